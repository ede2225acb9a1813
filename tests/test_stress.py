"""Small samples of tests/stress.py, which damages files by the thousand; and that its judges tell right from wrong."""

import random
from pathlib import Path

import pytest
import stress
from PIL import Image

import data

SHARED = Path(__file__).resolve().parents[2] / "shared"


def test_damaged_annotations_are_read_as_they_stand_or_refused_in_one_line():
    figures, failures = stress.annotations(count=8 * len(stress.LAYOUTS))
    assert not failures, figures


def test_every_layout_is_read_as_its_oracle_reads_it(tmp_path):
    for name, (files, read, oracle) in stress.LAYOUTS.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content, encoding="utf-8", newline="")
        assert stress.judge_annotation(folder, [folder / file for file in files], read, oracle) == "examples", name


WRONG_LABELS = {  # what the judges must notice: a reader that ...
    "shifts answers": lambda examples: [e._replace(answer=f.answer)
                                        for e, f in zip(examples, examples[1:] + examples[:1], strict=True)],
    "drops a row": lambda examples: examples[1:],
    "repeats a row": lambda examples: [*examples, examples[0]],
    "swaps options": lambda examples: [e._replace(options=e.options[::-1]) for e in examples],
    "swaps videos": lambda examples: [e._replace(video=examples[0].video) for e in examples],
    "coerces": lambda examples: [e._replace(answer=float(e.answer)) for e in examples],
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_LABELS)
def test_the_judge_notices_a_reader_that(wrong, tmp_path):
    files, read, oracle = stress.LAYOUTS["tgif_qa_action"]
    (name, content), = files.items()
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    verdict = stress.judge_annotation(tmp_path, [tmp_path / name], lambda f: WRONG_LABELS[wrong](read(f)), oracle)
    assert verdict.startswith("not what stands there")


def test_damaged_media_give_frames_or_one_clear_error(tmp_path):
    video = tmp_path / "video.mp4"
    data.write_gif([Image.new("RGB", (32, 24), (9 * i, 0, 0)) for i in range(8)], tmp_path / "a.gif")
    data._ffmpeg("", ["-i", str(tmp_path / "a.gif"), "-pix_fmt", "yuv420p", str(video)])
    figures, failures = stress.media(tmp_path, cuts=3, errors=7)
    assert not failures and "20 damaged files of 2" in figures


@pytest.mark.skipif(not (SHARED / "videos").is_dir(), reason=f"the odd real files are not here: {SHARED / 'videos'}")
@pytest.mark.parametrize("name", ["mmaction2_test.avi error 93"])
def test_damaged_files_that_once_went_wrong(name, tmp_path):
    file, kind, _ = name.split()
    path = tmp_path / file
    path.write_bytes(stress.damage((SHARED / "videos" / file).read_bytes(), random.Random(name), kind))
    assert stress.judge_media(path) in ("frames", "error")
