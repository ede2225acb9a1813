"""Tests of the toy data: what its videos show, that its files stay as they are, and where it cannot be written."""

import errno
import functools
import hashlib
import os
import random
from collections import Counter

import pytest

import data

KINDS = ["action", "transition", "frameqa", "count"]
# The four parts, with few videos.
SMALL = {
    "tgif_qa": functools.partial(data.write_toy_tgif_qa, train=60, test=6),
    "msrvtt": functools.partial(data.write_toy_msrvtt, train=60, test=20),
    "vqa": functools.partial(data.write_toy_vqa, train=60, test=6),
    "coco_captions": functools.partial(data.write_toy_coco, train=20, val=6),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    for part, write in SMALL.items():
        write(folder / part)
    return folder


# ---------------------------------------------------------------- the world


def test_options_never_name_the_other_action_and_answers_are_spread_evenly():
    rng, places = random.Random(0), Counter()
    for i in range(500):
        video = data.toy_video(str(i), rng)
        for kind in ("action", "transition"):
            question = data.toy_columns(video, kind, rng)
            options = [question[f"a{j}"] for j in range(1, 6)]
            shown = {video.action, video.last} & set(options)
            assert shown == {options[question["answer"]]} and len(set(options)) == 5
            places[question["answer"]] += 1
    assert min(places.values()) > 150  # of 1,000: no place is the right one much more often than another


def test_timeline_shows_every_repetition_and_idles_in_between():
    for i in range(100):
        video = data.toy_video(str(i), random.Random(i))
        frames = [action for action, _ in video.timeline]
        assert len(frames) == data.TOY_FRAMES
        assert frames.count(video.action) == data.TOY_BUSY and frames.count(video.last) == data.TOY_LAST
        starts = sum(a == video.action != b for a, b in zip(frames, [frames[-1], *frames[:-1]], strict=True))
        assert starts == video.times  # counted around the loop


def test_gifs_keep_all_their_frames(toy):
    for path in sorted((toy / "tgif_qa" / "gifs").iterdir()):
        assert data.probe(path)[:4] == (data.TOY_FRAMES, data.TOY_FPS, data.TOY_SIZE, data.TOY_SIZE)


# ---------------------------------------------------------------- its files


def test_annotations_are_those_that_the_results_were_measured_with(toy):
    """Another order of the random draws would be other data, and need a new TOY_VERSION."""
    texts = sorted(path for path in toy.rglob("*") if path.suffix in (".csv", ".json", ".jsonl"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()
    assert (len(texts), digest[:16]) == (24, "e54d0eac19ff9c25")


def test_training_and_test_of_tgif_qa_share_no_video(toy):
    for kind in KINDS:
        train, test = (data.read_examples(f"tgif_qa_{kind}", toy / "tgif_qa", split) for split in ("train", "test"))
        assert (len(train), len(test)) == (120 if kind == "transition" else 60, 6)
        assert not {e.video for e in train} & {e.video for e in test}


def test_no_number_of_a_vqa_photo_stands_for_two(toy):
    """VQA's questions name a photo by its number alone."""
    for split, place in (("train", "train2014"), ("test", "val2014")):
        examples = data.read_examples("vqa", toy / "vqa", split)
        assert {data.find_media(toy / "vqa", e.video).parent.name for e in examples} == {place}


def test_no_caption_fits_two_test_videos(toy):
    contents = [frozenset(e.text.split()) for e in data.read_examples("msrvtt_retrieval", toy / "msrvtt", "test")]
    assert len(set(contents)) == len(contents) == 20  # the same words: the same shape and actions


def test_every_photo_has_all_its_captions(toy):
    """A photo's captions are a closed list: what is not on it is wrong of the photo."""
    images = data.caption_groups(data.read_examples("pretrain", toy / "coco_captions", "train"), 6)
    assert [len(set(image.captions)) for image in images] == [len(data.TOY_CAPTIONS)] * 20
    others = data.caption_groups(data.read_examples("pretrain", toy / "coco_captions", "val"), 6)
    assert not {image.video for image in images} & {image.video for image in others}


def test_the_vocabulary_serves_every_toy_task(toy):
    tokenizer = data.build_tokenizer(data.vocabulary_from_text(data.toy_texts(toy)))
    words = [*data.TOY_COLORS, *data.TOY_SHAPES, *data.TOY_ACTIONS, *data.TOY_PLACES, *data.TOY_NUMBERS, "yes", "no"]
    for text in [f"what does the {word} do 3 times ?" for word in words]:
        assert " ".join(tokenizer.tokenize(text)) == text


# ---------------------------------------------------------------- writing it


def test_a_part_is_written_once_and_what_was_interrupted_is_written_anew(tmp_path, monkeypatch):
    calls = []

    def write(folder):
        calls.append(folder)
        folder.mkdir(exist_ok=True, parents=True)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(data.TOY_PARTS, "vqa", write)
    with pytest.raises(KeyboardInterrupt):
        data.toy_data("vqa", folder=tmp_path)
    for _ in range(2):
        assert data.toy_data("vqa", folder=tmp_path) == tmp_path
    assert calls == [tmp_path / "vqa"] * 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_written_is_named_in_one_line(number, tmp_path, monkeypatch):
    def write(folder):
        raise OSError(number, os.strerror(number), str(folder / "gifs"))

    monkeypatch.setitem(data.TOY_PARTS, "tgif_qa", write)
    with pytest.raises(data.DataError) as error:
        data.toy_data("tgif_qa", folder=tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/tgif_qa: ") and "\n" not in message
    assert os.strerror(number) in message and "choose another directory" in message
