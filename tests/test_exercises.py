"""The tests of the exercises: each is a property, with its points and a sentence for when it fails.

    python -m pytest -k exercise3_       one exercise (mind the underscore)

No exercise needs another one: where a function calls another exercise's, a stand-in takes its place.
Expected numbers come from the authors' implementation (the golden_* files beside this one), from a
slow formula beside the test (`..._by_hand`), or can be checked on paper.
"""

import functools
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import exercises
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clipbert
import data
import finetune

HERE = Path(__file__).parent
PRETRAIN, RETRIEVAL = (json.loads((HERE / f"golden_{name}.json").read_text()) for name in ("pretrain", "retrieval"))
TINY = replace(clipbert.ClipBertConfig.tiny(vocab_size=200), hidden_size=32, num_hidden_layers=2, intermediate_size=64)


torch.set_num_threads(1)  # the models are tiny


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
            except (AssertionError, pytest.fail.Exception) as error:
                raise Hurt(sentence) from error
            except (Exception, SystemExit) as error:
                raise Hurt(f"{sentence} ({error!r})") from error
            finally:
                torch.set_grad_enabled(True)

        checked.points = points
        return checked

    return decorate


def pure(function, *inputs, **more):
    """function(*inputs), of which nothing remains but what it returns."""

    def world():
        numbers = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
        return {
            "draws random numbers that do not come from the generator it is given": numbers,
            "changes its inputs": [x.tolist() if torch.is_tensor(x) else str(x) for x in inputs],
            "leaves gradients switched off for whatever comes after it": torch.is_grad_enabled(),
        }

    before = world()
    result = function(*inputs, **more)
    for hurt, now in world().items():
        if now != before[hurt]:
            raise Hurt(f"it {hurt}")
    return result


def close(actual, expected, tolerance=1e-5):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False, equal_nan=True)


def agree(function, by_hand, *inputs, tolerance=1e-4):
    """The checker: function(*inputs) is by_hand(*inputs), and so are the gradients of both.

    Gradients with respect to the weights, where the first input is a model, and the first tensor, if
    it holds floats. No side effects, and whatever is made is made where the inputs are.
    """
    inputs = list(inputs)
    first = int(isinstance(inputs[0], nn.Module))
    leaves = [weight for weight in inputs[0].parameters() if weight.requires_grad] if first else []
    if inputs[first].is_floating_point():
        inputs[first] = inputs[first].clone().requires_grad_()
        leaves.append(inputs[first])
    actual, expected = pure(function, *inputs), by_hand(*inputs)
    close(actual, expected, tolerance)
    weights = normal(*expected.shape, seed=99)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
                    for x in (actual, expected))  # fmt: skip
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


def decided_by_generator(draw):
    """draw(generator) is the same for the same seed, another for another one, and the generator goes on."""
    generator = seeded(1)
    first, later = draw(generator), draw(generator)
    if draw(seeded(1)) != first or draw(seeded(2)) == first or later == first:
        raise Hurt("the generator does not decide: equal seeds, other results, or other seeds, the same results")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=seeded(seed)) * scale


def pixels(*shape):
    return torch.randint(0, 256, shape, generator=seeded(0), dtype=torch.uint8)


# ------------------------------------------------ Exercise 1: clip sampling

# num_frames, fps, n_clips, n_frames, target_fps; a test clip, its frames: the authors' decoder's, but where N = 1.
CLIPS = [
    (1, 25.0, 16, 2, 2, 4, [0, 0]), (7, 25.0, 4, 1, 1, 3, [0]), (7, 25.0, 2, 3, 3, 1, [0, 6, 6]),
    (7, 25.0, 16, 4, 2, 2, [0, 6, 6, 6]), (20, 10.0, 4, 3, 3, 2, [5, 9, 14]), (20, 10.0, 8, 4, 2, 6, [0, 6, 12, 19]),
    (90, 30.0, 16, 2, 1, 2, [4, 63]), (300, 30.0, 4, 2, 2, 2, [135, 164]), (300, 30.0, 16, 3, 3, 0, [0, 14, 29]),
    (372, 29.97, 16, 2, 2, 10, [214, 242]), (372, 29.97, 4, 3, 3, 1, [86, 100, 114]),
    (300, 30.0, 2, 3, 2, 1, [128, 150, 172]), (200, 25.0, 2, 2, 0.8, 1, [69, 130]),  # a clip of 62.5 frames
    (61, 29.97, 4, 4, 4, 0, [0, 9, 19, 28]), (3, 30.0, 2, 4, 2, 1, [0, 2, 2, 2]), (15, 30.0, 3, 2, 4, 0, [0, 14]),
    (10, 2.0, 2, 2, 2, 0, [0, 1]), (10, 0.2, 2, 2, 2, 0, [0, 0]),  # a clip shorter than a frame is that frame
    (300, 30.0, 1, 2, 2, 0, [135, 164]), (7, 4.0, 1, 1, 1, 0, [2]), (16, 4.0, 1, 4, 2, 0, [4, 6, 8, 11]),
]  # fmt: skip


def sample(num_frames, fps, n_clips, n_frames, target_fps, train=False, seed=0):
    clips = pure(data.sample_clips, num_frames, fps, n_clips, n_frames, target_fps, train, seeded(seed))
    assert clips.shape == (n_clips, n_frames) and clips.dtype == torch.int64
    return clips


@worth(4, "test clip i of N does not start with the first frame from i/N of the free range on, one alone in the middle")
def test_exercise1_testing():
    for *arguments, clip, frames in CLIPS:
        assert sample(*arguments)[clip].tolist() == frames
        assert sample(*arguments, seed=1).equal(data.sample_clips(*arguments, False))  # None: no chance in it


@worth(2, "a clip's frames are not spread over it, or a video shorter than a clip goes wrong")
def test_exercise1_frames_of_a_clip():
    for num_frames, fps, _, n_frames, target_fps, _, frames in CLIPS:
        for train in (True, False):
            clips = sample(num_frames, fps, 50, n_frames, target_fps, train)
            assert (clips - clips[:, :1]).equal(torch.tensor(frames).sub(frames[0]).expand(50, n_frames))
            assert clips.min() >= 0 and clips.max() < num_frames


@worth(4, "training starts are not uniform over the free range, rounded up, each one for itself")
def test_exercise1_training():
    for n_clips in (1, 3):
        starts = [sample(300, 30.0, n_clips, 2, 2, True, seed)[:, 0] for seed in range(400)]
        starts = torch.stack(starts, 1).double()  # (clip, draw)
        assert (starts.mean(1) - 135).abs().max() < 15
        assert (starts.std(1) - 270 / math.sqrt(12)).abs().max() < 8
        assert n_clips == 1 or starts.corrcoef().fill_diagonal_(0).abs().max() < 0.2
    first = sample(3, 1.0, 4000, 1, 0.8, True)[:, 0]  # 1 from (0, 1], 2 from (1, 1.75]
    assert abs((first == 2).double().mean() - 0.75 / 1.75) < 0.04 and (first > 0).all()
    for num_frames, fps, n_frames, last in [(5, 1.0, 1, 4), (8, 2.0, 2, 4), (2, 1.0, 1, 1)]:
        counts = Counter(sample(num_frames, fps, 400, n_frames, 1, True)[:, 0].tolist())
        assert set(counts) == set(range(1, last + 1)) and min(counts.values()) > 280 / last
    decided_by_generator(lambda generator: data.sample_clips(300, 30.0, 8, 2, 2, True, generator).tolist())
    assert data.sample_clips(300, 30.0, 8, 2, 2, True).shape == (8, 2)  # None: torch's own


# ------------------------------------------------ Exercise 2: the grid encoder


def grid_features(bgr=False):
    torch.manual_seed(2)
    cfg = replace(TINY, pixel_mean=(10.0, 60.0, 110.0), pixel_std=(40.0, 50.0, 90.0), bgr=bgr)
    return clipbert.GridFeatures(cfg)


def normalized_by_hand(model, frames):
    mean, std = model.cfg.pixel_mean, model.cfg.pixel_std
    channels = (2, 1, 0) if model.cfg.bgr else (0, 1, 2)
    return torch.stack([(frames[:, c].float() - mean[c]) / std[c] for c in channels], 1)


@worth(3, "bytes, BGR or the zero border are not normalised as floats in RGB (black is -mean/std)")
def test_exercise2_normalize():
    frames = pixels(2, 3, 8, 4)
    frames[..., 4:, :] = 0
    for model in (grid_features(), grid_features(bgr=True)):
        agree(clipbert.GridFeatures.normalize, normalized_by_hand, model, frames.float())
        close(model.normalize(frames), normalized_by_hand(model, frames))
        assert model.normalize(frames).dtype == torch.float32


def grids_by_hand(model, frames):
    """Frame by frame."""
    maps = torch.cat([model.resnet(model.normalize(frame[None])) for frame in frames.flatten(0, 1)])
    maps = F.max_pool2d(F.conv2d(maps, model.grid_encoder[0].weight, padding=1), 2).relu()
    return maps.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


@worth(4, "a frame's grid is not ReLU(max-pool(conv(trunk(normalised frame)))), in its own place")
def test_exercise2_value():
    for B, T, H, W in [(2, 3, 32, 48), (1, 1, 16, 16), (1, 4, 56, 40)]:
        for frames in (pixels(B, T, 3, H, W), pixels(B, T, 3, H, W).float()):
            agree(clipbert.GridFeatures.forward, grids_by_hand, grid_features(), frames)


@worth(2, "the trunk does not see all frames of all videos in one call")
def test_exercise2_once():
    model, seen = grid_features(), []
    model.resnet.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    model(pixels(2, 3, 3, 32, 32))
    assert seen == [6]


# ------------------------------------------------ Exercise 3: visual tokens


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
    cells = [sum(grid[:, t, y, x] for t in range(T)) / T + row[y] + column[x] for y in range(h) for x in range(w)]
    return module.LayerNorm(torch.stack(cells, 1) + module.token_type_embeddings.weight[0])


@worth(4, "a token is not LayerNorm(mean over T + row + column + type embedding), row by row")
def test_exercise3_value():
    module = visual_embedding()
    for B, T, h, w in [(2, 3, 3, 5), (2, 1, 5, 2), (1, 1, 1, 1), (3, 2, 4, 4), (1, 7, 1, 6)]:
        for scale in (1, 80):
            grid = normal(B, T, h, w, 32, seed=T, scale=scale)
            agree(clipbert.VisualEmbedding.forward, tokens_by_hand, module, grid)


@worth(2, "keep does not leave so many tokens as they were, drawn by chance, at the same places of every video")
def test_exercise3_keep():
    def distances(some):
        return torch.cdist(some[0], tokens[0])

    module, grid = visual_embedding().train(), normal(2, 2, 4, 6, 32)
    tokens, before = module(grid), grid.clone()
    for keep in (1, 7, 23):
        some = module(grid, keep=keep)
        places = distances(some).argmin(1)
        assert some.shape == (2, keep, 32) and len(places.unique()) == keep
        close(some, tokens[:, places])
        made_here(functools.partial(module, grid, keep), lambda some: distances(some).min(1).values.max() < 0.1)
    for keep in (None, 24, 25, 100):
        close(module(grid, keep=keep), tokens, 0)
    assert grid.equal(before)
    grid = grid[:, :, :3, :4]
    tokens = module(grid)
    pairs = Counter(frozenset(distances(module(grid, keep=2)).argmin(1).tolist()) for _ in range(1320))
    assert len(pairs) == 66 and max(pairs.values()) < 45  # 20 on average: not only neighbours


@worth(1, "dropout does not come last, or not in training only")
def test_exercise3_dropout():
    module, grid = visual_embedding(dropout=0.5), normal(4, 1, 5, 5, 32)
    tokens = pure(module, grid)
    dropped = module.train()(grid)
    kept = dropped != 0
    assert module.training and 0.4 < kept.float().mean() < 0.6
    close(dropped[kept], 2 * tokens[kept])


@worth(1, "a grid beyond 100 rows or columns passes, or a smaller one doesn't, or the ValueError lacks the number")
def test_exercise3_refused():
    module = visual_embedding()
    for h, w in ((100, 1), (1, 100)):
        assert module(torch.zeros(1, 1, h, w, 32)).shape == (1, 100, 32)
    for h, w in ((2, 101), (101, 2)):
        with pytest.raises(ValueError, match="101"):
            module(torch.zeros(1, 1, h, w, 32))


# ------------------------------------------------ Exercise 4: [text; grid] with its mask


def encoder(scale=1, dropout=0.0):
    """scale: of the queries; with 8, attention scores are some tens: a mask must be stronger."""
    torch.manual_seed(4)
    model = clipbert.ClipBert(replace(TINY, dropout=dropout), 2).eval()
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.weight.data.mul_(scale)
    model.dropout.train()  # the one of `classify`, which comes later
    model.visual_embeddings.forward = lambda grid, keep=None: grid[:, 0].flatten(1, 2)[:, :keep]  # the cells alone
    return model


def fused(model, grid, ids, mask, keep):
    """What `fuse` returns, without the states of padding: (all tokens of all texts, d)."""
    hidden, pooled = model.fuse(grid, ids, mask, keep)
    cells = torch.ones(len(ids), hidden.shape[1] - ids.shape[1], device=mask.device)
    return torch.cat([hidden[torch.cat([mask, cells], 1) == 1], pooled])


def fused_by_hand(model, grid, ids, mask, keep):
    """Text by text, without its padding: no mask is needed."""
    states, pooled, n = [], [], len(ids) // len(grid)
    for i, length in enumerate(mask.sum(1)):
        words, cells = model.bert.embeddings(ids[i : i + 1, :length]), model.visual_embeddings(grid[[i // n]], keep)
        hidden = model.bert.encoder(torch.cat([words, cells], 1))[0]
        states.append(hidden[0])
        pooled.append(model.bert.pooler(hidden))
    return torch.cat(states + pooled)


def agree_on_fuse(model, videos, lengths, black=0, keep=None):
    """lengths: of the texts; black: how many of the grid's rows."""
    ids = torch.randint(1, 200, (len(lengths), 6), generator=seeded(len(lengths)))
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    grid = normal(videos, 1, 2, 3, 32)
    grid[:, :, :black] = 0
    agree(fused, fused_by_hand, model, grid, ids, mask, keep)


@worth(4, "states are not those of BERT's layers over [text; grid], pooled not the pooler's, or keep is not passed on")
def test_exercise4_value():
    agree_on_fuse(encoder(), 2, [6, 6])
    agree_on_fuse(encoder(scale=8), 1, [6])
    agree_on_fuse(encoder(dropout=0.5), 2, [6, 6], keep=4)  # nothing may be dropped here


@worth(3, "padding changes the answer, or black cells are masked, which must be seen like any other")
def test_exercise4_mask():
    for scale in (1, 8):
        agree_on_fuse(encoder(scale), 3, [3, 1, 5])
    agree_on_fuse(encoder(), 2, [6, 6], black=1)


@worth(3, "the n texts of a video do not each get its grid, or a ValueError and its two numbers are missing")
def test_exercise4_texts_of_a_video():
    for videos, count in ((2, 6), (1, 2)):
        agree_on_fuse(encoder(), videos, [6] * count)
    for videos, count in ((2, 3), (3, 4), (2, 1), (4, 6)):  # do not divide
        ids = torch.ones(count, 6, dtype=torch.long)
        with pytest.raises(ValueError) as error:
            encoder().fuse(normal(videos, 1, 2, 2, 32), ids, ids)
        assert str(count) in str(error.value) and str(videos) in str(error.value)


# ------------------------------------------------ Exercise 5: p_1, ..., p_N


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
    """Clip by clip and text by text."""
    N, n, clips = frames.shape[1], len(ids) // len(frames), []
    for c in range(N):
        grids = [model.encode_frames(frames[i // n, [c]]) for i in range(len(ids))]
        clips.append(torch.cat([model.classify(grid, ids[[i]], mask[[i]]) for i, grid in enumerate(grids)]))
    return torch.stack(clips)


def agree_on_clips(*sizes):
    for B, N, n, K in sizes:
        ids, mask = (torch.randint(0, high, (B * n, 4), generator=seeded(n)) for high in (200, 2))
        for frames in (pixels(B, N, 2, 3, 4, 4), pixels(B, N, 2, 3, 4, 4).float()):
            agree(clipbert.clip_logits, logits_by_hand, Simple(K), frames, ids, mask, tolerance=1e-3)


@worth(4, "with one text a video, the scores of clip i are not at [i]")
def test_exercise5_one_text():
    agree_on_clips((2, 3, 1, 5), (3, 2, 1, 4), (2, 2, 1, 2), (1, 1, 1, 1), (3, 1, 1, 1), (1, 2, 1, 3))


@worth(4, "with n texts a video, the scores of text j of video b are not at [:, b * n + j]")
def test_exercise5_several_texts():
    agree_on_clips((2, 3, 4, 5), (2, 2, 2, 2), (3, 4, 2, 2), (1, 4, 3, 1), (3, 1, 2, 1))


@worth(2, "the CNN does not see each clip once, all in one call, however many texts there are")
def test_exercise5_once():
    for n in (1, 3):
        model, ids = Simple(2), torch.ones(2 * n, 4, dtype=torch.long)
        clipbert.clip_logits(model, pixels(2, 3, 2, 3, 4, 4), ids, ids)
        assert model.clips == [6]


# ------------------------------------------------ Exercise 6: from clips to a video

BY_HAND = {
    "mean": lambda logits: sum(logits) / len(logits),
    "max": lambda logits: torch.stack(list(logits)).sort(0).values[-1],
    "lse": lambda logits: functools.reduce(torch.logaddexp, logits),
}


def agree_on_aggregation(how, on_paper):
    """on_paper: what comes of the clips [0, -3] and [log 3, -1]."""
    G = functools.partial(clipbert.aggregate_clips, how=how)
    close(G(torch.tensor([[[0.0, -3.0]], [[math.log(3), -1.0]]])), [on_paper])
    large = torch.tensor([[[1000.0, -1000.0, 90.0, -20.0, 80.0]], [[999.0, -1001.0, -90.0, -20.5, -20.0]]])
    for logits in (large, normal(4, 4, 4), normal(3, 2, 5, scale=3), normal(1, 3, 5), normal(16, 1, 2)):
        agree(G, BY_HAND[how], logits)
    doubles = torch.tensor([[[1.0]], [[1.0 + 1e-10]]], dtype=torch.float64)
    assert abs(G(doubles) - BY_HAND[how](doubles)).item() < 1e-14


@worth(4, "mean or max is not that of the logits over the clips, in their precision, or another name is no ValueError")
def test_exercise6_mean_and_max():
    agree_on_aggregation("mean", [math.log(3) / 2, -2.0])
    agree_on_aggregation("max", [math.log(3), -1.0])
    for how, clips in itertools.product(("median", "sum", "", None), (1, 2)):
        with pytest.raises(ValueError):
            clipbert.aggregate_clips(torch.zeros(clips, 1, 1), how)


@worth(3, "lse is not log(sum(exp)) of the logits over the clips, each answer's by itself, or 1000 overflows")
def test_exercise6_lse():
    agree_on_aggregation("lse", [math.log(4), math.log(math.exp(-3) + math.exp(-1))])


# ------------------------------------------------ Exercise 7: the losses of a video

ROWS = torch.tensor([[0.5, 4.0, -2.0], [1.0, -0.5, 3.0], [-20.0, 80.0, 79.0], [5.0, -20.0, -20.5]])


def cross_entropy_by_hand(p, target):
    return sum(row.logsumexp(0) - row[q] for row, q in zip(p, target, strict=True)) / len(p)


def loss_by_hand(p, target, kind):
    """Question by question."""
    if kind == "count":
        return sum((score[0] - t) ** 2 for score, t in zip(p, target, strict=True)) / len(p)
    if kind == "soft":
        target = torch.cat([target, torch.zeros(len(p), p.shape[1] - target.shape[1])], 1)
        return (torch.logaddexp(p, torch.zeros_like(p)) - p * target).sum() / len(p)
    return cross_entropy_by_hand(p.view(len(target), -1), target)


def agree_on_loss(kind, p, *targets):
    for target in targets:
        for scale in (1.0, 20.0):
            agree(clipbert.video_loss, loss_by_hand, scale * torch.as_tensor(p), torch.as_tensor(target), kind)


@worth(2, "choice is not cross entropy over each question's n options, which stand below each other")
def test_exercise7_choice():
    agree_on_loss("choice", ROWS.reshape(12, 1), [2, 0, 1, 0], [0, 0, 2, 1], [1, 5])
    agree_on_loss("choice", [[3.0]], [0])


@worth(2, "answer or match is not cross entropy over a row's scores (match: column 1 is a match)")
def test_exercise7_answer_and_match():
    agree_on_loss("answer", ROWS, [2, 0, 1, 0], [0, 0, 2, 1])
    agree_on_loss("match", ROWS[:, :2], [1, 0, 1, 0], [0, 0, 1, 1])
    close(clipbert.video_loss(torch.tensor([[0.0, math.log(7)]]), torch.tensor([1]), "match"), math.log(8 / 7))


@worth(3, "soft is not binary cross entropy, summed over all of p's outputs, averaged over questions")
def test_exercise7_soft():
    whole = torch.tensor([[0.0, 0.3, 0.0], [1.0, 0.6, 0.3], [0.0, 1.0, 1.0], [0.9, 0.0, 0.0]])
    agree_on_loss("soft", ROWS, whole, whole[:, :2])  # an output beyond the answers: never
    for case in RETRIEVAL["vqa"]:
        loss = clipbert.video_loss(torch.tensor(case["logits"]), torch.tensor(case["targets"]), "soft")
        close(loss, torch.tensor(case["loss"]))


@worth(3, "count is not the mean squared error of p's one column, or another kind of answer is not a ValueError")
def test_exercise7_count():
    agree_on_loss("count", [[2.0], [5.0], [-4.0]], [1.0, 5.0, 10.0], [1, 5, 10])
    agree_on_loss("count", [[3.5]], [3])
    for kind in ("essay", "", None):
        with pytest.raises(ValueError):
            clipbert.video_loss(torch.zeros(1, 1), torch.zeros(1), kind)


# ------------------------------------------------ Exercise 8: evaluation with N_test clips


class Recorded(nn.Module):
    """A model whose scores are known: logits (clips, n, K) of each video; notes what is asked."""

    def __init__(self, *videos):
        super().__init__()
        self.videos = [torch.as_tensor(video, dtype=torch.float) for video in videos]
        self.weight = nn.Parameter(torch.ones(()))
        self.asked, self.calls, self.testing = [], [], True

    def read(self, video, n_test):  # clip i: one frame of 1 x 1 pixels, (video, i, 0)
        self.asked.append((video, n_test))
        return torch.tensor([[video, i, 0] for i in range(n_test)]).view(n_test, 1, 3, 1, 1)

    def clip_logits(self, _, frames, ids, mask):
        assert frames.dim() == 6 and len(frames) == 1 and len(ids) == len(mask)
        self.calls.append(frames[0, :, 0, :2, 0, 0].tolist())
        self.testing &= not (self.training or torch.is_grad_enabled())
        return torch.stack([self.videos[video][i] for video, i in self.calls[-1]]) * self.weight

    def aggregate_clips(self, logits, how):
        assert logits.dim() == 3  # (clips, n, K)
        return BY_HAND[how](logits)

    def accuracy(self, answers, n_test, how="mean", **more):
        ids = [torch.ones(video.shape[1], 4, dtype=torch.long) for video in self.videos]
        questions = [(video, ids[video], ids[video], answer) for video, answer in enumerate(answers)]
        with mock.patch.multiple(clipbert, clip_logits=self.clip_logits, aggregate_clips=self.aggregate_clips):
            return pure(exercises.evaluate, self, questions, self.read, n_test, how, **more)


# One clip is for answer 0, more than the two for answer 1 together: 0 by the mean, 1 by votes.
LOUD = [[[9.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.0, 1.0, 0.5]]]
OPTIONS = [[[0.0], [3.0], [1.0], [0.0]]] * 3  # four options of a multiple choice, the second best


@worth(4, "it is not the percentage of questions whose highest p, of G over all N_test clips at once, is right")
def test_exercise8_value():
    model = Recorded(LOUD, OPTIONS, LOUD, OPTIONS, LOUD, LOUD, OPTIONS, LOUD)
    for n_test in (1, 3):
        assert model.accuracy([1, 0, 2, 2, 2, 1, 3, 2], n_test) == 0
        assert model.accuracy([0, 1, 0, 2, 1, 0, 1, 2], n_test) == pytest.approx(62.5)
    scores = [4.0] + [-0.16] * 15 + [-1.0] * 4  # of answer 0; sixteen, then four: mean .1 and -1
    model = Recorded([[[score, 0.0]] for score in scores])
    for how, right, n_test in (("mean", 1, 20), ("max", 0, 20), ("lse", 0, 20), ("mean", 0, 16)):
        for at_once in (16, 7, 20, 100):
            assert model.accuracy([right], n_test, how, at_once=at_once) == 100
    short = Recorded([[[score, 0.0]] for score in (1, 1, 1, 1, -3)])
    assert short.accuracy([0], 5, at_once=4) == 100  # .2, not the mean of 1 and -3


@worth(2, "not each clip goes through the model once, at most at_once of them in a call")
def test_exercise8_at_once():
    for n_test in (1, 3, 4, 16, 17):
        for limit, more in ((16, {}), (1, {"at_once": 1}), (3, {"at_once": 3}), (16, {"at_once": 16})):
            model = Recorded(*torch.zeros(2, 17, 1, 2))
            model.accuracy([0, 0], n_test, **more)
            assert model.asked == [(0, n_test), (1, n_test)]
            assert [clip for call in model.calls for clip in call] == [[v, i] for v in (0, 1) for i in range(n_test)]
            assert len(model.calls) == 2 * math.ceil(n_test / limit) and max(map(len, model.calls)) <= limit


@worth(2, "the model is not in testing mode without a graph, and afterwards in the mode it was in")
def test_exercise8_mode():
    for training in (True, False):
        model = Recorded(LOUD, OPTIONS).train(training)
        model.accuracy([0, 1], 3, "lse", at_once=2)
        assert model.training == training and len(model.calls) == 4 and model.testing


# ------------------------------------------------ Exercise 9: which words to mask

TOKENIZER = data.build_tokenizer(data.SPECIAL_TOKENS + [f"word{c}" for c in "abcdefghijklmnopqrstuvwxyz"])
MASK = TOKENIZER.mask_token_id


def word_ids(*shape, seed=0):
    return torch.randint(5, 31, shape, generator=seeded(seed))


def mask_tokens(ids, seed=1, **more):
    """-> masked ids, which ones are chosen. Labels: the words that were there, elsewhere -100 and no change."""
    masked, labels = pure(data.mask_tokens, ids, TOKENIZER, seeded(seed), **more)
    assert masked.shape == labels.shape == ids.shape and masked.dtype == labels.dtype == torch.int64
    chosen = labels != -100
    if not (labels[chosen].equal(ids[chosen]) and masked[~chosen].equal(ids[~chosen])):
        raise Hurt("labels are not the words that were there where one is chosen, else -100 and no change")
    return masked, chosen


@worth(2, "not 15% (rate) are chosen, of which 80% become [MASK], 10% any token and 10% stay")
def test_exercise9_shares():
    share = 0.1 / len(TOKENIZER)  # of the random tokens, some are [MASK] or the word itself
    for shape, rate in (((150_000,), {}), ((5000, 30), {}), ((50_000,), {"rate": 0.5}), ((50_000,), {"rate": 1.0})):
        ids = word_ids(*shape)
        masked, chosen = mask_tokens(ids, **rate)
        assert chosen.float().mean().item() == pytest.approx(rate.get("rate", 0.15), abs=0.006)
        assert (masked == MASK)[chosen].float().mean() == pytest.approx(0.8 + share, abs=0.012)
        assert (masked == ids)[chosen].float().mean() == pytest.approx(0.1 + share, abs=0.012)
    masked, chosen = mask_tokens(torch.full((300_000,), 7))
    counts = Counter(masked[chosen].tolist())
    words = [counts[i] for i in range(len(TOKENIZER)) if i not in (7, MASK)]
    assert min(words) > 0.6 * max(words)  # each token alike, special ones too


@worth(2, "special tokens are chosen, or change how many of the words beside them are")
def test_exercise9_special():
    sentences = ["worda wordb unknownword", "worda"]
    ids = TOKENIZER(sentences, padding=True, return_tensors="pt")["input_ids"].repeat(2000, 1)
    ids[::5, 1] = MASK
    special = ids < 5  # [PAD] [UNK] [CLS] [SEP] [MASK]
    for rate in (0.15, 1.0):
        _, chosen = mask_tokens(ids, rate=rate)
        assert not chosen[special].any()
        assert chosen[~special].float().mean().item() == pytest.approx(rate, abs=0.02)


@worth(2, "a word's chance or fate depends on its neighbours, or on how many are chosen")
def test_exercise9_each_by_itself():
    masked, chosen = mask_tokens(word_ids(20_000, 4), rate=0.5)
    assert (chosen.double().mean(0) - 0.5).abs().max() < 0.02
    assert chosen.double().T.corrcoef().fill_diagonal_(0).abs().max() < 0.04
    both = (masked == MASK).double()[chosen[:, 0] & chosen[:, 1], :2]
    assert abs(both.T.corrcoef()[0, 1]) < 0.05
    alone = [mask_tokens(word_ids(1, seed=i), i, rate=1.0)[0].item() for i in range(300)]
    assert 210 < alone.count(MASK) < 270  # of texts of one word
    for i in (0, 1):  # the masked words; the labels
        decided_by_generator(lambda generator, i=i: data.mask_tokens(word_ids(90), TOKENIZER, generator)[i].tolist())


# ------------------------------------------------ Exercise 10: the losses of pretraining

LABELS = torch.tensor([[1, -100, -100, -100], [2, 0, 1, -100], [-100, 3, -100, 4]])
NONE = torch.full((2, 4), -100)


def mlm_by_hand(scores, labels, over="masked", text_length=30):
    """Word by word."""
    rows = zip(scores.flatten(0, 1), labels.flatten(), strict=True)
    words = [row.logsumexp(0) - row[q] for row, q in rows if q != -100]
    return (sum(words) + 0 * scores.sum()) / (len(labels) * text_length if over == "all" else max(len(words), 1))


@worth(2, "MLM is not cross entropy, averaged over the masked words of the batch (none: 0)")
def test_exercise10_mlm():
    for labels in (LABELS, LABELS[:1], NONE):
        for scale in (1, 80):
            agree(clipbert.mlm_loss, mlm_by_hand, normal(len(labels), 4, 5, scale=scale), labels)
    for case in PRETRAIN:
        loss = clipbert.mlm_loss(torch.tensor(case["mlm_scores"]), torch.tensor(case["mlm_labels"]))
        close(loss, float(case["valid_mlm_loss"]))


@worth(2, "over='all' is not divided by text_length (30) positions a text, or any other name passes")
def test_exercise10_over():
    for labels in (LABELS, NONE):
        for how in (("all",), ("all", 10), ("masked", 10)):
            agree(clipbert.mlm_loss, mlm_by_hand, normal(len(labels), 4, 5), labels, *how)
        for over in ("words", "", None):
            with pytest.raises(ValueError):
                clipbert.mlm_loss(normal(len(labels), 4, 5), labels, over=over)
    for case in PRETRAIN:  # the reference pads every text to one length
        scores, labels = torch.tensor(case["mlm_scores"]), torch.tensor(case["mlm_labels"])
        close(clipbert.mlm_loss(scores, labels, over="all", text_length=labels.shape[1]), float(case["mlm_loss"]))


@worth(2, "ITM is not the mean of -log P(y), column 1 meaning a match")
def test_exercise10_itm():
    rows = torch.tensor([[0.0, math.log(7)], [80.0, -20.0], [1000.0, -1000.0]])
    for labels in ([1, 1, 0], [0, 0, 0]):
        agree(clipbert.itm_loss, cross_entropy_by_hand, rows, torch.tensor(labels))


@worth(1, "scores in half precision are not computed in float32")
def test_exercise10_precision():
    for dtype in (torch.float16, torch.bfloat16):
        half = normal(3, 4, 5, scale=20).to(dtype)
        for loss, scores, labels in [
            (clipbert.itm_loss, half[:, 0, :2], torch.tensor([1, 0, 1])), (clipbert.mlm_loss, half, LABELS),
            (functools.partial(clipbert.mlm_loss, over="all"), half, LABELS), (clipbert.mlm_loss, half[:2], NONE),
        ]:  # fmt: skip
            close(loss(scores, labels), loss(scores.float(), labels))
            assert loss(scores, labels).dtype == torch.float32


# ------------------------------------------------ Exercise 11: right and wrong captions

IMAGES = ["dog", "hen", "cow", "dog", "owl"]
CAPTIONS = ["A dog runs", "a bird", "a Cow", "The dog", "a bird"]


def matched(images=IMAGES, captions=CAPTIONS, draws=600):
    for seed in range(draws):
        texts, labels = pure(exercises.match_captions, images, captions, seeded(seed))
        assert len(texts) == len(labels) == len(captions) and texts is not captions
        assert all(type(label) is int and label in (0, 1) for label in labels)
        yield texts, labels


@worth(4, "labels don't say which captions stay, or each is not replaced with probability 1/2 whatever the others do")
def test_exercise11_labels():
    draws = list(matched())
    for texts, labels in draws:
        assert labels == [int(text == caption) for text, caption in zip(texts, CAPTIONS, strict=True)]
    labels = torch.tensor([labels for _, labels in draws]).double()
    assert (labels.mean(0) - 0.5).abs().max() < 0.07
    assert len(labels.unique(dim=0)) == 32  # every pattern


@worth(2, "not all captions of other images are equally likely to take its place (one that is there twice: twice)")
def test_exercise11_equally_likely():
    draws = [texts for texts, _ in matched()]
    for image, caption, *texts in zip(IMAGES, CAPTIONS, *draws, strict=True):
        own = [text for text, name in zip(CAPTIONS, IMAGES, strict=True) if name == image]
        others = [text for text in CAPTIONS if text not in own]
        counts = Counter(text for text in texts if text != caption)
        assert set(counts) == set(others)
        for text in others:
            assert abs(counts[text] / counts.total() - others.count(text) / len(others)) < 0.1
    decided_by_generator(lambda generator: [exercises.match_captions(IMAGES, CAPTIONS, generator) for _ in range(4)])


@worth(2, "a caption that is said of the image, in capitals or elsewhere, takes its caption's place")
def test_exercise11_never_its_own():
    images, captions = ["1", "2", "1", "3"], ["A dog", "a DOG", "a dog runs", "a dog Runs fast"]
    found = [set(texts) for texts in zip(*(texts for texts, _ in matched(images, captions, 100)), strict=True)]
    assert found[0] == {"A dog", "a dog Runs fast"} and found[2] == {"a dog runs", "a dog Runs fast"}
    assert found[1] == {"a DOG", "a dog runs", "a dog Runs fast"} and found[3] == set(captions)
    for images, captions in ((["1"], ["a dog"]), (["1", "2"], ["a dog", "A dog"]), (["1", "1"], ["a", "b"])):
        assert all(draw == (captions, [1] * len(captions)) for draw in matched(images, captions, 10))  # none: it stays


# ------------------------------------------------ Exercise 12: retrieval metrics

NAMES = {"r1": "r1", "r5": "r5", "r10": "r10", "medianR": "median_rank", "meanR": "mean_rank"}
WAYS = {"text_to_video": "text2video", "video_to_text": "video2text"}


def mean_ranks(scores, columns):
    metrics = pure(finetune.retrieval_metrics, torch.as_tensor(scores, dtype=torch.float), columns)
    return pytest.approx([metrics[way]["mean_rank"] for way in WAYS], abs=1e-3)


@worth(2, "a rank is not 1 + how many score higher + half of how many others score exactly the same")
def test_exercise12_ranks():
    scores = torch.tensor([[5.0, 3, 3, 1], [0, 0, 0, 0], [-20.0, -21, -1000, 1000]])
    for column, expected in ((0, [1, 2.5, 2]), (1, [2.5, 2.5, 3]), (3, [4, 2.5, 1])):
        close(pure(finetune.ranks_of, scores[:, [column]], scores), expected)
    row = torch.tensor([[0.5, 0.5 + 1e-12, 0.5 + 2e-12]], dtype=torch.float64)
    close(torch.cat([finetune.ranks_of(row[:, [i]], row) for i in range(3)]), [3.0, 2, 1])
    assert [4.0, 4.0] == mean_ranks(torch.full((7, 7), -3.5), range(7))  # chance


@worth(2, "recalls, median and mean rank of the two ways are not the reference's")
def test_exercise12_stored():
    for case in RETRIEVAL["retrieval"]:
        columns = [case["videos"].index(v) for v in case["gt"]] if "gt" in case else range(20)
        ours = finetune.retrieval_metrics(torch.tensor(case["scores"]), columns)
        # Ties: between the luckiest and the unluckiest order. It has no video with two right answers.
        bounds = list(case.get("metric_bounds", {"": case["metrics"]}).values())
        for way, key in itertools.product(WAYS if "metric_bounds" in case else ["text_to_video"], NAMES):
            values = [bound[WAYS[way]][key] for bound in bounds]
            assert min(values) - 1e-4 <= ours[way][NAMES[key]] <= max(values) + 1e-4


@worth(3, "of a video's captions not the best counts, the others are rivals, or order or a video without one matters")
def test_exercise12_several_captions():
    scores = [[4.0, 7], [9, 5], [5, 2], [2, 6], [1, 3]]
    # Video 0: its best is 9, none is above: 1. Video 1: its best is 6, and 7 of video 0 is above: 2.
    assert [(2 + 1 + 2 + 1 + 1) / 5, 1.5] == mean_ranks(scores, [0, 0, 1, 1, 1])
    tie = [[4.0, 0], [4, 0], [4, 1]]  # video 0's two captions tie with each other and with a third
    assert [(1 + 1 + 2) / 3, (1.5 + 1) / 2] == mean_ranks(tie, [0, 0, 1])
    lonely = [[1.0, 5, 9, 7], [0, 3, 9, 4]]  # of the videos 1 and 2; nobody describes 0 and 3
    assert [(3 + 1) / 2, (1 + 1.5) / 2] == mean_ranks(lonely, [1, 2])
    scores, order = normal(6, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    straight = finetune.retrieval_metrics(scores, range(6))
    assert straight == finetune.retrieval_metrics(scores[order], order)
