"""Small samples of tests/stress.py, which damages files by the thousand; and that its judge notices mistakes."""

import random

import pytest
import stress
from conftest import SHARED
from test_media import make_gif, make_video

import data


def test_damaged_annotations_are_read_as_they_stand_or_refused_in_one_line():
    figures, failures = stress.annotations(6 * len(stress.LAYOUTS))
    assert not failures, figures


def save_whole(folder, layout):
    for file in stress.LAYOUTS[layout][2].items():
        stress.save(folder, *file)


@pytest.mark.parametrize("layout", stress.LAYOUTS)
def test_every_layout_is_read_as_a_naive_reading_has_it(layout, tmp_path):
    save_whole(tmp_path, layout)
    assert stress.judge_annotation(layout, tmp_path) == "read"


WRONG_LABELS = {  # a reader that ...
    "shifts answers": lambda rows: [row._replace(answer=rows[i - 1].answer) for i, row in enumerate(rows)],
    "drops a row": lambda rows: rows[1:],
    "swaps options": lambda rows: [row._replace(options=row.options[::-1]) for row in rows],
    "swaps videos": lambda rows: [row._replace(video=rows[0].video) for row in rows],
    "coerces": lambda rows: [row._replace(answer=float(row.answer)) for row in rows],
}


@pytest.mark.parametrize("wrong", WRONG_LABELS)
def test_the_judge_notices_a_reader_that(wrong, tmp_path):
    def read(*asked):
        return WRONG_LABELS[wrong](data.read_examples(*asked))

    layout = "tgif_qa-Train_action_question.csv"
    save_whole(tmp_path, layout)
    assert stress.judge_annotation(layout, tmp_path, read).startswith("not what stands there")


def test_damaged_media_give_frames_or_one_clear_error(tmp_path):
    make_gif(tmp_path / "a.gif")
    make_video(tmp_path / "b.mp4", 8)
    figures, failures = stress.media(tmp_path, 20)
    assert not failures and "20 damaged files" in figures


@pytest.mark.skipif(not (SHARED / "videos").is_dir(), reason=f"the odd real files are not here: {SHARED / 'videos'}")
@pytest.mark.parametrize("name", ["mmaction2_test.avi error 93"])
def test_damaged_files_that_once_went_wrong(name, tmp_path):
    file, kind, _ = name.split()
    path = tmp_path / file
    path.write_bytes(stress.damage((SHARED / "videos" / file).read_bytes(), random.Random(name), kind))
    assert stress.judge_media(path) in ("read", "error")


@pytest.mark.parametrize("command, size", [("kill", [2]), ("disk", []), ("soak", [100])])
def test_disturbed_runs_end_as_the_undisturbed_one_and_leave_nothing_behind(command, size, monkeypatch):
    monkeypatch.setattr(stress, "STEPS", ["--max_steps", 12, "--save_every", 1])
    figures, failures = getattr(stress, command)(*size)
    assert not failures, figures
