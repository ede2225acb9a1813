"""`python data.py check`: every kind of finding is found where it was planted, and nothing in whole data."""

import re
import shutil
from pathlib import Path

import pytest

import data


@pytest.fixture
def toy(toy_videos, tmp_path):
    """A folder deeper than what is given to `check`, as some data sets are published."""
    return Path(shutil.copytree(toy_videos, tmp_path / "data" / "dataset"))


def check(capsys, task, folder, *more):
    """-> (exit code, what it printed, {(finding, split): how many})."""
    with pytest.raises(SystemExit) as stop:
        data.main(["check", "--task", task, "--data", str(folder), *more])
    out = capsys.readouterr().out
    found = re.findall(r"^(\w+): ([a-z ]+): ([\d,]+) \(", out, re.MULTILINE)
    return stop.value.code, out, {(what, split): int(number) for split, what, number in found}


@pytest.mark.parametrize("task", ["tgif_qa", "tgif_qa_transition", "tgif_qa_frameqa", "tgif_qa_count"])
def test_nothing_is_found_in_whole_data(task, toy, capsys):
    code, out, found = check(capsys, task, toy.parent)
    assert (code, found) == (0, {}) and "nothing here would stop a run" in out
    assert f"train  {24 if task == 'tgif_qa_transition' else 12} examples, 12 videos\ntest   6 examples, 6 videos" in out


def test_every_kind_of_damage_is_found_where_it_is(toy, capsys):
    gifs, names = toy / "gifs", [f"toy_train_{i:04d}" for i in range(6)]
    (gifs / f"{names[0]}.gif").unlink()
    (gifs / f"{names[1]}.gif").write_bytes(b"GIF89a")
    data.write_gif([data.Image.new("RGB", (9, 9))], gifs / f"{names[2]}.gif")
    test = toy / "Test_action_question.csv"
    row = test.read_text().splitlines()[1]
    cells = row.split("\t")
    more = [row, row.replace(cells[0], names[5]),  # the same row; another video, one of training
            "\t".join([cells[0], " ".join(["word"] * 22), "a b", *cells[3:]])]  # room for one more word
    test.write_text(test.read_text() + "\n".join(more) + "\n")
    code, out, found = check(capsys, "tgif_qa", toy.parent)
    lines = {  # what they begin with
        ("videos missing", "train"): names[0], ("videos unreadable", "train"): f"{gifs}/{names[1]}.gif: not a readable",
        ("videos without motion", "train"): f"{gifs}/{names[2]}.gif", ("videos also in train", "test"): names[5],
        ("same row twice", "test"): f"8  {cells[0]}: {cells[1]}", ("text cut", "test"): "10  26 tokens: word",
    }  # fmt: skip
    assert code == 1 and "mend this before a run: videos missing, videos unreadable\n" in out
    assert found == dict.fromkeys(lines, 1) and all(f"\n  {line}" in out for line in lines.values())
    assert {"annotations unreadable", *(what for what, _ in found)} == {*data.FAULTS, *data.REMARKS}  # all of them


@pytest.mark.parametrize("what, damage", [("missing", Path.unlink), ("unreadable", lambda path: path.write_bytes(b"x"))])
def test_training_videos_that_are_all_bad_are_not_called_fine(what, damage, toy, capsys):
    for path in (toy / "gifs").glob("toy_train*"):
        damage(path)
    code, out, found = check(capsys, "tgif_qa_transition", toy.parent)  # two questions a video
    assert (code, found) == (1, {(f"videos {what}", "train"): 12}) and "nothing here" not in out
    assert len(re.findall("^  .*toy_train", out, re.MULTILINE)) == 3  # the first of them


def test_annotations_that_cannot_be_read_are_one_finding(toy, capsys):
    path = toy / "Train_count_question.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:4], rows[4].rpartition("\t")[0]]))
    code, out, found = check(capsys, "tgif_qa_count", toy.parent)
    assert (code, found) == (1, {("annotations unreadable", "train"): 1}) and f"\n  {path}:5: 2 columns" in out


def test_photos_need_no_motion_and_captions_are_cut_at_the_text_length(toy_photos, capsys):
    assert check(capsys, "pretrain", toy_photos)[::2] == (0, {})
    found = check(capsys, "pretrain", toy_photos, "--text_length", "6")[::2]  # three of a photo's six captions have more
    assert found == (0, {("text cut", "train"): 3 * 20, ("text cut", "val"): 3 * 6})
