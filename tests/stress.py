"""Damaged files, thousands of them: what the readers do must be a result or one clear error. Not a test for every day.

    python tests/stress.py media --videos DIR      every file of DIR, cut off or with byte errors: some 10 minutes
    python tests/stress.py annotations             2,000 damaged annotation files, over all readers: a minute
    python tests/stress.py                         both (media only with --videos)

One line of figures per part; each failure is listed, with the seed that brings it back, and makes the exit code 1.
"""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data

SECONDS, BYTES = 10, 2**29  # that a damaged file may take at most: time; memory beyond the imports' (some 400 MB)


# ---------------------------------------------------------------- media
def damage(whole, rng, kind):
    """The bytes of a file, cut off at a random place, or with 1 to 100 random bytes: half of the time in its first
    1,000 bytes or its last 5%, where the headers are."""
    if kind == "cut":
        return whole[: rng.randrange(len(whole))] if whole else whole
    damaged = bytearray(whole)
    start, end = rng.choice([(0, len(whole))] * 2 + [(0, 1000), (len(whole) * 19 // 20, len(whole))])
    for _ in range(rng.choice([1, 3, 10, 30, 100]) if whole else 0):
        damaged[rng.randrange(start, max(min(end, len(whole)), start + 1))] = rng.randrange(256)
    return bytes(damaged)


def judge_media(path):
    """-> "frames", "error", or what is wrong with what `read_clips` does with this file."""
    try:
        clips = data.read_clips(path, 2, 2, 2.0, 64, False)
    except data.DataError as error:
        line = str(error)
        return "error" if line.startswith(str(path)) and "\n" not in line and len(line) < 1000 else f"unclear: {line}"
    except Exception as error:  # noqa: BLE001 - that is what we are looking for
        return f"{type(error).__name__}: {error}"
    right = clips.shape == (2, 2, 3, 64, 64) and clips.dtype == torch.uint8
    return "frames" if right else f"shape {tuple(clips.shape)} {clips.dtype}"


def read_damaged(source, cuts, errors, connection):
    """A process of its own for the variants of one file: a crash names the file, and memory is its own."""
    whole, before = source.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for i in range(cuts + errors):
            kind = "cut" if i < cuts else "error"
            seed = f"{source.name} {kind} {i}"
            path = Path(folder) / f"{i}{source.suffix}"
            path.write_bytes(damage(whole, random.Random(seed), kind))
            connection.send(("started", seed, 0, 0, 0))
            signal.alarm(10 * SECONDS)  # its default action ends this process, whatever C code it is in
            began = time.monotonic()
            verdict = judge_media(path)
            signal.alarm(0)
            memory = [1024 * max(resource.getrusage(who).ru_maxrss - before, 0)  # an ffmpeg begins as a copy of us
                      for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]  # fmt: skip
            connection.send((verdict, seed, time.monotonic() - began, *memory))
            path.unlink()
    connection.send(("done", "", 0, 0, 0))


def media(folder, cuts=10, errors=100):
    """-> (figures, failures) over all files of a folder."""
    sources = sorted(path for path in Path(folder).iterdir() if path.is_file() and path.suffix != ".json")
    counts, failures, slowest, peaks = Counter(), [], (0, ""), (0, 0)
    for source in tqdm(sources, unit="file", disable=None):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=read_damaged, args=(source, cuts, errors, sender))
        process.start()
        sender.close()
        last, seed = "", ""
        while last != "done":
            try:
                last, seed, seconds, *memory = receiver.recv()
            except EOFError:
                failures.append(f"{seed}: the process ended ({process.exitcode})")
                break
            if last in ("started", "done"):
                continue
            counts[last if last in ("frames", "error") else "wrong"] += 1
            slowest, before, peaks = max(slowest, (seconds, seed)), peaks, tuple(map(max, peaks, memory))
            if last not in ("frames", "error"):
                failures.append(f"{seed}: {last}")
            if seconds > SECONDS:
                failures.append(f"{seed}: {seconds:.1f} s")
            if max(peaks) > BYTES and peaks != before:
                failures.append(f"{seed}: {max(memory) / 2**20:.0f} MB")
        process.join()
    figures = (f"media: {counts.total():,} damaged files of {len(sources)}: {counts['frames']:,} read, "
               f"{counts['error']:,} clear errors, {counts['wrong']} wrong; slowest {slowest[0]:.1f} s ({slowest[1]}), "
               f"memory at most {peaks[0] / 2**20:.0f} MB (Python), {peaks[1] / 2**20:.0f} MB (ffmpeg) more than "
               "the imports take")  # fmt: skip
    return figures, failures


# ---------------------------------------------------------------- annotations: small files in every layout
# Each reader is judged by a second, naive reading of the same damaged bytes. These oracles share no code with data.py
# (but the official spelling of VQA answers) and check nothing: whatever data.py accepts must be, in order and in full,
# what stands there. A label that damage turned into another valid one ("3" into "2") can't be told; one that is
# guessed, shifted to another row, coerced or dropped can.


def lines_of(path):
    return re.split("\r\n|\n|\r", path.read_bytes().decode("utf-8-sig").rstrip("\r\n"))


def rows_of(path):
    """Rows as dicts of text: of a table split at every TAB (or by csv, at commas), or of JSON values."""
    if path.suffix == ".jsonl":
        return list(map(json.loads, re.split("\r?\n", path.read_bytes().decode("utf-8-sig").rstrip())))
    if path.suffix == ".json":
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    lines = lines_of(path)
    cells = [line.split("\t") for line in lines] if "\t" in lines[0] else list(csv.reader(lines))
    return [dict(zip(map(str.strip, cells[0]), row, strict=True)) for row in cells[1:]]


def words(text):
    return " ".join(str(text).split())


def first(row, *names):
    return next(row[name] for name in names if row.get(name) is not None)


def choice(row, *video):
    options = [row[f"a{i}"] for i in range(1, 6)] if "a1" in row else first(row, "options", "caption")
    return words(first(row, *video)), words(row.get("question", "")), tuple(map(words, options)), int(row["answer"])


def clip(name):
    return f"video{words(name)}" if words(name).isdigit() else words(name)  # MSRVTT's video of that number


def question(row):
    return clip(first(row, "video_id", "clip_name")), words(row["question"]), (), words(row["answer"])


def caption(video, text):
    return words(video), words(text), (), None


def paragraph(pairs):
    said = {}
    for video, text in pairs:
        said.setdefault(words(video), []).append(text)
    return [caption(video, " ".join(texts)) for video, texts in said.items()]


def photo(name):
    return words(name).zfill(12) if words(name).isdigit() else words(name)


def vqa(questions, annotations):
    given = {words(row["question_id"]): row for row in rows_of(annotations)["annotations"]}
    for row in rows_of(questions)["questions"]:
        said = [words(answer["answer"]) for answer in given[words(row["question_id"])]["answers"]]
        counts = Counter(data.normalize_answer(answer) for answer in said)
        scores = {answer: min(1.0, n / 3) for answer, n in counts.items() if answer}
        image = first({**given[words(row["question_id"])], **row}, "image_id")  # both files tell
        yield photo(image), words(row["question"]), (), scores


def listed(listing, *files):
    videos = {words(row["video_id"]) for row in rows_of(listing)}
    sentences = [row for path in files for row in rows_of(path)["sentences"]]
    return [caption(clip(row["video_id"]), row.get("caption") or "") for row in sentences if words(row["video_id"]) in videos]


def coco(path):
    names = {words(row["id"]): row.get("file_name") or photo(row["id"]) for row in rows_of(path)["images"]}
    return [caption(names[words(row["image_id"])], row.get("caption") or "") for row in rows_of(path)["annotations"]]


def regions(path):
    for image in rows_of(path):
        for row in image["regions"]:
            yield caption(f"{words(first({**image, **row}, 'image_id', 'id'))}.jpg", row.get("phrase") or "")


def own(path):
    for row in rows_of(path):
        texts = row.get("caption")
        video = first(row, "path", "video", "image", "clip_name", "video_id", "coco_id", "vg_id")
        if "coco_id" in row:
            video = photo(video)
        elif "vg_id" in row:
            video = words(video) + ".jpg" if words(video).isdigit() else words(video)
        yield from (caption(video, text) for text in (texts if isinstance(texts, list) else [texts or ""]))


def table(rows, separator="\t", end="\r\n"):
    return end.join(separator.join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]) + end


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


TEXTS = ["what does the \"cat do 2 times ?", "how many dogs, are there ?", "\"wer läuft ?", "what is it ?"]
ACTIONS = ["jump", "spin", "wave hand", "nod", "hop", "sit"]
MSRVTT = {"videos": [{"video_id": f"video{i}", "split": "train", "id": i} for i in range(4)],
          "sentences": [{"sen_id": i, "video_id": f"video{i % 4}", "caption": f"a {ACTIONS[i % 6]}, {i}"}
                        for i in range(8)]}  # fmt: skip
FIVE = [{f"a{k}": ACTIONS[(i + k) % 6] for k in range(1, 6)} for i in range(4)]
ROWS = [{"gif_name": f"tumblr_{i}", "question": text} for i, text in enumerate(TEXTS)]
KEYS = [{"vid_id": f"ID{i}", "key": 7 + i} for i in range(4)]
ASKED = [{"id": i, "video_id": 6513 + i, "question": text, "answer": ACTIONS[i], "category_id": 3}
         for i, text in enumerate(TEXTS)]  # fmt: skip
LISTS = [{"clip_name": f"video{i}", "question": text, "options": list(FIVE[i].values()), "answer": i}
         for i, text in enumerate(TEXTS)]  # fmt: skip
SAID = [{"clip_name": f"video{i}", "caption": text} for i, text in enumerate(TEXTS)]
PEOPLE = [{"answer": ["yes", "no", "Two.", "a dog"][i % 4], "answer_id": i} for i in range(10)]

# name: ({file: its content}, our reader, the oracle of these files)
LAYOUTS = {
    "tgif_qa_action": (
        {"Train_action_question.csv": table([ROWS[i] | FIVE[i] | {"answer": i} | KEYS[i] for i in range(4)])},
        lambda folder: data.read_examples("tgif_qa_action", folder, "train"),
        lambda path: [choice(row, "gif_name") for row in rows_of(path)]),
    "tgif_qa_count": (
        {"Test_count_question.csv": table([ROWS[i] | {"answer": 2 + 3 * i} | KEYS[i] for i in range(4)])},
        lambda folder: data.read_examples("tgif_qa_count", folder, "test"),
        lambda path: [(words(row["gif_name"]), words(row["question"]), (), int(row["answer"]))
                      for row in rows_of(path)]),
    "tgif_qa_frameqa": (
        {"Test_frameqa_question.csv": table([ROWS[i] | {"answer": ACTIONS[i], "type": i} | KEYS[i] for i in range(4)])},
        lambda folder: data.read_examples("tgif_qa_frameqa", folder, "test"),
        lambda path: [(words(row["gif_name"]), words(row["question"]), (), words(row["answer"]))
                      for row in rows_of(path)]),
    "tgif_qa_transition.jsonl": (
        {"transition_train.jsonl": lines([row | {"gif_name": row["clip_name"]} for row in LISTS])},
        lambda folder: data.read_examples("tgif_qa_transition", folder, "train"),
        lambda path: [choice(row, "gif_name", "clip_name") for row in rows_of(path)]),
    "msrvtt_qa": (
        {"val_qa.json": json.dumps(ASKED)}, lambda folder: data.read_examples("msrvtt_qa", folder, "val"),
        lambda path: [question(row) for row in rows_of(path)]),
    "msrvtt_qa.jsonl": (
        {"msrvtt_qa_test.jsonl": lines([row | {"answer_type": "what"} for row in ASKED])},
        lambda folder: data.read_examples("msrvtt_qa", folder, "test"), lambda path: [question(row) for row in rows_of(path)]),
    "msrvtt_mc": (
        {"msrvtt_mc_test.jsonl": lines([{k: v for k, v in row.items() if k != "question"} for row in LISTS])},
        lambda folder: data.read_examples("msrvtt_mc", folder, "test"),
        lambda path: [(video, "", *rest) for video, _, *rest in
                      (choice(row, "clip_name", "video_id", "video") for row in rows_of(path))]),
    "vqa": (
        {"v2_OpenEnded_mscoco_train2014_questions.json": json.dumps({"questions": [
            {"question_id": 90 + i, "image_id": 9, "question": text} for i, text in enumerate(TEXTS)]}),
         "v2_mscoco_train2014_annotations.json": json.dumps({"annotations": [
             {"question_id": 90 + i, "image_id": 9, "answer_type": "other", "answers": PEOPLE} for i in range(4)]})},
        lambda folder: data.read_examples("vqa", folder, "train"), lambda *paths: list(vqa(*paths))),
    "vqa.jsonl": (
        {"vqa_train.jsonl": lines([{"question": text, "question_id": i, "image_id": 7, "labels": {"yes": 1, "no": .3}}
                                   for i, text in enumerate(TEXTS)])},
        lambda folder: data.read_examples("vqa", folder, "train"),
        lambda path: [(photo(row["image_id"]), words(row["question"]), (),
                       {words(k): v for k, v in row["labels"].items()}) for row in rows_of(path)]),
    "msrvtt_retrieval": (
        {"MSRVTT_train.9k.csv": "video_id\r\nvideo0\r\nvideo2\r\nvideo3\r\n", "MSRVTT_data.json": json.dumps(MSRVTT)},
        lambda folder: data.read_examples("msrvtt_retrieval", folder, "train"), listed),
    "msrvtt_1ka_test": (
        {"MSRVTT_JSFUSION_test.csv": table([{"key": f"ret{i}", "vid_key": f"msr{i}", "video_id": f"video{i}",
                                             "sentence": f'"a {a}, {i}"'} for i, a in enumerate(ACTIONS)], ",", "\n")},
        lambda folder: data.read_examples("msrvtt_retrieval", folder, "test"),
        lambda path: [caption(clip(row["video_id"]), row["sentence"]) for row in rows_of(path)]),
    "retrieval.jsonl": (
        {"train.jsonl": lines(SAID)}, lambda folder: data.read_examples("msrvtt_retrieval", folder, "train"),
        lambda path: [caption(row["clip_name"], row["caption"]) for row in rows_of(path)]),
    "didemo": (
        {"val_data.json": json.dumps([{"annotation_id": i, "video": f"{i % 3}.mov", "description": text, "times": [[0]]}
                                      for i, text in enumerate(TEXTS)])},
        lambda folder: data.read_examples("didemo_retrieval", folder, "val"),
        lambda path: paragraph((row["video"], row.get("description") or "") for row in rows_of(path))),
    "activitynet": (
        {"val_1.json": json.dumps({f"v_{i}": {"duration": 3.5, "timestamps": [[0, 3]], "sentences": [text, " And so."]}
                                   for i, text in enumerate(TEXTS)})},
        lambda folder: data.read_examples("activitynet_retrieval", folder, "test"),
        lambda path: paragraph((clip(video), text) for video, row in rows_of(path).items() for text in row["sentences"])),
    "activitynet.csv": (
        {"val_1.csv": table([{"video_id": f"v_{i % 3}", "caption": text, "start": i} for i, text in enumerate(ACTIONS)],
                            ",", "\n")},
        lambda folder: data.read_examples("activitynet_retrieval", folder, "val"),
        lambda path: paragraph((clip(row["video_id"]), row["caption"]) for row in rows_of(path))),
    "coco_captions": (
        {"captions_train2017.json": json.dumps({
            "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480} for i in range(3)],
            "annotations": [{"id": i, "image_id": i % 3, "caption": text} for i, text in enumerate(TEXTS)]})},
        data.read_captions, coco),
    "visual_genome": (
        {"region_descriptions.json": json.dumps([{"id": i, "regions": [
            {"region_id": 2 * i + k, "image_id": i, "phrase": ACTIONS[i + k], "x": 3} for k in range(2)]}
            for i in range(3)])},
        data.read_captions, lambda path: list(regions(path))),
    "own.csv": (
        {"mine.csv": table([{"path": f"clips/{i}.mp4", "caption": f"a {a}"} for i, a in enumerate(ACTIONS)], ",")},
        data.read_captions, lambda path: list(own(path))),
    "own.jsonl": (
        {"mine_train.jsonl": lines([*({"coco_id": i, "caption": text} for i, text in enumerate(TEXTS)),
                                    {"vg_id": 5, "caption": ["x", "y"]}, {"path": "a.gif", "caption": "z"}])},
        data.read_captions, lambda path: list(own(path))),
}  # fmt: skip


# ---------------------------------------------------------------- ... and how they are damaged
HUGE = ["x" * 30_000, "y " * 200_000, '"' + "\n" * 1_000_000, "9" * 6000, "[" * 100_000, "\t" * 50_000]
WRONG = [None, True, False, 3.7, -1, 5, 10**30, "", " ", "3", "1_0", "\u0663", "0.0", "\0", "\ud800", [], {}, [[1]],
         {"a": "b"}, float("nan"), float("inf"), "x" * 30_000, "../x", ["a"] * 5, [1, 2, 3, 4, 5]]  # fmt: skip
JUNK = [b"", b"\0", b"\t", b"\n", b"\r", b'"', b",", b"]", b"}", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"[", b"{", b"9",
        b"null", b"true", b"\xe2\x80\xa8", b"\x1c", b"\x85", b"1e400", b"\\u0000", b'"a":1,']  # fmt: skip


def damage_bytes(content, rng):
    whole = content.encode()
    for _ in range(rng.choice([1, 1, 3])):
        a, b = sorted(rng.choices(range(len(whole) + 1), k=2))
        junk = rng.choice([*JUNK, whole[a:b] * 2, bytes([rng.randrange(256)])])
        whole = whole[:a] + junk + whole[rng.choice([a, a + 1, b]):]
    return whole


def damage_encoding(content, rng):
    codec = rng.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig twice", "utf-7"])
    if codec == "utf-8-sig twice":
        return b"\xef\xbb\xbf" * 2 + content.encode()
    return content.replace("cat", "cät").encode(codec, "replace")


def damage_table(content, rng):
    """Columns dropped, swapped, doubled, renamed or filled with nonsense: in all rows, in the header, or in one."""
    separator = "\t" if "\t" in content.partition("\n")[0] else ","
    cells = [line.split(separator) for line in content.splitlines()]
    rows = rng.choice([range(len(cells)), [0], [rng.randrange(len(cells))], [rng.randrange(1, len(cells))]])
    a, b = rng.choices(range(len(cells[0])), k=2)
    how, value = rng.choice(["drop", "swap", "double", "set", "huge"]), rng.choice([*WRONG, *cells[0]])
    for row in (cells[i] for i in rows):
        if max(a, b) >= len(row):
            continue
        if how == "swap":
            row[a], row[b] = row[b], row[a]
        elif how in ("set", "huge"):
            row[a] = rng.choice(HUGE) if how == "huge" else str(value).replace("\ud800", "")
        else:
            row[a : a + 1] = [] if how == "drop" else [row[a]] * 2
    if rng.random() < 0.2:
        rng.shuffle(cells)
    return rng.choice(["\r\n", "\n", "\r"]).join(separator.join(row) for row in cells).encode()


def damage_value(value, rng):
    """Something inside a JSON value dropped, doubled, swapped, renamed, nested, or of the wrong type or size."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or rng.random() < 0.15:
        return rng.choice([*WRONG, [value], {"value": value}, str(value), value * 2 if value != {} and
                           isinstance(value, (str, list)) else rng.choice(HUGE)])  # fmt: skip
    key, other = rng.choices(inside, k=2)
    how = rng.random()
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


def damage_json(content, rng, name):
    rows = content.splitlines() if name.endswith(".jsonl") else [content]
    i = rng.randrange(len(rows))
    how = rng.random()
    if how < 0.05:
        depth = rng.choice([100, 900, 100_000])
        rows[i] = '{"a":' * depth + rows[i] + "}" * depth
    elif how < 0.1:  # a key that may stand there already
        begins = rng.choice([match.end() for match in re.finditer("{", rows[i])])
        key = rng.choice(re.findall(r'"(\w+)":', rows[i]))
        rows[i] = f'{rows[i][:begins]}"{key}": {rng.choice(["0", "7", chr(34) * 2])}, {rows[i][begins:]}'
    else:
        rows[i] = json.dumps(damage_value(json.loads(rows[i]), rng), ensure_ascii=rng.random() < 0.5)
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def damage_annotation(name, content, rng):
    structure = damage_table if name.endswith(".csv") else lambda text, rng: damage_json(text, rng, name)
    return rng.choices([structure, damage_bytes, damage_encoding], [6, 3, 1])[0](content, rng)


def judge_annotation(folder, paths, read, oracle):
    """-> "examples", "error", or what is wrong."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # notes of what was left out
            examples = read(folder)
    except data.DataError as error:
        line = str(error)
        clear = line.startswith(str(folder)) and "\n" not in line and len(line) < 1000 and line.isprintable()
        names = "|".join(re.escape(str(path)) for path in paths)
        place = re.search(rf"^({names}):|^{re.escape(str(folder))}: no examples in it$", line)  # of the file, all files
        return "error" if clear and place else f"unclear: {line[:300]!r}"
    except Exception as error:  # noqa: BLE001 - that is what we are looking for
        return f"{type(error).__name__}: {str(error)[:300]}"
    found = [(e.video, e.text, e.options, e.answer) for e in examples]
    try:
        expected = [example for example in oracle(*paths) if example[1] or example[2]]  # without blank captions
    except Exception as error:  # noqa: BLE001 - the oracle must be able to read what the reader could
        return f"accepted what can't be read simply ({type(error).__name__}: {str(error)[:200]})"
    same = found == expected and [type(x[3]) for x in found] == [type(x[3]) for x in expected]
    odd = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), (len(found), len(expected)))
    return "examples" if same else f"not what stands there: {str(odd)[:400]}"


def annotations(count=2000, seed=0):
    """-> (figures, failures) over `count` damaged annotation files, the layouts in turn."""
    counts, failures, slowest = Counter(), [], (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        for i in tqdm(range(count), disable=None):
            layout = list(LAYOUTS)[i % len(LAYOUTS)]
            files, read, oracle = LAYOUTS[layout]
            rng, place = random.Random(f"{layout} {seed} {i}"), Path(folder) / str(i)
            place.mkdir()
            victim = rng.choice(list(files))
            for name, content in files.items():
                whole = content.encode() if name != victim else damage_annotation(name, content, rng)
                (place / name).write_bytes(whole)
            began = time.monotonic()
            verdict = judge_annotation(place, [place / name for name in files], read, oracle)
            seconds = time.monotonic() - began
            counts[verdict if verdict in ("examples", "error") else "wrong"] += 1
            slowest = max(slowest, (seconds, f"{layout} {i}"))
            if verdict not in ("examples", "error") or seconds > SECONDS:
                failures.append(f"{layout} {seed} {i} ({victim}): {verdict}, {seconds:.1f} s")
            shutil.rmtree(place)
    figures = (f"annotations: {count:,} damaged files of {len(LAYOUTS)} layouts: {counts['examples']:,} read as they "
               f"stand, {counts['error']:,} clear errors, {counts['wrong']} wrong; slowest {slowest[0]:.1f} s "
               f"({slowest[1]})")  # fmt: skip
    return figures, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="media, annotations (default: annotations, and media with --videos)")
    parser.add_argument("--videos", type=Path, help="media: a folder of videos and images")
    parser.add_argument("--seed", type=int, default=0, help="annotations: another seed, other damage")
    args = parser.parse_args()
    parts = args.parts or ["annotations", *(["media"] if args.videos else [])]
    if wrong := set(parts) - {"media", "annotations"}:
        parser.error(f"no such part: {', '.join(wrong)}")
    if "media" in parts and not args.videos:
        parser.error("media needs --videos DIR")
    torch.set_num_threads(1)
    failed = False
    for part in parts:
        figures, failures = annotations(seed=args.seed) if part == "annotations" else media(args.videos)
        print(figures, *(f"  {line}" for line in failures), sep="\n", flush=True)
        failed = failed or bool(failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
