"""The tests of the exercises: each is a property, with its points and a sentence for when it fails.

    python -m pytest -k exercise3_       one exercise (mind the underscore)

No exercise needs another one: where a function calls another exercise's, a stand-in takes its place.
Expected numbers come from the authors' implementation (the golden_* files beside this one), from a
slow formula beside the test (`..._by_hand`), or can be checked on paper.
"""

import functools
import gzip
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import exercises
import numpy as np
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
    json.loads((HERE / f"golden_{name}.json").read_text())
    for name in ("clipbert", "pretrain", "retrieval")
)
TENSORS = load(gzip.decompress((HERE / "golden_tensors.safetensors.gz").read_bytes()))
TINY = replace(
    clipbert.ClipBertConfig.tiny(vocab_size=200), hidden_size=32, layers=2, intermediate_size=64
)


class Hurt(AssertionError):
    """A property that doesn't hold, in a sentence."""


def worth(points, sentence):
    """Of a test: its points, and what is wrong if it fails (the comparison stands above that)."""

    def decorate(test):
        @functools.wraps(test)
        def checked():
            torch.manual_seed(0)
            random.seed(0)
            try:
                test()
            except (NotImplementedError, Hurt):
                raise
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                raise Hurt(sentence) from error
            finally:
                switched_off = not torch.is_grad_enabled()
                torch.set_grad_enabled(True)
            if switched_off:
                raise Hurt("it leaves gradients switched off for whatever comes after it")

        return checked

    return decorate


def pure(function, *inputs, **more):
    """function(*inputs), of which nothing remains but what it returns."""

    def states():
        numpy = np.random.get_state()[1].tobytes()
        return random.getstate(), numpy, torch.get_rng_state().numpy().tobytes()

    def contents():
        return [
            x.detach().numpy().tobytes() if torch.is_tensor(x) else list(x) if isinstance(x, list) else 0
            for x in inputs
        ]

    before = states(), contents()
    result = function(*inputs, **more)
    if states() != before[0]:
        raise Hurt("it draws random numbers that do not come from the generator it is given")
    if contents() != before[1]:
        raise Hurt("it changes its inputs")
    return result


def close(actual, expected, tolerance=1e-5):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False, equal_nan=True
    )


def agree(function, by_hand, *inputs, leaves=(), tolerance=1e-4):
    """The checker: function(*inputs) is by_hand(*inputs), and so are the gradients of both.

    Gradients with respect to `leaves` and, if it holds floats, to the first input. No side effects,
    and whatever is made is made where the inputs are.
    """
    if inputs[0].is_floating_point():
        inputs = inputs[0].detach().clone().requires_grad_(), *inputs[1:]
        leaves = [inputs[0], *leaves]
    actual, expected = pure(function, *inputs), by_hand(*inputs)
    close(actual, expected, tolerance)
    weights = normal(*expected.shape, seed=99)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves) for x in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 10 * tolerance)
    made_here(lambda: function(*inputs), lambda result: result.allclose(actual, equal_nan=True))


def made_here(function, right):
    """What function() makes without saying where is made on another device, without values: none may be missing."""
    try:
        with torch.device("meta"):
            result = function()
        here = result.device.type != "meta" and right(result)
    except (RuntimeError, NotImplementedError) as error:
        here = "meta" not in str(error)
    if not here:
        raise Hurt("it makes a tensor on the default device, not on its inputs' (device=...)")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=seeded(seed)) * scale


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


# --------------------------------------------------------------------------------------------------
# Exercise 1: clip sampling

# From the authors' decoder: (num_frames, fps, n_frames, target_fps, n_clips, clip, its frames).
UNIFORM = [
    (1, 25.0, 2, 2, 16, 4, [0, 0]), (7, 25.0, 1, 1, 4, 3, [0]), (7, 25.0, 3, 3, 2, 1, [0, 6, 6]),
    (7, 25.0, 4, 2, 16, 2, [0, 6, 6, 6]), (20, 10.0, 3, 3, 4, 2, [5, 9, 14]),
    (20, 10.0, 4, 2, 8, 6, [0, 6, 12, 19]), (90, 30.0, 2, 1, 16, 2, [4, 63]),
    (300, 30.0, 2, 2, 4, 2, [135, 164]), (300, 30.0, 3, 3, 16, 0, [0, 14, 29]),
    (372, 29.97, 2, 2, 16, 10, [214, 242]), (372, 29.97, 3, 3, 4, 1, [86, 100, 114]),
]  # fmt: skip


def sample(num_frames, fps, n_clips, n_frames, target_fps, train=False, seed=0):
    arguments = num_frames, fps, n_clips, n_frames, target_fps, train, seeded(seed)
    clips = pure(data.sample_clips, *arguments)
    assert clips.shape == (n_clips, n_frames) and clips.dtype == torch.int64
    return clips


@worth(3, "test clip i of N does not start with the first whole frame from i/N of the free range on")
def test_exercise1_uniform():
    for num_frames, fps, n_frames, target_fps, n_clips, clip, expected in UNIFORM:
        assert sample(num_frames, fps, n_clips, n_frames, target_fps)[clip].tolist() == expected
    assert sample(300, 30.0, 2, 3, 2).tolist() == [[0, 22, 44], [128, 150, 172]]
    assert sample(200, 25.0, 2, 2, 0.8).tolist() == [[0, 61], [69, 130]]  # a clip of 62.5 frames
    assert sample(300, 30.0, 3, 2, 2, seed=1).equal(data.sample_clips(300, 30.0, 3, 2, 2, False))


@worth(1, "a single test clip is not the one in the middle of the video")
def test_exercise1_middle():
    assert sample(300, 30.0, 1, 2, 2).tolist() == [[135, 164]]
    assert sample(7, 4.0, 1, 1, 1).tolist() == [[2]]  # starts at 1.5: the next frame
    assert sample(16, 4.0, 1, 4, 2).tolist() == [[4, 6, 8, 11]]


@worth(2, "a clip's frames are not spread over it, or a video shorter than a clip goes wrong")
def test_exercise1_frames_of_a_clip():
    for num_frames, fps, n_frames, target_fps, offsets in [
        (300, 30.0, 2, 2, [0, 29]), (300, 30.0, 1, 1, [0]), (61, 29.97, 4, 4, [0, 9, 19, 28]),
        (90, 10.0, 3, 1, [0, 14, 29]), (20, 4.0, 4, 2, [0, 2, 4, 7]), (200, 25.0, 2, 0.8, [0, 61]),
        (10, 2.0, 2, 2, [0, 1]), (10, 0.2, 2, 2, [0, 0]),  # a clip shorter than a frame is that frame
        (3, 30.0, 4, 2, [0, 2, 2, 2]), (1, 30.0, 2, 1, [0, 0]), (15, 30.0, 2, 4, [0, 14]),
    ]:  # fmt: skip
        for train in (True, False):
            clips = sample(num_frames, fps, 50, n_frames, target_fps, train)
            assert (clips - clips[:, :1]).equal(torch.tensor(offsets).expand(50, n_frames))
            assert clips.min() >= 0 and clips.max() < num_frames


@worth(3, "training starts are not uniform over the free range, rounded up, each one for itself")
def test_exercise1_random():
    for n_clips in (1, 3):
        starts = [sample(300, 30.0, n_clips, 2, 2, True, seed)[:, 0] for seed in range(400)]
        starts = torch.stack(starts, 1).double()  # (clip, draw)
        assert (starts.mean(1) - 135).abs().max() < 15
        assert (starts.std(1) - 270 / math.sqrt(12)).abs().max() < 8
        assert n_clips == 1 or starts.corrcoef().fill_diagonal_(0).abs().max() < 0.2
    for seed in range(3):
        first = sample(3, 1.0, 4000, 1, 0.8, True, seed)[:, 0]  # 1 from (0, 1], 2 from (1, 1.75]
        assert abs((first == 2).double().mean() - 0.75 / 1.75) < 0.04 and (first > 0).all()
        for num_frames, fps, n_frames, last in [(5, 1.0, 1, 4), (8, 2.0, 2, 4), (2, 1.0, 1, 1)]:
            clips = sample(num_frames, fps, 400, n_frames, 1, True, seed)
            counts = Counter(clips[:, 0].tolist())
            assert set(counts) == set(range(1, last + 1)) and min(counts.values()) > 280 / last
            assert clips.max() == num_frames - 1


@worth(1, "the generator does not decide: equal seeds, other clips, or other seeds, the same clips")
def test_exercise1_generator():
    generator = seeded(0)
    first = data.sample_clips(300, 30.0, 8, 2, 2, True, generator)
    assert first.equal(sample(300, 30.0, 8, 2, 2, True))
    assert not first.equal(sample(300, 30.0, 8, 2, 2, True, seed=1))
    assert not first.equal(data.sample_clips(300, 30.0, 8, 2, 2, True, generator))  # it goes on
    assert data.sample_clips(300, 30.0, 8, 2, 2, True).shape == (8, 2)  # None: torch's own


# --------------------------------------------------------------------------------------------------
# Exercise 2: the grid encoder


def grid_features(**changes):
    torch.manual_seed(2)
    cfg = replace(TINY, pixel_mean=(10.0, 60.0, 110.0), pixel_std=(40.0, 50.0, 90.0), **changes)
    return clipbert.GridFeatures(cfg)


def grid_by_hand(model, frames):
    """Frame by frame."""
    cfg, grids = model.cfg, []
    for frame in frames.flatten(0, 1).float():
        x = torch.stack([(frame[c] - cfg.pixel_mean[c]) / cfg.pixel_std[c] for c in range(3)])
        x = model.resnet((x[[2, 1, 0]] if cfg.bgr else x)[None])
        x = F.max_pool2d(F.conv2d(x, model.grid_encoder[0].weight, padding=1), 2).relu()
        grids.append(x[0].permute(1, 2, 0))
    return torch.stack(grids).unflatten(0, frames.shape[:2])


@worth(5, "a frame's grid is not ReLU(max-pool(conv(trunk(normalised frame)))), in its own place")
def test_exercise2_value():
    model = grid_features()
    leaves = model.grid_encoder[0].weight, model.resnet.conv1.weight
    for B, T, H, W in [(2, 3, 32, 48), (1, 1, 16, 16), (1, 4, 56, 40)]:
        frames = pixels(B, T, 3, H, W).float()
        agree(model, functools.partial(grid_by_hand, model), frames, leaves=leaves)


@worth(2, "bytes, BGR or the zero border are not normalised as floats in RGB (black is -mean/std)")
def test_exercise2_pixels():
    for bgr in (False, True):
        model, frames = grid_features(bgr=bgr), pixels(1, 2, 3, 32, 32, seed=1)
        frames[..., 16:, :] = 0
        agree(model, functools.partial(grid_by_hand, model), frames, leaves=[model.resnet.conv1.weight])
        assert model(frames).dtype == torch.float32


@worth(2, "the trunk does not see all frames of all videos in one call")
def test_exercise2_once():
    model, seen = grid_features(), []
    model.resnet.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    model(pixels(2, 3, 3, 32, 32))
    assert seen == [6]


# --------------------------------------------------------------------------------------------------
# Exercise 3: visual tokens


def visual_embedding(dropout=0.0):
    """With LayerNorm numbers that a fresh one doesn't have."""
    torch.manual_seed(3)
    module = clipbert.VisualEmbedding(replace(TINY, dropout=dropout, layer_norm_eps=0.05)).eval()
    nn.init.normal_(module.LayerNorm.weight)
    nn.init.normal_(module.LayerNorm.bias)
    return module


def tokens_by_hand(module, grid):
    _, T, h, w, _ = grid.shape
    row, column = module.row_position_embeddings.weight, module.col_position_embeddings.weight
    x = torch.stack([
        sum(grid[:, t, y, x] for t in range(T)) / T + row[y] + column[x]
        for y in range(h) for x in range(w)
    ], 1) + module.token_type_embeddings.weight[0]  # fmt: skip
    norm, centred = module.LayerNorm, x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias


@worth(4, "a token is not LayerNorm(mean over T + row + column + type embedding), row by row")
def test_exercise3_value():
    module = visual_embedding()
    for B, T, h, w in [(2, 3, 3, 5), (2, 1, 5, 2), (1, 1, 1, 1), (3, 2, 4, 4), (1, 7, 1, 6)]:
        for scale in (1, 80):
            grid = normal(B, T, h, w, 32, seed=T, scale=scale)
            by_hand = functools.partial(tokens_by_hand, module)
            agree(module, by_hand, grid, leaves=list(module.parameters()))


@worth(1, "dropout does not come last, or not in training only")
def test_exercise3_dropout():
    module, grid = visual_embedding(dropout=0.5), normal(4, 1, 5, 5, 32)
    tokens = pure(module, grid)
    dropped = module.train()(grid)
    kept = dropped != 0
    assert module.training and 0.4 < kept.float().mean() < 0.6
    close(dropped[kept], 2 * tokens[kept])


def among(tokens, some):
    return torch.cdist(some[0], tokens).min(1).values.max() < 0.1


@worth(2, "keep does not leave so many tokens as they were, at the same places of every video")
def test_exercise3_keep():
    for module in (visual_embedding(), visual_embedding().train()):
        grid = normal(2, 2, 4, 6, 32)
        tokens, before = module(grid), grid.clone()
        for keep in (1, 7, 23):
            some = module(grid, keep=keep)
            places = torch.cdist(some[0], tokens[0]).argmin(1)
            assert some.shape == (2, keep, 32) and len(places.unique()) == keep
            close(some, tokens[:, places])
            made_here(functools.partial(module, grid, keep=keep), functools.partial(among, tokens[0]))
        for keep in (None, 24, 25, 100):
            close(module(grid, keep=keep), tokens, 0)
        assert grid.equal(before)


@worth(1, "places are not drawn by chance, all alike, or a grid beyond 100 rows or columns passes")
def test_exercise3_random_and_refused():
    module, grid = visual_embedding(), normal(1, 1, 3, 4, 32)
    tokens, pairs = module(grid)[0], Counter()
    for _ in range(1320):
        places = torch.cdist(module(grid, keep=2)[0], tokens).argmin(1)
        pairs.update([frozenset(places.tolist())])
    assert len(pairs) == 66 and max(pairs.values()) < 45  # 20 on average: not only neighbours
    assert module(torch.zeros(1, 1, 100, 1, 32)).shape == (1, 100, 32)
    assert module(torch.zeros(1, 1, 1, 100, 32)).shape == (1, 100, 32)
    for shape in ((2, 101), (101, 2)):
        with pytest.raises(ValueError, match="101"):  # the message says how many
            module(torch.zeros(1, 1, *shape, 32))


# --------------------------------------------------------------------------------------------------
# Exercise 4: [text; grid] with its mask


def encoder(scale=1, dropout=0.0):
    """scale: of the queries; with 8, attention scores are some tens: a mask must be stronger."""
    torch.manual_seed(4)
    model = clipbert.ClipBert(replace(TINY, dropout=dropout), 2).eval()
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.weight.data.mul_(scale)
    return model


def texts(*lengths, longest=6):
    """Random ids and a mask that keeps the first so many of each."""
    ids = torch.randint(1, 200, (len(lengths), longest), generator=seeded(len(lengths)))
    return ids, (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def fused(model, grid, ids, mask, keep=None):
    """What `fuse` returns, without the states of padding: (all tokens of all texts, d)."""

    def cells_alone(self, grid, keep=None):
        return grid[:, 0].flatten(1, 2)[:, :keep]

    with mock.patch.object(clipbert.VisualEmbedding, "forward", cells_alone):
        hidden, pooled = model.fuse(grid, ids, mask, keep)
    cells = torch.ones(len(ids), hidden.shape[1] - ids.shape[1], device=mask.device)
    return torch.cat([hidden[torch.cat([mask, cells], 1) == 1], pooled])


def fused_by_hand(model, grid, ids, mask, keep=None):
    """Text by text, without its padding: no mask is needed."""
    states, pooled, n = [], [], len(ids) // len(grid)
    for i, length in enumerate(mask.sum(1)):
        words, cells = model.bert.embeddings(ids[i : i + 1, :length]), grid[i // n, 0].flatten(0, 1)
        hidden = model.bert.encoder(torch.cat([words, cells[None, :keep]], 1))[0]
        states.append(hidden[0])
        pooled.append(model.bert.pooler(hidden))
    return torch.cat(states + pooled)


def agree_on_fuse(videos, *lengths, scale=1, black=0, keep=None, dropout=0.0):
    model, grid = encoder(scale, dropout), normal(videos, 1, 2, 3, 32)
    model.dropout.train()  # the one of `classify`, which comes later
    grid[:, :, :black] = 0
    ours, by_hand = (functools.partial(f, model, keep=keep) for f in (fused, fused_by_hand))
    leaves = [model.bert.embeddings.word_embeddings.weight, model.bert.pooler.dense.weight]
    agree(ours, by_hand, grid, *texts(*lengths), leaves=leaves)


@worth(3, "states are not those of BERT's layers over [text; grid], or pooled is not the pooler's")
def test_exercise4_value():
    agree_on_fuse(2, 6, 6)
    agree_on_fuse(1, 6, scale=8)


@worth(2, "padding changes the answer")
def test_exercise4_padding():
    for scale in (1, 8):
        agree_on_fuse(3, 3, 1, 5, scale=scale)


@worth(2, "the n texts of a video, one after the other, do not each get that video's grid")
def test_exercise4_texts_of_a_video():
    agree_on_fuse(2, 6, 6, 6, 6, 6, 6)
    agree_on_fuse(1, 6, 6)


@worth(1, "black cells are masked, which must be seen like any other")
def test_exercise4_black_cells():
    agree_on_fuse(2, 6, 6, black=1)


@worth(1, "texts that do not divide among the videos pass, or the ValueError lacks the two numbers")
def test_exercise4_refused():
    for videos, count in ((2, 3), (3, 4), (2, 1), (4, 6)):
        with pytest.raises(ValueError) as error:
            fused(encoder(), normal(videos, 1, 2, 2, 32), *texts(*[4] * count))
        assert {str(count), str(videos)} <= set(re.findall(r"\d+", str(error.value)))


@worth(1, "keep is not passed on, or a dropout is added")
def test_exercise4_keep():
    agree_on_fuse(2, 6, 6, 6, 6, keep=4, dropout=0.5)


# --------------------------------------------------------------------------------------------------
# Exercise 5: p_1, ..., p_N


class Simple(nn.Module):
    """A stand-in for the model: frames to grids, grids and texts to K scores."""

    def __init__(self, K):
        super().__init__()
        self.weight, self.K, self.clips = nn.Parameter(torch.tensor(0.7)), K, []

    def encode_frames(self, frames):  # (B, T, 3, L, L) -> (B, T, 1, 2, 3)
        self.clips.append(len(frames))
        return (frames * self.weight).mean((3, 4)).sin()[:, :, None, None].expand(-1, -1, 1, 2, 3)

    def classify(self, grid, ids, mask):  # (B, T, 1, 2, 3), (B*n, Lt) -> (B*n, K)
        assert grid.dim() == 5 and ids.shape == mask.shape and len(ids) % len(grid) == 0
        video = (grid.flatten(1) * torch.arange(1, grid[0].numel() + 1, device=grid.device)).sum(1)
        words = (ids * (1 + mask) * torch.arange(1, 5, device=ids.device)).sum(1)
        x = video.repeat_interleave(len(ids) // len(grid)) + words
        return (x[:, None] * torch.arange(1, self.K + 1, device=x.device)).sin()


def logits_by_hand(model, frames, ids, mask):
    B, N, n = *frames.shape[:2], len(ids) // len(frames)
    rows = [[i // n, i] for i in range(B * n)]
    return torch.stack([
        torch.cat([model.classify(model.encode_frames(frames[b, c][None]), ids[[i]], mask[[i]])
                   for b, i in rows])
        for c in range(N)
    ])  # fmt: skip


def agree_on_clips(*sizes, frames_as=torch.float, order=(0, 1, 2, 3, 4)):
    for B, N, n, K in sizes:
        ids = torch.randint(1, 200, (B * n, 4), generator=seeded(n))
        mask = torch.randint(0, 2, (B * n, 4), generator=seeded(n + 1))
        frames = pixels(B, N, 2, 3, 4, 4).to(frames_as).contiguous()
        model = Simple(K).train(K % 2 == 0)
        by_hand = functools.partial(logits_by_hand, model)
        ours = functools.partial(clipbert.clip_logits, model)
        agree(ours, by_hand, frames, ids, mask, leaves=[model.weight], tolerance=1e-3)
        assert model.training == (K % 2 == 0)


@worth(4, "with one text a video, the scores of clip i are not at [i]")
def test_exercise5_one_text():
    agree_on_clips((2, 3, 1, 5), (3, 2, 1, 4), (2, 2, 1, 2))


@worth(3, "with n texts a video, the scores of text j of video b are not at [:, b * n + j]")
def test_exercise5_several_texts():
    agree_on_clips((2, 3, 4, 5), (2, 2, 2, 2), (3, 4, 2, 2))


@worth(1, "one video, one clip, one score, or pixels of one byte go wrong")
def test_exercise5_ones():
    agree_on_clips((1, 1, 1, 1), (1, 4, 3, 1), (3, 1, 2, 1), (1, 2, 1, 3))
    agree_on_clips((2, 3, 2, 2), frames_as=torch.uint8)


@worth(2, "the CNN does not see each clip once, all in one call, however many texts there are")
def test_exercise5_once():
    for n in (1, 3):
        model, ids = Simple(2), torch.ones(2 * n, 4, dtype=torch.long)
        clipbert.clip_logits(model, pixels(2, 3, 2, 3, 4, 4), ids, ids)
        assert model.clips == [6]


# --------------------------------------------------------------------------------------------------
# Exercise 6: from clips to a video

BY_HAND = {
    "mean": lambda logits: sum(logits) / len(logits),
    "max": lambda logits: torch.stack(list(logits)).sort(0).values[-1],
    "lse": lambda logits: functools.reduce(torch.logaddexp, logits),
}


def agree_on_aggregation(*logits):
    for one in logits:
        for how, by_hand in BY_HAND.items():
            agree(lambda x, how=how: clipbert.aggregate_clips(x, how), by_hand, one)


@worth(2, "mean, max or LogSumExp is not that of the logits over the clips")
def test_exercise6_value():
    logits = torch.tensor([[[0.0, -3.0]], [[math.log(3), -1.0]]])  # two clips, one video
    close(clipbert.aggregate_clips(logits, "mean"), [[math.log(3) / 2, -2.0]])
    close(clipbert.aggregate_clips(logits, "max"), [[math.log(3), -1.0]])
    lse = [[math.log(4), math.log(math.exp(-3) + math.exp(-1))]]
    close(clipbert.aggregate_clips(logits, "lse"), lse)
    for case in GOLDEN["clip_aggregation"]:
        p = clipbert.aggregate_clips(torch.tensor(case["logits"]), case["pool"])
        close(p, torch.tensor(case["eval_pooled_logits"]))


@worth(2, "a video's or an answer's score depends on others, or a single clip's is not its own")
def test_exercise6_each_by_itself():
    sizes = [(4, 4, 4), (3, 2, 5), (1, 3, 5), (1, 1, 1), (16, 1, 2)]
    agree_on_aggregation(*(normal(*shape, scale=3) for shape in sizes))


@worth(2, "logits of -1000, -20, 80 or 1000 overflow or vanish, or doubles become floats")
def test_exercise6_large():
    large = [[[1000.0, -1000.0, 90.0, -20.0, 80.0]], [[999.0, -1001.0, -90.0, -20.5, -20.0]]]
    agree_on_aggregation(torch.tensor(large))
    logits = torch.tensor([[[1.0]], [[1.0 + 1e-10]]], dtype=torch.float64)
    for how, expected in (("max", 1e-10), ("mean", 5e-11), ("lse", 5e-11 + math.log(2))):
        assert abs(clipbert.aggregate_clips(logits, how).item() - 1 - expected) < 1e-14


@worth(1, "another name than mean, max or lse is not a ValueError, of one clip too")
def test_exercise6_unknown():
    for how in ("median", "sum", "", None):
        for clips in (1, 2):
            with pytest.raises(ValueError):
                clipbert.aggregate_clips(torch.zeros(clips, 1, 1), how)


# --------------------------------------------------------------------------------------------------
# Exercise 7: the losses of a video


def cross_entropy_by_hand(p, target):
    return sum(row.logsumexp(0) - row[q] for row, q in zip(p, target, strict=True)) / len(p)


def agree_on_loss(kind, by_hand, p, *targets):
    for target in map(torch.as_tensor, targets):
        ours = functools.partial(clipbert.video_loss, kind=kind)
        for scale in (1.0, 20.0):
            agree(ours, by_hand, scale * torch.as_tensor(p), target)


ROWS = torch.tensor([[0.5, 4.0, -2.0], [1.0, -0.5, 3.0], [-20.0, 80.0, 79.0], [5.0, -20.0, -20.5]])


@worth(2, "choice is not cross entropy over each question's n options, which stand below each other")
def test_exercise7_choice():
    def by_hand(p, target):
        return cross_entropy_by_hand(p.flatten().view(len(target), -1), target)

    agree_on_loss("choice", by_hand, ROWS.reshape(12, 1), [2, 0, 1, 0], [0, 0, 2, 1], [1, 5])
    agree_on_loss("choice", by_hand, [[3.0]], [0])
    close(clipbert.video_loss(torch.zeros(15, 1), torch.tensor([2, 0, 4]), "choice"), math.log(5))


@worth(2, "answer or match is not cross entropy over a row's scores (match: column 1 is a match)")
def test_exercise7_answer_and_match():
    agree_on_loss("answer", cross_entropy_by_hand, ROWS, [2, 0, 1, 0], [0, 0, 2, 1])
    agree_on_loss("match", cross_entropy_by_hand, ROWS[:, :2], [1, 0, 1, 0], [0, 0, 1, 1])
    pair = torch.tensor([[0.0, math.log(7)]])
    close(clipbert.video_loss(pair, torch.tensor([1]), "match"), math.log(8 / 7))
    for case in GOLDEN["clip_aggregation"]:
        p = torch.tensor(case["eval_pooled_logits"])
        loss = clipbert.video_loss(p, torch.tensor(case["labels"]), "answer")
        close(loss, torch.tensor(case["loss"]))


@worth(3, "soft is not binary cross entropy, summed over all of p's outputs, averaged over questions")
def test_exercise7_soft():
    def by_hand(p, target):
        target = torch.cat([target, torch.zeros(len(p), 3 - target.shape[1])], 1)
        return (torch.logaddexp(p, torch.zeros_like(p)) - p * target).sum() / len(p)

    whole = torch.tensor([[0.0, 0.3, 0.0], [1.0, 0.6, 0.3], [0.0, 1.0, 1.0], [0.9, 0.0, 0.0]])
    agree_on_loss("soft", by_hand, ROWS, whole, whole[:, :2])  # an output beyond the answers: never
    for case in RETRIEVAL["vqa"]:
        loss = clipbert.video_loss(torch.tensor(case["logits"]), torch.tensor(case["targets"]), "soft")
        close(loss, torch.tensor(case["loss"]))


@worth(2, "count is not the mean squared error of p's one column")
def test_exercise7_count():
    def by_hand(p, target):
        return sum((score[0] - t) ** 2 for score, t in zip(p, target, strict=True)) / len(p)

    agree_on_loss("count", by_hand, [[2.0], [5.0], [-4.0]], [1.0, 5.0, 10.0], [1, 5, 10])
    agree_on_loss("count", by_hand, [[3.5]], [3])


@worth(1, "another kind of answer is not a ValueError")
def test_exercise7_unknown():
    for kind in ("essay", "", None):
        with pytest.raises(ValueError):
            clipbert.video_loss(torch.zeros(1, 1), torch.zeros(1), kind)


# --------------------------------------------------------------------------------------------------
# Exercise 8: evaluation with N_test clips


class Recorded(nn.Module):
    """A model whose scores are known: logits (clips, n, K) of each video; notes what is asked."""

    def __init__(self, *videos):
        super().__init__()
        self.videos = [torch.as_tensor(video, dtype=torch.float) for video in videos]
        self.asked, self.calls, self.weight = [], [], nn.Parameter(torch.ones(()))

    def read(self, video, n_test):  # clip i: one frame of 1 x 1 pixels, (video, i, 0)
        self.asked.append((video, n_test))
        clips = [[video, i, 0] for i in range(n_test)]
        return torch.tensor(clips).view(n_test, 1, 3, 1, 1)

    def clip_logits(self, _, frames, ids, mask):
        places = frames[0, :, 0, :2, 0, 0].tolist()
        self.calls.append((len(places), self.training or torch.is_grad_enabled()))
        self.seen = getattr(self, "seen", []) + places
        assert frames.dim() == 6 and len(frames) == 1 and len(ids) == len(mask)
        return torch.stack([self.videos[video][i] for video, i in places]) * self.weight

    def aggregate_clips(self, logits, how):
        assert logits.dim() == 3  # (clips, n, K)
        return BY_HAND[how](logits)

    def accuracy(self, answers, n_test, how="mean", **more):
        questions = []
        for video, answer in enumerate(answers):
            ids = torch.ones(self.videos[video].shape[1], 4, dtype=torch.long)
            questions.append((video, ids, ids, answer))
        with (
            mock.patch.object(clipbert, "clip_logits", self.clip_logits),
            mock.patch.object(clipbert, "aggregate_clips", self.aggregate_clips),
        ):
            return exercises.evaluate(self, questions, self.read, n_test, how, **more)


# One clip is for answer 0, more than the two for answer 1 together: 0 by the mean, 1 by votes.
LOUD = [[[9.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.0, 1.0, 0.5]]]
OPTIONS = [[[0.0], [3.0], [1.0], [0.0]]] * 3  # four options of a multiple choice, the second best


@worth(2, "it is not the percentage of questions whose highest p is the right answer, or option")
def test_exercise8_value():
    model = Recorded(LOUD, OPTIONS, LOUD, OPTIONS, LOUD, LOUD, OPTIONS, LOUD)
    for n_test in (1, 3):
        assert pure(model.accuracy, [0, 1, 0, 1, 0, 0, 1, 0], n_test) == 100
        assert model.accuracy([1, 0, 2, 2, 2, 1, 3, 2], n_test) == 0
        assert model.accuracy([0, 1, 0, 2, 1, 0, 1, 2], n_test) == pytest.approx(62.5)
    assert Recorded(OPTIONS).accuracy([1], 2) == 100


@worth(2, "G does not see the logits of all N_test clips of a video at once, in the asked-for way")
def test_exercise8_aggregation():
    scores = [4.0] + [-0.16] * 15 + [-1.0] * 4  # of answer 0; sixteen, then four: mean .1 and -1
    video = torch.tensor(scores).view(20, 1, 1) * torch.tensor([1.0, 0.0])
    for how, right, n_test in (("mean", 1, 20), ("max", 0, 20), ("lse", 0, 20), ("mean", 0, 16)):
        for at_once in (16, 7, 20, 100):
            assert Recorded(video).accuracy([right], n_test, how, at_once=at_once) == 100
    short = torch.tensor([1.0, 1, 1, 1, -3]).view(5, 1, 1) * torch.tensor([1.0, 0.0])
    assert Recorded(short).accuracy([0], 5, at_once=4) == 100  # .2, not the mean of 1 and -3


@worth(2, "not each clip goes through the model once, at most at_once of them in a call")
def test_exercise8_at_once():
    for n_test in (1, 3, 4, 16, 17):
        for at_once in (None, 1, 3, 16):
            model, limit = Recorded(*torch.zeros(2, 17, 1, 2)), at_once or 16
            model.accuracy([0, 0], n_test, **{"at_once": at_once} if at_once else {})
            assert model.asked == [(0, n_test), (1, n_test)]
            assert model.seen == [[video, i] for video in (0, 1) for i in range(n_test)]
            assert len(model.calls) == 2 * math.ceil(n_test / limit)
            assert max(clips for clips, _ in model.calls) <= limit


@worth(2, "the model is not in testing mode without a graph, and afterwards in the mode it was in")
def test_exercise8_mode():
    for training in (True, False):
        model = Recorded(LOUD, OPTIONS).train(training)
        model.accuracy([0, 1], 3, "lse", at_once=2)
        assert model.training == training and len(model.calls) == 4
        assert not any(in_training_or_with_graph for _, in_training_or_with_graph in model.calls)


# --------------------------------------------------------------------------------------------------
# Exercise 9: which words to mask

WORDS = [f"word{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
TOKENIZER = data.build_tokenizer(data.SPECIAL_TOKENS + WORDS)
MASK = TOKENIZER.mask_token_id


def word_ids(*shape, seed=0):
    return torch.randint(5, 31, shape, generator=seeded(seed))


def mask_tokens(ids, seed=1, **more):
    masked, labels = pure(data.mask_tokens, ids, TOKENIZER, seeded(seed), **more)
    assert masked.shape == labels.shape == ids.shape
    assert masked.dtype == labels.dtype == torch.int64
    return masked, labels


@worth(2, "not 15% (rate) are chosen, of which 80% become [MASK], 10% any token and 10% stay")
def test_exercise9_shares():
    for shape, rate in [((150_000,), 0.15), ((5000, 30), 0.15), ((50_000,), 0.5), ((50_000,), 1.0)]:
        ids = word_ids(*shape)
        masked, labels = mask_tokens(ids, **{} if rate == 0.15 else {"rate": rate})
        chosen = labels != -100
        assert chosen.float().mean().item() == pytest.approx(rate, abs=0.006)
        share = 0.1 / len(TOKENIZER)  # of the random tokens, some are [MASK] or the word itself
        assert (masked == MASK)[chosen].float().mean() == pytest.approx(0.8 + share, abs=0.012)
        assert (masked == ids)[chosen].float().mean() == pytest.approx(0.1 + share, abs=0.012)
    assert (mask_tokens(word_ids(1000), rate=0.0)[1] == -100).all()
    masked, labels = mask_tokens(torch.full((300_000,), 7))
    counts = Counter(masked[(labels != -100)].tolist())
    words = [counts[i] for i in range(5, 31) if i != 7]
    assert min(words) > 0.6 * max(words)  # each word alike


@worth(1, "labels are not the words that were there where one is chosen, else -100 and no change")
def test_exercise9_labels():
    for seed in range(3):
        ids = word_ids(200, 50, seed=seed)
        masked, labels = mask_tokens(ids, seed)
        chosen = labels != -100
        assert labels[chosen].equal(ids[chosen]) and masked[~chosen].equal(ids[~chosen])


@worth(1, "special tokens are chosen, or change how many of the words beside them are")
def test_exercise9_special():
    sentences = ["worda wordb unknownword", "worda"]
    ids = TOKENIZER(sentences, padding=True, return_tensors="pt")["input_ids"].repeat(2000, 1)
    ids[::5, 1] = MASK
    special = ids < 5  # [PAD] [UNK] [CLS] [SEP] [MASK]
    assert len(ids[special].unique()) == 5
    for rate in (0.15, 1.0):
        masked, labels = mask_tokens(ids, rate=rate)
        assert masked[special].equal(ids[special]) and (labels[special] == -100).all()
        assert (labels != -100)[~special].float().mean().item() == pytest.approx(rate, abs=0.02)


@worth(1, "a word's chance or fate depends on its neighbours, or on how many are chosen")
def test_exercise9_each_by_itself():
    ids, generator = word_ids(20), seeded(0)
    counts = [data.mask_tokens(ids, TOKENIZER, generator)[1].ne(-100).sum() for _ in range(1500)]
    counts = torch.stack(counts).double()  # now more, now fewer, now and then none
    assert abs(counts.mean() - 3) < 0.25 and abs(counts.var() - 20 * 0.15 * 0.85) < 0.5
    masked, labels = mask_tokens(word_ids(20_000, 4), rate=0.5)
    chosen, is_mask = labels != -100, (masked == MASK).double()
    assert (chosen.double().mean(0) - 0.5).abs().max() < 0.02
    assert chosen.double().T.corrcoef().fill_diagonal_(0).abs().max() < 0.04
    both = is_mask[chosen[:, 0] & chosen[:, 1], :2]
    assert abs(both.T.corrcoef()[0, 1]) < 0.05
    alone = [mask_tokens(word_ids(1, seed=i), i, rate=1.0)[0].item() for i in range(300)]
    assert 210 < alone.count(MASK) < 270  # of texts of one word


@worth(1, "the generator does not decide: equal seeds, other masks, or other seeds, the same masks")
def test_exercise9_generator():
    ids, generator = word_ids(50, 20), seeded(1)
    first = data.mask_tokens(ids, TOKENIZER, generator)
    again, other, later = mask_tokens(ids), mask_tokens(ids, 2), data.mask_tokens(ids, TOKENIZER, generator)
    for i in (0, 1):
        assert first[i].equal(again[i]) and not first[i].equal(other[i])
        assert not first[i].equal(later[i])  # it goes on


# --------------------------------------------------------------------------------------------------
# Exercise 10: the losses of pretraining


def mlm_by_hand(scores, labels, positions=None):
    words = [(s, q) for rows, qs in zip(scores, labels, strict=True)
             for s, q in zip(rows, qs, strict=True) if q != -100]  # fmt: skip
    total = sum(s.logsumexp(0) - s[q] for s, q in words) + 0 * scores.sum()
    return total / (positions or max(len(words), 1))


LABELS = torch.tensor([[1, -100, -100, -100], [2, 0, 1, -100], [-100, 3, -100, 4]])


@worth(2, "MLM is not cross entropy, averaged over the masked words of the batch (none: 0)")
def test_exercise10_mlm():
    for scale in (1, 80):
        for labels in (LABELS, LABELS[:1], torch.full((2, 4), -100)):
            agree(clipbert.mlm_loss, mlm_by_hand, normal(len(labels), 4, 5, scale=scale), labels)
    for case in PRETRAIN:
        scores, labels = torch.tensor(case["mlm_scores"]), torch.tensor(case["mlm_labels"])
        close(clipbert.mlm_loss(scores, labels), float(case["valid_mlm_loss"]))


@worth(2, "over='all' is not divided by text_length (30) positions a text, or any other name passes")
def test_exercise10_over():
    for labels in (LABELS, torch.full((2, 4), -100)):
        scores = normal(len(labels), 4, 5)
        for more, length in (({}, 30), ({"text_length": 10}, 10)):
            ours = functools.partial(clipbert.mlm_loss, over="all", **more)
            by_hand = functools.partial(mlm_by_hand, positions=len(labels) * length)
            agree(ours, by_hand, scores, labels)
        for over in ("words", "", None):
            with pytest.raises(ValueError):
                clipbert.mlm_loss(scores, labels, over=over)
    for case in PRETRAIN:  # the reference pads every text to one length
        scores, labels = torch.tensor(case["mlm_scores"]), torch.tensor(case["mlm_labels"])
        loss = clipbert.mlm_loss(scores, labels, over="all", text_length=labels.shape[1])
        close(loss, float(case["mlm_loss"]))


@worth(2, "ITM is not the mean of -log P(y), column 1 meaning a match")
def test_exercise10_itm():
    rows = torch.tensor([[0.0, math.log(7)], [80.0, -20.0], [1000.0, -1000.0]])
    for labels in ([1, 1, 0], [0, 0, 0]):
        agree(clipbert.itm_loss, cross_entropy_by_hand, rows, torch.tensor(labels))
    for case in PRETRAIN:
        scores, labels = torch.tensor(case["itm_scores"]), torch.tensor(case["itm_labels"])
        close(clipbert.itm_loss(scores, labels), float(case["itm_loss"]))


@worth(1, "scores in half precision are not computed in float32")
def test_exercise10_precision():
    half = normal(3, 4, 5, scale=20)
    for dtype in (torch.float16, torch.bfloat16):
        for over in ("masked", "all"):
            for labels in (LABELS, torch.full((3, 4), -100)):
                loss = clipbert.mlm_loss(half.to(dtype), labels, over)
                close(loss, clipbert.mlm_loss(half.to(dtype).float(), labels, over))
                assert loss.dtype == torch.float32
        loss = clipbert.itm_loss(half[:, 0, :2].to(dtype), torch.tensor([1, 0, 1]))
        close(loss, clipbert.itm_loss(half[:, 0, :2].to(dtype).float(), torch.tensor([1, 0, 1])))
        assert loss.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Exercise 11: right and wrong captions

IMAGES = ["dog", "cat", "cow", "dog", "owl"]
CAPTIONS = ["A dog runs", "a cat", "a Cow", "The dog", "an OWL"]


def matched(images, captions, seed=0):
    texts, labels = pure(exercises.match_captions, images, captions, seeded(seed))
    assert len(texts) == len(labels) == len(captions)
    assert all(type(label) is int and label in (0, 1) for label in labels)
    return texts, labels


def many_matched():
    return [matched(IMAGES, CAPTIONS, seed) for seed in range(600)]


@worth(2, "a label does not say whether its caption is the one that stood there, or another image's")
def test_exercise11_labels():
    for texts, labels in many_matched():
        stayed = [text == caption for text, caption in zip(texts, CAPTIONS, strict=True)]
        assert stayed == [bool(label) for label in labels]


@worth(2, "not every caption is replaced with probability 1/2, whatever happens to the others")
def test_exercise11_half():
    labels = torch.tensor([labels for _, labels in many_matched()]).double()
    assert (labels.mean(0) - 0.5).abs().max() < 0.07
    assert labels.T.corrcoef().fill_diagonal_(0).abs().max() < 0.15
    assert len({tuple(row) for row in labels.tolist()}) == 32  # every pattern


@worth(2, "not all captions of other images are equally likely to take a caption's place")
def test_exercise11_equally_likely():
    seen = [Counter() for _ in IMAGES]
    for texts, labels in many_matched():
        for counts, text, label in zip(seen, texts, labels, strict=True):
            counts.update([] if label else [text])
    for image, counts in zip(IMAGES, seen, strict=True):
        others = {text for text, name in zip(CAPTIONS, IMAGES, strict=True) if name != image}
        assert set(counts) == others and min(counts.values()) > 0.65 * 300 / len(others)


@worth(1, "a caption that is said of the image, in capitals or elsewhere, takes its caption's place")
def test_exercise11_never_its_own():
    images, captions = ["1", "2", "1", "3"], ["A dog", "a DOG", "a dog runs", "a dog Runs fast"]
    found = [set() for _ in images]
    for seed in range(100):
        for texts, text in zip(found, matched(images, captions, seed)[0], strict=True):
            texts.add(text)
    assert found[0] == {"A dog", "a dog Runs fast"} and found[2] == {"a dog runs", "a dog Runs fast"}
    assert found[1] == {"a DOG", "a dog runs", "a dog Runs fast"} and found[3] == set(captions)


@worth(1, "where there is no other caption it does not stay, or the generator does not decide")
def test_exercise11_none_and_generator():
    for images, captions in ((["1"], ["a dog"]), (["1", "2"], ["a dog", "A dog"]), (["1", "1"], ["a", "b"])):
        for seed in range(10):
            assert matched(images, captions, seed) == (captions, [1] * len(captions))
    assert exercises.match_captions(["1"], captions[:1], seeded(0))[0] is not captions
    generator = seeded(5)
    first = exercises.match_captions(IMAGES, CAPTIONS, generator)
    assert first == matched(IMAGES, CAPTIONS, 5)
    later = [exercises.match_captions(IMAGES, CAPTIONS, generator) for _ in range(4)]
    assert any(draw != first for draw in later)  # it goes on


# --------------------------------------------------------------------------------------------------
# Exercise 12: retrieval metrics

NAMES = {"r1": "r1", "r5": "r5", "r10": "r10", "medianR": "median_rank", "meanR": "mean_rank"}
WAYS = {"text_to_video": "text2video", "video_to_text": "video2text"}


def mean_ranks(scores, columns):
    scores = torch.as_tensor(scores, dtype=torch.float)
    metrics = pure(finetune.retrieval_metrics, scores, columns)
    return pytest.approx([metrics[way]["mean_rank"] for way in WAYS], abs=1e-3)


@worth(2, "a rank is not 1 + how many score higher + half of how many others score exactly the same")
def test_exercise12_ranks():
    scores = torch.tensor([[5.0, 3, 3, 1], [0, 0, 0, 0], [-20.0, -21, -1000, 1000]])
    for column, expected in ((0, [1, 2.5, 2]), (1, [2.5, 2.5, 3]), (3, [4, 2.5, 1])):
        close(pure(finetune.ranks_of, scores[:, column : column + 1], scores), expected)
    close(finetune.ranks_of(torch.tensor([[2.0]]), torch.tensor([[2.0]])), [1.0])
    row = torch.tensor([[0.5, 0.5 + 1e-12, 0.5 + 2e-12]], dtype=torch.float64)
    close(torch.cat([finetune.ranks_of(row[:, i : i + 1], row) for i in range(3)]), [3.0, 2, 1])
    assert [4.0, 4.0] == mean_ranks(torch.full((7, 7), -3.5), range(7))  # chance


@worth(2, "recalls, median and mean rank of the two ways are not the reference's")
def test_exercise12_stored():
    for case in RETRIEVAL["retrieval"]:
        columns = [case["videos"].index(v) for v in case["gt"]] if "gt" in case else range(20)
        ours = finetune.retrieval_metrics(torch.tensor(case["scores"]), columns)
        for way, key in [(way, key) for way in WAYS for key in NAMES]:
            value = ours[way][NAMES[key]]
            if "metric_bounds" in case:  # ties: between the luckiest and the unluckiest order
                bounds = [bound[WAYS[way]][key] for bound in case["metric_bounds"].values()]
                assert min(bounds) - 1e-6 <= value <= max(bounds) + 1e-6
            elif case["name"] in ("no_ties", "perfect") or way == "text_to_video":
                assert value == pytest.approx(case["metrics"][WAYS[way]][key], abs=1e-4)
    scores = [[3.0, 9, 9.5], [2, 8, 7], [1, 8.5, 7.5]]  # caption i is of video i
    assert [(3 + 1 + 2) / 3, (1 + 3 + 2) / 3] == mean_ranks(scores, [0, 1, 2])


@worth(2, "from video to text, of several captions not the best counts, or the others are its rivals")
def test_exercise12_several_captions():
    scores = [[4.0, 7], [9, 5], [5, 2], [2, 6], [1, 3]]
    # Video 0: its best is 9, none is above: 1. Video 1: its best is 6, and 7 of video 0 is above: 2.
    assert [(2 + 1 + 2 + 1 + 1) / 5, 1.5] == mean_ranks(scores, [0, 0, 1, 1, 1])
    tie = [[4.0, 0], [4, 0], [4, 1]]  # video 0's two captions tie with each other and with a third
    assert [(1 + 1 + 2) / 3, (1.5 + 1) / 2] == mean_ranks(tie, [0, 0, 1])


@worth(1, "captions in another order, or videos without a caption, give other metrics")
def test_exercise12_any_order():
    scores, order = normal(6, 6), [3, 0, 5, 1, 4, 2]
    straight = finetune.retrieval_metrics(scores, range(6))
    assert finetune.retrieval_metrics(scores[order], order) == straight
    assert finetune.retrieval_metrics(scores, torch.arange(6)) == straight
    scores = [[1.0, 5, 9, 7], [0, 3, 9, 4]]  # of the videos 1 and 2; nobody describes 0 and 3
    assert [(3 + 1) / 2, (1 + 1.5) / 2] == mean_ranks(scores, [1, 2])
