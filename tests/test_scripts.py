"""Small samples of ablations.py, benchmark.py and stress.py; that a changed function and a judge do what they say.

What comes of the ablations and how fast what is are not tested.
"""

from dataclasses import replace

import ablations
import benchmark
import pytest
import stress
import torch
from test_media import make_gif, make_video

import clipbert
import data
import finetune

SMALL = replace(clipbert.ClipBertConfig.tiny(50), hidden_size=32, num_hidden_layers=1, intermediate_size=32)


def test_variants_give_flags_that_there_are_and_one_of_them_runs(toy_videos, monkeypatch):
    for _, variants in ablations.CLAIMS.values():
        for variant in variants.values():
            finetune.parse_arguments([*variant.start.split(), *variant.flags.split()])
    monkeypatch.setattr(data, "read_clips", data.read_clips)  # whatever is put there goes after the test
    monkeypatch.setattr(clipbert.ClipBert, "encode_frames", clipbert.ClipBert.encode_frames)
    flags = f"--data {toy_videos} --max_steps 1 --grad_accum 1 --size 32 --test_clips 1 2"
    changes = (ablations.other_videos, ablations.different_clips, ablations.frozen_cnn)
    assert ablations.train(ablations.Variant(flags, changes, start=""), seed=0).keys() == {"1", "2"}


def test_clips_that_differ_find_the_moment_that_uniform_ones_miss(monkeypatch):
    def read(path, n_clips, n_frames, fps, size, train):
        """Noise on grey; the fourth of eight clips is bright on one side."""
        clips = torch.randint(60, 64, (n_clips, n_frames, 3, size, size), generator=torch.Generator().manual_seed(0))
        clips[3:4, ..., size // 2 :] += 150
        return clips.to(torch.uint8)

    monkeypatch.setattr(data, "read_clips", read)
    ablations.different_clips()
    assert read("", 2, 1, 1.0, 32, False).max() < 150
    assert [clip.max() > 150 for clip in data.read_clips("", 2, 1, 1.0, 32, False)] == [True, False]
    assert data.read_clips("", 1, 2, 1.0, 32, False).equal(read("", 4, 2, 1.0, 32, False)[2:3])  # the middle
    assert data.read_clips("", 2, 1, 1.0, 32, True).equal(read("", 2, 1, 1.0, 32, True))  # training: as ever
    assert ablations.farthest_points(torch.zeros(8, 3, 32, 32), 8) == list(range(8))  # each once, though all look alike


def test_plain_and_our_step_are_measured_for_both_tasks_and_agree_at_first(capsys):
    benchmark.step(SMALL, size=32, videos=1)
    benchmark.memory(SMALL, size=32)
    benchmark.agree(steps=2, videos=1)
    said = capsys.readouterr().out
    assert said.count("; aim: 2x") == said.count("GiB a video") == said.count(": agreed") == 2


def test_damaged_annotations_are_read_as_they_stand_or_refused_in_one_line():
    figures, failures = stress.annotations(6 * len(stress.LAYOUTS))
    assert not failures, figures


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
    for file in stress.LAYOUTS[layout][2].items():
        stress.save(tmp_path, *file)
    assert stress.judge_annotation(layout, tmp_path) == "read"
    assert stress.judge_annotation(layout, tmp_path, read).startswith("not what stands there")


def test_damaged_media_give_frames_or_one_clear_error(tmp_path):
    make_gif(tmp_path / "a.gif")
    make_video(tmp_path / "b.mp4", 8)
    figures, failures = stress.media(tmp_path, 20)
    assert not failures and "20 damaged files" in figures


@pytest.mark.parametrize("command, size", [("kill", [2]), ("disk", []), ("soak", [100])])
def test_disturbed_runs_end_as_the_undisturbed_one_and_leave_nothing_behind(command, size, monkeypatch):
    monkeypatch.setattr(stress, "STEPS", ["--max_steps", 12, "--save_every", 1])
    figures, failures = getattr(stress, command)(*size)
    assert not failures, figures
