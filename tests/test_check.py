"""`python data.py check`: every kind of finding is found where it was planted, and nothing in whole data."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import data
import finetune
import pretrain

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    data.write_toy_tgif_qa(folder, train=50, test=2)  # every answer stands in training
    return folder


@pytest.fixture
def toy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "toy"))


def check(capsys, *arguments):
    """-> (exit code, what it printed, {(what, split): [names]} of its report)."""
    report = Path(arguments[arguments.index("--data") + 1]) / "report.tsv"
    with pytest.raises(SystemExit) as stop:
        data.main(["check", *map(str, arguments), "--report", str(report), "--workers", "1"])
    header, *rows = [line.split("\t") for line in report.read_text(encoding="utf-8").splitlines()]
    assert header == ["what", "split", "name", "detail"]
    found = {}
    for what, split, name, _ in rows:
        found.setdefault((what, split), []).append(name)
    return int(stop.value.code), capsys.readouterr().out, found


def table(out):
    """{row: numbers} of the printed table."""
    rows = [line for line in out.split("\n\n")[1].splitlines()[1:]]
    return {row[:24].strip(): row[24:].split() for row in rows}


def test_nothing_is_found_in_whole_data(toy, capsys):
    for task in ("tgif_qa", "tgif_qa_transition", "tgif_qa_frameqa", "tgif_qa_count"):
        code, out, found = check(capsys, "--task", task, "--data", toy, "--deep")
        assert (code, found) == (0, {}) and "nothing here would stop a run" in out
        assert table(out)["examples"] == ["100" if task == "tgif_qa_transition" else "50", "2"]
        assert table(out)["videos"] == ["50", "2"]


def test_every_kind_of_damage_is_found_where_it_is(toy, tmp_path, capsys):
    gifs, names = toy / "gifs", [f"toy_train_{i:04d}" for i in range(6)]
    (gifs / f"{names[0]}.gif").unlink()
    (gifs / f"{names[1]}.gif").write_bytes(b"GIF89a")
    data.write_gif([data.Image.new("RGB", (9, 9))], gifs / f"{names[2]}.gif")
    test = toy / "Test_action_question.csv"
    header, *rows = test.read_text().splitlines()
    cells = rows[0].split("\t")
    said = " ".join(["word"] * 22)
    more = [rows[0], rows[0].replace(cells[0], names[5]),  # the same row; the same id, of a video of training
            "\t".join([cells[0], said, "a b c", *cells[3:8], "CUT", "1"]),  # room for one word of an option
            "\t".join([cells[0], f"{said} word", *cells[2:8], "LOST", "1"])]  # room for none
    test.write_text("\n".join([header, *rows, *more]) + "\n")
    code, out, found = check(capsys, "--data", toy)
    assert code == 1 and "a run would stop: videos missing" in out
    assert found == {
        ("videos missing", "train"): [names[0]], ("videos unreadable", "train"): [names[1]],
        ("videos without motion", "train"): [names[2]],
        ("videos also in train", "test"): [names[5]], ("same row twice", "test"): [cells[8]],
        ("same id twice", "test"): [cells[8]] * 2, ("option cut", "test"): ["CUT"], ("option lost", "test"): ["LOST"],
    }  # fmt: skip
    assert table(out)["videos missing"] == ["1", "-"] and table(out)["same id twice"] == ["-", "2"]
    assert "word" in out and "--allow_missing" in out  # the first of each kind, and what to do


def test_answers_outside_the_list_of_training(toy, capsys):
    test = toy / "Test_frameqa_question.csv"
    test.write_text(test.read_text().rstrip() + "\n" + "toy_test_0000\twhat ?\ta zebra\t0\tNEW\t9\n")
    assert check(capsys, "--task", "tgif_qa_frameqa", "--data", toy)[2] == {("answer not in list", "test"): ["NEW"]}
    (toy / "ans2label.json").write_text(json.dumps({"a zebra": 0}))
    found = check(capsys, "--task", "tgif_qa_frameqa", "--data", toy)[2]
    assert {key: len(names) for key, names in found.items()} == {("answer not in list", s): n
                                                                for s, n in (("train", 50), ("test", 2))}  # fmt: skip


def test_annotations_that_cannot_be_read_are_one_finding(toy, capsys):
    path = toy / "Train_count_question.csv"
    path.write_text(path.read_text().replace("\tCOUNT3", ""))
    code, out, found = check(capsys, "--task", "tgif_qa_count", "--data", toy)
    assert code == 1 and list(found) == [("annotations unreadable", "train")] and f"{path}:5: 4 columns" in out
    path.unlink()
    code, out, _ = check(capsys, "--task", "tgif_qa_count", "--data", toy)
    assert code == 1 and "no annotation file; looked for Train_count_question*.csv" in out
    assert table(out)["examples"] == ["-", "2"]


def test_deep_finds_what_the_header_hides(tmp_path, capsys):
    """A video whose pictures are gone, behind a whole header."""
    data.write_toy_msrvtt(tmp_path, train=1, test=5)
    gif, video = tmp_path / "videos" / "video5.gif", tmp_path / "videos" / "video5.mp4"
    data._ffmpeg(str(gif), ["-i", str(gif), "-pix_fmt", "yuv420p", "-movflags", "faststart", str(video)])
    gif.unlink()
    assert check(capsys, "--task", "msrvtt_retrieval", "--data", tmp_path, "--deep")[2] == {}
    content = video.read_bytes()
    video.write_bytes(content[: content.index(b"mdat") + 8])
    assert check(capsys, "--task", "msrvtt_retrieval", "--data", tmp_path)[2] == {}
    found = check(capsys, "--task", "msrvtt_retrieval", "--data", tmp_path, "--deep")[2]
    assert found == {("videos unreadable", "train"): ["video5"]}


def test_photos_need_no_motion_and_captions_are_cut_at_the_text_length(tmp_path, capsys):
    data.write_toy_coco(tmp_path, train=3, val=2)
    assert check(capsys, "--task", "pretrain", "--data", tmp_path)[::2] == (0, {})
    code, _, found = check(capsys, "--task", "pretrain", "--data", tmp_path, "--text_length", 6)
    captions = [e for split in ("train", "val") for e in data.read_captions(tmp_path, split)]
    long = Counter("train" if "train" in e.id else "val" for e in captions if len(e.text.split()) > 4)
    assert code == 0 and {split: len(names) for (_, split), names in found.items()} == long


def test_test_split_of_the_toy_photos_shows_its_own_photos(tmp_path):
    """VQA's questions name a photo by its number alone: no number may stand for two."""
    data.write_toy_vqa(tmp_path, train=3, test=2)
    for split, place in (("train", "train2014"), ("test", "val2014")):
        assert {data.find_media(tmp_path, e.video).parent.name for e in data.read_examples("vqa", tmp_path, split)} == {place}


def test_layouts_are_those_of_the_scripts():
    assert set(data.LAYOUTS) == {*finetune.TASKS, "pretrain"}
    assert data.LAYOUTS["pretrain"].text_length == pretrain.PAPER["text_length"]
    assert [finetune.TASKS[name].text_length for name in ("tgif_qa_action", "msrvtt_qa", "vqa")] == [25, 100, 20]
    assert all(what in data.FINDINGS for what in ("videos missing", "option lost"))


@pytest.mark.skipif(not (SHARED / "annotations").is_dir(), reason=f"no sample annotations at {SHARED / 'annotations'}")
def test_public_annotations_without_their_videos_are_all_missing(tmp_path, capsys):
    folder = shutil.copytree(SHARED / "annotations" / "tgif_qa", tmp_path / "tgif_qa")
    code, _, found = check(capsys, "--data", folder)
    assert code == 1 and {key: len(names) for key, names in found.items() if "missing" in key[0]} == {
        ("videos missing", "train"): 200, ("videos missing", "test"): 200}  # fmt: skip
