"""ClipBERT: a ResNet and a BERT trained end to end on a few randomly sampled clips per video.

    Less is More: ClipBERT for Video-and-Language Learning via Sparse Sampling
    Lei, Li, Zhou, Gan, Berg, Bansal, Liu. CVPR 2021. https://arxiv.org/abs/2102.06183

Read this file beside section 3 of the paper, top to bottom:

    c_i       a clip: T frames of about a second   (B, T, 3, L, L)   pixels 0..255
    F_v(c_i)  ResNet-50, grid encoder, mean over T,
              2-D positions                        (B, h*w, d)       GridFeatures, VisualEmbedding
    F_l(S)    word + position + type embeddings    (B*n, Lt, d)      BERT's own
    H         a 12-layer BERT over [text; grid]    (B*n, Lt+h*w, d)  VideoTextEncoder.fuse
    p_i = H(F_v(c_i), F_l(S))                      (B*n, K)          ClipBert.forward, clip_logits
    p = G(p_1, ..., p_N)                           (B*n, K)          aggregate_clips
    loss = NLL(p, q)                               scalar            video_loss

B videos, N clips of T frames of L x L pixels, n texts a video (options or captions; with one text,
B*n is B), Lt text tokens, an h x w grid (h = w = L / 64; tiny: L / 16), d hidden units, K scores, q
the right answer.

The optimizer and its learning rate follow. There, at a line of #, the paper's part ends; the rest
serves both scripts.
"""

import argparse
import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from transformers import BertConfig, BertForPreTraining, BertModel
from transformers.models.bert.modeling_bert import BertPreTrainingHeads
from transformers.utils import logging as transformers_messages

# ----------------------------------------------------------------------------------------------------------------------
# Configuration

# name -> (residual block, blocks in each stage res2..res5); "tiny" stops after res3: GridFeatures.
BACKBONES = {
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "tiny": (BasicBlock, (1, 1)),
}


@dataclass
class ClipBertConfig:
    """Every size of the model. The defaults are `base()`: the paper's model."""

    backbone: str = "resnet50"  # a key of BACKBONES
    frozen_stages: int = 2  # 0: none; 1: the stem; 2: stem and res2, as in the paper's code
    # True: a stage's stride sits in its first 1x1 conv; False: in the 3x3 (torchvision)
    caffe_strides: bool = False
    bgr: bool = False  # the channel order in which the CNN was pretrained
    pixel_mean: tuple = (123.675, 116.28, 103.53)  # RGB, on the 0..255 scale (ImageNet)
    pixel_std: tuple = (58.395, 57.12, 57.375)
    # from here on in transformers' words, see BERT_SIZES
    hidden_size: int = 768  # d
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    max_position_embeddings: int = 512  # the longest text
    hidden_act: str = "gelu"  # x times the normal distribution's share below x, by erf
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02  # the standard deviation of Linear and Embedding weights
    # embeddings, attention, sublayer outputs, pooled vector; none in the CNN or inside the MLP
    dropout: float = 0.1

    @property
    def stride(self):
        """Pixels from one grid cell to the next: 4 of the stem, doubled by each stage but the first
        and by the grid encoder's max-pool."""
        return 4 * 2 ** len(BACKBONES[self.backbone][1])

    @classmethod
    def base(cls):
        """The paper's model, to start from ImageNet's ResNet-50 and bert-base-uncased."""
        return cls()

    @classmethod
    def official(cls):
        """`base()` as the official checkpoint needs it: detectron2's ResNet, BGR pixels, std 1."""
        return cls(caffe_strides=True, bgr=True, pixel_std=(1.0, 1.0, 1.0))

    @classmethod
    def tiny(cls, vocab_size=30522):
        """A model that learns the toy data from scratch on a laptop CPU in minutes.

        Its stride is 16: a 4 x 4 grid at L = 64.
        Nothing is frozen (there are no pretrained weights to protect) and there is no dropout (a
        small model on random clips, always new, does not overfit). Initial scale matters most: with
        BERT's .02 a 96-wide, 3-layer transformer attends uniformly and stays at ln(5), the loss of
        guessing among five options, for a long time; 1/sqrt(d) lets attention pick out
        tokens from step one.
        """
        return cls(
            backbone="tiny", frozen_stages=0, hidden_size=96, num_hidden_layers=3,
            num_attention_heads=4, intermediate_size=192, vocab_size=vocab_size, dropout=0.0,
            initializer_range=96**-0.5,
            # of the toy frames, which are mostly dark
            pixel_mean=(45.0, 45.0, 45.0), pixel_std=(60.0, 60.0, 60.0),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# F_v, the visual encoder (paper, section 3): ResNet -> grid encoder -> mean over T -> 2-D positions


class GridFeatures(nn.Module):
    """The CNN half of F_v: pixels to a grid of d-dimensional features, frame by frame.

    Total stride 64: the ResNet's 32, then 2 of the grid encoder's max-pool. The "tiny" backbone
    stops after res3 (stride 8, so 16 in all), since a 64-pixel toy frame would otherwise end in a
    single grid cell.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        block, depths = BACKBONES[cfg.backbone]
        # torchvision builds four stages; of tiny the last two, a block each, are thrown away
        resnet = torchvision.models.ResNet(block, (*depths, 1, 1)[:4], norm_layer=FrozenNorm)
        # The trunk under torchvision's own names, without pooling and classes: grid features keep
        # their places.
        names = ["conv1", "bn1", "relu", "maxpool", *(f"layer{i + 1}" for i in range(len(depths)))]
        self.resnet = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in names))
        stem, stages = self.resnet[:4], self.resnet[4:]
        if cfg.caffe_strides:
            for stage in stages[1:]:
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        scale_residual_branches(stages)
        channels = 64 * 2 ** (len(depths) - 1) * block.expansion  # 2048 of ResNet-50
        self.grid_encoder = nn.Sequential(  # no bias, no norm
            nn.Conv2d(channels, cfg.hidden_size, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(kernel_size=2, stride=2),
            nn.ReLU(),
        )
        frozen = [stem, *stages][: cfg.frozen_stages]
        for parameter in (p for module in frozen for p in module.parameters()):
            # BatchNorm needs nothing here: FrozenNorm holds only buffers
            parameter.requires_grad_(False)
        mean, std = torch.tensor(cfg.pixel_mean), torch.tensor(cfg.pixel_std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    def normalize(self, frames):
        """(..., 3, L, L) uint8 or float RGB 0..255 -> float, as the CNN was pretrained.

        Frames arrive padded with zeros, so padding becomes -mean/std: the reference pads before it
        normalises, too.
        """
        pixels = (frames.float() - self.pixel_mean) / self.pixel_std
        # the mean is RGB: flip only after subtracting it
        return pixels.flip(-3) if self.cfg.bgr else pixels

    def forward(self, frames):
        """(B, T, 3, L, L) uint8 or float RGB 0..255 -> grid features (B, T, h, w, d).

        Of the frozen stages autograd keeps nothing for the backward pass, as no input of theirs
        needs a gradient.
        """
        x = frames.flatten(0, 1)  # (B*T, 3, L, L): the CNN knows neither clips nor time
        x = x.contiguous(memory_format=torch.channels_last)  # in which convolutions are fast
        x = self.resnet(self.normalize(x))  # (B*T, 2048, L/32, L/32), of tiny (B*T, 128, L/8, L/8)
        x = self.grid_encoder(x).permute(0, 2, 3, 1)  # (B*T, h, w, d)
        return x.unflatten(0, frames.shape[:2])


class FrozenNorm(FrozenBatchNorm2d):
    """A BatchNorm whose statistics and gains never change: one factor, one addend a channel.

        y = s x + (b - s mean),  s = gain / sqrt(variance + eps)

    Frozen, as a batch of a few videos is too small for statistics of its own. In x's precision: the
    float32 buffers would make every activation float32 under autocast, twice the memory.
    """

    def forward(self, x):
        s = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * s
        return x * s.to(x.dtype).view(-1, 1, 1) + shift.to(x.dtype).view(-1, 1, 1)


def scale_residual_branches(stages):
    """Shrink each residual branch's last convolution, for a start without pretrained weights (which
    are copied over this).

    A FrozenBatchNorm without statistics normalises nothing: almost every block of ResNet-50 would
    double the variance. Scaled by 1/sqrt(number of blocks), the branches together add about as much
    as there was.
    """
    blocks = [block for stage in stages for block in stage]
    for block in blocks:
        last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
        last.weight.data.mul_(len(blocks) ** -0.5)


class VisualEmbedding(nn.Module):
    """Grid features to visual tokens, which know their places (paper, section 3).

        v[y, x] = LayerNorm( 1/T sum_t grid[t, y, x] + row[y] + col[x] + type )
    """

    MAX_GRID = 100  # rows and columns that have an embedding, as in the official checkpoint

    def __init__(self, cfg):
        super().__init__()
        self.row_position_embeddings = nn.Embedding(self.MAX_GRID, cfg.hidden_size)
        self.col_position_embeddings = nn.Embedding(self.MAX_GRID, cfg.hidden_size)
        self.token_type_embeddings = nn.Embedding(1, cfg.hidden_size)
        self.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, grid, keep=None):
        """grid (B, T, h, w, d) -> visual tokens (B, h*w, d), row by row.

        keep: None, or how many tokens to draw at random, the same places for the whole batch.
        Pretraining draws 100 of the 144 that 768 pixels give: less to compute, and no place to rely
        on. Drawn after the positions are added, so a token still knows where it was.
        """
        h, w = grid.shape[2:4]
        if max(h, w) > self.MAX_GRID:
            raise ValueError(f"a grid of {h} x {w} cells, only {self.MAX_GRID} rows and columns: "
                             "use a smaller size")  # fmt: skip
        x = grid.mean(1)  # (B, h, w, d): the order of frames within a clip is not seen
        x = x + self.row_position_embeddings.weight[:h, None]  # still (B, h, w, d): plus (h, 1, d)
        x = x + self.col_position_embeddings.weight[:w]  # ... plus (w, d)
        x = x.flatten(1, 2)  # (B, h*w, d)
        if keep is not None and keep < h * w:
            x = x[:, torch.randperm(h * w, device=x.device)[:keep].sort().values]
        x = x + self.token_type_embeddings.weight
        return self.dropout(self.LayerNorm(x))


# ----------------------------------------------------------------------------------------------------------------------
# F_l and H, the cross-modal transformer (paper, section 3)


class VideoTextEncoder(nn.Module):
    """F_v, F_l and H: what fine-tuning and pretraining share."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.cnn = GridFeatures(cfg)
        self.bert = BertModel(bert_config(cfg))  # its embeddings are F_l, its encoder is H
        self.visual_embeddings = VisualEmbedding(cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.visual_embeddings.apply(self.init_weights)

    def init_weights(self, module):
        """BERT's: N(0, initializer_range), zero biases. (The grid encoder's is torch's.)"""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.cfg.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode_frames(self, frames):
        """F_v up to the grid: (B, T, 3, L, L) RGB 0..255 -> (B, T, h, w, d), no mean over T yet."""
        return self.cnn(frames)

    def fuse(self, grid, input_ids, attention_mask, keep=None):
        """H(F_v, F_l): BERT over the sequence [text; visual].

        grid (B, T, h, w, d). input_ids, attention_mask (B*n, Lt), 0 is padding, 1 is not: the n
        texts of a video (the options of a question, the captions of an image) stand one after the
        other and share its one CNN pass. keep: as in VisualEmbedding, how many grid tokens to draw,
        or None, all. Of a video with several clips (clip_logits) each counts as a video here.
        -> all hidden states (B*n, Lt + h*w, d), and the pooled [CLS] vector (B*n, d).
        """
        visual = self.visual_embeddings(grid, keep)  # (B, h*w, d)
        if input_ids.shape[0] % visual.shape[0]:
            raise ValueError(f"{len(input_ids)} texts do not divide among {len(visual)} videos")
        n = len(input_ids) // len(visual)
        visual = visual.repeat_interleave(n, dim=0)  # (B*n, h*w, d): for each text of a video
        # Type ids of text are 0 in BERT's own table; the visual type has a table of its own.
        text = self.bert.embeddings(input_ids)  # (B*n, Lt, d)
        # One mask for all heads and queries. Grid cells over the zero border of a padded frame are
        # not masked: the reference attends to them, too.
        mask = F.pad(attention_mask, (0, visual.shape[1]), value=1)[:, None, None, :]  # of Lt + h*w
        # Added to the attention scores: 0 is seen; of -inf the softmax makes exactly 0.
        mask = torch.zeros_like(mask, dtype=text.dtype).masked_fill(mask == 0, -torch.inf)
        x = torch.cat([text, visual], dim=1)  # (B*n, Lt + h*w, d)
        hidden = self.bert.encoder(x, attention_mask=mask).last_hidden_state
        return hidden, self.bert.pooler(hidden)


# What our configuration and a BERT's have in common.
BERT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "vocab_size", "max_position_embeddings", "hidden_act", "layer_norm_eps")  # fmt: skip


def bert_config(cfg):
    """The BERT of a ClipBertConfig, as transformers wants to know it."""
    return BertConfig(
        **{name: getattr(cfg, name) for name in BERT_SIZES},
        hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout,
        initializer_range=cfg.initializer_range,
        attn_implementation="sdpa",  # torch's fused attention
    )  # fmt: skip


def config_of_bert(bert, cfg):
    """cfg with the sizes of a BERT's config.json; CNN, dropout and initialisation stay."""
    if bert.model_type != "bert":
        raise ValueError(f"{bert.name_or_path}: holds a {bert.model_type}; give a BERT")
    return replace(cfg, **{name: getattr(bert, name) for name in BERT_SIZES})


class ClipBert(VideoTextEncoder):
    """ClipBERT for a task: [CLS] -> 2-layer MLP -> K scores (paper, section 3).

    num_outputs, K (section 4): the number of answers (open-ended QA); 1, the score of an option or
    the count itself (multiple choice, counting); 2 (retrieval).
    """

    def __init__(self, cfg, num_outputs):
        super().__init__(cfg)
        self.classifier = nn.Sequential(
            nn.Linear(cfg.hidden_size, 2 * cfg.hidden_size),
            nn.ReLU(),
            nn.Linear(2 * cfg.hidden_size, num_outputs),
        )
        self.classifier.apply(self.init_weights)
        # The first loss should be ln(classes) whatever initializer_range is: no opinion before the
        # first example.
        nn.init.normal_(self.classifier[-1].weight, std=0.02)

    def classify(self, grid, input_ids, attention_mask):
        """grid (B, T, h, w, d), input_ids (B*n, Lt) -> (B*n, num_outputs), float32.

        The head is computed in float32 under autocast, too: bf16 knows three digits, with which
        most of 1,000 videos would share their score with another, and a tie for the first place
        counts as not found.
        """
        _, pooled = self.fuse(grid, input_ids, attention_mask)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.classifier(self.dropout(pooled.float()))

    def forward(self, frames, input_ids, attention_mask):
        """p_i = H(F_v(c_i), F_l(S)) of one clip of each video, or of all N (paper, section 3).

        frames (B, T, 3, L, L) uint8 or float RGB 0..255; input_ids, attention_mask (B*n, Lt) ->
        (B*n, num_outputs). With frames (B, N, T, 3, L, L): (N, B*n, num_outputs), by
        `clip_logits`. Called as model(...), never by name: DDP averages only such calls' gradients.
        """
        if frames.dim() == 6:
            return clip_logits(self, frames, input_ids, attention_mask)
        return self.classify(self.encode_frames(frames), input_ids, attention_mask)


class ClipBertForPreTraining(VideoTextEncoder):
    """Image-text pretraining (paper, section 3): masked language modelling, image-text matching."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cls = BertPreTrainingHeads(bert_config(cfg))
        self.cls.apply(self.init_weights)
        # no opinion at first, as in ClipBert
        nn.init.normal_(self.cls.seq_relationship.weight, std=0.02)
        # tied, as in BERT
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def forward(self, frames, input_ids, attention_mask, keep=None):
        """-> MLM scores (B*n, Lt, vocabulary), ITM scores (B*n, 2); column 1: they belong together.

        frames (B, T, 3, L, L); input_ids, attention_mask (B*n, Lt); keep: how many grid tokens to
        draw (100 in training).
        """
        hidden, pooled = self.fuse(self.encode_frames(frames), input_ids, attention_mask, keep)
        return self.cls(hidden[:, : input_ids.shape[1]], pooled)


# ----------------------------------------------------------------------------------------------------------------------
# From clips to a video (paper, section 3): p_i, G and its loss; then pretraining's two losses


def clip_logits(model, frames, input_ids, attention_mask):
    """p_1 ... p_N of every video.

    frames (B, N, T, 3, L, L); input_ids, attention_mask (B*n, Lt) -> (N, B*n, K). All clips go
    through the CNN at once, and each clip only once, however many texts there are.
    """
    B, N = frames.shape[:2]
    n, Lt = input_ids.shape[0] // B, input_ids.shape[1]
    grid = model.encode_frames(frames.flatten(0, 1))  # (B*N, T, h, w, d)
    # (B*N*n, Lt): a video's texts stand again behind each of its clips, as fuse wants them
    ids, mask = (
        x.view(B, 1, n, Lt).expand(B, N, n, Lt).reshape(-1, Lt) for x in (input_ids, attention_mask)
    )
    logits = model.classify(grid, ids, mask)  # (B*N*n, K)
    return logits.view(B, N, n, -1).transpose(0, 1).reshape(N, B * n, -1)


def aggregate_clips(logits, how):
    """G, the one place where clips become a video (paper, section 3; compared in section 4).

        mean:  p = 1/N sum_i p_i          max:  p = max_i p_i          lse:  p = log sum_i exp(p_i)

    logits (N, B*n, K) -> (B*n, K). With lse, cross_entropy(p, y) is the reference's log-sum-exp
    over clips and labels minus the one over clips of the true label. how: "mean" | "max" | "lse".
    """
    if how == "mean":
        return logits.mean(0)
    if how == "max":
        return logits.amax(0)
    if how == "lse":
        return logits.logsumexp(0)  # never exp first: logits of 80 would overflow
    raise ValueError(f"unknown aggregation {how!r}: choose mean, max or lse")


def video_loss(p, target, kind):
    """NLL(p, q) of the video-level prediction p, by the kind of answer (paper, section 4).

    choice   p (B*n, 1) scores of n options each, target (B,) the right one: cross entropy over them
    answer   p (B, K) scores of all answers, target (B,) index: cross entropy
    soft     p (B, K), target (B, K) in 0..1 (VQA): binary cross entropy, summed over the answers
    match    p (B*n, 2), target (B*n,) 1 for a video's own caption: cross entropy (retrieval)
    count    p (B, 1), target (B,): squared error
    """
    if kind == "choice":
        return F.cross_entropy(p.view(len(target), -1), target)
    if kind in ("answer", "match"):
        return F.cross_entropy(p, target)
    if kind == "count":
        return F.mse_loss(p.squeeze(1), target.float())
    if kind == "soft":
        # outputs beyond the list of answers are never right
        target = F.pad(target, (0, p.shape[1] - target.shape[1]))
        # the mean over questions and answers, times K: a question's sum
        return F.binary_cross_entropy_with_logits(p, target) * p.shape[1]
    raise ValueError(f"unknown kind of answer {kind!r}")


def match_score(p):
    """How well a caption fits a video: p (B*n, 2) -> probabilities (B*n,).

    In float64: as float32, all probabilities from a difference of 17 on would be 1, and 1,000
    videos could not be ranked.
    """
    return p.double().softmax(1)[:, 1]


def mlm_loss(scores, labels, over="masked", text_length=30):
    """Masked language modelling (paper, section 3): the masked words M from the other words and the
    image v.

        L_MLM = -1/|M| sum_{m in M} log P(w_m | w_{not M}, v)

    scores (B, Lt, vocabulary); labels (B, Lt), -100 where no word is masked. over="all" divides by
    B * text_length instead, as the reference does, which pads each text to 30 tokens and averages
    over all of them. With 15% masked, only some 6% of those positions count, so that is the same
    loss with a weight of about .06 beside ITM's 1. Mismatched pairs take part, too: there the words
    alone must do.
    """
    total = F.cross_entropy(
        scores.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    if over == "all":
        return total / (len(labels) * text_length)
    if over == "masked":
        # a batch without masked words: 0, not 0/0
        return total / (labels != -100).sum().clamp(min=1)
    raise ValueError(f"unknown average {over!r}: choose masked or all")


def itm_loss(scores, labels):
    """Image-text matching (paper, section 3): y = 1 if caption S and image v belong together, 0 if
    S is another's.

        L_ITM = -log P(y | S, v)

    scores (B, 2), labels (B,).
    """
    return F.cross_entropy(scores.float(), labels)


# ----------------------------------------------------------------------------------------------------------------------
# Optimisation (paper, section 4): AdamW without decay on biases and LayerNorm; linear warm-up, then
# linear decay


def optimizer_groups(model, weight_decay):
    """Two groups of trainable parameters: decayed, and biases + LayerNorm, which are not.

    Decay pulls a weight to 0, so that no input counts too much; a bias or a gain has no input to
    weigh.
    """
    decayed, others = [], []
    for name, p in model.named_parameters():  # a tied weight once
        if p.requires_grad:
            (others if name.endswith("bias") or "LayerNorm" in name else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build_optimizer(model, weight_decay=1e-3):
    """AdamW with the reference's betas. Learning rate and eps are set at every step, by
    `set_step`."""
    return torch.optim.AdamW(
        optimizer_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.98), fused=True
    )


ADAM_EPS = 1e-6  # the reference's


def set_step(optimizer, step, lr):
    """What an update depends on besides the gradients: its learning rate, and an eps that makes it
    the reference's.

        update = lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps / sqrt(1 - b2^t)),  t = step

    The reference adds eps to sqrt(v) before the bias correction, torch after it: so torch gets eps
    / sqrt(1 - b2^t), seven times eps in the first step. Training then follows the reference's,
    losses to five digits.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["eps"] = ADAM_EPS / math.sqrt(1 - group["betas"][1] ** step)


def learning_rate(step, total_steps, peak, warmup_ratio=0.1):
    """Linear from 0 to `peak` over the first warmup_ratio of the steps, then linear to 0 at
    total_steps.

        peak * step / warmup                                       if step < warmup, else
        peak * (total_steps - step) / (total_steps - warmup)

    step counts from 1 (the first update). Where that gives exactly 0, as at total_steps (even if
    all is warm-up), it is the reference's 1e-8, so that no step is in vain.
    """
    warmup = int(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step / warmup) or 1e-8
    return peak * (max(total_steps - step, 0) / max(total_steps - warmup, 1)) or 1e-8


########################################################################################################################
# Here the paper's part ends. What follows serves both scripts: settings and flags, weights and
# checkpoints, and what surrounds a training loop (several GPUs, precision, the log, how a run stops
# and goes on, errors).
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Settings: what a run can be told, with its meaning; each flag is made from its field


def setting(default, meaning, **flag):
    """A field of Settings; flag: what argparse or data.Parser.numbers wants to know besides."""
    if default is not None and default is not False and default != ():
        meaning += f" (default: {default})"
    return field(default=default, metadata={"help": meaning, **flag})


@dataclass
class Settings:
    """What both scripts can be told; theirs add their own. All of it is stored in every checkpoint.

    The order in which a value is decided, the last one wins: the default here; the task's row (the
    paper's); the tiny model's changes; the checkpoint, with --eval and --resume; the command line,
    where --epochs makes max_steps void.
    """

    # where
    data: tuple = setting(None, "folders of the data set (default: the toy data, in toy_data/)",
                          nargs="+", type=os.path.normpath)  # plain text: toy/ is toy
    out: str = setting(None, "where to write (default: a new folder in runs/)", metavar="DIR")
    overwrite: bool = setting(False, "write into an --out that holds a run, and lose that run")
    resume: bool = setting(
        False, "go on from the newest whole checkpoint in --out (default: the task's newest run)"
    )
    eval: str = setting(None, "only evaluate this checkpoint of ours", metavar="CKPT")
    # which model, and what it starts from
    model: str = setting("tiny", "with --init: the checkpoint's", choices=["tiny", "base"])
    init: str = setting(None, "start from this checkpoint, ours or the official", metavar="CKPT")
    resnet: str = setting(None, "base: a ResNet-50's weights (default: torchvision's, from its hub)",
                          metavar="FILE")  # fmt: skip
    bert: str = setting(None, "base: any BERT, a folder or a name of the hub's; it sets the "
                        "transformer's sizes (default: bert-base-uncased)")  # fmt: skip
    scratch: bool = setting(False, "base: start from random weights")
    # what it sees
    size: int = setting(448, "L, pixels", low=16, high=64 * VisualEmbedding.MAX_GRID)
    fps: float = setting(1.0, "a clip of T frames spans T / fps seconds", low=0.001, high=1000)
    frames: int = setting(1, "T, frames of a clip", high=256)
    text_length: int = setting(30, "Lt at most, [CLS] and [SEP] included", low=3, high=512)
    limit: int = setting(None, "use only the first so many examples or images of each split")
    allow_missing: bool = setting(
        False, "leave out in training what has no video; in testing it counts as wrong"
    )
    cache: bool = setting(
        False, "take frames from the small files that `python data.py cache` wrote"
    )
    blind: bool = setting(False, "zero all frames: what can be guessed from the text alone?")
    # how it learns
    batch_size: int = setting(16, "videos at a time, on each GPU")
    grad_accum: int = setting(2, "... and how many such batches to an update")
    epochs: int = setting(15, "how often each example is seen")
    max_steps: int = setting(None, "end the schedule after so many updates, whatever --epochs says")
    lr: float = setting(5e-5, "the learning rate's peak", low=0, high=1)
    weight_decay: float = setting(1e-3, "of AdamW, not on biases and LayerNorm", low=0, high=1)
    clip_grad: float = setting(5.0, "the gradient's largest norm", low=1e-6)
    seed: int = setting(0, "of all that is random in training", low=0, high=2**32 - 1)
    # on which machine
    precision: str = setting(
        None, "default: bf16, fp16 on older GPUs, fp32 on a CPU", choices=["bf16", "fp16", "fp32"]
    )
    workers: int = setting(None, "processes that read videos (default: one a core of a GPU "
                           "machine, at most 8; on a CPU a core less than there are, at most 4)",
                           low=0, high=256)  # fmt: skip
    save_every: int = setting(500, "steps between checkpoints")
    debug: bool = setting(False, "show the traceback of an error")


# What a resumed run may be told anew: how long, where, and how this machine computes. All else is
# the checkpoint's.
RESUMABLE = {"resume", "epochs", "max_steps", "out", "workers", "save_every", "precision", "debug"}


def parse_flags(parser, cls, arguments=None):
    """What the command line gives, {name: value}; cls: the script's Settings, a flag for each field."""
    for f in fields(cls):
        how = {"default": argparse.SUPPRESS, **f.metadata}
        if f.type in (int, float) or "high" in how:
            parser.numbers(f"--{f.name}", kind=float if f.type is float else int, **how)
        elif f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", **how)
        else:
            parser.add_argument(f"--{f.name}", **how)
    given = vars(parser.parse_args(arguments))
    # argparse makes lists, which compare as equal to no default and to no stored setting
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if len({"init", "resume", "eval"} & given.keys()) > 1:
        parser.error("--init, --resume and --eval exclude each other; choose one")
    if given.get("model") != "base" and not {"resume", "eval"} & given.keys():
        # --init CKPT --bert DIR: the official weights want a vocabulary
        of_base = {"resnet", "scratch"} | (set() if "init" in given else {"bert"})
        for name in of_base & given.keys():
            parser.error(f"--{name} is for --model base; add that, or leave it out")
    return given


def settle(cls, values, given):
    """The script's Settings, cls: its defaults, over them these values, then the flags."""
    if "epochs" in given:
        values = values | {"max_steps": None}  # asked for in epochs: a number of steps is void
    return cls(**values | given)


def check_size(s, cfg):
    """ValueError, if --size has more cells than the grid, --text_length more tokens than the BERT."""
    largest = VisualEmbedding.MAX_GRID * cfg.stride
    if not cfg.stride <= s.size <= largest:
        raise ValueError(
            f"--size {s.size}: this model's grid takes {cfg.stride} to {largest} pixels"
        )
    if s.text_length > cfg.max_position_embeddings:
        raise ValueError(f"--text_length {s.text_length}: this BERT has {cfg.max_position_embeddings} positions")


def first_free(name, taken):
    """name, name-2, name-3, ...: the first that is not taken. So no run or result replaces another."""
    names = (name if i == 1 else f"{name}-{i}" for i in count(1))
    return next(name for name in names if not taken(name))


def new_folder(s, name):
    """Set s.out, if it is not said, to a new folder of runs/; one that is said must hold no run."""

    def holds_run(folder):
        return any((Path(folder) / file).exists() for file in ("config.json", "last.pt", "best.pt"))

    if s.out is None:
        s.out = first_free(f"runs/{name}{'_blind' if s.blind else ''}", holds_run)
        print(f"writing to {s.out}")
    elif holds_run(s.out) and not s.overwrite:
        raise ValueError(f"{s.out}: holds a run; choose another --out, go on with --resume, or "
                         "lose it by --overwrite")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Weights in


def copy_weights(model, tensors):
    """Copy {name: tensor} into the model. -> a report: the names by what became of them.

    loaded; missing: in the model only, keep their initial values; unexpected: in the file only;
    mismatched: of another shape. ValueError if not one tensor fits.
    """
    own, report = model.state_dict(), {"loaded": [], "unexpected": [], "mismatched": []}
    for name, value in tensors.items():
        if name not in own:
            report["unexpected"].append(name)
        elif own[name].shape != value.shape:
            shapes = f"{tuple(value.shape)}, here {tuple(own[name].shape)}"
            report["mismatched"].append(f"{name} {shapes}")
        else:
            report["loaded"].append(name)
    if not report["loaded"]:
        raise ValueError(
            f"no tensor of this file fits the model (it has {', '.join(list(tensors)[:3])} ...)"
        )
    model.load_state_dict({name: tensors[name] for name in report["loaded"]}, strict=False)
    return report | {"missing": [name for name in own if name not in tensors]}


def describe(report):
    """The report in a few lines; names what stays at random: mismatched, and the missing parts."""
    lines = [", ".join(f"{len(names)} tensors {what}" for what, names in report.items() if names)]
    for what in ("unexpected", "mismatched"):
        if names := report[what]:
            lines.append(f"  {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    if parts := dict.fromkeys(".".join(name.split(".")[:2]) for name in report["missing"]):
        lines.append(f"  at random: {', '.join(parts)}")
    return "\n".join(lines)


def official_name(name):
    """A key of the official checkpoint -> the name here; None: its own forward never used it."""
    if name.startswith(("cnn.feature.proposal_generator.", "cnn.feature.roi_heads.")):
        return None  # detectron2's region proposals and detection heads
    if name == "transformer.bert.visual_embeddings.position_embeddings.weight":
        return None  # one-dimensional positions that the 2-D ones replaced
    if name.startswith("cnn.feature.backbone."):
        return "cnn.resnet." + detectron2_name(name.removeprefix("cnn.feature.backbone."))
    name = name.replace("transformer.bert.visual_embeddings.", "visual_embeddings.")
    # bert.*, classifier.*, cls.*; cnn.grid_encoder.* keeps its name
    return name.removeprefix("transformer.")


def detectron2_name(name):
    """detectron2's names of a ResNet's weights -> torchvision's; others stay."""
    for old, new in (
        ("stem.", ""), ("res2.", "layer1."), ("res3.", "layer2."), ("res4.", "layer3."),
        ("res5.", "layer4."), ("shortcut.norm.", "downsample.1."), ("shortcut.", "downsample.0."),
        ("conv1.norm.", "bn1."), ("conv2.norm.", "bn2."), ("conv3.norm.", "bn3."),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def load_official_checkpoint(model, checkpoint):
    """Copy the official checkpoint, a flat state dict of 495 keys or its path, into a model.

    -> a report, as copy_weights has it; "unused" names the known leftovers. ValueError, if the
    model was not built with `ClipBertConfig.official()`: these weights expect BGR pixels and caffe
    strides, and would fit another model, but give wrong features.
    """
    tensors = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    backbone = any(name.startswith("cnn.feature.backbone.") for name in tensors)
    if backbone and not (model.cfg.caffe_strides and model.cfg.bgr):
        raise ValueError("official weights need a model of ClipBertConfig.official()")
    names = {name: official_name(name) for name in tensors}
    report = copy_weights(model, {new: tensors[name] for name, new in names.items() if new})
    return report | {"unused": [name for name, new in names.items() if not new]}


def model_name(given, state):
    """tiny or base: what --model says, or what --init's checkpoint, ours or the official, holds."""
    if not state:
        return given.get("model", "tiny")
    tiny = "config" in state and config_from(state).backbone == "tiny"
    held = "tiny" if tiny else "base"
    if given.get("model", held) != held:
        raise ValueError(f"{given['init']}: a checkpoint of {held}; leave out --model")
    return held


def start_model(build, s, state, text_vocabulary, bert_vocabulary):
    """A new model and its vocabulary: from --init's state, from ImageNet and BERT, or at random.

    build: config -> model. text_vocabulary(), bert_vocabulary(): lists of tokens, made only if they
    are needed.
    """
    if state and "config" in state:  # ours brings its own sizes and vocabulary
        model, vocabulary = build(config_from(state)), state["vocabulary"]
        print(f"{s.init}: {describe(copy_weights(model, state['model']))}")
    elif state:  # the official layout
        model, vocabulary = build(ClipBertConfig.official()), bert_vocabulary()
        print(f"{s.init}: {describe(load_official_checkpoint(model, state))}")
    elif s.model == "base" and not s.scratch:
        model, vocabulary = start_pretrained(build, s), bert_vocabulary()
    else:  # random weights: nothing to protect, so nothing is frozen
        vocabulary = text_vocabulary()
        cfg = ClipBertConfig.base() if s.model == "base" else ClipBertConfig.tiny()
        model = build(replace(cfg, vocab_size=len(vocabulary), frozen_stages=0))
    return model, vocabulary


def start_pretrained(build, s):
    """`base()` from a ResNet and a BERT, as the paper does before its own pretraining.

    The BERT's config.json sets the transformer's sizes, so that any BERT fits. Its MLM head is
    taken, too, where it has one and the model a place for it. Of the CNN and of bert.* everything
    must be there: what is not stops the run, as a model that is half random would only be a bad
    one.
    """
    bert, absent, cnn = read_starts(s)
    detector = "res2.0.conv1.weight" in cnn  # detectron2's names: the reference's start
    cfg = ClipBertConfig.official() if detector else ClipBertConfig.base()
    model = build(config_of_bert(bert.config, cfg))
    # not of the trunk: a detector's or a classifier's heads, and BatchNorm's counters of batches
    leftovers = r"(?!stem|res)" if detector else r"fc\.|.*num_batches"
    tensors = {f"cnn.resnet.{detectron2_name(name)}": torch.as_tensor(value)
               for name, value in cnn.items() if not re.match(leftovers, name)}  # fmt: skip
    tensors |= {name: value for name, value in bert.state_dict().items() if name not in absent
                and (name.startswith("bert.") or name in model.state_dict())}  # fmt: skip
    report = copy_weights(model, tensors)
    for name in report["unexpected"] + report["mismatched"] + report["missing"]:
        if name.startswith("cnn.resnet."):
            raise ValueError(f"{s.resnet}: not a resnet50; give torchvision's resnet50-*.pth")
        if name.startswith("bert.") and "pooler" not in name:  # BERTs for sentences come without
            raise ValueError(f"{s.bert}: not a whole BERT ({name}); give another folder or name")
    print(f"{s.resnet or 'resnet50'}, {s.bert or 'bert-base-uncased'}: {describe(report)}")
    return model


def read_starts(s):
    """What --bert and --resnet name, or the hubs have: (BERT, what its file lacks, CNN tensors)."""
    transformers_messages.set_verbosity_error()  # what does not fit is said in a line of ours
    try:
        bert, info = BertForPreTraining.from_pretrained(
            s.bert or "bert-base-uncased", output_loading_info=True, ignore_mismatched_sizes=True
        )
        if s.resnet:
            cnn = load_checkpoint(s.resnet)
        else:
            cnn = torchvision.models.get_model("resnet50", weights="IMAGENET1K_V1").state_dict()
    except Exception as error:  # the hubs raise a dozen kinds of network errors, of one remedy
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"no starting weights ({reason}): without a network, give --resnet FILE "
                         "(torchvision's resnet50-*.pth) and --bert DIR (a BERT's folder), --init "
                         "CKPT, or --scratch") from error  # fmt: skip
    # from_pretrained draws at random what is not in the file, or has another shape there
    absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    return bert, absent, {name.removeprefix("backbone."): value for name, value in cnn.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all, read without running code


def write_file(path, content, previous=None):
    """Bytes or text to a file, by the first process alone: whole, or not at all.

    Written beside `path`, flushed to the disk, then renamed: whenever the process dies or the disk
    is full, the old file or the new one is there (for an instant the old one only as `previous`,
    where it is kept, against a disk that lies). An OSError names the file.
    """
    if RANK:
        return
    temporary = Path(f"{path}.tmp")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # else a power cut may leave the new name with nothing behind it
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: not written ({error.strerror or error}): see to that, then --resume, "
                      "or choose another --out") from error  # fmt: skip
    finally:
        with suppress(OSError):  # the disk may be gone altogether
            temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """Read tensors and plain values only (weights_only): a stranger's file can't run code."""
    try:
        with warnings.catch_warnings():  # of an odd pickle; what matters is said below
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(
            f"{path}: no such checkpoint ({error.strerror}); give a file that training wrote, best.pt"
        ) from None
    except Exception as error:  # noqa: BLE001 - unpickling a stranger's bytes can raise anything
        raise ValueError(
            f"{path}: not a whole checkpoint of tensors and plain values ({type(error).__name__}); "
            "copy the file again, or have its state dict saved alone"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: is a {type(state).__name__}, not named values")  # noqa: TRY004
    return state


def config_from(state):
    """The ClipBertConfig that a checkpoint of ours was made with."""
    try:
        return ClipBertConfig(**state["config"])
    except TypeError:
        raise ValueError(
            "the checkpoint's config is not one of ClipBERT's; give one that our training wrote"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# How a run begins: anew or from --init (`begin`), with --resume (`load_stopped`), with --eval
# (`load_finished`)


def begin(cls, given, name, task_values):
    """-> (s, state): the settings; what to start from (--init), to go on from (s.resume), or None.

    cls: the script's Settings. task_values(model): what the task has instead of the defaults.
    """
    if "resume" in given:
        return load_stopped(cls, given, name)
    state = load_checkpoint(given["init"]) if "init" in given else None
    model = model_name(given, state)
    s = settle(cls, task_values(model) | {"model": model}, given)
    new_folder(s, name)
    return s, state


def load_own(cls, path):
    """A checkpoint of the script with these Settings: not another's, nor an older version's."""
    state = load_checkpoint(path)
    if set(state.get("settings", ())) != {f.name for f in fields(cls)}:
        raise ValueError(f"{path}: not a checkpoint that this script has trained; start from it "
                         "with --init")  # fmt: skip
    return state


def load_finished(cls, given):
    """--eval: (s, state) of a checkpoint of ours, with its settings where no flag says else."""
    state = load_own(cls, given["eval"])
    # Of that run or its machine alone: an evaluation takes all examples, and what suits this machine.
    own = {"limit": None, "workers": None, "precision": None}
    s = settle(cls, state["settings"] | own | {"out": str(Path(given["eval"]).parent)}, given)
    if s.blind and "blind" not in given:
        print(f"{s.eval}: trained blind, so it sees no frames here, either")
    return s, state


def result_suffix(s, *what):
    """What --eval adds to its results' names: what was evaluated, and a number if that is there."""
    folder = Path(s.data[0]).resolve().name if s.data else "toy"
    name = "-".join(["", Path(s.eval).stem, *what, folder])
    if s.blind:
        name += "-blind"
    return first_free(name, lambda name: (Path(s.out) / f"metrics{name}.json").exists())


def load_stopped(cls, given, name):
    """--resume: (s, state) of the newest whole checkpoint in --out, or in the newest run of `name`.

    Everything is as the checkpoint says, data and model, too: else it would be another run. What
    the command line says otherwise must be in RESUMABLE; another precision or length makes other
    weights (the learning rate follows the new length).
    """
    out = given.get("out", Path("runs") / name)
    if "out" not in given:  # the newest; previous.pt alone would do, too
        written = [path for path in Path("runs").glob(f"{name}*/*.pt")
                   if ("_blind" in path.parent.name) == ("blind" in given)]  # fmt: skip
        out = max(written, key=lambda path: path.stat().st_mtime).parent if written else out
    for path in (Path(out) / "last.pt", Path(out) / "previous.pt"):  # a disk may lose the newest
        with suppress(ValueError):
            state = load_own(cls, path)
            break
    else:
        raise ValueError(f"{out}: holds no whole last.pt or previous.pt of this script; to start anew, "
                         "leave out --resume")  # fmt: skip
    for flag in given.keys() - RESUMABLE:
        if given[flag] != state["settings"][flag]:
            raise ValueError(f"{path}: was begun with --{flag} {state['settings'][flag]}, not "
                             f"{given[flag]}; leave that out, give another --out, or start anew")
    print(f"resuming from {path}, step {state['step']}")
    return settle(cls, state["settings"], given | {"out": str(out)}), state


# ----------------------------------------------------------------------------------------------------------------------
# Several GPUs. `torchrun --nproc_per_node=K SCRIPT ...` starts K processes and numbers them. Each
# has the whole model and takes every K-th batch; backward averages the gradients over them
# (DistributedDataParallel), so that K processes do what one does with K times the --grad_accum. The
# first one prints and writes.
RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def join_processes():
    """Meet the other processes, if there are any; all but the first one fall silent."""
    if PROCESSES == 1:
        return
    gpu, local_rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(f"{torch.cuda.device_count()} GPUs: --nproc_per_node can't be more")
    if gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1))
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for good


@contextmanager
def first_one_first():
    """The others wait: there may be toy data to write, or weights to download.

    A gather is a barrier: it ends when all processes have come to it.
    """
    if RANK:
        gather(None)
    yield
    if not RANK:
        gather(None)


def gather(value):
    """Every process's value, in order."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# The machine: where and how precisely to compute
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_machine(s, model):
    """Settle precision and workers, as far as s leaves them open; the model goes to the device.

    ValueError if it can't be used with these settings.
    """
    check_size(s, model.cfg)
    gpu = DEVICE == "cuda"
    if s.precision is None:
        half = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        s.precision = half if gpu else "fp32"
    if s.precision == "fp16" and not gpu:
        raise ValueError("--precision fp16 needs a GPU: choose fp32 or bf16")
    # for each of this machine's processes
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if s.workers is None:  # on a CPU one core is left to the model
        s.workers = min(8, cores) if gpu else max(1, min(4, cores - 1))
    if gpu:
        # once: else each convolution turns its weights at each step
        model.cnn.to(memory_format=torch.channels_last)
        # all frames have one size: the fastest kernels are sought once
        torch.backends.cudnn.benchmark = True
        # TF32 rounds to 10 bits, three digits, where fp32 is to agree with the reference to five
        torch.backends.cudnn.allow_tf32 = s.precision != "fp32"
        # this kernel of attention would be built anew for each length of text
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif model.cfg.backbone == "tiny":  # its operations are small: more threads would only wait
        torch.set_num_threads(min(4, torch.get_num_threads()))
    return model.to(DEVICE)


def autocast(s):
    """The forward pass in s.precision; weights and losses stay float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[s.precision]
    return torch.autocast(DEVICE, dtype=dtype, enabled=s.precision != "fp32")


def to_device(batch):
    """A batch with its tensors on the device; frames go there as uint8, a quarter of the bytes."""
    return {
        k: v.to(DEVICE, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# A training run


class Training:
    """What surrounds both scripts' loops: updates, the log, checkpoints, how a run stops, goes on.

    for step in training.steps():                 after each, last.pt, if it is time
        for batch in training.batches(loader):    grad_accum of them
            ... training.parallel(...) ...
            training.backward(loss)
        training.update(step, loss=...)           one update; logged
    """

    def __init__(self, s, model, n_examples, stopped=None, **extras):
        """n_examples: in an epoch. stopped: --resume's state, or None. extras: more to save."""
        self.s, self.model, self.out, self.n_examples = s, model, Path(s.out), n_examples
        self.per_step = s.batch_size * s.grad_accum * PROCESSES  # examples to an update
        self.total_steps = s.max_steps or math.ceil(s.epochs * n_examples / self.per_step)
        self.extras = extras | {"settings": asdict(s), "config": asdict(model.cfg)}
        self.optimizer = build_optimizer(model, s.weight_decay)
        # fp16's gradients are scaled, lest small ones become 0; others go through as they are.
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=s.precision == "fp16")
        self.start, self.best = 0, -math.inf  # steps that are done; the highest validation score
        # The same model, but each process its own dropout; `restore` brings the stopped run's.
        if RANK:
            torch.manual_seed(s.seed + 1_000_003 * RANK)  # far from the seeds of other runs
        self.log_bytes = self.restore(stopped) if stopped else 0  # the length of log.jsonl
        if not RANK:
            self.prepare_folder(anew=not stopped)
        # Batches of all processes, for data.training_order: the run's first one and its end.
        self.first_batch, self.n_batches = (
            n * s.grad_accum * PROCESSES for n in (self.start, self.total_steps)
        )
        # What training calls in place of the model: DDP averages gradients.
        self.parallel = nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model
        self.waiting, self.unreadable = [], Counter()  # rows to log; error lines and how often
        self.stopped_by, self.began, self.shown = 0, time.time(), 0.0  # shown: when, see `show`
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {DEVICE}, "
              f"{self.total_steps:,} updates of {self.per_step} examples (an epoch has {n_examples:,}), "
              f"learning rate {s.lr:g}; all settings are in {self.out / 'config.json'}")  # fmt: skip
        if self.start >= self.total_steps:
            print("this run is finished; --max_steps or --epochs with a larger number makes it longer")

    def restore(self, state):
        """Go on as if there had been no stop; the weights are loaded. -> bytes of the log to keep."""
        self.start, self.best = state["step"], state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, moments in self.optimizer.state.items():  # in this machine's order of memory
            moments |= {name: torch.empty_like(weight).copy_(moments[name]) for name in ("exp_avg", "exp_avg_sq")}
        if self.scaler.is_enabled() and state["scaler"]:  # the stopped run's precision was fp16, too
            self.scaler.load_state_dict(state["scaler"])
        if RANK < len(state["random"]):  # the stopped run may have had fewer processes
            own = state["random"][RANK]
            torch.set_rng_state(own["torch"])
            if DEVICE == "cuda" and own["cuda"] is not None:
                torch.cuda.set_rng_state(own["cuda"])
        return state["log"]

    def prepare_folder(self, anew):
        """config.json; a log without the steps that will be logged again; no older run's weights."""
        config = {"device": DEVICE, "total_steps": self.total_steps, **self.extras["settings"],
                  "config": self.extras["config"]}  # fmt: skip
        if anew and not self.s.overwrite and (self.out / "config.json").exists():
            raise ValueError(f"{self.out}: another run has just begun there; choose another --out")
        write_file(self.out / "config.json", json.dumps(config, indent=2) + "\n")
        if anew:  # --overwrite: nothing that this run might fall back on stays
            for name in ("last.pt", "previous.pt", "best.pt"):
                (self.out / name).unlink(missing_ok=True)
        with open(self.out / "log.jsonl", "ab") as log:
            self.log_bytes = log.truncate(min(self.log_bytes, log.tell()))

    def steps(self):
        """Yield start + 1, ..., total_steps; after each, a checkpoint if one is due.

        Ctrl-C and SIGTERM wait for the step's end, which is saved; then the run ends. A second one
        ends it at once (not of several processes: torchrun sends a second one itself). At the end,
        what could not be read is listed.
        """

        def note(number, _):
            self.stopped_by = number
            signal.signal(number, signal.default_int_handler if PROCESSES == 1 else signal.SIG_IGN)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in range(self.start + 1, self.total_steps + 1):
                yield step
                self.end_step(step)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        everywhere = sum(gather(self.unreadable), Counter())
        list_unreadable(everywhere, "replaced by other examples in training")

    def batches(self, loader):
        """The next grad_accum batches of an iterator, on the device."""
        for i in range(self.s.grad_accum):
            # Processes exchange gradients in the last backward pass only, as in DDP's no_sync();
            # a model without DDP takes no notice.
            self.parallel.require_backward_grad_sync = i == self.s.grad_accum - 1
            batch = to_device(next(loader))
            self.unreadable.update(line for lines in batch["unreadable"] for line in lines)
            yield batch

    def backward(self, loss):
        """Gradients of one of grad_accum batches: their mean is that of one large batch.

        (Nearly so of MLM's mean over masked words: batches differ in how many they have. The
        reference sums the gradients.)
        """
        self.scaler.scale(loss / self.s.grad_accum).backward()

    def update(self, step, **losses):
        """An update by the gradients so far; it is logged some steps later, by flush.

        losses: sums over the grad_accum batches. The log has their means, and the gradient's norm
        before it is clipped.
        """
        lr = learning_rate(step, self.total_steps, self.s.lr)
        set_step(self.optimizer, step, lr)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.clip_grad)
        self.scaler.step(self.optimizer)  # in fp16, not if a gradient is not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        losses = {name: value / self.s.grad_accum for name, value in losses.items()}
        self.waiting.append({"step": step, **losses, "lr": lr, "grad_norm": norm})
        # reading a number off the GPU waits for it: not at every step
        if step % 10 == 0 or step == self.total_steps:
            self.flush()

    def flush(self):
        """Log the waiting steps, each the mean over the processes; an error if one is not finite."""
        rows = [{name: float(value) for name, value in row.items()} for row in self.waiting]
        self.waiting, everywhere = [], gather(rows)
        for i, row in enumerate(rows):
            for name in row:
                row[name] = sum(theirs[i][name] for theirs in everywhere) / PROCESSES
            self.log(row | {"step": int(row["step"])})
            self.check_finite(row)
        if rows:
            self.show(rows[-1])

    def check_finite(self, row):
        """End the run, before it is saved, where it has become of no use."""
        # fp16: an overflow only halves the scale, and the step is skipped. At a scale below 1 that
        # has not helped: then it is an error.
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not math.isfinite(row["loss"]) or not (overflow or math.isfinite(row["grad_norm"])):
            raise ValueError(
                f"the loss is {row['loss']} (gradient norm {row['grad_norm']}) at step "
                f"{row['step']:.0f}: try a lower --lr, or --precision fp32 or bf16"
            )

    def show(self, row):
        """How it goes: a line every half minute."""
        now, done = time.time(), row["step"] - self.start
        if now > self.shown + 30:
            self.shown, seconds = now, (now - self.began) / done  # a step's
            left = seconds * (self.total_steps - row["step"]) / 60
            print(f"step {row['step']:.0f} of {self.total_steps:,}: loss {row['loss']:.3f}, "
                  f"{self.per_step / seconds:.0f} examples/s, {left:.0f} min left", flush=True)  # fmt: skip

    def log(self, row):
        """A line of log.jsonl."""
        if RANK:
            return
        path = self.out / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
                self.log_bytes = file.tell()
        except OSError as error:
            raise OSError(f"{path}: not written ({error.strerror}): make room, then --resume") from error

    def ends_epoch(self, step):
        """Whether the examples of this step are an epoch's last ones, or the run's."""
        epochs = [n * self.per_step // self.n_examples for n in (step - 1, step)]
        return epochs[0] < epochs[1] or step == self.total_steps

    def validated(self, step, score, row):
        """Log a validation; best.pt is the checkpoint with the highest score."""
        self.flush()
        self.log({"step": step, **row})
        if score > self.best:
            self.best = score
            self.save("best.pt", step)

    def save(self, name, step, previous=None, **more):
        """A checkpoint: the weights, the settings, what the script's own model needs, `more`.

        previous: where the file that is there now goes.
        """
        if not RANK:
            buffer = io.BytesIO()  # in memory first: then only one place has to mind a full disk
            more |= self.extras | {"step": step, "model": self.model.state_dict()}
            torch.save(more, buffer)
            write_file(self.out / name, buffer.getbuffer(), previous)

    def end_step(self, step):
        """A checkpoint if one is due, or if a signal came: then the run ends here."""
        number = self.stopped_by
        if PROCESSES > 1:  # they must agree on a step to stop at: they ask each other now and then
            number = max(gather(number)) if step % 10 == 0 else 0
        if step % self.s.save_every == 0 or step == self.total_steps or number:
            self.flush()  # first: the checkpoint tells how long the log is, with all steps so far
            self.checkpoint(step)
        if number:
            name = signal.Signals(number).name
            raise KeyboardInterrupt(number, f"{name} after step {step} of {self.total_steps}, which is "
                                    f"saved: --resume --out {self.out} goes on")  # fmt: skip

    def checkpoint(self, step):
        """last.pt, with all that a resumed run needs to repeat the uninterrupted one.

        The one before it stays as previous.pt: a disk may lose the newest.
        """
        cuda = torch.cuda.get_rng_state() if DEVICE == "cuda" else None
        # of dropout, in each process; clips, captions and masks have streams of their own
        random_states = gather({"torch": torch.get_rng_state(), "cuda": cuda})
        self.save(
            "last.pt", step, self.out / "previous.pt", best=self.best, random=random_states,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
            log=self.log_bytes,  # its length
        )  # fmt: skip


def list_unreadable(errors, what):
    """On stderr: how many files, and the twenty that failed most often."""
    errors = Counter(errors)
    if RANK or not errors:
        return
    print(f"unreadable files, {what}: {len(errors):,}", file=sys.stderr)
    for line, times in errors.most_common(20):
        print(f"  {times}x {line}", file=sys.stderr)
    if len(errors) > 20:
        print("  ...", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Errors in one line


def main(job, given):
    """Run a script's job; an error that the user can mend ends in one line and exit code 2.

    --debug shows the traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside of steps, as Ctrl-C
    try:
        join_processes()
        job(given)
        if PROCESSES > 1:
            dist.destroy_process_group()
        return
    except BaseException as error:
        if given.get("debug"):
            raise
        traceback.clear_frames(error.__traceback__)  # they held the data loader, whose workers end now
        message, code = explain(error)
        if not message:
            raise
    print(message, file=sys.stderr)
    sys.exit(code)


def explain(error):
    """The line to print and the exit code; ("", 1) if it is no error that the user can mend."""
    text = str(error).strip()
    if isinstance(error, KeyboardInterrupt):
        if error.args:  # a step was finished and saved: Training.end_step
            return error.args[1], 128 + error.args[0]
        return "stopped: --resume goes on from the last checkpoint, if there is one", 130
    # in the words of CUDA, cuDNN and cuBLAS
    if isinstance(error, RuntimeError) and re.search(r"out of memory|ALLOC\w*_FAILED", text):
        return ("error: out of GPU memory: halve --batch_size and double --grad_accum (the same "
                "update), or lower --size (other numbers)"), 2  # fmt: skip
    if re.search("Bus error|shared memory|file </torch_", text):  # where workers put their batches
        return ("error: /dev/shm is full: start Docker with --shm-size 8g or --ipc=host, or use "
                "--workers 0; --resume goes on from the last checkpoint"), 2  # fmt: skip
    # a data loader's worker that died: torch says so, or the pipe to it breaks first
    if "DataLoader worker (pid" in text or isinstance(error, ConnectionError | EOFError):
        return ("error: a data loader's worker was killed, perhaps for memory: try fewer "
                "--workers; --resume goes on from the last checkpoint"), 2  # fmt: skip
    if isinstance(error, ValueError | OSError):
        if text.startswith("Caught "):  # raised by a worker: the last line, behind the traceback
            text = text.splitlines()[-1].split(": ", 1)[-1]
        return f"error: {' '.join(text.split())}", 2
    return "", 1
