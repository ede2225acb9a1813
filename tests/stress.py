"""Files that are damaged by the thousand, and runs that are killed, starved and cut off.

    python tests/stress.py media --videos DIR
    python tests/stress.py annotations kill disk soak               a quarter of an hour on two cores
    python tests/stress.py annotations kill --files 200 --runs 4    small versions: half a minute

    media        3,410 damaged copies of DIR's videos and images: frames or one clear error (10 to 25 minutes)
    annotations  2,000 damaged files, over all layouts: read exactly as they stand, or refused in one line that names
                 the place; never a wrong label (a minute)
    kill         kill -9 at 30 random moments, then --resume: the end of the undisturbed run (5 minutes)
    disk         a full disk, a lost folder, vanished data, a killed worker: one error line, then --resume (a minute)
    soak         10,000 steps with two workers: memory, open files, processes left behind (10 minutes)

A line of figures a command. Each failure is listed, with the name that brings the same damage back, and makes the exit
code 1. The moments of the kills depend on the machine's speed. Linux only (/proc).
"""

import argparse
import csv
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from conftest import FORK, errors, finish, logged, same_end, start, tensors, wait_for
from test_annotations import LAYOUTS, save
from tqdm import tqdm

import data

# ----------------------------------------------------------------------------------------------------------------------
# media, annotations: what is damaged is judged in a process of its own, where a crash is its alone, and the memory, too

SECONDS, MEGABYTES = 10, 512  # that one damaged file may take; the imports (400 MB) are not counted


def judged(names, write, judge):
    """-> (figures, failures) of what `judge` says of every file, damaged by write(name, folder) -> what to ask it."""
    found = {}
    for name in tqdm(names, disable=None):
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, FORK) as process:
            try:
                found[name] = process.submit(measured, judge, *write(name, Path(folder))).result()
            except BrokenProcessPool:
                found[name] = "the process ended", 0, 0
    verdicts, seconds, megabytes = zip(*found.values(), strict=True)
    read, clear = verdicts.count("read"), verdicts.count("error")
    figures = (f"{len(names):,} damaged files: {read:,} read, {clear:,} clear errors; at most "
               f"{max(seconds):.1f} s and {max(megabytes):.0f} MB more than the imports take")  # fmt: skip
    return figures, [
        f"{name}: {verdict}, {seconds:.1f} s, {megabytes:.0f} MB"
        for name, (verdict, seconds, megabytes) in found.items()
        if verdict not in ("read", "error") or seconds > SECONDS or megabytes > MEGABYTES
    ]


def measured(judge, *asked):
    """-> (verdict, seconds, the MB that this process or its ffmpegs, copies of it at first, had more than before)."""
    signal.alarm(10 * SECONDS)  # unhandled, it ends this process, whatever C code it is in
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - notes of what was left out
    imports, began = highest(), time.monotonic()
    return judge(*asked), time.monotonic() - began, highest() - imports


def highest():
    family = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return max(resource.getrusage(who).ru_maxrss for who in family) / 1024


def verdict_of(error, *paths):
    """Of what a reader raised: "error", one line that begins with one of its files, or what is wrong with it."""
    line = str(error)
    if not isinstance(error, data.DataError):
        return f"{type(error).__name__}: {line[:300]}"
    clear = line.startswith(tuple(f"{path}:" for path in paths)) and line.isprintable() and len(line) < 1000
    return "error" if clear else f"unclear: {line[:300]!r}"


# -------------------------------------------------- media
def damage(whole, rng, kind):
    """A file's bytes cut off at a random place ("cut"), or with 1 to 100 random bytes ("error"): half of the time in
    its first 1,000 bytes or its last 5%, where the headers are."""
    if kind == "cut":
        return whole[: rng.randrange(len(whole))] if whole else whole
    damaged, n = bytearray(whole), len(whole)
    start, end = rng.choice([(0, n)] * 2 + [(0, 1000), (n * 19 // 20, n)])
    for _ in range(rng.choice([1, 3, 10, 30, 100]) if whole else 0):
        damaged[rng.randrange(start, max(min(end, n), start + 1))] = rng.randrange(256)
    return bytes(damaged)


def judge_media(path):
    """-> "read", "error", or what is wrong with what `read_clips` does with this file."""
    try:
        clips = data.read_clips(path, 2, 2, 2.0, 64, False)
    except Exception as error:  # noqa: BLE001 - that is what we are looking for
        return verdict_of(error, path)
    right = clips.shape == (2, 2, 3, 64, 64) and clips.dtype == torch.uint8
    return "read" if right else f"shape {tuple(clips.shape)} {clips.dtype}"


def media(folder, count):
    """-> (figures, failures): of each file a tenth of the damaged copies are cut, the others changed."""
    files = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".json"]
    each = max(1, count // len(files))
    names = [f"{file} {'cut' if i < each / 11 else 'error'} {i}" for file in files for i in range(each)]

    def write(name, place):
        file, kind, _ = name.rsplit(" ", 2)
        (place / file).write_bytes(damage((folder / file).read_bytes(), random.Random(name), kind))
        return [place / file]

    return judged(names, write, judge_media)


# -------------------------------------------------- annotations: small files in every layout
#
# Each reader is judged by a second, naive reading of the same damaged bytes. It shares no code with data.py (but the
# official spelling of VQA answers) and checks nothing: whatever data.py accepts must be, in order and in full, what
# stands there. A label that damage turned into another valid one ("3" into "2") can't be told; one that is guessed,
# shifted or coerced can. Keys that stand twice in a JSON object are taken as Python's json takes them, by both.


def words(text):
    return " ".join(str(text).split())


def first(row, *names):
    return next(row[name] for name in names if row.get(name) is not None)


def parsed(path):
    """What a JSON file says; the rows of a jsonl, or of a table split at every TAB or comma."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return list(map(json.loads, re.split("\r?\n", text.rstrip())))
    lines = re.split("\r\n|\n|\r", text.rstrip("\r\n"))
    cells = [line.split("\t") for line in lines] if "\t" in lines[0] else list(csv.reader(lines))
    return [dict(zip(map(str.strip, cells[0]), row, strict=True)) for row in cells[1:]]


def joined(rows, key, others, own):
    """Each row with what the list beside it says: that row whose `own` is the row's `key`."""
    found = {words(row[own]): row for row in others}
    return [{**found[words(row[key])], **row} for row in rows]


def rows_of(task, paths):
    """A row for each question or caption, with all that is said of its video or image."""
    (*before, said), name = map(parsed, paths), paths[-1].name
    if name.startswith("v2_"):
        return joined(before[0]["questions"], "question_id", said["annotations"], "question_id")
    if "captions" in name:
        return joined(said["annotations"], "image_id", said["images"], "id")
    if name == "region_descriptions.json":
        regions = [{**image, **region} for image in said for region in image["regions"]]
        return [{**row, "vg_id": first(row, "image_id", "id")} for row in regions]
    if name == "val_1.json":
        return [{"video_id": video, "caption": text} for video, row in said.items() for text in row["sentences"]]
    if name == "MSRVTT_data.json":
        rows = joined(said["sentences"], "video_id", said["videos"], "video_id")
        if task == "pretrain":
            return [row for row in rows if row.get("split", "train") == "train"]
        listed = {words(row["video_id"]) for row in before[0]}
        return [row for row in rows if words(row["video_id"]) in listed]
    return said


def video(row):
    """In some columns a bare number stands for a name, in every layout for the same one."""
    names = "path", "gif_name", "clip_name", "video", "image", "file_name", "video_id", "vg_id", "image_id", "coco_id"
    column = next(name for name in names if row.get(name) is not None)
    said = words(row[column])
    named = {"video_id": f"video{said}", "vg_id": f"{said}.jpg", "image_id": said.zfill(12), "coco_id": said.zfill(12)}
    return named.get(column, said) if said.isdigit() else said


def answer(task, row):
    """None of a caption; of VQA scores, counted from ten people's answers or, in a jsonl, given."""
    if task == "pretrain" or task.endswith("retrieval"):
        return None
    if task == "vqa" and "labels" in row:
        return {words(answer): score for answer, score in row["labels"].items()}
    if task == "vqa":
        counts = Counter(data.normalize_answer(words(one["answer"])) for one in row.get("answers", ()))
        return {answer: min(1.0, n / 3) for answer, n in counts.items() if answer}
    said = row["answer"]
    if task in ("tgif_qa_frameqa", "msrvtt_qa"):
        return words(said)
    return int(said) if isinstance(said, str) and set(said) <= set(" 0123456789") else said


def naive_reading(task, paths):
    """What must be right about each example: (video, text, options, answer)."""
    found, paragraphs = [], {}
    for row in rows_of(task, paths):
        said = "" if task == "msrvtt_mc" else first(row, "question", "caption", "sentence", "description", "phrase")
        options = [row[f"a{k}"] for k in range(1, 6)] if "a1" in row else row.get("options", ())
        for text in said if isinstance(said, list) else [said]:
            found.append((video(row), words(text), tuple(map(words, options)), answer(task, row)))
            paragraphs.setdefault(video(row), []).append(text)
    if task in ("didemo_retrieval", "activitynet_retrieval"):
        found = [(name, words(" ".join(texts)), (), None) for name, texts in paragraphs.items()]
    return [facts for facts in found if facts[1] or facts[2]]  # no blank captions


# What takes the place of a value: of the wrong type or size; and of some bytes.
WRONG = [None, True, False, 3.7, -1, 5, 10**30, "", " ", "3", "1_0", "\u0663", "\0", "\ud800", [], {}, "../x",
         {"a": "b"}, float("nan"), float("inf"), ["a"] * 5, [1, 2, 3, 4, 5], "x" * 30_000, "9" * 6000,
         '"' + "\n" * 1_000_000, "[" * 100_000, "\t" * 50_000]  # fmt: skip
JUNK = [b"", b"\0", b"\t", b"\n", b"\r", b'"', b",", b"]", b"}", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"[", b"9", b"null",
        b"true", b"\xe2\x80\xa8", b"\x1c", b"\x85", b"1e400", b"\\u0000", b'"a":1,', b'{"a":' * 100_000]  # fmt: skip
CODECS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"]


def damage_annotation(name, content, rng):
    """Mostly its structure; sometimes single bytes; now and then it is saved in another encoding."""
    how = rng.choices(["structure", "bytes", "encoding"], [6, 3, 1])[0]
    if how == "structure" and name.endswith(("csv", "tsv")):
        return damage_table(content, rng)
    if how == "structure":
        rows = content.splitlines()  # a .json is a single line
        i = rng.randrange(len(rows))
        rows[i] = json.dumps(damage_value(json.loads(rows[i]), rng), ensure_ascii=rng.random() < 0.5)
        return "\n".join(rows).encode("utf-8", "surrogatepass")
    if how == "encoding":
        return content.replace("cat", "cät").encode(rng.choice(CODECS), "replace")
    whole = content.encode()
    for _ in range(rng.choice([1, 1, 3])):
        a, b = sorted(rng.choices(range(len(whole) + 1), k=2))
        junk = rng.choice([*JUNK, whole[a:b] * 2, bytes([rng.randrange(256)])])
        whole = whole[:a] + junk + whole[rng.choice([a, a + 1, b]) :]
    return whole


def damage_table(content, rng):
    """A column dropped, doubled, swapped or filled with nonsense: in all rows, the header, or one."""
    separator = "\t" if "\t" in content.partition("\n")[0] else ","
    cells = [line.split(separator) for line in content.strip("\n").splitlines()]
    a, b = rng.choices(range(len(cells[0])), k=2)
    how = rng.choice(["drop", "double", "swap", "set", "set"])
    value = str(rng.choice([*WRONG, *cells[0]])).replace("\ud800", "")
    for row in rng.choice([cells, cells[:1], [rng.choice(cells[1:])]]):
        if how == "swap":
            row[a], row[b] = row[b], row[a]
        else:
            row[a : a + 1] = {"drop": [], "double": [row[a]] * 2, "set": [value]}[how]
    if rng.random() < 0.2:
        rng.shuffle(cells)
    return rng.choice(["\r\n", "\n", "\r"]).join(separator.join(row) for row in cells).encode()


def damage_value(value, rng):
    """Something in a JSON value dropped, swapped, renamed, doubled, nested or replaced by nonsense."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    if not keys or rng.random() < 0.15:
        return rng.choice([*WRONG, [value], {"value": value}, str(value), [value, value]])
    (key, other), how = rng.choices(keys, k=2), rng.random()
    if how < 0.15:
        del value[key]
    elif how < 0.3:
        value[key], value[other] = value[other], value[key]
    elif how < 0.4 and isinstance(value, dict):
        value[rng.choice(["Answer", "x" * 300, other])] = value.pop(key)
    elif how < 0.45 and isinstance(value, list):
        value.insert(key, value[other])
    else:
        value[key] = damage_value(value[key], rng)
    return value


def judge_annotation(layout, folder, read=data.read_examples):
    """-> "read", "error", or what is wrong with how the reader takes a layout's files in a folder."""
    task, split, files, _ = LAYOUTS[layout]
    paths = [folder / file for file in files]
    try:
        found = [(e.video, e.text, e.options, e.answer) for e in read(task, folder, split)]
    except Exception as error:  # noqa: BLE001 - that is what we are looking for
        return verdict_of(error, *paths)
    try:
        expected = naive_reading(task, paths)
    except Exception as error:  # noqa: BLE001 - what the reader could read, a naive one must, too
        return f"accepted what can't be read simply ({type(error).__name__}: {str(error)[:200]})"
    if found == expected and [type(x[3]) for x in found] == [type(x[3]) for x in expected]:
        return "read"
    odd = [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
    return f"not what stands there: {str(odd or (found, expected))[:400]}"


def annotations(count):
    """-> (figures, failures) over `count` damaged annotation files, the layouts in turn."""
    names = [f"{list(LAYOUTS)[i % len(LAYOUTS)]} {i}" for i in range(count)]

    def write(name, folder):
        layout, rng = name.split()[0], random.Random(name)
        victim = rng.choice([save(folder, *file) for file in LAYOUTS[layout][2].items()])
        victim.write_bytes(damage_annotation(victim.name, victim.read_bytes().decode(), rng))
        return layout, folder

    return judged(names, write, judge_annotation)


# ----------------------------------------------------------------------------------------------------------------------
# kill, disk, soak: small runs of fine-tuning, and what is left of them

STEPS = ["--max_steps", 30, "--save_every", 1]


@contextmanager
def undisturbed():
    """-> toy data, a folder to work in, the folder of a whole run, how many seconds that took."""
    with tempfile.TemporaryDirectory() as work:
        folder, out, began = Path(work) / "videos", Path(work) / "whole", time.time()
        data.write_toy_videos(folder, train=24, test=6)
        code = finish(start(folder, out, *STEPS))
        assert code == 0, errors(out)
        yield folder, Path(work), out, time.time() - began


def kill(runs):
    """One kill a run, at a random moment; then --resume until the end."""
    inside, failures, rng = 0, [], random.Random(0)
    with undisturbed() as (folder, work, whole, seconds):
        for i in tqdm(range(runs), disable=None):
            out = work / f"kill{i}"
            process = start(folder, out, *STEPS)
            time.sleep(rng.uniform(0.1, 0.95) * seconds)
            process.kill()
            process.join()
            logged(out)  # raises where a kill has cut a line in half
            inside += bool(list(out.glob("*.tmp"))) or not (out / "last.pt").exists() and (out / "previous.pt").exists()
            found = any((out / name).exists() for name in ("last.pt", "previous.pt"))
            code = finish(start(folder, out, *STEPS, "--resume" if found else "--overwrite"))
            if code or not same_end(out, whole):
                failures.append(f"run {i} ended otherwise, with exit code {code}: {errors(out)}")
    equal = f"{runs - len(failures)} of {runs} runs end with the weights, optimizer and log of the undisturbed one"
    if runs >= 30 and not inside:
        failures.append("no kill came in a checkpoint, so nothing is known about that")
    return f"{equal}; {inside} were killed in a checkpoint", failures


TROUBLES = {  # and what the run says of it
    "a full disk": "last.pt: not written (File too large): see to that, then --resume",
    "a lost folder": "last.pt: not written",
    "vanished data": "error: 20 unreadable videos in a row",
    "a killed worker": "worker was killed",
}


def disk():
    """Each trouble comes after step 5, must end the run in one line, and is over when the run is resumed."""
    said, failures = [], []
    with undisturbed() as (folder, work, whole, _):
        for kind, words in TROUBLES.items():
            out, more = work / kind, [*STEPS, "--workers", 2]
            process = start(folder, out, *more)
            wait_for(out, 5, process)
            with trouble(kind, folder, out, process):
                code = finish(process)
            lines, left = errors(out), list(out.glob("*.tmp"))
            said += [line.replace(str(work), "...") for line in lines]
            if (out / "last.pt").exists():  # a worker's death may come between the two renames: there is previous.pt
                tensors(out)  # raises if the checkpoint of before is not whole
            again = finish(start(folder, out, *more, "--resume"))
            if (code, again, left, len(lines)) != (2, 0, [], 1) or words not in lines[0] or not same_end(out, whole):
                failures.append(f"{kind}: exit code {code}, resumed {again}: {errors(out)}")
    return "\n  ".join(["every run said one line and was resumed to the same end", *said]), failures


@contextmanager
def trouble(kind, folder, out, process):
    """It comes all at once, while the run stands still."""
    lost = {"a lost folder": out, "vanished data": folder / "gifs"}.get(kind)
    os.kill(process.pid, signal.SIGSTOP)
    if kind == "a full disk":  # no file may grow beyond 5 MB any more: a checkpoint breaks off in its middle
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
    elif kind == "a killed worker":
        os.kill(children(process)[0], signal.SIGKILL)
    else:  # a file takes the place of the folder: nobody can write below that, root neither
        lost.rename(folder / "elsewhere")
        lost.write_text("")
    os.kill(process.pid, signal.SIGCONT)
    yield
    if lost:
        lost.unlink()
        (folder / "elsewhere").rename(lost)


def children(process):
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def soak(steps):
    """Samples, 2 s apart in a long run, after a twentieth of the steps. Batches on their way are a few open files."""
    samples, tiny = [], ["--batch_size", 1, "--text_length", 8, "--workers", 2, "--max_steps", steps]
    with undisturbed() as (folder, work, *_):
        process = start(folder, work / "soak", *tiny, "--save_every", max(1, steps // 20))
        while process.is_alive():
            time.sleep(min(2, steps / 1000))
            with suppress(OSError, ValueError, IndexError):  # it ends in between; the log is being made
                step, family = logged(work / "soak")[-1], [process.pid, *children(process)]
                # the proportional set size, in kB, counts once what processes share
                maps = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in family]
                size = sum(int(re.search(r"\nPss: *(\d+)", text)[1]) for text in maps)
                files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
                if steps / 20 <= step < steps and len(family) == 3:  # not the evaluation at the end
                    samples.append((size, files, family))
        code = finish(process)
    sizes, counts, families = zip(*samples, strict=True)
    half, left = len(counts) // 2, [pid for pid in families[-1] if Path(f"/proc/{pid}").exists()]
    grown, before, after = max(sizes) / sizes[0] - 1, max(counts[:half]), max(counts[half:])
    steady = grown < 0.05 or steps < 1000  # at first memory grows in any run
    figures = (f"{steps:,} steps, exit code {code}; {sizes[0] / 1024:.0f} MB, then {grown:+.1%} at most ({len(sizes)} "
               f"samples); {before}, then {after} open files at most; {len(left)} processes left behind")  # fmt: skip
    return figures, [] if code == 0 and steady and after <= before + 4 and not left else ["not as it should be"]


# ----------------------------------------------------------------------------------------------------------------------


def main():
    commands = {
        "media": lambda: media(args.videos, args.files or 3410),
        "annotations": lambda: annotations(args.files or 2000),
        "kill": lambda: kill(args.runs),
        "disk": disk,
        "soak": lambda: soak(args.steps),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=commands, metavar="COMMAND", help=", ".join(commands))
    parser.add_argument("--videos", type=Path, metavar="DIR", help="media: a folder of videos and images")
    parser.add_argument("--files", type=int, metavar="N", help="media, annotations: how many damaged files")
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="kill: how many runs")
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="soak: how many steps")
    args = parser.parse_args()
    if "media" in args.commands and not args.videos:
        parser.error("media needs --videos DIR")
    torch.set_num_threads(1)
    failed = False
    for command in args.commands:
        began = time.time()
        figures, failures = commands[command]()
        print(f"{command}: {figures} ({time.time() - began:.0f} s)", *failures, sep="\n  FAILED: ", flush=True)
        failed = failed or bool(failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
