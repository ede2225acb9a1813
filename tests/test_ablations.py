"""The changed function of tests/ablations.py that chooses clips by what they show; what comes of it is not tested."""

import ablations
import pytest
import torch
from PIL import Image

import data


@pytest.fixture
def video(tmp_path):
    """32 frames of noise on grey, four a second; three of them, at 5 s, are bright on one side."""
    generator, frames = torch.Generator().manual_seed(0), []
    for i in range(32):
        pixels = torch.randint(60, 64, (40, 40), generator=generator, dtype=torch.uint8)
        if 19 <= i <= 21:
            pixels[:, 20:] += 150
        frames.append(Image.fromarray(pixels.numpy()))
    frames[0].save(tmp_path / "moment.gif", save_all=True, append_images=frames[1:], duration=250)
    return tmp_path / "moment.gif"


def bright(clips):
    return [bool(clip.float().max() > 150) for clip in clips]


def test_clips_that_differ_find_the_moment_that_uniform_ones_miss(video, monkeypatch):
    read = data.read_clips
    monkeypatch.setattr(data, "read_clips", read)  # whatever is put there goes after the test
    ablations.different_clips()
    assert bright(read(video, 2, 1, 4.0, 32, False)) == [False, False]
    assert bright(data.read_clips(video, 2, 1, 4.0, 32, False)) == [False, True]
    assert data.read_clips(video, 1, 2, 4.0, 32, False).equal(read(video, 1, 2, 4.0, 32, False))  # the middle
    train = [way(video, 2, 1, 4.0, 32, True, torch.Generator().manual_seed(1)) for way in (read, data.read_clips)]
    assert train[0].equal(train[1])


@pytest.mark.parametrize("n", [1, 3, 8])
def test_farthest_points_take_each_place_once_in_order(n):
    levels = torch.arange(4 * n, dtype=torch.uint8)[:, None, None, None]  # grey levels that rise with time
    places = ablations.farthest_points(levels.expand(-1, 3, 8, 8), n)
    assert places == sorted(set(places)) and len(places) == n and 2 * n in places
    if n == 3:  # the middle, and what is farthest from it, both ends
        assert places == [0, 6, 11]
    assert len(set(ablations.farthest_points(torch.zeros(4 * n, 3, 8, 8), n))) == n  # all look alike
