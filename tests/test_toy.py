"""Tests of the toy data: what its videos show, and that its files stay as they are."""

import hashlib
import random
from collections import Counter
from unittest.mock import Mock, call

import pytest

import data

SMALL = {"videos": (60, 30), "photos": (20, 6)}  # how many: training, test


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    for part, sizes in SMALL.items():
        data.TOY_PARTS[part](folder / part, *sizes)
    return folder


def read(toy, task, split):
    return data.read_examples(task, toy / data.LAYOUTS[task].toy, split)


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


def test_files_are_those_that_the_results_were_measured_with(toy):
    """Another order of the random draws would be other data, and need a new TOY_VERSION."""
    texts = sorted(path for path in toy.rglob("*") if path.suffix in (".csv", ".json", ".jsonl"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()
    assert (len(texts), digest[:16]) == (23, "9f10a04072a08258")
    gifs = {data.probe(path)[:4] for path in toy.rglob("*.gif")}
    assert gifs == {(data.TOY_FRAMES, data.TOY_FPS, data.TOY_SIZE, data.TOY_SIZE)}  # none of them lost a frame


@pytest.mark.parametrize("task", data.LAYOUTS)
def test_every_task_can_be_read_and_its_test_shares_no_video_with_training(task, toy):
    """VQA's names are numbers alone: none stands for two photos."""
    train, test = read(toy, task, "train"), read(toy, task, "val" if task == "pretrain" else "test")
    assert all(e.path for e in train + test)
    assert not {e.video for e in train} & {e.video for e in test}


def test_captions_fit_one_test_video_and_are_all_that_is_said_of_a_photo(toy):
    captions = read(toy, "msrvtt_retrieval", "test")
    contents = {frozenset(e.text.split()) for e in captions}  # the same words: the same shape and actions
    assert len(contents) == len(captions) == 27  # of 30 videos
    images = data.caption_groups(read(toy, "pretrain", "train"), len(data.PHOTO_CAPTIONS))  # what is not said is wrong
    assert [len(set(image.captions)) for image in images] == [len(data.PHOTO_CAPTIONS)] * 20


def test_the_vocabulary_of_pretraining_serves_every_toy_task(toy):
    captions = [example.text for example in read(toy, "pretrain", "train")]
    tokenizer = data.build_tokenizer(data.vocabulary_from_text(captions + data.TOY_WORDS))
    for task in data.LAYOUTS:
        for example in read(toy, task, "train"):
            answers = example.answer if isinstance(example.answer, dict) else [str(example.answer or 0)]
            pieces = [piece for text in [*data.input_texts(example), *answers] for piece in tokenizer.tokenize(text)]
            assert not [piece for piece in pieces if piece == "[UNK]" or piece.startswith("##")]


def test_what_was_interrupted_is_written_anew_and_then_once(tmp_path, monkeypatch):
    write = Mock(side_effect=[KeyboardInterrupt, None])  # a third writing would be an error
    monkeypatch.setitem(data.TOY_PARTS, "photos", write)
    (tmp_path / "photos").mkdir()  # what writing makes first, and an interrupt leaves
    with pytest.raises(KeyboardInterrupt):
        data.toy_data("photos", folder=tmp_path)
    for _ in range(2):
        assert data.toy_data("photos", folder=tmp_path) == tmp_path
    assert write.mock_calls == [call(tmp_path / "photos")] * 2
