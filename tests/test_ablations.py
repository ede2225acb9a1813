"""tests/ablations.py: its runs can be made, a changed function does what it says; what comes of them is not tested."""

import ablations
import pytest
import torch

import clipbert
import data
import finetune


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
        """Noise on grey; the sixth of eight clips is bright on one side."""
        clips = torch.randint(60, 64, (n_clips, n_frames, 3, size, size), generator=torch.Generator().manual_seed(0))
        clips[5:6, ..., size // 2 :] += 150
        return clips.to(torch.uint8)

    monkeypatch.setattr(data, "read_clips", read)
    ablations.different_clips()
    assert read("", 2, 1, 1.0, 32, False).max() < 150
    assert [clip.max() > 150 for clip in data.read_clips("", 2, 1, 1.0, 32, False)] == [False, True]
    assert data.read_clips("", 1, 2, 1.0, 32, False).equal(read("", 4, 2, 1.0, 32, False)[2:3])  # the middle
    assert data.read_clips("", 2, 1, 1.0, 32, True).equal(read("", 2, 1, 1.0, 32, True))  # training: as ever


@pytest.mark.parametrize("n", [1, 3, 8])
def test_farthest_points_take_each_place_once_in_order(n):
    levels = torch.arange(4 * n, dtype=torch.uint8)[:, None, None, None]  # grey levels that rise with time
    places = ablations.farthest_points(levels.expand(-1, 3, 8, 8), n)
    assert places == sorted(set(places)) and len(places) == n and 2 * n in places
    assert n != 3 or places == [0, 6, 11]  # the middle, and what is farthest from it, both ends
    assert len(set(ablations.farthest_points(torch.zeros(4 * n, 3, 8, 8), n))) == n  # all look alike
