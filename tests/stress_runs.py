"""Runs that are killed, starved and cut off: what is left of them, and do they go on as if nothing had happened?

    python tests/stress_runs.py                 all parts, some 15 minutes on two cores
    python tests/stress_runs.py kill disk       only these

    kill    kill -9 at 30 random moments of a small run that saves at every step, then --resume
    disk    a disk that fills up in the middle of a checkpoint, a folder that can't be written, data that vanish, a
            worker that is killed: one error line each, then --resume
    soak    10,000 steps with two workers: memory, processes and open files

One line of figures a part; exit code 1 if one of them is not as it should be. The seed is fixed, the moments of the
kills depend on the machine's speed all the same. Linux only (/proc); a full disk is a small tmpfs where mounting one is
permitted, else a limit on the size of files.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clipbert
import data
import finetune

SMALL = ["--batch_size", 4, "--size", 32, "--test_clips", 1]


def job(script, arguments, log, before):
    """What a started process does: training, its output in a file."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    before()
    clipbert.main(script.run_training, script.parse_arguments([str(argument) for argument in arguments]))


def nothing():
    pass


def start(folder, out, *more, before=nothing, script=finetune):
    """Fine-tuning as a forked process (nothing is imported again); it writes what it says to <out>.txt."""
    small = SMALL if script is finetune else SMALL[:4]
    arguments = ["--data", folder, "--out", out, *small, *more]
    process = multiprocessing.get_context("fork").Process(target=job, args=(script, arguments, f"{out}.txt", before))
    process.start()
    return process


def finish(process):
    process.join()
    return process.exitcode


def errors(out):
    """The lines a run said after its progress: its error, or how it was stopped."""
    return [line for line in Path(f"{out}.txt").read_text().splitlines() if line.startswith(("error: ", "SIG"))]


def tensors(path):
    """Everything in a checkpoint that a run goes on from, flattened."""
    state = clipbert.load_checkpoint(path)
    random_states = {f"random{rank}": each["torch"] for rank, each in enumerate(state["random"])}
    moments = {f"{k}.{n}": v for k, s in state["optimizer"]["state"].items() for n, v in s.items()}
    return state["model"] | moments | random_states


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def logged(out):
    """The steps in log.jsonl; ValueError if a line is not whole."""
    path = Path(out) / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        raise ValueError(f"half a line at the end of {path}: {text[-80:]!r}")
    return [json.loads(line)["step"] for line in text.splitlines()]


def wait_for(out, step, process):
    """Until this step is logged (every tenth, or with a checkpoint)."""
    while process.is_alive() and step not in logged(out):
        time.sleep(0.005)


def resume(folder, out, *more):
    """Go on, with or without a checkpoint, as someone would who finds the folder."""
    found = any((Path(out) / name).exists() for name in ("last.pt", "previous.pt"))
    return finish(start(folder, out, *more, *(["--resume"] if found else [])))


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


# ----------------------------------------------------------------------------------------------------------------------
# kill


def kill(folder, work, trials=30):
    """One kill a trial, at a random moment of the run; then --resume until the end."""
    steps = ["--max_steps", 30, "--save_every", 1]
    began = time.time()
    assert finish(start(folder, work / "whole", *steps)) == 0, errors(work / "whole")
    seconds, expected, rng = time.time() - began, tensors(work / "whole" / "last.pt"), random.Random(0)
    moments, equal, half = {"before the first checkpoint": 0, "in a checkpoint": 0, "between": 0, "after": 0}, 0, 0
    for trial in range(trials):
        out = work / f"kill{trial}"
        process = start(folder, out, *steps)
        time.sleep(rng.uniform(0.1, 0.95) * seconds)
        process.kill()
        process.join()
        moments[moment(out)] += 1
        half += (out / "log.jsonl").exists() and (out / "log.jsonl").read_text()[-1:] not in ("", "\n")
        code = resume(folder, out, *steps)
        good = code == 0 and logged(out) == list(range(1, 31)) and same(tensors(out / "last.pt"), expected)
        equal += good
        if not good:
            print(f"kill: trial {trial} ended with exit code {code}: {errors(out)}")
    print(f"kill: {equal} of {trials} end with the weights, optimizer state and log of the undisturbed run; killed "
          + ", ".join(f"{n} {when}" for when, n in moments.items()) + f"; {half} logs with half a line")  # fmt: skip
    return equal == trials and not half and moments["in a checkpoint"] > 0


def moment(out):
    """When the kill came, as far as the files tell."""
    if list(out.glob("*.tmp")) or (out / "previous.pt").exists() and not (out / "last.pt").exists():
        return "in a checkpoint"
    if (out / "best.pt").exists():
        return "after"
    return "between" if (out / "last.pt").exists() else "before the first checkpoint"


# ----------------------------------------------------------------------------------------------------------------------
# disk


def disk(folder, work):
    steps = ["--max_steps", 30, "--save_every", 1]
    assert finish(start(folder, work / "whole", *steps)) == 0, errors(work / "whole")
    expected, good = tensors(work / "whole" / "last.pt"), True
    for name, trouble in [("full disk", full_disk), ("read-only from the start", read_only), ("read-only in training",
                          read_only_later), ("data vanish", vanish), ("worker killed", kill_worker)]:  # fmt: skip
        out = work / name.replace(" ", "_")
        how, code, more = trouble(folder, out, steps)
        lines, again = errors(out), resume(folder, out, *steps, *more)
        same_end = again == 0 and logged(out) == list(range(1, 31)) and same(tensors(out / "last.pt"), expected)
        fine = code == 2 and len(lines) == 1 and same_end
        said = lines[0].replace(str(work), "...") if lines else "nothing"
        print(f"disk: {name} ({how}): exit code {code}, {len(lines)} line ({said[:150]}), "
              f"resumed to the {'same' if same_end else 'WRONG'} end")  # fmt: skip
        good &= fine
        unmount(out)
    return good


def mount(out, *options):
    """A small file system of its own, where that is permitted."""
    out.mkdir(exist_ok=True)
    command = ["mount", *options, "-t", "tmpfs", "tmpfs", out]
    return not subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


def remount(out, options):
    """-> whether it went; not while a file there is open for writing."""
    command = ["mount", "-o", f"remount,{options}", out]
    return not subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


def unmount(out):
    if os.path.ismount(out):
        subprocess.run(["umount", out], check=True)


def full_disk(folder, out, steps):
    """Room for two checkpoints and a half."""
    if mount(out, "-o", "size=24m"):
        code = finish(start(folder, out, *steps))
        last = clipbert.load_checkpoint(out / "last.pt")["step"]
        assert remount(out, "size=100m")
        return f"tmpfs of 24 MB, last.pt whole at step {last}", code, []

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))

    return "files limited to 5 MB", finish(start(folder, out, *steps, before=small_files)), []


def read_only(folder, out, steps):
    """A path below a file, which binds for root, too."""
    out.write_text("")
    code = finish(start(folder, out, *steps))
    out.unlink()
    return "a file in its place", code, []


def read_only_later(folder, out, steps):
    mounted = mount(out)
    process = start(folder, out, *steps)
    wait_for(out, 5, process)
    if mounted:
        while process.is_alive() and not remount(out, "ro"):
            time.sleep(0.001)
        code = finish(process)
        assert remount(out, "rw")
        return "tmpfs remounted read-only", code, []
    out.rename(f"{out}.away")
    out.write_text("")
    code = finish(process)
    out.unlink()
    Path(f"{out}.away").rename(out)
    return "a file in its place", code, []


def vanish(folder, out, steps):
    process = start(folder, out, *steps, "--workers", 2)
    wait_for(out, 5, process)
    (folder / "gifs").rename(folder / "elsewhere")
    code = finish(process)
    (folder / "elsewhere").rename(folder / "gifs")
    return "the folder of videos renamed", code, ["--workers", 2]


def kill_worker(folder, out, steps):
    process = start(folder, out, *steps, "--workers", 2)
    wait_for(out, 5, process)
    os.kill(children(process)[0], signal.SIGKILL)
    return "kill -9 of one of two", finish(process), ["--workers", 2]


# ----------------------------------------------------------------------------------------------------------------------
# soak


def soak(folder, work, steps=10_000):
    """Memory is the proportional set size (pages that processes share count once) of the run and its workers. Batches
    on their way from a worker are a few open files."""
    out, samples = work / "soak", {}
    tiny = ["--batch_size", 1, "--text_length", 8, "--save_every", 500, "--max_steps", steps, "--workers", 2]
    process = start(folder, out, *tiny)
    while process.is_alive():
        time.sleep(2)
        with suppress(OSError, ValueError, IndexError):  # it ends in between; the log is being made
            step = logged(out)[-1]
            family = [process.pid, *children(process)]
            if step < steps and len(family) == 3:  # not the evaluation at the end
                samples[step] = (sum(map(memory, family)), sum(map(handles, family)), family)
    late = {step: sample for step, sample in samples.items() if step >= 500}
    sizes = [size for size, _, _ in late.values()]
    grown = max(sizes) / sizes[0] - 1
    counts = [count for _, count, _ in late.values()]
    before, after = (max(half) for half in (counts[: len(counts) // 2], counts[len(counts) // 2 :]))
    left = [pid for pid in samples[max(samples)][2] if Path(f"/proc/{pid}").exists()]
    code = finish(process)
    print(f"soak: {steps:,} steps, exit code {code}; memory {sizes[0] / 2**20:.0f} MB after 500 steps, then at most "
          f"{grown:+.1%}, at the end {sizes[-1] / sizes[0] - 1:+.1%} ({len(sizes)} samples); at most {before} "
          f"open files in the first half, {after} in the second; {len(left)} processes left behind")  # fmt: skip
    return code == 0 and grown < 0.05 and after <= before + 4 and not left and max(samples) > 0.9 * steps


def memory(pid):
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1])


def handles(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


# ----------------------------------------------------------------------------------------------------------------------

PARTS = {"kill": kill, "disk": disk, "soak": soak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    good = True
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "tgif_qa"
            data.write_toy_tgif_qa(folder, train=24, test=2)
            began = time.time()
            fine = PARTS[part](folder, Path(work))
            print(f"{part}: {'good' if fine else 'FAILED'}, {time.time() - began:.0f} s", flush=True)
            good &= fine
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
