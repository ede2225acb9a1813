"""Training runs as processes of their own, for the tests that kill them and for tests/stress.py."""

import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clipbert
import data
import finetune

FORK = multiprocessing.get_context("fork")  # processes that need not import everything again


def flags(script, *arguments):
    """What a command line gives, as the script reads it."""
    arguments = [str(argument) for argument in arguments]
    if script is finetune:
        return finetune.parse_arguments(arguments)
    return clipbert.parse_flags(data.Parser(), script.Settings, arguments)


def small(script, folder, out, *more):
    """The arguments of a small run; folder or out None: without --data or --out."""
    where = [*(["--data", folder] if folder else []), *(["--out", out] if out else [])]
    clips = ["--test_clips", 1] if script is finetune else []
    return [*where, "--batch_size", 4, "--size", 32, "--workers", 0, *clips, *more]


def start(folder, out, *more, before=lambda: None, script=finetune):
    """Training as a forked process, which writes what it says to <out>.txt."""

    def job():
        sys.stdout = sys.stderr = open(f"{out}.txt", "a", buffering=1)  # noqa: SIM115
        before()
        clipbert.main(script.run_training, flags(script, *small(script, folder, out, *more)))

    process = FORK.Process(target=job)
    process.start()
    return process


def finish(process):
    """Its exit code."""
    process.join()
    return process.exitcode


def resume(folder, out, *more):
    """Go on, with or without a checkpoint, as someone would who finds the folder. -> the exit code."""
    found = any((Path(out) / name).exists() for name in ("last.pt", "previous.pt"))
    return finish(start(folder, out, *more, "--resume" if found else "--overwrite"))


def errors(out):
    """The lines a run said after its progress: its error, or how it was stopped."""
    lines = Path(f"{out}.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("error: ", "SIG"))]


def tensors(out):
    """The weights, optimizer, random states and best score that a run ended with, by name."""
    state = clipbert.load_checkpoint(out / "last.pt")
    random_states = {f"random{rank}": each["torch"] for rank, each in enumerate(state["random"])}
    moments = {f"{k}.{n}": v for k, s in state["optimizer"]["state"].items() for n, v in s.items()}
    return state["model"] | moments | random_states | {"best": torch.tensor(state["best"])}


def same_end(one, other):
    """Whether two runs ended with the same tensors, to the bit, and the very same log."""
    ours, twins = tensors(one), tensors(other)
    logs = [(out / "log.jsonl").read_text() for out in (one, other)]
    return logs[0] == logs[1] and all(torch.equal(ours[name], twins[name]) for name in ours | twins)


def logged(out):
    """The steps in log.jsonl; ValueError if a line is not whole."""
    path = Path(out) / "log.jsonl"
    *rows, rest = path.read_text().split("\n") if path.exists() else [""]
    if rest:
        raise ValueError(f"{path} ends in half a line: {rest!r}")
    return [json.loads(row)["step"] for row in rows]


def wait_for(out, step, process):
    """Until this step is logged (every tenth, or with a checkpoint)."""
    while process.is_alive() and step not in logged(out):
        time.sleep(0.005)
