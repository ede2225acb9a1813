"""Files that are damaged by the thousand, and runs that are killed, starved and cut off.

    python tests/stress.py media --videos DIR                   every file of DIR, 3,410 damaged copies in all
    python tests/stress.py annotations kill disk soak           a quarter of an hour on two cores
    python tests/stress.py annotations kill --files 200 --runs 4        small versions: half a minute

    media        videos and images, cut off or with byte errors: frames or one clear error, each within 10 seconds
                 and half a GB (10 to 25 minutes; --files N: about so many)
    annotations  2,000 damaged annotation files, over all layouts: read exactly as they stand, or refused in one line
                 that names the place; never a wrong label (20 seconds; --files N)
    kill         kill -9 at 30 random moments of a small run that saves at every step, then --resume: the weights,
                 optimizer and log of the undisturbed run (5 minutes; --runs N)
    disk         a full disk, a folder that can't be written, data that vanish, a killed worker: one error line, then
                 --resume to the end of the undisturbed run (half a minute)
    soak         10,000 steps with two workers: memory, open files, processes left behind (10 minutes; --steps N)

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
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import FORK, errors, finish, logged, resume, same, start, tensors, wait_for

import data

# ----------------------------------------------------------------------------------------------------------------------
# media: every damaged file in a process of its own, where a crash is its alone, and the memory, too

SECONDS, BYTES = 10, 2**29  # that one damaged file may take; the imports (400 MB) are not counted


def damage(whole, rng, kind):
    """A file's bytes cut off at a random place ("cut"), or with 1 to 100 random bytes ("error"): half of the time in its
    first 1,000 bytes or its last 5%, where the headers are."""
    if kind == "cut":
        return whole[: rng.randrange(len(whole))] if whole else whole
    damaged, n = bytearray(whole), len(whole)
    start, end = rng.choice([(0, n)] * 2 + [(0, 1000), (n * 19 // 20, n)])
    for _ in range(rng.choice([1, 3, 10, 30, 100]) if whole else 0):
        damaged[rng.randrange(start, max(min(end, n), start + 1))] = rng.randrange(256)
    return bytes(damaged)


def clear(error, places):
    """Is it one line that begins with one of these places (a pattern)?"""
    line = str(error)
    return re.match(places, line) and line.isprintable() and len(line) < 1000


def judge_media(path):
    """-> "frames", "error", or what is wrong with what `read_clips` does with this file."""
    try:
        clips = data.read_clips(path, 2, 2, 2.0, 64, False)
    except data.DataError as error:
        return "error" if clear(error, re.escape(f"{path}:")) else f"unclear: {error}"
    except Exception as error:  # noqa: BLE001 - that is what we are looking for
        return f"{type(error).__name__}: {error}"
    right = clips.shape == (2, 2, 3, 64, 64) and clips.dtype == torch.uint8
    return "frames" if right else f"shape {tuple(clips.shape)} {clips.dtype}"


def read_damaged(path, sender):
    """Sends the verdict, the seconds, and the bytes that this process or its ffmpegs, copies of it at first, took more."""

    def highest():
        family = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        return 1024 * max(resource.getrusage(who).ru_maxrss for who in family)

    signal.alarm(10 * SECONDS)  # unhandled, it ends this process, whatever C code it is in
    imports, began = highest(), time.monotonic()
    verdict = judge_media(path)
    sender.send((verdict, time.monotonic() - began, highest() - imports))


def media(folder, count=3410):
    """-> (figures, failures): of each file a tenth of the damaged copies are cut, the others changed."""
    sources = sorted(p for p in Path(folder).iterdir() if p.is_file() and p.suffix != ".json")
    each, counts, failures, slowest, most = max(1, count // len(sources)), Counter(), [], (0, ""), 0
    names = [(source, "cut" if i < each / 11 else "error", i) for source in sources for i in range(each)]
    for source, kind, i in tqdm(names, disable=None):
        name = f"{source.name} {kind} {i}"
        receiver, sender = FORK.Pipe(duplex=False)
        with tempfile.NamedTemporaryFile(suffix=source.suffix) as file:
            Path(file.name).write_bytes(damage(source.read_bytes(), random.Random(name), kind))
            process = FORK.Process(target=read_damaged, args=(file.name, sender))
            process.start()
            sender.close()
            verdict, seconds, memory = "the process ended", 0, 0
            with suppress(EOFError):
                verdict, seconds, memory = receiver.recv()
            process.join()
        counts[verdict] += 1
        slowest, most = max(slowest, (seconds, name)), max(most, memory)
        if verdict not in ("frames", "error") or seconds > SECONDS or memory > BYTES:
            failures.append(f"{name}: {verdict}, {seconds:.1f} s, {memory / 2**20:.0f} MB")
    return (f"{len(names):,} damaged files of {len(sources)}: {counts['frames']:,} read, {counts['error']:,} "
            f"clear errors; slowest {slowest[0]:.1f} s ({slowest[1]}), at most {most / 2**20:.0f} MB more "
            "than the imports take"), failures  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# annotations: small files in every layout
#
# Each reader is judged by a second, naive reading of the same damaged bytes, an oracle. The oracles share no code with
# data.py (but the official spelling of VQA answers) and check nothing: whatever data.py accepts must be, in order and in
# full, what stands there. A label that damage turned into another valid one ("3" into "2") can't be told; one that is
# guessed, shifted or coerced can.


def facts(example):
    """What must be right about an example, as the oracles say it: (video, text, options, answer)."""
    return example.video, example.text, example.options, example.answer


def rows_of(path):
    """What a JSON file says; the rows of a jsonl, or of a table split at every TAB or comma."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return list(map(json.loads, re.split("\r?\n", text.rstrip())))
    lines = re.split("\r\n|\n|\r", text.rstrip("\r\n"))
    cells = [line.split("\t") for line in lines] if "\t" in lines[0] else list(csv.reader(lines))
    return [dict(zip(map(str.strip, cells[0]), row, strict=True)) for row in cells[1:]]


def words(text):
    return " ".join(str(text).split())


def number(value):
    return int(value) if isinstance(value, str) and set(value) <= set(" 0123456789") else value


def first(row, *names):
    return next(row[name] for name in names if row.get(name) is not None)


def asked(path, answer=words):
    for row in rows_of(path):
        options = [row[f"a{k}"] for k in range(1, 6)] if "a1" in row else row.get("options", ())
        video = words(first(row, "gif_name", "clip_name", "video_id"))
        video = f"video{video}" if "video_id" in row and video.isdigit() else video  # MSRVTT-QA
        question = words(row["question"]) if "question" in row else ""  # MSRVTT-MC has none
        yield video, question, tuple(map(words, options)), answer(row["answer"])


def photo(name):
    return words(name).zfill(12) if words(name).isdigit() else words(name)


def vqa(path, annotations=None):
    """Soft scores: counted from ten people's answers or, in a jsonl, given."""
    people = {words(row["question_id"]): row["answers"] for row in rows_of(annotations)["annotations"]
              } if annotations else {}  # fmt: skip
    for row in rows_of(path)["questions"] if annotations else rows_of(path):
        said = [words(answer["answer"]) for answer in people.get(words(row.get("question_id")), [])]
        counts = Counter(data.normalize_answer(answer) for answer in said)
        scores = {answer: min(1.0, n / 3) for answer, n in counts.items() if answer}
        scores = scores if annotations else {words(answer): x for answer, x in row["labels"].items()}
        yield photo(row["image_id"]), words(row["question"]), (), scores


def captions(pairs):
    return [(words(video), words(text or ""), (), None) for video, text in pairs]


def paragraphs(pairs):
    said = {}
    for video, text in pairs:
        said.setdefault(words(video), []).append(text or "")
    return captions((video, " ".join(texts)) for video, texts in said.items())


def pairs_of(video, text):
    """An oracle for rows with a column for each of the two."""
    return lambda path: captions((row[video], row.get(text)) for row in rows_of(path))


def listed(listing, path):
    videos = {words(row["video_id"]) for row in rows_of(listing)}
    rows = [row for row in rows_of(path)["sentences"] if words(row["video_id"]) in videos]
    return captions((row["video_id"], row.get("caption")) for row in rows)


def coco(path):
    images = {words(row["id"]): row for row in rows_of(path)["images"]}
    rows = rows_of(path)["annotations"]
    return captions((images[words(row["image_id"])]["file_name"], row.get("caption")) for row in rows)


def visual_genome(path):
    rows = [{**image, **row} for image in rows_of(path) for row in image["regions"]]
    return captions((f"{words(first(row, 'image_id', 'id'))}.jpg", row.get("phrase")) for row in rows)


def own(path):
    for row in rows_of(path):
        video = first(row, "path", "video", "image", "clip_name", "video_id", "coco_id", "vg_id")
        if "coco_id" in row or "vg_id" in row:
            video = photo(video) if "coco_id" in row else words(video).removesuffix(".jpg") + ".jpg"
        texts = row.get("caption") if isinstance(row.get("caption"), list) else [row.get("caption")]
        yield from captions((video, text) for text in texts)


def table(rows, separator="\t", end="\r\n"):
    rows = list(rows)
    lines = [list(rows[0]), *(row.values() for row in rows)]
    return end.join(separator.join(map(str, line)) for line in lines) + end


def jsonl(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


ASK = list(enumerate(['what "cat does it 2 times ?', "how many, are there ?", '"wer läuft ?', "what ?"]))
ACTS = ["jump", "spin", "wave hand", "nod", "hop", "sit", "run", "fly"]
TEN = [{"answer": answer} for answer in ["yes", "no", "Two.", "a dog", "yes"] * 2]
MSRVTT = {"videos": [{"video_id": f"v{i}", "split": "train"} for i, _ in ASK],
          "sentences": [{"sen_id": k + i, "video_id": f"v{i}", "caption": q} for k in (0, 4) for i, q in ASK]}
COCO = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i, _ in ASK],
        "annotations": [{"id": 7 + i, "image_id": i // 2, "caption": q} for i, q in ASK]}  # fmt: skip
REGIONS = [{"id": i, "regions": [{"region_id": 2 * i + k, "image_id": i, "phrase": ACTS[i + k]}
                                 for k in (0, 1)]} for i, _ in ASK]  # fmt: skip
QUESTIONS = {"questions": [{"question_id": 9 + i, "image_id": 5, "question": q} for i, q in ASK]}
ANSWERS = {"annotations": [{"question_id": 9 + i, "image_id": 5, "answers": TEN} for i, _ in ASK]}

# name: (task, split, oracle, {file: its content}); the oracle takes the files in this order
LAYOUTS = {
    "tgif_qa_action": ("tgif_qa_action", "train", partial(asked, answer=number), {
        "Train_action_question.csv": table({"gif_name": f"t{i}", "question": q, "a1": ACTS[i], "a2": "nod",
            "a3": ACTS[i + 1], "a4": ACTS[i + 2], "a5": "hop", "answer": i, "vid_id": i} for i, q in ASK)}),
    "tgif_qa_count": ("tgif_qa_count", "test", partial(asked, answer=number), {
        "Test_count_question.csv": table(
            {"gif_name": f"t{i}", "question": q, "answer": 2 + 3 * i, "key": i} for i, q in ASK)}),
    "tgif_qa_frameqa": ("tgif_qa_frameqa", "test", asked, {
        "Test_frameqa_question.csv": table(
            {"gif_name": f"t{i}", "question": q, "answer": ACTS[i], "type": i} for i, q in ASK)}),
    "tgif_qa_transition.jsonl": ("tgif_qa_transition", "train", partial(asked, answer=number), {
        "transition_train.jsonl": jsonl({"gif_name": f"t{i}", "question": q, "options": ACTS[i : i + 5],
                                         "answer": i} for i, q in ASK)}),
    "msrvtt_qa": ("msrvtt_qa", "val", asked, {"val_qa.json": json.dumps(
        [{"id": i, "video_id": 6513 + i, "question": q, "answer": ACTS[i]} for i, q in ASK])}),
    "msrvtt_mc": ("msrvtt_mc", "test", partial(asked, answer=number), {"msrvtt_mc_test.jsonl": jsonl(
        {"clip_name": f"v{i}", "options": ACTS[i : i + 5], "answer": i} for i, q in ASK)}),
    "vqa": ("vqa", "train", vqa, {
        "v2_OpenEnded_mscoco_train2014_questions.json": json.dumps(QUESTIONS),
        "v2_mscoco_train2014_annotations.json": json.dumps(ANSWERS)}),
    "vqa.jsonl": ("vqa", "train", vqa, {"vqa_train.jsonl": jsonl(
        {**row, "labels": {"yes": 1, "no": 0.3}} for row in QUESTIONS["questions"])}),
    "msrvtt_retrieval": ("msrvtt_retrieval", "train", listed, {
        "MSRVTT_train.9k.csv": "video_id\r\nv0\r\nv2\r\nv3\r\n", "MSRVTT_data.json": json.dumps(MSRVTT)}),
    "msrvtt_1ka_test": ("msrvtt_retrieval", "test", pairs_of("video_id", "sentence"), {
        "MSRVTT_JSFUSION_test.csv": table(
            ({"key": i, "video_id": f"v{i}", "sentence": f'"a cat, {i}"'} for i, _ in ASK), ",", "\n")}),
    "retrieval.jsonl": ("msrvtt_retrieval", "train", pairs_of("clip_name", "caption"), {
        "train.jsonl": jsonl({"clip_name": f"v{i}", "caption": q} for i, q in ASK)}),
    "didemo": ("didemo_retrieval", "val",
        lambda path: paragraphs((row["video"], row.get("description")) for row in rows_of(path)),
        {"val_data.json": json.dumps(
            [{"annotation_id": i, "video": f"{i % 3}.mov", "description": q} for i, q in ASK])}),
    "activitynet": ("activitynet_retrieval", "test",
        lambda path: paragraphs((name, said) for name, row in rows_of(path).items() for said in row["sentences"]),
        {"val_1.json": json.dumps({f"v_{i}": {"duration": 3.5, "sentences": [q, " So."]} for i, q in ASK})}),
    "activitynet.csv": ("activitynet_retrieval", "val",
        lambda path: paragraphs((row["video_id"], row["caption"]) for row in rows_of(path)),
        {"val_1.csv": table(({"video_id": i % 3, "caption": ACTS[i]} for i, _ in ASK), ",", "\n")}),
    "coco_captions": ("pretrain", "train", coco, {"captions_train2017.json": json.dumps(COCO)}),
    "visual_genome": ("pretrain", "train", visual_genome, {"region_descriptions.json": json.dumps(REGIONS)}),
    "own.csv": ("pretrain", "train", own, {
        "mine.csv": table(({"path": f"{i}.mp4", "caption": f"a {ACTS[i]}"} for i, _ in ASK), ",")}),
    "own.jsonl": ("pretrain", "train", own, {"mine_train.jsonl": jsonl(
        [*({"coco_id": i, "caption": q} for i, q in ASK), {"vg_id": 5, "caption": ["x", "y"]}])}),
}  # fmt: skip

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
    if how == "structure":
        return (damage_table if name.endswith(".csv") else damage_json)(content, rng)
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
    cells = [line.split(separator) for line in content.splitlines()]
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


def damage_json(content, rng):
    rows = content.splitlines()  # a .json is a single line
    i = rng.randrange(len(rows))
    rows[i] = json.dumps(damage_value(json.loads(rows[i]), rng), ensure_ascii=rng.random() < 0.5)
    return "\n".join(rows).encode("utf-8", "surrogatepass")


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


def judge_annotation(folder, layout, read=None):
    """-> "examples", "error", or what is wrong with how a layout's files in a folder are read."""
    task, split, oracle, files = LAYOUTS[layout]
    paths = [Path(folder) / file for file in files]
    try:
        with redirect_stderr(StringIO()):  # notes of what was left out
            found = list(map(facts, (read or data.LAYOUTS[task].read)(folder, split=split)))
    except data.DataError as error:
        places = "|".join(re.escape(f"{path}:") for path in paths) + f"|{re.escape(f'{folder}: no examples')}"
        return "error" if clear(error, places) else f"unclear: {str(error)[:300]!r}"
    except Exception as error:  # noqa: BLE001 - that is what we are looking for
        return f"{type(error).__name__}: {str(error)[:300]}"
    try:
        expected = [given for given in oracle(*paths) if given[1] or given[2]]  # no blank captions
    except Exception as error:  # noqa: BLE001 - what the reader could read, the oracle must, too
        return f"accepted what can't be read simply ({type(error).__name__}: {str(error)[:200]})"
    if found == expected and [type(x[3]) for x in found] == [type(x[3]) for x in expected]:
        return "examples"
    odd = [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
    return f"not what stands there: {str(odd or (found, expected))[:400]}"


def annotations(count=2000):
    """-> (figures, failures) over `count` damaged annotation files, the layouts in turn."""
    counts, failures = Counter(), []
    for i in tqdm(range(count), disable=None):
        layout = list(LAYOUTS)[i % len(LAYOUTS)]
        files, rng = LAYOUTS[layout][3], random.Random(f"{layout} {i}")
        victim, began = rng.choice(list(files)), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                whole = damage_annotation(name, text, rng) if name == victim else text.encode()
                (Path(folder) / name).write_bytes(whole)
            verdict = judge_annotation(folder, layout)
        seconds = time.monotonic() - began
        counts[verdict] += 1
        if verdict not in ("examples", "error") or seconds > SECONDS:
            failures.append(f"{layout} {i} ({victim}): {verdict}, {seconds:.1f} s")
    return (f"{count:,} damaged files of {len(LAYOUTS)} layouts: {counts['examples']:,} read as they "
            f"stand, {counts['error']:,} clear errors"), failures  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# kill, disk, soak: small runs of fine-tuning, and what is left of them

STEPS = ["--max_steps", 30, "--save_every", 1]


@contextmanager
def undisturbed(*flags):
    """-> toy data, a folder to work in, how long a whole run takes, the checkpoint that it ends with."""
    with tempfile.TemporaryDirectory() as work:
        folder, out, began = Path(work) / "tgif_qa", Path(work) / "whole", time.time()
        data.write_toy_tgif_qa(folder, train=24, test=2)
        code = finish(start(folder, out, *STEPS, *flags))
        assert code == 0, errors(out)
        yield folder, Path(work), time.time() - began, tensors(out / "last.pt")


def repeated(code, out, expected):
    """Did a disturbed and resumed run end as the undisturbed one, with each step logged once?"""
    return code == 0 and logged(out) == list(range(1, 31)) and same(tensors(out / "last.pt"), expected)


def kill(runs=30):
    """One kill a run, at a random moment; then --resume until the end."""
    moments, failures, rng = Counter(), [], random.Random(0)
    with undisturbed() as (folder, work, seconds, expected):
        for i in tqdm(range(runs), disable=None):
            out = work / f"kill{i}"
            process = start(folder, out, *STEPS)
            time.sleep(rng.uniform(0.1, 0.95) * seconds)
            process.kill()
            process.join()
            moments[moment(out)] += 1
            logged(out)  # raises where a kill has cut a line in half
            if not repeated(code := resume(folder, out, *STEPS), out, expected):
                failures.append(f"run {i} ended otherwise, with exit code {code}: {errors(out)}")
    equal = f"{runs - len(failures)} of {runs} runs end with the weights, optimizer and log of the undisturbed one"
    if runs >= 30 and not moments["in a checkpoint"]:
        failures.append("no kill came in a checkpoint, so nothing is known about that")
    return f"{equal}; killed {', '.join(f'{n} {when}' for when, n in moments.items())}", failures


def moment(out):
    """When the kill came, as far as the files tell."""
    if list(out.glob("*.tmp")) or (out / "previous.pt").exists() and not (out / "last.pt").exists():
        return "in a checkpoint"
    if (out / "best.pt").exists():
        return "after training"
    return "between checkpoints" if (out / "last.pt").exists() else "before the first checkpoint"


def disk():
    """Each trouble comes after step 5, must end the run in one line, and is over when the run is resumed."""
    said, failures = [], []
    with undisturbed("--workers", 2) as (folder, work, _, expected):
        for trouble in (full_disk, folder_lost, data_vanish, worker_killed):
            out, place = work / trouble.__name__, work / f"{trouble.__name__}.folder"
            place.mkdir()
            out.symlink_to(place)
            process = start(folder, out, *STEPS, "--workers", 2)
            wait_for(out, 5, process)
            with trouble(folder, out, process):
                code = finish(process)
            lines, again = errors(out), resume(folder, out, *STEPS, "--workers", 2)
            said += [line.replace(str(work), "...") for line in lines]
            if code != 2 or len(lines) != 1 or not repeated(again, out, expected):
                failures.append(f"{trouble.__name__}: exit code {code}, resumed {again}: {errors(out)}")
    return "\n  ".join(["every run said one line and was resumed to the same end", *said]), failures


@contextmanager
def full_disk(folder, out, process):
    """No file may grow beyond 5 MB any more, so that a checkpoint breaks off in its middle, as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
    yield


@contextmanager
def folder_lost(folder, out, process):
    """Where the run's folder was is a file, all at once: nobody can write below that, root neither."""
    place, file = out.readlink(), out.with_suffix(".file")
    file.write_text("")
    file.replace(out)
    yield
    out.unlink()
    out.symlink_to(place)


@contextmanager
def data_vanish(folder, out, process):
    (folder / "gifs").rename(folder / "elsewhere")
    yield
    (folder / "elsewhere").rename(folder / "gifs")


@contextmanager
def worker_killed(folder, out, process):
    os.kill(children(process)[0], signal.SIGKILL)
    yield


def children(process):
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def memory_of(pid):
    """In bytes: the proportional set size, which counts once what processes share."""
    return 1024 * int(re.search(r"\nPss: *(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1])


def soak(steps=10_000):
    """A sample every two seconds, after a first twentieth of the steps. Batches on their way from a worker are a few
    open files."""
    samples, tiny = [], ["--batch_size", 1, "--text_length", 8, "--workers", 2, "--max_steps", steps]
    with undisturbed() as (folder, work, *_):
        process = start(folder, work / "soak", *tiny, "--save_every", max(1, steps // 20))
        while process.is_alive():
            time.sleep(2)
            with suppress(OSError, ValueError, IndexError):  # it ends in between; the log is being made
                step, family = logged(work / "soak")[-1], [process.pid, *children(process)]
                files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
                if steps / 20 <= step < steps and len(family) == 3:  # not the evaluation at the end
                    samples.append((sum(map(memory_of, family)), files, family))
        code = finish(process)
    sizes, counts, families = zip(*samples, strict=True)
    half, left = len(counts) // 2, [pid for pid in families[-1] if Path(f"/proc/{pid}").exists()]
    grown, before, after = max(sizes) / sizes[0] - 1, max(counts[:half]), max(counts[half:])
    figures = (f"{steps:,} steps, exit code {code}; {sizes[0] / 2**20:.0f} MB, then {grown:+.1%} at most ({len(sizes)} "
               f"samples); {before}, then {after} open files at most; {len(left)} processes left behind")  # fmt: skip
    return figures, [] if code == 0 and grown < 0.05 and after <= before + 4 and not left else ["not as it should be"]


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"media": media, "annotations": annotations, "kill": kill, "disk": disk, "soak": soak}
    parser.add_argument("commands", nargs="+", choices=commands, metavar="COMMAND", help=", ".join(commands))
    parser.add_argument("--videos", type=Path, metavar="DIR", help="media: a folder of videos and images")
    parser.add_argument("--files", type=int, metavar="N", help="media, annotations: how many damaged files")
    parser.add_argument("--runs", type=int, metavar="N", help="kill: how many runs")
    parser.add_argument("--steps", type=int, metavar="N", help="soak: how many steps")
    args = parser.parse_args()
    if "media" in args.commands and not args.videos:
        parser.error("media needs --videos DIR")
    torch.set_num_threads(1)
    given = {"media": (args.videos, args.files), "annotations": [args.files], "kill": [args.runs], "soak": [args.steps]}
    failed = False
    for name in args.commands:
        began = time.time()
        figures, failures = commands[name](*(value for value in given.get(name, []) if value))
        print(f"{name}: {figures} ({time.time() - began:.0f} s)", *failures, sep="\n  FAILED: ", flush=True)
        failed = failed or bool(failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
