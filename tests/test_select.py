"""--select difference: in testing, the clips that differ most; nothing else changes."""

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


def bright(frames):
    return [bool(clip.float().max() > 150) for clip in frames]


def test_selection_finds_the_moment_that_uniform_clips_miss(video):
    assert bright(data.read_clips(video, 2, 1, 4.0, 32, False)) == [False, False]
    assert bright(data.read_clips(video, 2, 1, 4.0, 32, False, select="difference")) == [False, True]
    again = data.read_clips(video, 3, 2, 4.0, 32, False, select="difference")
    assert again.shape == (3, 2, 3, 32, 32) and any(bright(again))
    assert again.equal(data.read_clips(video, 3, 2, 4.0, 32, False, select="difference"))


def test_the_cache_selects_the_same(video):
    plain = data.read_clips(video, 2, 1, 4.0, 32, False, select="difference")
    data.write_cached(video, 32, 4.0)
    cached = data.read_clips(video, 2, 1, 4.0, 32, False, cache=True, select="difference")
    assert not cached.equal(plain) and (cached.float() - plain.float()).abs().mean() < 3  # JPEG of the same frames


@pytest.mark.parametrize("n_clips", [1, 3, 8])
def test_selected_clips_are_some_of_the_candidates_each_once_in_the_order_of_time(n_clips):
    def read(indices):
        return torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()

    candidates = data.sample_clips(100, 10.0, 4 * n_clips, 2, 2.0, False).tolist()
    clips = data.select_clips(read, 100, 10.0, n_clips, 2, 2.0).tolist()
    assert clips == sorted(clips) and len({tuple(clip) for clip in clips}) == n_clips
    assert all(clip in candidates for clip in clips)
    if n_clips == 1:  # the middle one, as ever
        assert clips == data.sample_clips(100, 10.0, 1, 2, 2.0, False).tolist()
    if n_clips == 3:  # of grey levels that rise with time: the middle, and what is farthest from it, both ends
        assert clips == [candidates[0], candidates[6], candidates[11]]


def test_a_video_of_which_all_frames_look_alike_and_a_still():
    def read(indices):
        return torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)

    clips = data.select_clips(read, 100, 10.0, 4, 1, 1.0)
    assert len(set(clips.flatten().tolist())) == 4
    assert data.select_clips(read, 1, 1.0, 4, 2, 1.0).tolist() == [[0, 0]] * 4


def test_only_testing_selects(video):
    pairs = [data.read_clips(video, 2, 1, 4.0, 32, True, torch.Generator().manual_seed(1), select=select)
             for select in ("uniform", "difference")]  # fmt: skip
    assert pairs[0].equal(pairs[1])
    examples = [data.Example("0", "moment.gif", "what ?")]
    options = {"n_clips": 2, "n_frames": 1, "fps": 4.0, "size": 32, "select": "difference"}
    assert bright(data.ClipDataset(examples, video.parent, train=False, **options)[(0, 0)]["frames"]) == [False, True]
