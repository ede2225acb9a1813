"""The tests of the exercises. One exercise at a time: `python -m pytest -k exercise3_`

Each exercise is tested without the help of any other: where a function calls another exercise's, a stand-in is put in
its place. Where numbers are stored, they were recorded from the authors' implementation (the golden_* files beside
this one) or can be checked by hand.
"""

import gzip
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import exercises
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import nn

import clipbert
import data
import finetune

HERE = Path(__file__).resolve().parent
GOLDEN, PRETRAIN, RETRIEVAL = (
    json.loads((HERE / f"golden_{name}.json").read_text()) for name in ("clipbert", "pretrain", "retrieval")
)
TENSORS = load(gzip.decompress((HERE / "golden_tensors.safetensors.gz").read_bytes()))
TINY = replace(clipbert.ClipBertConfig.tiny(vocab_size=200), hidden_size=32, layers=2, intermediate_size=64)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def stored(name):
    """A copy: nothing that a solution does to it reaches the next test."""
    return TENSORS[f"multichoice/{name}"].clone()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=seeded(seed)) * scale


def uses_only(generator, function):
    """Run function() and check that all its random numbers came from `generator`: torch's own state stays as it was."""
    before, own = torch.get_rng_state(), generator.get_state()
    result = function()
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(generator.get_state(), own)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 1: clip sampling

# From the authors' decoder: (num_frames, fps, n_frames, target_fps, n_clips, clip, selected frames).
UNIFORM = [
    (1, 25.0, 2, 2, 16, 4, [0, 0]), (7, 25.0, 1, 1, 4, 3, [0]), (7, 25.0, 2, 2, 8, 4, [0, 6]),
    (7, 25.0, 3, 3, 2, 1, [0, 6, 6]), (7, 25.0, 4, 2, 16, 2, [0, 6, 6, 6]), (20, 10.0, 2, 2, 16, 12, [8, 17]),
    (20, 10.0, 3, 3, 2, 0, [0, 4, 9]), (20, 10.0, 3, 3, 4, 2, [5, 9, 14]), (20, 10.0, 4, 2, 8, 6, [0, 6, 12, 19]),
    (90, 30.0, 1, 1, 16, 4, [15]), (90, 30.0, 2, 1, 16, 2, [4, 63]), (90, 30.0, 2, 2, 16, 10, [38, 67]),
    (300, 30.0, 1, 1, 8, 6, [203]), (300, 30.0, 2, 2, 4, 2, [135, 164]), (300, 30.0, 2, 2, 16, 2, [34, 63]),
    (300, 30.0, 3, 3, 16, 0, [0, 14, 29]), (372, 29.97, 2, 1, 16, 6, [118, 176]), (372, 29.97, 2, 2, 4, 0, [0, 28]),
    (372, 29.97, 2, 2, 16, 10, [214, 242]), (372, 29.97, 3, 3, 4, 1, [86, 100, 114]),
]  # fmt: skip


def sample(num_frames, fps, n_clips, n_frames, target_fps, train=False, seed=0):
    return data.sample_clips(num_frames, fps, n_clips, n_frames, target_fps, train, seeded(seed))


def test_exercise1_uniform_clips_are_the_references():
    for num_frames, fps, n_frames, target_fps, n_clips, clip, expected in UNIFORM:
        clips = sample(num_frames, fps, n_clips, n_frames, target_fps)
        assert clips.shape == (n_clips, n_frames) and clips.dtype == torch.int64
        assert clips[clip].tolist() == expected
    assert sample(300, 30.0, 8, 2, 2)[:, 0].tolist() == [0, 34, 68, 102, 135, 169, 203, 237]
    assert sample(300, 30.0, 2, 3, 2).tolist() == [[0, 22, 44], [128, 150, 172]]  # a second and a half
    assert sample(200, 25.0, 2, 2, 0.8).tolist() == [[0, 61], [69, 130]]  # two and a half: 62.5 frames


def test_exercise1_one_test_clip_is_the_middle():
    assert sample(300, 30.0, 1, 2, 2).tolist() == [[135, 164]]
    assert sample(7, 4.0, 1, 1, 1).tolist() == [[2]]  # starts at 1.5: the next frame
    assert sample(16, 4.0, 1, 4, 2).tolist() == [[4, 6, 8, 11]]
    assert sample(3, 30.0, 1, 2, 1).tolist() == [[0, 2]]


def test_exercise1_testing_is_not_random():
    for n_clips in (1, 2, 16):
        assert sample(300, 30.0, n_clips, 2, 2, seed=1).equal(sample(300, 30.0, n_clips, 2, 2, seed=2))
        assert data.sample_clips(300, 30.0, n_clips, 2, 2, False).equal(sample(300, 30.0, n_clips, 2, 2))


def test_exercise1_training_clips_are_whole_clips_of_the_video():
    for num_frames, fps, n_frames, target_fps in [
        (300, 30.0, 2, 2), (300, 30.0, 1, 1), (61, 29.97, 4, 2), (90, 10.0, 3, 1), (20, 4.0, 16, 16), (9, 0.5, 2, 0.25),
        (1, 1.0, 1, 1), (3, 30.0, 4, 2), (300, 0.2, 2, 2), (5, 1.0, 8, 1),
    ]:  # fmt: skip
        clips = sample(num_frames, fps, 50, n_frames, target_fps, train=True)
        assert clips.shape == (50, n_frames) and clips.dtype == torch.int64
        assert clips.min() >= 0 and clips.max() < num_frames
        # The frames of a random clip are as far apart as those of a uniform one.
        offsets = sample(num_frames, fps, 2, n_frames, target_fps)[0]
        assert clips.equal((clips[:, :1] + offsets).clamp(max=num_frames - 1))
        if n_frames / target_fps * fps <= num_frames:  # no clip needs a frame twice
            assert (clips - clips[:, :1]).equal(offsets.expand(50, n_frames))


def test_exercise1_training_starts_are_uniform_and_independent():
    starts = torch.cat([sample(300, 30.0, 4, 2, 2, train=True, seed=i)[:, :1].T for i in range(400)]).double()
    assert (starts.mean(0) - 135).abs().max() < 15  # each of the four clips is anywhere in 0 .. 270
    assert (starts.std(0) - 270 / math.sqrt(12)).abs().max() < 8
    assert starts.T.corrcoef().fill_diagonal_(0).abs().max() < 0.2
    assert starts.min() < 10 and starts.max() > 260


def test_exercise1_training_reaches_the_end_of_the_video():
    for num_frames, fps, n_frames, target_fps in [(5, 1.0, 1, 1), (8, 2.0, 2, 1), (62, 30.0, 2, 1)]:
        clips = sample(num_frames, fps, 400, n_frames, target_fps, train=True)
        assert clips.max() == num_frames - 1
        assert clips[:, 0].min() <= 1
        counts = Counter(clips[:, 0].tolist())
        assert min(counts[start] for start in range(1, clips[:, 0].max() + 1)) > 40


def test_exercise1_the_generator_decides():
    generator = seeded(0)
    first = uses_only(generator, lambda: data.sample_clips(300, 30.0, 8, 2, 2, True, generator))
    assert first.equal(sample(300, 30.0, 8, 2, 2, train=True))
    assert not first.equal(sample(300, 30.0, 8, 2, 2, train=True, seed=1))
    assert not first.equal(data.sample_clips(300, 30.0, 8, 2, 2, True, generator))  # it goes on
    assert data.sample_clips(300, 30.0, 8, 2, 2, True).shape == (8, 2)  # None: torch's own


def test_exercise1_a_single_training_clip_is_random_too():
    starts = [sample(300, 30.0, 1, 2, 2, train=True, seed=i)[0, 0].item() for i in range(100)]
    assert len(set(starts)) > 50 and min(starts) < 40 and max(starts) > 230


def test_exercise1_training_starts_are_no_whole_numbers_and_rounded_up():
    assert sample(2, 1.0, 400, 1, 1, train=True).eq(1).all()  # starts in (0, 1]
    first = sample(3, 1.0, 4000, 1, 0.8, train=True)[:, 0]  # 0 to 1.75: frame 1 from (0, 1], frame 2 from (1, 1.75]
    assert abs((first == 2).float().mean() - 0.75 / 1.75) < 0.04


def test_exercise1_a_clip_shorter_than_a_frame_is_that_frame():
    for train in (False, True):
        clips = sample(10, 0.2, 8, 2, 2, train=train)
        assert clips.min() >= 0 and clips[:, 0].equal(clips[:, 1])
    assert sample(10, 0.2, 8, 2, 2)[0].tolist() == [0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 2: resize and pad


def test_exercise2_long_side_to_size_short_side_truncated():
    for height, width, size, expected in [
        (240, 320, 448, (336, 448)), (360, 640, 224, (126, 224)), (360, 640, 1000, (562, 1000)), (9, 7, 24, (24, 18)),
        (1000, 999, 1000, (1000, 999)), (3, 5, 48, (28, 48)), (1, 5000, 16, (1, 16)), (64, 64, 96, (96, 96)),
    ]:  # fmt: skip
        assert data.resized_shape(height, width, size) == expected
        assert data.resized_shape(width, height, size) == expected[::-1]
        if max(height, width, size) < 400:
            padded = data.resize_and_pad(torch.full((3, height, width), 7.0), size)
            content = torch.zeros(size, size)
            content[: expected[0], : expected[1]] = 7
            close(padded, content.expand(3, size, size))


def test_exercise2_bilinear_by_hand():
    frame = torch.tensor([0.0, 40.0, 80.0, 120.0]).expand(5, 3, 2, 4)
    row = torch.tensor([0.0, 10.0, 30.0, 50.0, 70.0, 90.0, 110.0, 120.0])  # weights 1/4 and 3/4
    close(data.resize_and_pad(frame, 8), F.pad(row.expand(5, 3, 4, 8), (0, 0, 0, 4)))
    ramp = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0]).expand(3, 8, 8)
    close(data.resize_and_pad(ramp, 4)[0, 0], [0.5, 6.5, 20.5, 42.5])
    close(data.resize_and_pad(ramp, 2)[0, 0], [2.5, 30.5])  # no antialiasing: only the two pixels beside the centre
    close(data.resize_and_pad(ramp.transpose(1, 2), 2)[0, :, 0], [2.5, 30.5])


def test_exercise2_stored_numbers_of_an_odd_frame():
    frame = (torch.arange(105).view(3, 5, 7) * 37 % 101).float()
    expected = [
        [10.2083, 50.2188, 47.0938, 31.3438, 69.2500, 31.4063], [43.5833, 70.9688, 51.0104, 35.2604, 52.1250, 60.5729],
        [46.4479, 31.7500, 59.1354, 43.3854, 60.2500, 68.6979], [33.5312, 65.1250, 71.4688, 55.7188, 27.3438, 48.4167],
    ]  # fmt: skip
    small = data.resize_and_pad(frame, 6)
    assert small.shape == (3, 6, 6) and (small[:, 4:] == 0).all()
    close(small[0, :4], torch.tensor(expected), 1e-3)
    assert data.resize_and_pad(frame.byte(), 6)[0, :4].equal(torch.tensor(expected).round().byte())


def test_exercise2_bytes_are_rounded_not_cut_off():
    frames = torch.randint(0, 256, (2, 3, 12, 20), generator=seeded(0), dtype=torch.uint8)
    exact = data.resize_and_pad(frames.float(), 13)
    rounded = data.resize_and_pad(frames, 13)
    assert rounded.dtype == torch.uint8 and exact.dtype == torch.float32
    assert (rounded - exact).abs().max() <= 0.5 + 1e-4
    assert (rounded.float() - exact)[:, :, :7].mean().abs() < 0.05
    assert data.resize_and_pad(torch.full((3, 4, 6), 255, dtype=torch.uint8), 9)[:, :6].eq(255).all()
    assert data.resize_and_pad(frames.double(), 13).dtype == torch.float64


def test_exercise2_any_leading_axes():
    frames = torch.randint(0, 256, (2, 5, 4, 3, 6, 9), generator=seeded(1), dtype=torch.uint8)
    padded = data.resize_and_pad(frames, 12)
    assert padded.shape == (2, 5, 4, 3, 12, 12)
    assert data.resize_and_pad(frames[0], 12).equal(padded[0])
    assert data.resize_and_pad(frames[1, 2, 3], 12).equal(padded[1, 2, 3])
    tall = data.resize_and_pad(frames.transpose(-1, -2), 12)  # padded on the right; not contiguous
    assert tall[..., 8:].eq(0).all() and tall[..., :8].gt(0).any()
    assert (tall.int() - padded.transpose(-1, -2).int()).abs().max() <= 1  # a half may be rounded either way


def test_exercise2_the_right_size_stays_as_it_is():
    frames = torch.randint(0, 256, (2, 3, 10, 16), generator=seeded(2), dtype=torch.uint8)
    before = frames.clone()
    padded = data.resize_and_pad(frames, 16)
    assert padded[:, :, :10].equal(frames) and padded[:, :, 10:].eq(0).all()
    square = data.resize_and_pad(frames[..., :10], 10)
    assert square.equal(before[..., :10]) and frames.equal(before)


def test_exercise2_floats_keep_their_range_and_precision():
    frames = torch.tensor([-300.0, 900.0]).view(1, 1, 2).expand(3, 2, 2)
    assert data.resize_and_pad(frames, 2).equal(frames)
    larger = data.resize_and_pad(frames, 4)
    assert (larger.min(), larger.max()) == (-300, 900)
    double = normal(3, 4, 6).double() + 1e-9
    close(data.resize_and_pad(double, 6)[:, :4], double, 1e-12)


def test_exercise2_on_any_device():
    frames = normal(3, 4, 6)
    with torch.device("meta"):
        assert data.resize_and_pad(frames, 9).device == frames.device


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 3: visual tokens


def visual_embedding(plain=False, dropout=0.0):
    """A VisualEmbedding; plain: without LayerNorm, so that its sums can be seen."""
    torch.manual_seed(3)
    module = clipbert.VisualEmbedding(replace(TINY, dropout=dropout)).eval()
    if plain:
        module.LayerNorm = nn.Identity()
    return module


def test_exercise3_stored_tokens_of_the_reference():
    module, prefix = visual_embedding(), "multichoice/state/bert.visual_embeddings."
    state = {name.removeprefix(prefix): value for name, value in TENSORS.items() if name.startswith(prefix)}
    module.load_state_dict({name: state[name] for name in module.state_dict()})
    tokens = module(stored("in/visual_inputs_before_repeat"))  # (2, 2, 3, 4, 32): two frames, 3 x 4 cells
    close(tokens, stored("out/act.visual_embedding_output")[::5])


def test_exercise3_rows_columns_and_type_are_added_row_by_row():
    for h, w in ((3, 5), (5, 2), (1, 1)):
        module = visual_embedding(plain=True)
        tokens = module(torch.zeros(2, 1, h, w, 32))
        assert tokens.shape == (2, h * w, 32)
        row, column, kind = (
            t.weight for t in (module.row_position_embeddings, module.col_position_embeddings,
                               module.token_type_embeddings)
        )  # fmt: skip
        for y in range(h):
            for x in range(w):
                close(tokens[1, y * w + x], row[y] + column[x] + kind[0])


def test_exercise3_mean_over_frames():
    module, grid = visual_embedding(plain=True), normal(2, 1, 3, 4, 32)
    zero = module(torch.zeros_like(grid))
    close(module(grid) - zero, grid[:, 0].flatten(1, 2))
    for T in (2, 3, 7):
        close(module(grid.expand(2, T, 3, 4, 32)), module(grid))  # a still image seen T times
        frames = normal(2, T, 3, 4, 32, seed=T)
        close(module(frames.flip(1)), module(frames))
        close(module(frames) - zero, sum((module(frames[:, t : t + 1]) - zero) / T for t in range(T)))


def test_exercise3_every_video_by_itself():
    for module in (visual_embedding(), visual_embedding(plain=True)):
        grid = normal(3, 2, 2, 3, 32)
        before = grid.clone()
        together = module(grid)
        for i in range(3):
            close(module(grid[i : i + 1])[0], together[i])
        assert grid.equal(before)


def test_exercise3_tokens_are_normalised():
    tokens = visual_embedding()(normal(2, 2, 3, 4, 32, scale=50))
    close(tokens.mean(-1), torch.zeros(2, 12), 1e-4)
    close(tokens.std(-1, correction=0), torch.ones(2, 12), 1e-4)


def test_exercise3_dropout_comes_last_and_in_training_only():
    module, grid = visual_embedding(dropout=0.5), normal(4, 1, 5, 5, 32)
    tokens = module(grid)
    close(module(grid), tokens, 0)
    dropped = module.train()(grid)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    close(dropped[kept], 2 * tokens[kept])


def test_exercise3_kept_tokens_know_where_they_were():
    for module in (visual_embedding(), visual_embedding().train()):
        grid = normal(2, 2, 4, 6, 32)
        tokens, some = module(grid), module(grid, keep=7)
        assert some.shape == (2, 7, 32)
        places = torch.cdist(some[0], tokens[0]).argmin(1)
        assert len(places.unique()) == 7  # no place twice
        close(some, tokens[:, places])  # the same places in both videos
        for keep in (None, 24, 100):
            close(module(grid, keep=keep), tokens, 0)


def test_exercise3_kept_tokens_are_drawn_at_random():
    module, grid = visual_embedding(), normal(1, 1, 3, 4, 32)
    tokens, seen = module(grid)[0], Counter()
    for _ in range(300):
        seen.update(torch.cdist(module(grid, keep=3)[0], tokens).argmin(1).tolist())
    assert len(seen) == 12 and min(seen.values()) > 40  # 75 on average


def test_exercise3_a_grid_without_positions_is_refused():
    module = visual_embedding()
    assert module(torch.zeros(1, 1, 100, 1, 32)).shape == module(torch.zeros(1, 1, 1, 100, 32)).shape == (1, 100, 32)
    for shape in ((2, 101), (101, 2)):
        with pytest.raises(ValueError, match="101"):
            module(torch.zeros(1, 1, *shape, 32))


def test_exercise3_gradients_reach_every_frame_and_table_on_any_device():
    module, grid = visual_embedding(plain=True), normal(2, 4, 3, 3, 32).requires_grad_()
    with torch.device("meta"):  # whatever is made without asking where lands on another device than the grid
        module(grid).sum().backward()
    close(grid.grad, torch.full_like(grid, 0.25))
    close(module.row_position_embeddings.weight.grad[:4, 0], [6.0, 6.0, 6.0, 0.0])
    close(module.col_position_embeddings.weight.grad[:4, 0], [6.0, 6.0, 6.0, 0.0])


def test_exercise3_kept_places_are_any_places_by_torchs_seed():
    module, grid = visual_embedding(), normal(1, 1, 3, 4, 32)
    tokens = module(grid)[0]
    pairs = {frozenset(torch.cdist(module(grid, keep=2)[0], tokens).argmin(1).tolist()) for _ in range(600)}
    assert len(pairs) > 60  # of 66: neither neighbours nor a regular pattern
    once, again = (torch.manual_seed(1) and module(grid, keep=5) for _ in range(2))
    assert once.equal(again)


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 4: [text; grid] with its mask


def seen_as(tokens=None, of=()):
    """A stand-in for VisualEmbedding.forward (exercise 3): these tokens `of` these videos, or just the grid's cells."""

    def forward(self, grid, keep=None):
        if tokens is None:
            return grid[:, 0].flatten(1, 2)[:, :keep]
        return torch.stack([tokens[next(i for i, known in enumerate(of) if known.equal(x))] for x in grid])

    return mock.patch.object(clipbert.VisualEmbedding, "forward", forward)


def encoder():
    torch.manual_seed(4)
    return clipbert.ClipBert(TINY, 2).eval()


def texts(*lengths, longest=6, seed=0):
    """Random ids and a mask that keeps the first so many of each."""
    ids = torch.randint(1, 200, (len(lengths), longest), generator=seeded(seed))
    return ids, (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def fuse(model, grid, ids, mask, **more):
    with seen_as():
        return model.fuse(grid, ids, mask, **more)


def test_exercise4_stored_states_of_the_reference():
    model, prefix = encoder(), "multichoice/state/"
    clipbert.load_official_checkpoint(
        model, {"transformer." + k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)
                if "classifier" not in k}
    )  # fmt: skip
    grid, ids, mask = map(stored, ("in/visual_inputs_before_repeat", "in/text_input_ids", "in/text_input_mask"))
    with seen_as(stored("out/act.visual_embedding_output")[::5], of=grid):
        hidden, pooled = model.fuse(grid, ids, mask)  # 2 videos, 5 texts each
    close(hidden, stored("out/act.layer1"))
    close(pooled, stored("out/act.pooled_output"))


def test_exercise4_shapes_and_order_text_first():
    model, grid = encoder(), normal(2, 1, 2, 3, 32)
    ids, mask = texts(6, 4)
    hidden, pooled = fuse(model, grid, ids, mask)
    assert hidden.shape == (2, 6 + 6, 32) and pooled.shape == (2, 32)
    # Without layers, the states are what went in.
    model.bert.encoder.layer = nn.ModuleList()
    hidden, _ = fuse(model, grid, ids, mask)
    close(hidden[:, 6:], grid[:, 0].flatten(1, 2))
    close(hidden[:, :6], model.bert.embeddings(ids))


def test_exercise4_pooled_is_of_the_first_token():
    model = encoder()
    hidden, pooled = fuse(model, normal(2, 1, 2, 3, 32), *texts(6, 4))
    close(pooled, model.bert.pooler(hidden))


def test_exercise4_padding_is_never_seen():
    model, grid = encoder(), normal(3, 1, 2, 2, 32)
    ids, mask = texts(3, 1, 6)
    hidden, pooled = fuse(model, grid, ids, mask)
    other = torch.where(mask.bool(), ids, 199 - ids)
    assert not other.equal(ids)
    again, pooled_again = fuse(model, grid, other, mask)
    seen = torch.cat([mask.bool(), torch.ones(3, 4, dtype=torch.bool)], 1)
    close(again[seen], hidden[seen])
    close(pooled_again, pooled)
    longer = F.pad(ids, (0, 5)), F.pad(mask, (0, 5))
    close(fuse(model, grid, *longer)[1], pooled)
    for i, length in enumerate((3, 1, 6)):  # as if the padding had never been there
        alone = fuse(model, grid[i : i + 1], ids[i : i + 1, :length], mask[i : i + 1, :length])
        close(alone[1][0], pooled[i])
        close(alone[0][0, length:], hidden[i, 6:])


def test_exercise4_every_word_and_every_cell_is_seen():
    model, grid = encoder(), normal(2, 1, 2, 2, 32)
    ids, mask = texts(6, 3)
    _, pooled = fuse(model, grid, ids, mask)
    for place in range(3):
        changed = ids.clone()
        changed[:, place] = ids[:, place] % 199 + 1
        assert ((fuse(model, grid, changed, mask)[1] - pooled).abs().amax(1) > 1e-4).all()
    for y in range(2):
        for x in range(2):
            changed = grid.clone()
            changed[:, :, y, x] += 3 * normal(32, seed=5)
            assert ((fuse(model, changed, ids, mask)[1] - pooled).abs().amax(1) > 1e-4).all()


def test_exercise4_black_cells_are_not_masked():
    """Cells over the zero border of a frame take part, as in the authors' code."""
    model, grid = encoder(), normal(1, 1, 2, 2, 32)
    grid[:, :, 1] = 0
    ids, mask = texts(4)
    assert (fuse(model, grid, ids, mask)[1] - fuse(model, grid[:, :, :1], ids, mask)[1]).abs().max() > 1e-4


def test_exercise4_texts_of_a_video_stand_one_after_the_other():
    model, grid = encoder(), normal(2, 1, 2, 3, 32)
    ids, mask = texts(6, 4, 2, 5, 3, 6)
    hidden, pooled = fuse(model, grid, ids, mask)
    assert hidden.shape == (6, 12, 32) and pooled.shape == (6, 32)
    for i in range(6):
        video = grid[i // 3 : i // 3 + 1]  # three texts of the first, then three of the second
        alone = fuse(model, video, ids[i : i + 1], mask[i : i + 1])
        close(alone[0][0], hidden[i])
        close(alone[1][0], pooled[i])


def test_exercise4_texts_that_do_not_divide_are_refused():
    model = encoder()
    for videos, count in ((2, 3), (3, 4), (2, 1)):
        with pytest.raises(ValueError) as error:
            fuse(model, normal(videos, 1, 2, 2, 32), *texts(*[4] * count))
        assert {str(count), str(videos)} <= set(re.findall(r"\d+", str(error.value)))


def test_exercise4_keep_is_passed_on():
    model, grid = encoder(), normal(2, 1, 2, 3, 32)
    ids, mask = texts(6, 4)
    before = ids.clone(), mask.clone()
    assert fuse(model, grid, ids, mask, keep=2)[0].shape == (2, 8, 32)
    close(fuse(model, grid, ids, mask, keep=3)[1], fuse(model, grid[:, :, :1], ids, mask)[1])
    assert ids.equal(before[0]) and mask.equal(before[1])


def test_exercise4_gradients_reach_cells_and_words():
    model, grid = encoder(), normal(2, 1, 2, 2, 32).requires_grad_()
    ids, mask = texts(6, 3)
    fuse(model, grid, ids, mask)[1].pow(2).sum().backward()
    assert (grid.grad.abs().amax(-1) > 0).all()
    seen = model.bert.embeddings.word_embeddings.weight.grad.abs().amax(-1) > 0
    assert set(seen.nonzero().flatten().tolist()) == set(ids[mask.bool()].tolist())


def test_exercise4_drops_nothing_by_itself():
    torch.manual_seed(0)
    model = clipbert.ClipBert(replace(TINY, dropout=0.5), 2).eval()
    model.dropout.train()  # the one of `classify`, which comes later
    grid, (ids, mask) = normal(2, 1, 2, 3, 32), texts(6, 4)
    hidden, pooled = fuse(model, grid, ids, mask)
    close(pooled, model.bert.pooler(hidden))
    close(fuse(model, grid, ids, mask)[0], hidden)


def test_exercise4_on_any_device():
    model, grid, (ids, mask) = encoder(), normal(2, 1, 2, 3, 32), texts(6, 4)
    with torch.device("meta"):
        assert fuse(model, grid, ids, mask)[1].device == grid.device


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 5: from clips to a video

HOWS = ("mean", "max", "lse")


def test_exercise5_stored_predictions_and_gradients_of_the_reference():
    for case in GOLDEN["clip_aggregation"]:  # also logits of 80 and 1000
        logits = torch.tensor(case["logits"], requires_grad=True)
        p = clipbert.aggregate_clips(logits, case["pool"])
        close(p, torch.tensor(case["eval_pooled_logits"]))
        F.cross_entropy(p, torch.tensor(case["labels"])).backward()
        close(logits.grad.sum(0), torch.tensor(case["grad_logits"]).sum(0), 1e-4)
        if case["pool"] != "max":  # equal clips may share max's gradient or leave it to one of them
            close(logits.grad, torch.tensor(case["grad_logits"]), 1e-4)


def test_exercise5_by_hand():
    logits = torch.tensor([[[0.0, -3.0]], [[math.log(3), -1.0]]])  # two clips, one video
    close(clipbert.aggregate_clips(logits, "mean"), [[math.log(3) / 2, -2.0]])
    close(clipbert.aggregate_clips(logits, "max"), [[math.log(3), -1.0]])
    close(clipbert.aggregate_clips(logits, "lse"), [[math.log(4), math.log(math.exp(-3) + math.exp(-1))]])


def test_exercise5_of_one_clip_is_that_clip():
    for how in HOWS:
        for shape in ((1, 1), (3, 5), (4, 1)):
            one = normal(1, *shape, scale=4)
            close(clipbert.aggregate_clips(one, how), one[0], 1e-6)


def test_exercise5_every_video_and_answer_by_itself_in_any_order_of_clips():
    for how in HOWS:
        logits = normal(4, 4, 4, scale=3)  # as many clips as videos as answers: only the place of the axis tells them
        before = logits.clone()
        p = clipbert.aggregate_clips(logits, how)
        assert p.shape == (4, 4)
        for b in range(4):
            for k in range(4):
                close(clipbert.aggregate_clips(logits[:, b : b + 1, k : k + 1], how), p[b : b + 1, k : k + 1])
        close(clipbert.aggregate_clips(logits[[2, 0, 3, 1]], how), p)
        assert logits.equal(before)


def test_exercise5_of_equal_clips():
    one = normal(1, 3, 5, scale=4)
    for n in (2, 3, 16):
        for how in HOWS:
            p = clipbert.aggregate_clips(one.expand(n, 3, 5), how)
            close(p, one[0] + (math.log(n) if how == "lse" else 0))


def test_exercise5_large_logits_do_not_overflow():
    logits = torch.tensor([[[1000.0, -1000.0, 90.0]], [[1000.0, -1000.0, -90.0]]])
    close(clipbert.aggregate_clips(logits, "mean"), [[1000.0, -1000.0, 0.0]])
    close(clipbert.aggregate_clips(logits, "max"), [[1000.0, -1000.0, 90.0]])
    close(clipbert.aggregate_clips(logits, "lse"), [[1000 + math.log(2), -1000 + math.log(2), 90.0]])


def test_exercise5_keeps_the_type():
    for how in HOWS:
        assert clipbert.aggregate_clips(normal(2, 3, 4).double(), how).dtype == torch.float64
        assert clipbert.aggregate_clips(normal(2, 3, 4), how).dtype == torch.float32


def test_exercise5_refuses_an_unknown_name():
    for how in ("median", "sum", "", None):
        with pytest.raises(ValueError):
            clipbert.aggregate_clips(torch.zeros(2, 1, 1), how)
    assert clipbert.aggregate_clips(torch.zeros(2, 1, 1), "max").shape == (1, 1)


def test_exercise5_refuses_an_unknown_name_of_one_clip_too():
    with pytest.raises(ValueError):
        clipbert.aggregate_clips(torch.zeros(1, 1, 1), "median")


def test_exercise5_double_precision_stays():
    logits = torch.tensor([[[1.0]], [[1.0 + 1e-10]]], dtype=torch.float64)
    for how, expected in (("max", 1e-10), ("mean", 5e-11), ("lse", 5e-11 + math.log(2))):
        expected = torch.tensor([[expected]], dtype=torch.float64)
        close(clipbert.aggregate_clips(logits, how) - 1, expected, 1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 6: the losses of a video


def test_exercise6_stored_losses_of_the_reference():
    for case in GOLDEN["clip_aggregation"]:
        p = torch.tensor(case["eval_pooled_logits"])  # (B, K)
        close(clipbert.video_loss(p, torch.tensor(case["labels"]), "answer"), torch.tensor(case["loss"]))
    for case in RETRIEVAL["vqa"]:
        p, target = torch.tensor(case["logits"]), torch.tensor(case["targets"])
        close(clipbert.video_loss(p, target, "soft"), torch.tensor(case["loss"]))
    for case in RETRIEVAL["scores"]:
        if case["labels"]:
            score = torch.tensor(case["eval_scores"])  # softmax(p)[1]
            p = torch.stack([torch.zeros_like(score), score.logit()], 1)
            close(clipbert.video_loss(p, torch.tensor(case["labels"]), "match"), torch.tensor(case["loss"]), 1e-4)
    for case in RETRIEVAL["rank"]:
        if case["case"] != "saturated":
            p, target = torch.tensor(case["eval_scores"]).logit()[:, None], torch.tensor(case["labels"])
            close(clipbert.video_loss(p, target, "rank"), torch.tensor(case["loss"]))


def test_exercise6_choice_is_over_the_options_of_each_question():
    p = torch.tensor([[0.0], [math.log(3)]])
    close(clipbert.video_loss(p, torch.tensor([1]), "choice"), math.log(4 / 3))  # softmax(0, ln 3) = (1/4, 3/4)
    close(clipbert.video_loss(p, torch.tensor([0]), "choice"), math.log(4))
    p = torch.full((15, 1), -20.0)
    p[[2, 5, 14]] = 20.0  # of three questions, five options each, the options 2, 0 and 4
    close(clipbert.video_loss(p, torch.tensor([2, 0, 4]), "choice"), 0.0)
    close(clipbert.video_loss(p, torch.tensor([2, 0, 3]), "choice"), 40 / 3)
    close(clipbert.video_loss(torch.zeros(15, 1), torch.tensor([2, 0, 4]), "choice"), math.log(5))


def test_exercise6_answer_and_match_are_cross_entropy():
    close(clipbert.video_loss(torch.zeros(2, 10), torch.tensor([3, 9]), "answer"), math.log(10))
    close(clipbert.video_loss(torch.tensor([[0.0, math.log(7)]]), torch.tensor([1]), "match"), math.log(8 / 7))
    close(clipbert.video_loss(torch.tensor([[0.0, math.log(7)]]), torch.tensor([0]), "match"), math.log(8))
    p = torch.tensor([[0.0, 4.0, -2.0], [1.0, 0.0, 3.0]])
    expected = sum(math.log(sum(math.exp(v) for v in row)) - row[i] for row, i in zip(p.tolist(), (2, 0), strict=True))
    close(clipbert.video_loss(p, torch.tensor([2, 0]), "answer"), expected / 2)


def test_exercise6_soft_is_summed_over_answers_and_averaged_over_questions():
    p, target = torch.zeros(2, 3), torch.tensor([[0.0, 0.3, 1.0], [0.0, 0.0, 0.0]])
    close(clipbert.video_loss(p, target, "soft"), 3 * math.log(2))
    close(clipbert.video_loss(torch.full((2, 3), -9.0), torch.ones(2, 3), "soft"), 3 * math.log(1 + math.exp(9)))
    close(clipbert.video_loss(torch.full((1, 1), 2.0), torch.full((1, 1), 0.5), "soft"), math.log(1 + math.exp(2)) - 1)


def test_exercise6_soft_outputs_beyond_the_list_are_never_right():
    p, target = normal(2, 3), torch.tensor([[0.0, 0.6, 1.0], [0.3, 0.0, 0.0]])
    more = F.pad(p, (0, 2), value=5.0)  # confident in answers that are not in the list
    extra = 2 * math.log(1 + math.exp(5))
    close(clipbert.video_loss(more, target, "soft"), clipbert.video_loss(p, target, "soft") + extra)
    assert target.shape == (2, 3)


def test_exercise6_count_is_squared_error():
    close(clipbert.video_loss(torch.tensor([[2.0], [5.0]]), torch.tensor([4, 5]), "count"), 2.0)  # (2² + 0²) / 2
    close(clipbert.video_loss(torch.tensor([[2.0], [5.0], [9.0]]), torch.tensor([1.0, 5.0, 5.0]), "count"), 17 / 3)
    close(clipbert.video_loss(torch.tensor([[3.5]]), torch.tensor([3]), "count"), 0.25)


def rank(rows):
    """The rank loss of rows of scores, a video's own caption first in each."""
    rows = torch.as_tensor(rows)
    target = torch.zeros(rows.shape, dtype=torch.long)
    target[:, 0] = 1
    return clipbert.video_loss(rows.reshape(-1, 1), target.flatten(), "rank")


def test_exercise6_rank_is_a_margin_of_a_fifth_between_probabilities():
    close(rank([[0.0, 0.0]]), 0.2)
    # sigmoid(ln 3) = .75, sigmoid(-ln 3) = .25: own .75, wrong .25 and .75
    row = torch.tensor([[math.log(3), -math.log(3), math.log(3)]])
    close(rank(row), 0.1)  # (0 + .2) / 2
    close(rank(-row), 0.45)  # (.7 + .2) / 2
    close(rank([[math.log(1.5), 0.0]]), 0.1)  # own .6, wrong .5: within the margin
    close(rank([[1000.0, -1000.0], [-1000.0, 1000.0]]), 0.6)  # (0 + 1.2) / 2
    close(rank([[5.0, -5.0, -5.0], [0.0, 0.0, 0.0]]), 0.1)  # (0 + 0 + .2 + .2) / 4


def test_exercise6_rank_pushes_own_up_and_wrong_down_until_the_margin():
    rows = torch.tensor([[0.1, 0.0], [9.0, -9.0]], requires_grad=True)
    rank(rows).backward()
    assert rows.grad[0, 0] < 0 < rows.grad[0, 1] and (rows.grad[1] == 0).all()


def test_exercise6_losses_are_finite_scalars_with_gradients():
    target = {"choice": torch.tensor([1]), "answer": torch.tensor([0, 1]), "soft": torch.tensor([[0, 0.6], [1, 0]]),
              "match": torch.tensor([0, 1]), "rank": torch.tensor([1, 0]), "count": torch.tensor([2, 3])}  # fmt: skip
    for scale in (1.0, 1000.0):
        for kind, t in target.items():
            p = torch.tensor([[1.0, -1.0], [1.0, -1.0]] if kind in ("answer", "soft", "match") else [[1.0], [-1.0]])
            p = (scale * p).requires_grad_()
            loss = clipbert.video_loss(p, t, kind)
            assert loss.shape == () and loss.isfinite()
            loss.backward()
            assert p.grad.isfinite().all()


def test_exercise6_refuses_an_unknown_kind():
    for kind in ("essay", "", None):
        with pytest.raises(ValueError):
            clipbert.video_loss(torch.zeros(1, 1), torch.zeros(1), kind)
    assert clipbert.video_loss(torch.zeros(1, 1), torch.zeros(1), "count") == 0


def test_exercise6_on_any_device():
    cases = {"choice": (4, 1), "answer": (2, 3), "soft": (2, 3), "match": (2, 2), "rank": (4, 1), "count": (2, 1)}
    targets = {"soft": torch.ones(2, 2), "rank": torch.tensor([1, 0, 1, 0])}
    cases = {kind: (torch.ones(shape), targets.get(kind, torch.tensor([1, 0]))) for kind, shape in cases.items()}
    with torch.device("meta"):
        for kind, (p, target) in cases.items():
            assert clipbert.video_loss(p, target, kind).device == p.device, kind


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 7: which words to mask

WORDS = [f"word{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
TOKENIZER = data.build_tokenizer(data.SPECIAL_TOKENS + WORDS)


def word_ids(*shape, seed=0):
    return torch.randint(5, 31, shape, generator=seeded(seed))


def mask_tokens(ids, seed=1, **more):
    return data.mask_tokens(ids, TOKENIZER, seeded(seed), **more)


def test_exercise7_15_percent_of_which_80_10_10():
    for ids in (word_ids(150_000), word_ids(5000, 30)):
        masked, labels = mask_tokens(ids)
        assert masked.shape == labels.shape == ids.shape and masked.dtype == labels.dtype == torch.int64
        chosen = labels != -100
        assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.004)
        share = 0.1 / len(TOKENIZER)  # of the random tokens, some may be [MASK], and some the word itself
        masks = (masked == TOKENIZER.mask_token_id)[chosen].float().mean().item()
        same = (masked == ids)[chosen].float().mean().item()
        assert masks == pytest.approx(0.8 + share, abs=0.012) and same == pytest.approx(0.1 + share, abs=0.012)


def test_exercise7_labels_are_the_words_that_were_there():
    ids = word_ids(200, 50)
    before = ids.clone()
    masked, labels = mask_tokens(ids)
    chosen = labels != -100
    assert labels[chosen].equal(ids[chosen]) and masked[~chosen].equal(ids[~chosen])
    assert ids.equal(before)  # the text itself is not touched


def test_exercise7_random_tokens_are_any_words():
    ids = torch.full((300_000,), 7)
    masked, labels = mask_tokens(ids)
    others = masked[(labels != -100) & (masked != 7) & (masked != TOKENIZER.mask_token_id)]
    counts = Counter(others.tolist())
    words = [counts[i] for i in range(5, 31) if i != 7]
    assert min(words) > 0.6 * max(words) and len(others) == pytest.approx(0.15 * 0.1 * 300_000, rel=0.15)
    positions = ((labels != -100) & (masked == 7)).view(3, -1).sum(1)
    assert (positions > 1000).all()  # about 1500 keep their word, anywhere in the text


def test_exercise7_special_tokens_are_never_touched():
    ids = TOKENIZER(["worda wordb unknownword", "worda"], padding=True, return_tensors="pt")["input_ids"]
    ids = ids.repeat(2000, 1)
    ids[::5, 1] = TOKENIZER.mask_token_id
    special = ids < 5  # [PAD] [UNK] [CLS] [SEP] [MASK]
    assert len(ids[special].unique()) == 5
    for rate in (0.15, 1.0):
        masked, labels = mask_tokens(ids, rate=rate)
        assert masked[special].equal(ids[special]) and (labels[special] == -100).all()
    masked, labels = mask_tokens(ids)
    assert (labels != -100)[~special].float().mean().item() == pytest.approx(0.15, abs=0.02)  # of the words alone


def test_exercise7_every_rate():
    ids = word_ids(100_000)
    for rate in (0.0, 0.5, 1.0):
        masked, labels = mask_tokens(ids, rate=rate)
        chosen = labels != -100
        assert chosen.float().mean().item() == pytest.approx(rate, abs=0.01)
        if rate:
            assert (masked == TOKENIZER.mask_token_id)[chosen].float().mean().item() == pytest.approx(0.8, abs=0.02)
        assert masked[~chosen].equal(ids[~chosen])


def test_exercise7_places_are_drawn_one_by_one():
    ids = word_ids(4000, 20)
    chosen = (mask_tokens(ids)[1] != -100).float()
    assert (chosen.mean(0) - 0.15).abs().max() < 0.03  # everywhere in a text
    assert chosen.T.corrcoef().fill_diagonal_(0).abs().max() < 0.1  # whatever its neighbours are
    counts = Counter(ids[chosen.bool()].tolist())
    assert min(counts.values()) > 0.7 * max(counts.values())  # whatever the word is


def test_exercise7_the_generator_decides():
    ids, generator = word_ids(50, 20), seeded(1)
    first = uses_only(generator, lambda: data.mask_tokens(ids, TOKENIZER, generator))
    again, other = mask_tokens(ids), mask_tokens(ids, seed=2)
    assert first[0].equal(again[0]) and first[1].equal(again[1])
    assert not first[0].equal(other[0]) and not first[1].equal(other[1])
    assert not data.mask_tokens(ids, TOKENIZER, generator)[1].equal(first[1])  # it goes on


def test_exercise7_each_word_is_chosen_by_chance_of_its_own():
    ids, generator = word_ids(20), seeded(0)
    counts = [(data.mask_tokens(ids, TOKENIZER, generator)[1] != -100).sum().item() for _ in range(1500)]
    counts = torch.tensor(counts).double()
    assert abs(counts.mean() - 3) < 0.25 and abs(counts.var() - 20 * 0.15 * 0.85) < 0.5  # now more, now fewer
    assert abs((counts == 0).double().mean() - 0.85**20) < 0.025  # and now and then none


def test_exercise7_each_chosen_word_has_a_die_of_its_own():
    ids, generator, masks, same, chosen = word_ids(6), seeded(0), 0, 0, 0
    for _ in range(4000):  # mostly one chosen word at a time
        masked, labels = data.mask_tokens(ids, TOKENIZER, generator)
        picked = labels != -100
        chosen += picked.sum().item()
        masks += (masked == TOKENIZER.mask_token_id)[picked].sum().item()
        same += (masked == ids)[picked].sum().item()
    assert masks / chosen == pytest.approx(0.8 + 0.1 / len(TOKENIZER), abs=0.03)
    assert same / chosen == pytest.approx(0.1 + 0.1 / len(TOKENIZER), abs=0.025)
    ids = word_ids(20000, 2)
    masked, _ = mask_tokens(ids, rate=1.0)
    is_mask = (masked == TOKENIZER.mask_token_id).double()
    assert abs(is_mask.T.corrcoef()[0, 1]) < 0.05  # of the two words of a text
    assert abs(torch.stack([is_mask[::2, 0], is_mask[1::2, 0]]).corrcoef()[0, 1]) < 0.05  # of neighbouring texts
    assert len(masked[(masked != TOKENIZER.mask_token_id) & (masked != ids)].unique()) > 20


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 8: the loss of masked words


def test_exercise8_stored_losses_of_the_reference():
    for case in PRETRAIN:
        scores, labels = torch.tensor(case["mlm_scores"]), torch.tensor(case["mlm_labels"])
        close(clipbert.mlm_loss(scores, labels), float(case["valid_mlm_loss"]))
        close(clipbert.mlm_loss(scores, labels, over="masked"), float(case["valid_mlm_loss"]))
        close(clipbert.mlm_loss(scores, labels, over="all"), float(case["mlm_loss"]))


def test_exercise8_mean_over_masked_words_not_over_texts():
    scores = torch.zeros(2, 4, 3)
    scores[0, 0, 1] = math.log(2)  # softmax (1/4, 1/2, 1/4)
    labels = torch.tensor([[1, -100, -100, -100], [2, 0, 1, -100]])
    expected = math.log(2) + 3 * math.log(3)
    close(clipbert.mlm_loss(scores, labels), expected / 4)
    close(clipbert.mlm_loss(scores, labels, over="all"), expected / 8)


def test_exercise8_other_positions_do_not_matter():
    scores, labels = normal(3, 5, 7).requires_grad_(), torch.full((3, 5), -100)
    labels[0, 2], labels[2, 4], labels[2, 0] = 6, 0, 3
    for over in ("masked", "all"):
        loss = clipbert.mlm_loss(scores, labels, over=over)
        scores.grad = None
        loss.backward()
        assert (scores.grad[labels == -100] == 0).all() and (scores.grad[labels != -100] != 0).all()
        changed = torch.where(labels[..., None] == -100, torch.tensor(50.0), scores)
        close(clipbert.mlm_loss(changed, labels, over=over), loss)


def test_exercise8_without_masked_words_the_loss_is_zero():
    for over in ("masked", "all"):
        scores = normal(2, 3, 5).requires_grad_()
        loss = clipbert.mlm_loss(scores, torch.full((2, 3), -100), over=over)
        assert loss == 0 and loss.shape == ()
        (loss + scores.sum() * 0).backward()  # it stands in a sum with ITM's
        assert (scores.grad == 0).all()


def test_exercise8_large_and_half_precision_scores():
    scores, labels = torch.zeros(1, 2, 4), torch.tensor([[1, -100]])
    scores[0, 0] = torch.tensor([1000.0, -1000.0, 0.0, 0.0])
    close(clipbert.mlm_loss(scores, labels), 2000.0)
    half = 20 * normal(4, 6, 9)
    labels = torch.where(normal(4, 6, seed=1) > 0, torch.arange(6).expand(4, 6), -100)
    for dtype in (torch.float16, torch.bfloat16):
        loss = clipbert.mlm_loss(half.to(dtype), labels)
        assert loss.dtype == torch.float32
        close(loss, clipbert.mlm_loss(half.to(dtype).float(), labels))


def test_exercise8_word_zero_counts_and_no_other_label_is_left_out():
    scores = normal(1, 7, 7)
    for word in range(7):
        labels = torch.full((1, 7), -100)
        labels[0, word] = word
        close(clipbert.mlm_loss(scores, labels), scores[0, word].logsumexp(0) - scores[0, word, word])


def test_exercise8_refuses_an_unknown_average():
    for over in ("words", "", None):
        with pytest.raises(ValueError):
            clipbert.mlm_loss(torch.zeros(1, 2, 3), torch.tensor([[0, -100]]), over=over)
    close(clipbert.mlm_loss(torch.zeros(1, 2, 3), torch.tensor([[0, -100]])), math.log(3))


def test_exercise8_both_averages_are_computed_in_float32():
    half, labels = (20 * normal(4, 6, 9)).half(), torch.arange(6).expand(4, 6)
    for over in ("masked", "all"):
        loss = clipbert.mlm_loss(half, labels, over=over)
        close(loss, clipbert.mlm_loss(half.float(), labels, over=over))
        assert loss.dtype == clipbert.mlm_loss(half, torch.full((4, 6), -100), over=over).dtype == torch.float32


def test_exercise8_on_any_device():
    scores, labels = torch.zeros(1, 2, 3), [torch.tensor([[0, -100]]), torch.tensor([[-100, -100]])]
    with torch.device("meta"):
        assert all(clipbert.mlm_loss(scores, some).device == scores.device for some in labels)


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 9: right and wrong captions


def captioned(*captions):
    return [data.CaptionedImage(f"{i}.png", own) for i, own in enumerate(captions)]


def dataset(images, n):
    return data.CaptionDataset(
        images, ".", captions=n, n_frames=1, fps=1.0, size=64, train=True, seed=0, blind=False
    )  # fmt: skip


def drawn(images, n, times=1000):
    """(image, captions, labels) of many draws."""
    source, generator = dataset(images, n), seeded(0)
    for i in range(times):
        yield images[i % len(images)], *source.draw_captions(images[i % len(images)], generator)


PHOTOS = captioned(*[(f"worda {w}", f"wordb {w}", f"wordc {w}") for w in WORDS])


def test_exercise9_a_mismatch_is_any_caption_but_its_own():
    captions, generator = ["a dog", "A cat", "A Dog", "a bird", "a cow"], seeded(0)
    seen = Counter(
        data.draw_mismatch(lambda i: captions[i], 5, {"a dog", "a cow"}, generator) for _ in range(600)
    )  # fmt: skip
    assert set(seen) == {"A cat", "a bird"}  # "A Dog" is "a dog": the tokenizer knows no capitals
    assert min(seen.values()) > 240


def test_exercise9_the_first_and_the_last_caption_may_come_and_no_other():
    generator, asked = seeded(0), Counter()

    def caption_of(i):
        asked[i] += 1
        return f"caption {i}"

    for _ in range(500):
        assert data.draw_mismatch(caption_of, 4, set(), generator) is not None
    assert set(asked) == {0, 1, 2, 3} and min(asked.values()) > 80
    assert all(isinstance(i, int) for i in asked)


def test_exercise9_none_if_every_caption_is_its_own():
    asked = []

    def caption_of(i):
        asked.append(i)
        assert len(asked) < 1000, "it never gives up"
        return "A dog"

    assert data.draw_mismatch(caption_of, 3, {"a dog"}, seeded(0)) is None and len(asked) > 20
    rare = [data.draw_mismatch(lambda i: "a dog" if i else "a cat", 4, {"a dog"}, seeded(i)) for i in range(50)]
    assert rare == ["a cat"] * 50  # one refusal is no reason to give up


def test_exercise9_the_generator_decides():
    generator = seeded(5)
    first = uses_only(generator, lambda: [data.draw_mismatch(str, 1000, set(), generator) for _ in range(5)])
    again, generator = seeded(5), seeded(5)
    assert first == [data.draw_mismatch(str, 1000, set(), again) for _ in range(5)] and len(set(first)) > 3
    texts = uses_only(generator, lambda: dataset(PHOTOS, 4).draw_captions(PHOTOS[0], generator))
    assert texts == dataset(PHOTOS, 4).draw_captions(PHOTOS[0], seeded(5))
    assert any(dataset(PHOTOS, 4).draw_captions(PHOTOS[0], seeded(i)) != texts for i in range(3))


def test_exercise9_labels_say_whose_caption_it_is():
    for n in (1, 2, 3, 4):
        for image, captions, labels in drawn(PHOTOS, n, 200):
            assert len(captions) == len(labels) == n and set(labels) <= {0, 1}
            assert [caption in image.captions for caption in captions] == [bool(label) for label in labels]


def test_exercise9_half_are_wrong_at_every_place_and_in_every_image():
    for n in (1, 2, 3, 4):
        rows = [labels for _, _, labels in drawn(PHOTOS, n, 1000)]
        for place in range(n):
            assert sum(labels[place] for labels in rows) / 1000 == pytest.approx(0.5, abs=0.06)
        assert all(a != b for labels in rows for a, b in itertools.pairwise(labels))  # they take turns


def test_exercise9_every_caption_may_come_as_right_and_as_wrong():
    right, wrong = Counter(), Counter()
    for _, captions, labels in drawn(PHOTOS, 2, 26 * 80):
        for caption, label in zip(captions, labels, strict=True):
            (right if label else wrong)[caption] += 1
    for counts in (right, wrong):
        assert len(counts) == 78 and sum(counts.values()) == 26 * 80 and min(counts.values()) > 8  # 27 on average


def test_exercise9_right_captions_of_an_image_differ_while_there_are_enough():
    for _, captions, labels in drawn(captioned(("a", "b"), ("c", "d", "e")), 4, 100):
        own = [caption for caption, label in zip(captions, labels, strict=True) if label]
        assert len(own) == len(set(own)) == 2
    few = {tuple(c for c, m in zip(captions, labels, strict=True) if m)
           for image, captions, labels in drawn(captioned(("a",), ("b",)), 4, 20)}  # fmt: skip
    assert few == {("a", "a"), ("b", "b")}  # too few: they come again


def test_exercise9_where_nothing_is_wrong_all_is_right():
    for _, captions, labels in drawn(captioned(("a dog",), ("A dog",)), 2, 10):
        assert list(labels) == [1, 1] and {caption.lower() for caption in captions} == {"a dog"}


def test_exercise9_gives_up_after_a_hundred_tries():
    asked = []
    assert data.draw_mismatch(lambda i: asked.append(i) or "A dog", 3, {"a dog"}, seeded(0)) is None
    assert len(asked) == 100


def test_exercise9_part_of_an_own_caption_is_another():
    assert data.draw_mismatch(lambda i: "a dog", 1, {"a dog runs"}, seeded(0)) == "a dog"
    assert data.draw_mismatch(lambda i: "a dog runs", 1, {"a dog"}, seeded(0)) == "a dog runs"


def test_exercise9_right_ones_come_in_every_order():
    orders = Counter(
        tuple(caption for caption, label in zip(captions, labels, strict=True) if label)
        for image, captions, labels in drawn(captioned(("a", "b", "c"), ("x",)), 6, 600) if image.video == "0.png"
    )  # fmt: skip
    assert len(orders) == 6 and min(orders.values()) > 20


def test_exercise9_wrong_ones_differ_and_labels_are_numbers():
    differ = 0
    for _, captions, labels in drawn(PHOTOS, 4, 100):
        assert torch.tensor(labels).dtype == torch.int64
        one, other = (caption for caption, label in zip(captions, labels, strict=True) if not label)
        differ += one != other
    assert differ > 90


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 10: gradient accumulation


def regression(seed=0, batches=3, size=4):
    """A small model with a frozen and an unused part, batches, and their loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    model[0].bias.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(2))
    return model, [(normal(size, 5, seed=i), normal(size, 1, seed=9 + i)) for i in range(batches)]


def squared_error(model, batch):
    return F.mse_loss(nn.Sequential.forward(model, batch[0]), batch[1])


def update(batches, max_norm=1e9, lr=0.1, stale=False, optimizer=torch.optim.SGD, model=None):
    """-> what `accumulate_gradients` returns, and how far each trainable parameter moved."""
    model = model or regression()[0]
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    if stale:
        squared_error(model, (normal(4, 5, seed=77), normal(4, 1, seed=78))).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = exercises.accumulate_gradients(model, optimizer, batches, squared_error, max_norm)
    return *result, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def moved(steps):
    return torch.cat([step.flatten() for step in steps.values()])


def test_exercise10_several_batches_are_one_large_one():
    for k in (1, 2, 3, 5):
        _, batches = regression(batches=k)
        whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        loss, norm, steps = update(batches)
        loss_of_one, norm_of_one, steps_of_one = update([whole])
        close(loss, loss_of_one)
        close(norm, norm_of_one)
        close(moved(steps), moved(steps_of_one), 1e-6)


def test_exercise10_by_hand():
    """loss = w * x, so the gradient is x: of 1, 2 and 6 the mean, 3."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    batches = [torch.tensor([[x]]) for x in (1.0, 2.0, 6.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for max_norm, expected in ((100.0, 0.5), (0.2, 0.4)):  # 2 - .5 * 3, then clipped: .5 - .5 * .2
        before = model.weight.item()
        loss, norm = exercises.accumulate_gradients(model, optimizer, batches, lambda m, x: m(x).mean(), max_norm)
        close(loss, 3 * before)
        close(norm, 3.0)
        close(model.weight.item(), expected, 1e-4)


def test_exercise10_old_gradients_do_not_count():
    _, batches = regression()
    close(moved(update(batches, stale=True)[2]), moved(update(batches)[2]), 1e-6)
    model, _ = regression()
    exercises.accumulate_gradients(
        model, torch.optim.SGD(model.parameters(), lr=0.0), batches, squared_error, 1e9
    )  # fmt: skip
    close(moved(update(batches, model=model)[2]), moved(update(batches)[2]), 1e-6)  # nor those of the update before


def test_exercise10_the_whole_gradient_is_clipped_once():
    _, batches = regression()
    _, norm, free = update(batches)
    _, norm_before, clipped = update(batches, max_norm=norm.item() / 4)
    close(norm_before, norm)  # as it was before clipping
    close(moved(clipped), moved(free) / 4, 1e-4)
    close(moved(clipped).norm() / 0.1, norm / 4, 1e-4)
    _, _, barely = update(batches, max_norm=norm.item() * 1.01)
    close(moved(barely), moved(free), 1e-6)


def test_exercise10_one_step_of_the_optimizer():
    _, batches = regression()
    calls = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    update(batches, optimizer=Counted)
    assert len(calls) == 1


def test_exercise10_each_batch_is_forgotten_before_the_next_is_seen():
    """The point of it all: only one batch's activations are in memory."""
    model, batches = regression()
    order = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            order.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            order.append("backward")
            return gradient

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exercises.accumulate_gradients(
        model, optimizer, batches, lambda m, b: Watched.apply(squared_error(m, b)), 1e9
    )  # fmt: skip
    assert order == ["forward", "backward"] * 3


def test_exercise10_returns_numbers_without_a_graph():
    model, batches = regression(batches=2)
    expected = sum(squared_error(model, batch).item() for batch in batches) / 2
    loss, norm, _ = update(batches, max_norm=1e-3)
    assert torch.is_tensor(loss) and loss.shape == () and not loss.requires_grad
    assert torch.is_tensor(norm) and norm.shape == () and not norm.requires_grad
    close(loss, expected)  # before the update


def test_exercise10_frozen_and_unused_parameters_stay():
    _, batches = regression()
    _, _, steps = update(batches)
    assert (steps["0.bias"] == 0).all() and (steps["unused"] == 0).all() and (steps["0.weight"] != 0).any()
    model, _ = regression()
    with torch.no_grad():
        model.unused.grad = torch.ones(2)  # left over from before: an Adam without zeroing would move it
    _, norm, steps = update(batches, model=model)
    assert (steps["unused"] == 0).all()
    close(norm, update(batches)[1])


def test_exercise10_the_gradient_is_that_of_all_parameter_groups():
    found = []
    for two_groups in (True, False):
        model, batches = regression()
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:]}] if two_groups else parameters
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        _, norm = exercises.accumulate_gradients(model, optimizer, batches, squared_error, 0.01)
        steps = torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])
        close(steps.norm(), 0.1 * 0.01, 1e-6)
        found.append((norm, steps))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1], 1e-7)


def test_exercise10_each_batch_counts_the_same_whatever_it_is():
    model = nn.Linear(1, 1, bias=False)
    for batches in ([[[1.0]], [[5.0], [5.0], [5.0]]], [{"x": [[1.0]]}, {"x": [[5.0]]}]):  # of other sizes; no tensors
        nn.init.constant_(model.weight, 2.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss, norm = exercises.accumulate_gradients(
            model, optimizer, batches, lambda m, b: m(torch.tensor(b["x"] if isinstance(b, dict) else b)).mean(), 100.0
        )
        close((loss, norm, model.weight.item()), (6.0, 3.0, 0.5))


def test_exercise10_a_gradient_of_zero():
    model = nn.Linear(1, 1, bias=False)
    before, optimizer = model.weight.item(), torch.optim.SGD(model.parameters(), lr=0.5)
    _, norm = exercises.accumulate_gradients(model, optimizer, [torch.zeros(1, 1)], lambda m, x: m(x).mean(), 1.0)
    assert norm == 0 and model.weight.item() == before


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 11: the learning rate


def test_exercise11_stored_schedules_of_the_reference():
    for name in ("linear", "linear_odd"):
        case = GOLDEN["schedule"][name]
        for step, expected in case["values"]:
            lr = clipbert.learning_rate(step, case["num_train_steps"], case["learning_rate"], case["warmup_ratio"])
            assert lr == pytest.approx(expected, rel=1e-9), step


def test_exercise11_peak_at_the_end_of_warmup():
    for total, ratio, warmup in ((1000, 0.1, 100), (37, 0.1, 3), (59, 0.25, 14), (10, 0.5, 5), (19, 0.1, 1)):
        lrs = [clipbert.learning_rate(step, total, 3e-4, ratio) for step in range(1, total + 1)]
        assert max(lrs) == lrs[warmup - 1] == pytest.approx(3e-4)
        rise, fall = lrs[:warmup], lrs[warmup - 1 :]
        assert all(a < b for a, b in itertools.pairwise(rise))
        assert all(a > b for a, b in itertools.pairwise(fall))
        assert rise == pytest.approx([3e-4 * (i + 1) / warmup for i in range(warmup)])
        assert fall[:-1] == pytest.approx([3e-4 * (1 - i / (total - warmup)) for i in range(total - warmup)])


def test_exercise11_default_warmup_is_a_tenth():
    assert clipbert.learning_rate(5, 100, 1.0) == pytest.approx(0.5)
    assert clipbert.learning_rate(55, 100, 1.0) == pytest.approx(0.5)
    assert clipbert.learning_rate(5, 100, 1.0) == clipbert.learning_rate(5, 100, 1.0, 0.1)


def test_exercise11_no_step_is_in_vain():
    for step in (0, 100, 101, 5000):
        assert clipbert.learning_rate(step, 100, 1e-4) == 1e-8
    assert clipbert.learning_rate(1, 1, 1.0) == 1e-8
    assert clipbert.learning_rate(99, 100, 1e-4) == pytest.approx(1e-4 / 90)


def test_exercise11_without_or_with_nothing_but_warmup():
    assert clipbert.learning_rate(1, 10, 1.0, warmup_ratio=0) == pytest.approx(0.9)
    assert clipbert.learning_rate(5, 10, 1.0, warmup_ratio=0.0) == pytest.approx(0.5)
    assert clipbert.learning_rate(1, 9, 1.0) == pytest.approx(8 / 9)  # a tenth of nine steps is none
    assert [clipbert.learning_rate(step, 4, 1.0, 1.0) for step in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.75])
    assert clipbert.learning_rate(4, 4, 1.0, 1.0) == 1e-8
    assert clipbert.learning_rate(1, 2, 1.0, 0.5) == 1.0


def test_exercise11_is_in_proportion_to_the_peak():
    for step in (1, 9, 10, 11, 50, 99):
        small, large = (clipbert.learning_rate(step, 100, peak) for peak in (1e-5, 1e-3))
        assert large == pytest.approx(100 * small)
        assert isinstance(small, float)


def test_exercise11_small_is_not_zero():
    assert clipbert.learning_rate(999_999, 1_000_000, 1e-4) == pytest.approx(1e-4 / 900_000)


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 12: retrieval metrics

NAMES = {"r1": "r1", "r5": "r5", "r10": "r10", "medianR": "median_rank", "meanR": "mean_rank"}
WAYS = {"text_to_video": "text2video", "video_to_text": "video2text"}


def mean_ranks(scores, columns):
    metrics = finetune.retrieval_metrics(torch.as_tensor(scores, dtype=torch.float), columns)
    return metrics["text_to_video"]["mean_rank"], metrics["video_to_text"]["mean_rank"]


def test_exercise12_stored_metrics_of_the_reference():
    for case in RETRIEVAL["retrieval"]:
        if case["name"] in ("no_ties", "perfect"):
            ours = finetune.retrieval_metrics(torch.tensor(case["scores"]), range(20))
            for way, theirs in WAYS.items():
                for key, name in NAMES.items():
                    assert ours[way][name] == pytest.approx(case["metrics"][theirs][key])


def test_exercise12_ties_lie_between_the_luckiest_and_the_unluckiest_order():
    for case in RETRIEVAL["retrieval"]:
        if "metric_bounds" in case:
            ours = finetune.retrieval_metrics(torch.tensor(case["scores"]), range(20))
            for way, theirs in WAYS.items():
                for key, name in NAMES.items():
                    bounds = [case["metric_bounds"][bound][theirs][key] for bound in ("optimistic", "pessimistic")]
                    assert min(bounds) - 1e-6 <= ours[way][name] <= max(bounds) + 1e-6


def test_exercise12_rank_counts_the_higher_and_half_of_the_equal():
    scores = torch.tensor([[5.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-2.0, -1.0, -1000.0, 1000.0]])
    for column, expected in ((0, [1, 2.5, 3]), (1, [2.5, 2.5, 2]), (3, [4, 2.5, 1])):
        close(finetune.ranks_of(scores[:, column : column + 1], scores).double(), torch.tensor(expected).double())
    close(finetune.ranks_of(torch.tensor([[2.0]]), torch.tensor([[2.0]])).double(), torch.tensor([1.0]).double())


def test_exercise12_equal_scores_are_chance():
    for n in (20, 7):
        ours = finetune.retrieval_metrics(torch.full((n, n), -3.5), range(n))
        assert ours["text_to_video"] == ours["video_to_text"]
        assert (ours["text_to_video"]["r1"], ours["text_to_video"]["mean_rank"]) == (0.0, (n + 1) / 2)


def test_exercise12_the_two_ways_are_not_the_same():
    scores = [[3.0, 9.0, 9.5], [2.0, 8.0, 7.0], [1.0, 8.5, 7.5]]  # caption i is of video i
    assert mean_ranks(scores, [0, 1, 2]) == pytest.approx(((3 + 1 + 2) / 3, (1 + 3 + 2) / 3), abs=1e-3)
    both = finetune.retrieval_metrics(torch.tensor(scores), [0, 1, 2])
    assert both["text_to_video"]["r1"] == pytest.approx(100 / 3, abs=1e-3) and both["text_to_video"]["median_rank"] == 2


def test_exercise12_captions_in_any_order():
    scores = normal(6, 6)
    order = [3, 0, 5, 1, 4, 2]
    straight = finetune.retrieval_metrics(scores, range(6))
    assert finetune.retrieval_metrics(scores[order], order) == straight
    assert finetune.retrieval_metrics(scores, torch.arange(6)) == straight  # a tensor will do as well
    assert finetune.retrieval_metrics(scores, list(range(5)) + [0]) != straight


def test_exercise12_of_several_captions_the_best_counts_and_the_others_do_not_compete():
    scores = [[4.0, 7.0], [9.0, 5.0], [5.0, 2.0], [2.0, 6.0], [1.0, 3.0]]
    columns = [0, 0, 1, 1, 1]
    # video 0: its best is 9, no other is above: 1. Video 1: its best is 6, and 7 of video 0 is above: 2.
    assert mean_ranks(scores, columns) == pytest.approx(((2 + 1 + 2 + 1 + 1) / 5, 1.5), abs=1e-3)
    tie = [[4.0, 0.0], [4.0, 0.0], [4.0, 1.0]]  # its two captions tie with each other, which is no tie, and a third
    assert mean_ranks(tie, [0, 0, 1])[1] == pytest.approx((1.5 + 1) / 2, abs=1e-3)


def test_exercise12_stored_case_of_two_captions_a_video():
    case = next(case for case in RETRIEVAL["retrieval"] if case["name"] == "two_captions_per_video")
    columns = [case["videos"].index(video) for video in case["gt"]]
    ours = finetune.retrieval_metrics(torch.tensor(case["scores"]), columns)
    for key, name in NAMES.items():
        assert ours["text_to_video"][name] == pytest.approx(case["metrics"]["text2video"][key], abs=1e-4)


def test_exercise12_more_videos_than_captions():
    scores = [[1.0, 5.0, 9.0, 7.0], [0.0, 3.0, 9.0, 4.0]]  # of the videos 1 and 2; nobody describes 0 and 3
    assert mean_ranks(scores, [1, 2]) == pytest.approx(((3 + 1) / 2, (1 + 1.5) / 2), abs=1e-3)


def test_exercise12_recalls_and_medians():
    n = 12
    scores = torch.zeros(n, n)
    for i in range(n):  # the rank of caption i is i + 1: so many other videos score higher
        scores[i, i] = 0.5
        scores[i, [j for j in range(n) if j != i][:i]] = 1.0
    ours = finetune.retrieval_metrics(scores, range(n))["text_to_video"]
    assert ours == pytest.approx(
        {"r1": 100 / 12, "r5": 500 / 12, "r10": 1000 / 12, "median_rank": 6.5, "mean_rank": 6.5}, abs=1e-3
    )


def test_exercise12_only_exact_ties_are_ties():
    row = torch.tensor([[0.5, 0.5 + 1e-12, 0.5 + 2e-12]], dtype=torch.float64)
    close(finetune.ranks_of(row[:, :1], row).double(), torch.tensor([3.0]).double())
    scores = torch.tensor([[0.5, 0.5 + 1e-12], [0.0, 1.0]], dtype=torch.float64)
    assert finetune.retrieval_metrics(scores, [0, 1])["text_to_video"]["mean_rank"] == 1.5


def test_exercise12_scores_are_left_as_they_are():
    scores = normal(6, 3)
    before = scores.clone()
    finetune.retrieval_metrics(scores, [0, 0, 1, 1, 2, 2])
    assert scores.equal(before)


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 13: FrozenBatchNorm


def batch_norms(channels=4, eps=1e-5):
    """A FrozenBatchNorm and a BatchNorm2d with the same, unusual numbers."""
    theirs = nn.BatchNorm2d(channels, eps=eps).eval()
    with torch.no_grad():
        theirs.weight.copy_(normal(channels, seed=1))
        theirs.bias.copy_(normal(channels, seed=2))
    theirs.running_mean.copy_(normal(channels, seed=3))
    theirs.running_var.copy_(normal(channels, seed=4).abs() + 0.01)
    ours = exercises.FrozenBatchNorm(channels, eps) if eps != 1e-5 else exercises.FrozenBatchNorm(channels)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"})
    return ours, theirs


def test_exercise13_is_batchnorm_in_testing():
    for channels, shape in ((4, (2, 4, 5, 3)), (3, (1, 3, 3, 3)), (7, (3, 7, 1, 1)), (4, (4, 4, 4, 4))):
        ours, theirs = batch_norms(channels)
        x = normal(*shape, seed=5, scale=3)
        before = x.clone()
        close(ours(x), theirs(x))
        assert x.equal(before)


def test_exercise13_training_and_testing_are_the_same():
    ours, theirs = batch_norms()
    x = normal(2, 4, 5, 3, scale=100) + 50
    close(ours.train()(x), theirs(x), 1e-4)
    close(ours.eval()(x), theirs(x), 1e-4)


def test_exercise13_nothing_changes_and_nothing_trains():
    ours, _ = batch_norms()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = (normal(2, 4, 5, 3) + 9).requires_grad_()
    for _ in range(3):
        ours.train()(x).sum().backward()
    assert list(ours.parameters()) == [] and all(not buffer.requires_grad for buffer in ours.buffers())
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_exercise13_state_dict_has_the_four_names():
    ours = exercises.FrozenBatchNorm(6)
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
        name: (6,) for name in ("weight", "bias", "running_mean", "running_var")
    }  # fmt: skip
    assert set(dict(ours.named_buffers())) == set(ours.state_dict())
    assert all(buffer.dtype == torch.float64 for buffer in ours.double().buffers())  # they move with the module


def test_exercise13_a_new_one_does_nothing():
    x = normal(2, 5, 3, 3, scale=4)
    close(exercises.FrozenBatchNorm(5)(x), x, 1e-4)
    close(exercises.FrozenBatchNorm(5)(x), x / math.sqrt(1 + 1e-5), 1e-6)


def test_exercise13_eps_is_under_the_root():
    for eps in (1e-5, 0.5):
        ours, theirs = batch_norms(eps=eps)
        ours.running_var.zero_()
        theirs.running_var.zero_()
        x = normal(2, 4, 3, 3)
        close(ours(x), theirs(x), 1e-4)
        assert ours(x).isfinite().all()


def test_exercise13_gradients_pass_through():
    ours, theirs = batch_norms()
    x, y = (normal(2, 4, 3, 3, seed=5).requires_grad_() for _ in range(2))
    weights = normal(2, 4, 3, 3, seed=6)
    (ours.train()(x) * weights).sum().backward()
    (theirs(y) * weights).sum().backward()
    close(x.grad, y.grad)


def test_exercise13_of_weights_that_are_loaded_after_use():
    ours, theirs = batch_norms()
    x, new = normal(2, 4, 3, 3), exercises.FrozenBatchNorm(4)
    new(x)
    new.load_state_dict(ours.state_dict())
    close(new(x), theirs(x))


def test_exercise13_in_double_precision():
    ours, theirs = batch_norms()
    x = normal(2, 4, 3, 3).double()
    close(ours.double()(x), theirs.double()(x), 1e-10)
