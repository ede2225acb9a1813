"""Small samples of tests/stress.py, which damages files by the thousand; and that its judges tell right from wrong."""

import random
from pathlib import Path

import imageio_ffmpeg
import pytest
import stress
from PIL import Image

import data

SHARED = Path(__file__).resolve().parents[2] / "shared"


def test_damaged_annotations_are_read_as_they_stand_or_refused_in_one_line():
    figures, failures = stress.annotations(count=8 * len(stress.LAYOUTS))
    assert not failures, figures


def whole_files(folder, layout):
    for file, content in stress.LAYOUTS[layout][3].items():
        (folder / file).write_text(content, encoding="utf-8", newline="")


@pytest.mark.parametrize("layout", stress.LAYOUTS)
def test_every_layout_is_read_as_its_oracle_reads_it(layout, tmp_path):
    whole_files(tmp_path, layout)
    assert stress.judge_annotation(tmp_path, layout) == "examples"


WRONG_LABELS = {  # what the judge must notice: a reader that ... (video, text, options, answer)
    "shifts answers": lambda facts: [(*fact[:3], facts[i - 1][3]) for i, fact in enumerate(facts)],
    "drops a row": lambda facts: facts[1:],
    "repeats a row": lambda facts: [*facts, facts[0]],
    "swaps options": lambda facts: [(video, text, options[::-1], answer) for video, text, options, answer in facts],
    "swaps videos": lambda facts: [(facts[0][0], *fact[1:]) for fact in facts],
    "coerces": lambda facts: [(*fact[:3], float(fact[3])) for fact in facts],
}


@pytest.mark.parametrize("wrong", WRONG_LABELS)
def test_the_judge_notices_a_reader_that(wrong, tmp_path, monkeypatch):
    def read(folder, split):
        return WRONG_LABELS[wrong](list(map(facts, data.LAYOUTS["tgif_qa_action"].read(folder, split=split))))

    facts = stress.facts
    monkeypatch.setattr(stress, "facts", lambda fact: fact)
    whole_files(tmp_path, "tgif_qa_action")
    assert stress.judge_annotation(tmp_path, "tgif_qa_action", read).startswith("not what stands there")


def test_damaged_media_give_frames_or_one_clear_error(tmp_path):
    frames = [Image.new("RGB", (32, 32), (9 * i, 0, 0)) for i in range(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    writer = imageio_ffmpeg.write_frames(str(tmp_path / "b.mp4"), (32, 32))
    writer.send(None)
    for frame in frames:
        writer.send(frame.tobytes())
    writer.close()
    figures, failures = stress.media(tmp_path, 20)
    assert not failures and "20 damaged files of 2" in figures


@pytest.mark.skipif(not (SHARED / "videos").is_dir(), reason=f"the odd real files are not here: {SHARED / 'videos'}")
@pytest.mark.parametrize("name", ["mmaction2_test.avi error 93"])
def test_damaged_files_that_once_went_wrong(name, tmp_path):
    file, kind, _ = name.split()
    path = tmp_path / file
    path.write_bytes(stress.damage((SHARED / "videos" / file).read_bytes(), random.Random(name), kind))
    assert stress.judge_media(path) in ("frames", "error")
