"""`python data.py check`: every kind of finding is found where it was planted, and nothing in whole data."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

import data
import finetune

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    data.write_toy_tgif_qa(folder, train=50, test=2)  # every answer stands in training
    return folder


@pytest.fixture
def toy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "toy"))


def check(capsys, task, folder, *more):
    """-> (exit code, what it printed, {(finding, split): [first words of its lines]})."""
    with pytest.raises(SystemExit) as stop:
        data.main(["check", "--task", task, "--data", str(folder), *map(str, more)])
    layout, found = data.LAYOUTS[data.ALIASES.get(task, task)], {}
    for what, split, line in data.check(layout, folder, int(more[1]) if more else layout.text_length)[1]:
        found.setdefault((what, split), []).append(line.split()[0])
    return int(stop.value.code), capsys.readouterr().out, found


def table(out):
    """{row: numbers} of the printed table."""
    rows = [line for line in out.split("\n\n")[1].splitlines()[1:]]
    return {row[:24].strip(): row[24:].split() for row in rows}


def test_nothing_is_found_in_whole_data(toy, capsys):
    for task in ("tgif_qa", "tgif_qa_transition", "tgif_qa_frameqa", "tgif_qa_count"):
        code, out, found = check(capsys, task, toy)
        assert (code, found) == (0, {}) and "nothing here would stop a run" in out
        assert table(out)["examples"] == ["100" if task == "tgif_qa_transition" else "50", "-", "2"]
        assert table(out)["videos"] == ["50", "-", "2"]


def test_every_kind_of_damage_is_found_where_it_is(toy, tmp_path, capsys):
    gifs, names = toy / "gifs", [f"toy_train_{i:04d}" for i in range(6)]
    (gifs / f"{names[0]}.gif").unlink()
    (gifs / f"{names[1]}.gif").write_bytes(b"GIF89a")
    data.write_gif([data.Image.new("RGB", (9, 9))], gifs / f"{names[2]}.gif")
    test = toy / "Test_action_question.csv"
    header, *rows = test.read_text().splitlines()
    cells = rows[0].split("\t")
    more = [rows[0], rows[0].replace(cells[0], names[5]),  # the same row; another video, one of training
            "\t".join([cells[0], " ".join(["word"] * 22), "a b", *cells[3:8], "CUT", "1"])]  # room for one more word
    test.write_text("\n".join([header, *rows, *more]) + "\n")
    code, out, found = check(capsys, "tgif_qa", toy)
    assert code == 1 and "mend this before a run: videos missing\n" in out
    assert found == {
        ("videos missing", "train"): [names[0]], ("videos unreadable", "train"): [names[1]],
        ("videos without motion", "train"): [names[2]],
        ("videos also in train", "test"): [names[5]], ("same row twice", "test"): [cells[8]],
        ("text cut", "test"): ["CUT"],
    }  # fmt: skip
    assert table(out)["videos missing"] == ["1", "-", "-"] and table(out)["text cut"] == ["-", "-", "1"]
    assert "word" in out and "--allow_missing" in out  # the first of each kind, and what to do


@pytest.mark.parametrize("bad, stops", [
    (range(19), False), (range(20), True), (range(0, 50, 2), True), (range(0, 48, 2), False),
    ([*range(40, 50), *range(10)], True),  # behind the last example comes the first
])  # fmt: skip
def test_too_many_unreadable_videos_are_not_called_fine(toy, bad, stops, capsys):
    for i in bad:
        (toy / "gifs" / f"toy_train_{i:04d}.gif").write_bytes(b"GIF89a")
    code, out, found = check(capsys, "tgif_qa", toy)
    assert code == stops == (("too many unreadable", "train") in found) == ("nothing here would stop" not in out)
    assert len(found["videos unreadable", "train"]) == len(bad)
    assert sum("toy_train" in line for line in out.splitlines()) == 3  # the first of them


def test_training_stops_where_check_says_so(toy):
    """The twenty of ClipDataset are the twenty of check."""
    settings = finetune.Settings(data=[toy], frames=1, fps=1.0, size=16)
    examples = data.read_examples("tgif_qa", toy, "train")
    dataset = data.ClipDataset(examples, settings, n_clips=1, train=True)
    for i in range(19):
        (toy / "gifs" / f"toy_train_{i:04d}.gif").write_bytes(b"GIF89a")
    assert len(dataset[(0, 0)]["unreadable"]) == 19
    (toy / "gifs" / "toy_train_0019.gif").write_bytes(b"GIF89a")
    with pytest.raises(data.DataError, match="20 unreadable videos in a row"):
        dataset[(0, 0)]


def test_annotations_that_cannot_be_read_are_one_finding(toy, capsys):
    path = toy / "Train_count_question.csv"
    path.write_text(path.read_text().replace("\tCOUNT3", ""))
    code, out, found = check(capsys, "tgif_qa_count", toy)
    assert code == 1 and list(found) == [("annotations unreadable", "train")] and f"{path}:5: 4 columns" in out
    path.unlink()
    code, out, _ = check(capsys, "tgif_qa_count", toy)
    assert code == 1 and "no annotation file; looked for Train_count_question*.csv" in out
    assert table(out)["examples"] == ["-", "-", "2"]


def test_photos_need_no_motion_and_captions_are_cut_at_the_text_length(tmp_path, capsys):
    data.write_toy_coco(tmp_path, train=3, val=2)
    assert check(capsys, "pretrain", tmp_path)[::2] == (0, {})
    code, _, found = check(capsys, "pretrain", tmp_path, "--text_length", 6)
    captions = [e for split in ("train", "val") for e in data.read_examples("pretrain", tmp_path, split)]
    long = Counter("train" if "train" in e.id else "val" for e in captions if len(e.text.split()) > 4)
    assert code == 0 and {split: len(lines) for (_, split), lines in found.items()} == long


def test_every_task_has_a_layout():
    assert set(data.LAYOUTS) == {*finetune.TASKS, "pretrain"}


@pytest.mark.skipif(not (SHARED / "annotations").is_dir(), reason=f"no sample annotations at {SHARED / 'annotations'}")
def test_public_annotations_without_their_videos_are_all_missing(tmp_path, capsys):
    folder = shutil.copytree(SHARED / "annotations" / "tgif_qa", tmp_path / "tgif_qa")
    code, out, found = check(capsys, "tgif_qa", folder)
    assert code == 1 and {key: len(lines) for key, lines in found.items() if "missing" in key[0]} == {
        ("all videos missing", "train"): 200, ("all videos missing", "test"): 200}  # fmt: skip
    assert "--allow_missing" not in out  # which takes at least one
