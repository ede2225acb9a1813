"""ClipBERT: a ResNet and a BERT trained end to end on a few randomly sampled clips per video.

    Less is More: ClipBERT for Video-and-Language Learning via Sparse Sampling
    Lei, Li, Zhou, Gan, Berg, Bansal, Liu. CVPR 2021. https://arxiv.org/abs/2102.06183

Read this file beside section 3 of the paper, top to bottom:

    c_i       a clip: T frames out of about one second of video      (B, T, 3, L, L)    pixels 0..255
    F_v(c_i)  ResNet-50, grid encoder, mean over T, 2-D positions    (B, h*w, d)        GridFeatures, VisualEmbedding
    F_l(S)    word + position + type embeddings                      (B, Lt, d)         BERT's own
    H         a 12-layer BERT over [text tokens; grid tokens]        (B, Lt + h*w, d)   VideoTextEncoder.fuse
    p_i = H(F_v(c_i), F_l(S))                                        (B, K)             ClipBert.forward, clip_logits
    p = G(p_1, ..., p_N)                                             (B, K)             aggregate_clips
    loss = NLL(p, q)                                                 scalar             video_loss

B videos, N clips of T frames of L x L pixels, n texts a video (options or captions; with one text, B*n is B), Lt text
tokens, an h x w grid (h = w = L / 64; tiny: L / 16), d hidden units, K scores, q the right answer.

The optimizer and its learning rate follow. There, at a line of #, the paper's part ends; the rest serves both scripts.
"""

import errno
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from tqdm import tqdm
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertPreTrainingHeads

# ----------------------------------------------------------------------------------------------------------------------
# Configuration

# name -> (residual block, blocks in each stage res2..res5); "tiny" stops after res3, see GridFeatures.
BACKBONES = {
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),  # lighter; not in the paper
    "tiny": (BasicBlock, (1, 1)),
}


@dataclass
class ClipBertConfig:
    """Every size of the model. The defaults are `base()`: the paper's model."""

    backbone: str = "resnet50"  # a key of BACKBONES
    frozen_stages: int = 2  # 0: none; 1: the stem; 2: stem and res2, as in the paper's code
    caffe_strides: bool = False  # True: a stage's stride sits in its first 1x1 conv; False: in the 3x3 (torchvision)
    bgr: bool = False  # the channel order in which the CNN was pretrained
    pixel_mean: tuple = (123.675, 116.28, 103.53)  # RGB, on the 0..255 scale (ImageNet)
    pixel_std: tuple = (58.395, 57.12, 57.375)
    hidden_size: int = 768  # d
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    dropout: float = 0.1  # embeddings, attention, sublayer outputs, pooled vector; none in the CNN or inside the MLP
    init_std: float = 0.02  # of Linear and Embedding weights
    layer_norm_eps: float = 1e-12

    @property
    def stride(self):
        """Pixels from one grid cell to the next."""
        return 4 * 2 ** len(BACKBONES[self.backbone][1])

    @classmethod
    def base(cls):
        """The paper's model, to start from ImageNet ResNet-50 (torchvision) and bert-base-uncased."""
        return cls()

    @classmethod
    def official(cls):
        """`base()` as the official checkpoint needs it: detectron2's caffe ResNet, BGR pixels minus mean, std 1."""
        return cls(caffe_strides=True, bgr=True, pixel_std=(1.0, 1.0, 1.0))

    @classmethod
    def tiny(cls, vocab_size=30522):
        """A model that learns the toy data from scratch on a laptop CPU in minutes (stride 16: a 4 x 4 grid at L = 64).

        Nothing is frozen (there are no pretrained weights to protect) and there is no dropout (a small model on endless
        random clips does not overfit). Initial scale matters most: with BERT's .02 a 96-wide, 3-layer transformer
        attends uniformly and stays at ln(5) for a long time; 1/sqrt(d) lets attention pick out tokens from step one.
        """
        return cls(
            backbone="tiny", frozen_stages=0, hidden_size=96, layers=3, heads=4, intermediate_size=192,
            vocab_size=vocab_size, dropout=0.0, init_std=96**-0.5,
            pixel_mean=(45.0, 45.0, 45.0), pixel_std=(60.0, 60.0, 60.0),  # of the toy frames, which are mostly dark
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# F_v, the visual encoder (paper, section 3: model architecture): ResNet -> grid encoder -> mean over T -> 2-D positions


class GridFeatures(nn.Module):
    """The CNN half of F_v: pixels to a grid of d-dimensional features, frame by frame.

    Total stride 64: the ResNet's 32, then 2 of the grid encoder's max-pool. The "tiny" backbone stops after res3
    (stride 8, so 16 in all), since a 64-pixel toy frame would otherwise end in a single grid cell.
    """

    chunk = None  # how many frames at a time, when memory is short; None: all of them

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        block, depths = BACKBONES[cfg.backbone]
        resnet = torchvision.models.ResNet(block, (*depths, 1, 1)[:4], norm_layer=FrozenNorm)
        stages = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4][: len(depths)]
        if cfg.caffe_strides:
            for stage in stages[1:]:
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        scale_residual_branches(stages)
        # The trunk under torchvision's own names, without pooling and classes: grid features keep their places.
        names = ["conv1", "bn1", "relu", "maxpool", *(f"layer{i + 1}" for i in range(len(depths)))]
        self.resnet = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in names))
        channels = 64 * 2 ** (len(depths) - 1) * block.expansion  # 2048 of ResNet-50
        self.grid_encoder = nn.Sequential(  # no bias, no norm
            nn.Conv2d(channels, cfg.hidden_size, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(kernel_size=2, stride=2),
            nn.ReLU(),
        )
        frozen = [resnet.conv1, *stages][: cfg.frozen_stages]
        for parameter in (p for module in frozen for p in module.parameters()):
            parameter.requires_grad_(False)  # BatchNorm needs nothing here: FrozenNorm holds only buffers
        mean, std = torch.tensor(cfg.pixel_mean), torch.tensor(cfg.pixel_std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    def normalize(self, frames):
        """(..., 3, L, L) uint8 or float RGB 0..255 -> float, as the CNN was pretrained.

        Frames arrive padded with zeros, so padding becomes -mean/std: the reference pads before it normalises, too.
        """
        pixels = (frames.float() - self.pixel_mean) / self.pixel_std
        return pixels.flip(-3) if self.cfg.bgr else pixels  # the mean is RGB: flip only after subtracting it

    def forward(self, frames):
        """(B, T, 3, L, L) uint8 or float RGB 0..255 -> grid features (B, T, h, w, d).

        In chunks, the backward pass runs each chunk's forward again: only one chunk's activations are in memory.
        """
        features = self.features
        if self.chunk and torch.is_grad_enabled():
            features = partial(checkpoint, self.features, use_reentrant=False, preserve_rng_state=False)
        parts = frames.flatten(0, 1).split(self.chunk or frames.shape[0] * frames.shape[1])
        x = torch.cat([features(part) for part in parts])  # (B*T, h, w, d)
        return x.unflatten(0, frames.shape[:2])

    def features(self, frames):
        """(F, 3, L, L) -> (F, h, w, d). Of the frozen stages autograd keeps nothing, as no input needs a gradient."""
        x = frames.contiguous(memory_format=torch.channels_last)  # the layout that convolutions are fast in
        x = self.resnet(self.normalize(x))  # (F, 2048, L/32, L/32); resnet18: 512 channels; tiny: (F, 128, L/8, L/8)
        return self.grid_encoder(x).permute(0, 2, 3, 1)  # (F, h, w, d)


class FrozenNorm(FrozenBatchNorm2d):
    """A BatchNorm whose statistics and gains never change, as a multiplication and an addition a channel.

        y = s x + (b - s mean),  s = gain / sqrt(variance + eps)

    In x's precision: the float32 buffers would make every activation float32 under autocast, twice the memory.
    """

    def forward(self, x):
        s = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * s
        return x * s.to(x.dtype).view(-1, 1, 1) + shift.to(x.dtype).view(-1, 1, 1)


def scale_residual_branches(stages):
    """Shrink each residual branch's last convolution, for a start without pretrained weights.

    A FrozenBatchNorm without statistics normalises nothing: almost every block of ResNet-50 would double the variance.
    Scaled by 1/sqrt(number of blocks), the branches together add about as much as there was.
    """
    blocks = [block for stage in stages for block in stage]
    for block in blocks:
        last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
        last.weight.data.mul_(len(blocks) ** -0.5)


class VisualEmbedding(nn.Module):
    """Grid features to visual tokens: mean over T, row + column positions, visual type, LayerNorm (paper, section 3).

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

        keep: None, or how many tokens to draw at random (pretraining: 100), the same places for the whole batch. Drawn
        after the positions are added, so a token still knows where it was.
        """
        h, w = grid.shape[2:4]
        if max(h, w) > self.MAX_GRID:
            raise ValueError(f"a grid of {h} x {w} cells, only {self.MAX_GRID} rows and columns: use a smaller size")
        x = grid.mean(1)  # (B, h, w, d): the order of frames within a clip is not seen
        x = x + self.row_position_embeddings.weight[:h, None]  # (h, 1, d)
        x = x + self.col_position_embeddings.weight[:w]  # (w, d)
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
        """BERT's initialisation: N(0, init_std), zero biases. (The grid encoder keeps its convolution's default.)"""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.cfg.init_std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode_frames(self, frames):
        """F_v up to the grid: (B, T, 3, L, L) uint8 or float RGB 0..255 -> (B, T, h, w, d), before the mean over T."""
        return self.cnn(frames)

    def fuse(self, grid, input_ids, attention_mask, keep=None):
        """H(F_v, F_l): BERT over the sequence [text; visual].

        grid (B, T, h, w, d); input_ids, attention_mask (B*n, Lt), 1 is keep, 0 is padding. n texts per video (the
        options of a question, the captions of an image) stand one after the other and share the video's one CNN pass.
        -> all hidden states (B*n, Lt + h*w, d), and the pooled [CLS] vector (B*n, d).
        """
        visual = self.visual_embeddings(grid, keep)  # (B, h*w, d)
        if input_ids.shape[0] % visual.shape[0]:
            raise ValueError(f"{input_ids.shape[0]} texts do not divide among {visual.shape[0]} videos")
        visual = visual.repeat_interleave(input_ids.shape[0] // visual.shape[0], dim=0)  # (B*n, h*w, d)
        text = self.bert.embeddings(input_ids)  # (B*n, Lt, d); text type ids are 0, the visual type has its own table
        # Grid cells over the zero border of a padded frame are not masked: the reference attends to them, too.
        mask = F.pad(attention_mask, (0, visual.shape[1]), value=1)[:, None, None, :]  # the same for all heads, queries
        # Added to the attention scores: after the softmax, exactly 0 of the attention goes to padding.
        mask = torch.zeros_like(mask, dtype=text.dtype).masked_fill(mask == 0, -torch.inf)  # (B*n, 1, 1, Lt + h*w)
        hidden = self.bert.encoder(torch.cat([text, visual], dim=1), attention_mask=mask).last_hidden_state
        return hidden, self.bert.pooler(hidden)


def bert_config(cfg):
    """The same sizes in the words of transformers."""
    return BertConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, intermediate_size=cfg.intermediate_size, hidden_act="gelu",
        hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout, initializer_range=cfg.init_std,
        layer_norm_eps=cfg.layer_norm_eps, attn_implementation="sdpa",
    )  # fmt: skip


class ClipBert(VideoTextEncoder):
    """ClipBERT for a task: [CLS] -> 2-layer MLP -> K scores (paper, section 3; K by task: section 4).

    num_outputs: the number of answers (open-ended QA), 1 per option (multiple choice, counting), 2 (retrieval).
    """

    def __init__(self, cfg, num_outputs):
        super().__init__(cfg)
        self.num_outputs = num_outputs
        self.classifier = nn.Sequential(
            nn.Linear(cfg.hidden_size, 2 * cfg.hidden_size), nn.ReLU(), nn.Linear(2 * cfg.hidden_size, num_outputs)
        )
        self.classifier.apply(self.init_weights)
        # The first loss should be ln(classes) whatever init_std is: no opinion before the first example.
        nn.init.normal_(self.classifier[-1].weight, std=0.02)

    def classify(self, grid, input_ids, attention_mask):
        """grid (B, T, h, w, d), input_ids (B*n, Lt) -> (B*n, num_outputs)."""
        _, pooled = self.fuse(grid, input_ids, attention_mask)
        return self.classifier(self.dropout(pooled))

    def forward(self, frames, input_ids, attention_mask):
        """p_i = H(F_v(c_i), F_l(S)) for one clip of each video (paper, section 3).

        frames (B, T, 3, L, L) uint8 or float RGB 0..255; input_ids, attention_mask (B*n, Lt) -> (B*n, num_outputs).
        With frames (B, N, T, 3, L, L), all clips: (N, B*n, num_outputs), by `clip_logits`. It can be asked for here
        because several processes average only the gradients of what was called as model(...).
        """
        if frames.dim() == 6:
            return clip_logits(self, frames, input_ids, attention_mask)
        return self.classify(self.encode_frames(frames), input_ids, attention_mask)


class ClipBertForPreTraining(VideoTextEncoder):
    """Image-text pretraining (paper, section 3: pretraining): masked language modelling and image-text matching."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cls = BertPreTrainingHeads(bert_config(cfg))
        self.cls.apply(self.init_weights)
        nn.init.normal_(self.cls.seq_relationship.weight, std=0.02)  # no opinion at first, as in ClipBert
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight  # tied, as in BERT
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def forward(self, frames, input_ids, attention_mask, keep=None):
        """frames (B, T, 3, L, L); input_ids, attention_mask (B*n, Lt); keep: grid tokens to draw (training: 100).

        -> MLM scores (B*n, Lt, vocabulary) and ITM scores (B*n, 2); column 1 means "they belong together".
        """
        hidden, pooled = self.fuse(self.encode_frames(frames), input_ids, attention_mask, keep)
        return self.cls(hidden[:, : input_ids.shape[1]], pooled)


# ----------------------------------------------------------------------------------------------------------------------
# From clips to a video (paper, section 3: sparse sampling): p_i, G and the losses


def clip_logits(model, frames, input_ids, attention_mask):
    """p_1 ... p_N of every video.

    frames (B, N, T, 3, L, L); input_ids, attention_mask (B*n, Lt) -> (N, B*n, K). All clips go through the CNN at once,
    and each clip only once, however many texts there are.
    """
    B, N = frames.shape[:2]
    n, Lt = input_ids.shape[0] // B, input_ids.shape[1]
    grid = model.encode_frames(frames.flatten(0, 1))  # (B*N, T, h, w, d)
    ids, mask = (x.view(B, 1, n, Lt).expand(B, N, n, Lt).reshape(-1, Lt) for x in (input_ids, attention_mask))
    logits = model.classify(grid, ids, mask)  # (B*N*n, K)
    return logits.view(B, N, n, -1).transpose(0, 1).reshape(N, B * n, -1)


def aggregate_clips(logits, how):
    """G, the one place where clips become a video (paper, section 3; compared in section 4).

        mean:  p = 1/N sum_i p_i          max:  p = max_i p_i          lse:  p = log sum_i exp(p_i)

    logits (N, B, K) -> (B, K). With lse, cross_entropy(p, y) is the reference's log-sum-exp over clips and labels minus
    the one over clips of the true label. how: "mean" | "max" | "lse".
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

        choice   p (B*n, 1) scores of n options each, target (B,) index of the right one: cross entropy over the options
        answer   p (B, K) scores of all answers, target (B,) index: cross entropy
        soft     p (B, K), target (B, K) in 0..1 (VQA): binary cross entropy, times K (so: summed over the answers)
        match    p (B*n, 2), target (B*n,) 1 for a video's own caption: cross entropy (retrieval)
        rank     p (B*n, 1), each video's own caption first: `rank_loss` (retrieval)
        count    p (B, 1), target (B,): squared error
    """
    if kind == "choice":
        return F.cross_entropy(p.view(len(target), -1), target)
    if kind in ("answer", "match"):
        return F.cross_entropy(p, target)
    if kind == "count":
        return F.mse_loss(p.squeeze(1), target.float())
    if kind == "soft":
        target = F.pad(target, (0, p.shape[1] - target.shape[1]))  # outputs beyond the list of answers are never right
        return F.binary_cross_entropy_with_logits(p, target) * p.shape[1]
    if kind == "rank":
        return rank_loss(p.squeeze(1), target)
    raise ValueError(f"unknown kind of answer {kind!r}")


def rank_loss(p, target, margin=0.2):
    """Rank a video's own caption above wrong ones by a margin.

        loss = mean of max(0, margin + sigmoid(p_wrong) - sigmoid(p_own))

    p, target (B*n,): 1 for a video's own caption, then 0 for wrong ones.
    """
    scores = p.sigmoid()
    own = (torch.arange(len(p), device=p.device) * target).cummax(0).values  # where each row's own caption is
    excess = (margin + scores - scores[own]).clamp(min=0) * (1 - target)
    return excess.sum() / (1 - target).sum()  # all on the device: nothing waits for a number


def match_score(p):
    """How well a caption fits a video, 0..1: p (B, 2) or, of the rank loss, (B, 1) -> (B,)."""
    return p.softmax(1)[:, 1] if p.shape[1] == 2 else p.sigmoid()[:, 0]


def mlm_loss(scores, labels, over="masked", text_length=30):
    """Masked language modelling (paper, section 3): the masked words M from the other words and the image v.

        L_MLM = -1/|M| sum_{m in M} log P(w_m | w_{not M}, v)

    scores (B, Lt, vocabulary); labels (B, Lt), -100 where no word is masked. over="all" divides by B * text_length
    instead, as the reference does, which pads each text to 30 tokens and averages over all of them. With 15% masked,
    only some 6% of those positions count, so that is the same loss with a weight of about .06 beside ITM's 1.
    Mismatched pairs take part, too: there the words alone must do.
    """
    total = F.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    if over == "all":
        return total / (len(labels) * text_length)
    if over == "masked":
        return total / (labels != -100).sum().clamp(min=1)  # a batch without masked words: 0, not 0/0
    raise ValueError(f"unknown average {over!r}: choose masked or all")


def itm_loss(scores, labels):
    """Image-text matching (paper, section 3): y = 1 if caption S and image v belong together, 0 if S is another's.

        L_ITM = -log P(y | S, v)

    scores (B, 2), labels (B,).
    """
    return F.cross_entropy(scores.float(), labels)


# ----------------------------------------------------------------------------------------------------------------------
# Optimisation (paper, section 4): AdamW without decay on biases and LayerNorm; linear warm-up, then linear decay


def optimizer_groups(model, weight_decay):
    """Two groups of trainable parameters: decayed, and biases + LayerNorm, which are not."""
    decayed, others = [], []
    for name, p in model.named_parameters():  # a tied weight once
        if p.requires_grad:
            (others if name.endswith("bias") or "LayerNorm" in name else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(model, weight_decay=1e-3):
    """AdamW with the reference's betas. Learning rate and eps are set at every step, by `set_step`."""
    return torch.optim.AdamW(optimizer_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.98), fused=True)


ADAM_EPS = 1e-6  # the reference's


def set_step(optimizer, step, lr):
    """What an update depends on besides the gradients: its learning rate, and an eps that makes it the reference's.

        update = lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps / sqrt(1 - b2^t)),  t = step = 1, 2, ...

    The reference adds eps to sqrt(v) before the bias correction, torch after it: so torch gets eps / sqrt(1 - b2^t),
    seven times eps in the first step. Training then follows the reference's to six digits, losses and weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["eps"] = ADAM_EPS / math.sqrt(1 - group["betas"][1] ** step)


def learning_rate(step, total_steps, peak, warmup_ratio=0.1):
    """Linear from 0 to `peak` over the first warmup_ratio of the steps, then linear to 0 at total_steps.

        peak * step / warmup    if step < warmup, else    peak * (total_steps - step) / (total_steps - warmup)

    step counts from 1 (the first update). Never exactly 0: the reference keeps 1e-8, so that no step is in vain.
    """
    warmup = int(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step / warmup) or 1e-8
    return peak * (max(total_steps - step, 0) / max(total_steps - warmup, 1)) or 1e-8


########################################################################################################################
# Here the paper's part ends. What follows serves both scripts: weights and checkpoints, and all that surrounds a
# training loop (flags, several GPUs, the log, how a run stops and goes on, errors).
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Weights in, checkpoints out


class LoadReport(NamedTuple):
    """What became of every tensor."""

    loaded: list  # names in the model that now hold a value of the file
    missing: list  # names in the model that the file has no value for: they keep their initial values
    unexpected: list  # names in the file that the model has no place for
    unused: list  # names in the file that are known leftovers (detectron2's detection heads)
    mismatched: list  # "name: shape in the file, shape in the model": not loaded

    def __str__(self):
        counts = ", ".join(f"{len(value)} {name}" for name, value in self._asdict().items() if value)
        names = [f"  {k}: {', '.join(v[:6])}{', ...' if len(v) > 6 else ''}"
                 for k, v in self._asdict().items() if v and k not in ("loaded", "unused")]  # fmt: skip
        return "\n".join([f"weights: {counts}", *names])


def copy_weights(model, tensors, unused=()):
    """Copy {name: tensor} into the model, checking every shape. -> LoadReport; ValueError if not one tensor fits."""
    own = model.state_dict(keep_vars=True)
    report = LoadReport([], [], [], list(unused), [])
    with torch.no_grad():
        for name, value in tensors.items():
            if name not in own:
                report.unexpected.append(name)
            elif own[name].shape != value.shape:
                report.mismatched.append(f"{name}: {tuple(value.shape)}, {tuple(own[name].shape)}")
            else:
                own[name].copy_(value)
                report.loaded.append(name)
    report.missing.extend(name for name in own if name not in tensors)
    if not report.loaded:
        raise ValueError(f"no tensor of this file fits the model (the file has {', '.join(list(tensors)[:3])} ...)")
    return report


def official_name(name):
    """A key of the official checkpoint -> the name in this model; None for leftovers that its forward never used."""
    if name.startswith(("cnn.feature.proposal_generator.", "cnn.feature.roi_heads.")):
        return None  # detectron2's region proposals and detection heads
    if name == "transformer.bert.visual_embeddings.position_embeddings.weight":
        return None  # one-dimensional positions that the 2-D ones replaced
    if name.startswith("cnn.feature.backbone."):
        name = name.removeprefix("cnn.feature.backbone.").removeprefix("stem.")
        for stage in (2, 3, 4, 5):
            name = name.replace(f"res{stage}.", f"layer{stage - 1}.")
        name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        for i in (1, 2, 3):
            name = name.replace(f"conv{i}.norm.", f"bn{i}.")
        return "cnn.resnet." + name
    name = name.replace("transformer.bert.visual_embeddings.", "visual_embeddings.")
    return name.removeprefix("transformer.")  # bert.*, classifier.*, cls.*; cnn.grid_encoder.* keeps its name


def load_official_checkpoint(model, checkpoint):
    """Copy the official checkpoint (a flat state dict of 495 keys, or its path) into a model. -> LoadReport.

    Build the model with `ClipBertConfig.official()`: these weights expect BGR pixels and caffe strides.
    """
    tensors = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    backbone = any(name.startswith("cnn.feature.backbone.") for name in tensors)
    if backbone and not (model.cfg.caffe_strides and model.cfg.bgr):
        warnings.warn("official weights in a model that was not built with ClipBertConfig.official()", stacklevel=2)
    names = {name: official_name(name) for name in tensors}
    return copy_weights(
        model,
        {new: tensors[name] for name, new in names.items() if new is not None},
        unused=[name for name, new in names.items() if new is None],
    )


def start_model(build, args, text_vocabulary, bert_vocabulary):
    """A new model and its vocabulary: from --init, from ImageNet and BERT, or at random (both scripts' flags).

    build: config -> model. text_vocabulary(), bert_vocabulary(): lists of tokens, made only if they are needed.
    """
    state = load_checkpoint(args.init) if args.init else None
    if state and args.model == ("base" if "config" in state and config_from(state).backbone == "tiny" else "tiny"):
        raise ValueError(f"{args.init}: not a checkpoint of the {args.model} model; leave out --model {args.model}")
    if state and args.backbone not in (None, config_from(state).backbone if "config" in state else "resnet50"):
        raise ValueError(f"{args.init}: not a checkpoint on {args.backbone}; leave out --backbone {args.backbone}")
    base = replace(ClipBertConfig.base(), backbone=args.backbone or "resnet50")
    if state and "config" in state:  # a checkpoint of ours brings its own sizes and vocabulary
        model, vocabulary = build(config_from(state)), state["vocabulary"]
        print(f"{args.init}: {copy_weights(model, state['model'])}")
    elif state:
        model = build(ClipBertConfig.official())
        print(f"{args.init}: {load_official_checkpoint(model, state)}")
        vocabulary = bert_vocabulary()
    elif args.model == "base" and not args.scratch:
        model = build(base)
        print(load_pretrained(model, args.resnet, args.bert))
        vocabulary = bert_vocabulary()
    else:
        vocabulary = text_vocabulary()
        cfg = base if args.model == "base" else ClipBertConfig.tiny()
        model = build(replace(cfg, vocab_size=len(vocabulary), frozen_stages=0))  # random weights: nothing to protect
    return model, vocabulary


def load_pretrained(model, resnet=None, bert=None):
    """Start `base()` from an ImageNet ResNet and bert-base-uncased, as the paper does before its own pretraining.

    resnet: torchvision's state-dict file; bert: a folder with config.json and weights; None: the hub's. -> LoadReport.
    """
    try:
        if resnet:
            cnn = load_checkpoint(resnet)
        else:
            cnn = torchvision.models.get_model(model.cfg.backbone, weights="IMAGENET1K_V1").state_dict()
        language = BertModel.from_pretrained(bert or "bert-base-uncased", add_pooling_layer=True).state_dict()
    except Exception as error:  # the hub raises a dozen kinds of network errors; the remedy is one and the same
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(
            f"no starting weights ({reason}). Choose: "
            f"--resnet FILE (torchvision's {model.cfg.backbone}-*.pth) and --bert DIR (a bert-base-uncased folder) "
            "where there is no network; --init CKPT (a ClipBERT checkpoint); --scratch (random weights); --model tiny"
        ) from error
    cnn = {f"cnn.resnet.{k}": v for k, v in cnn.items() if not k.startswith("fc.") and "num_batches" not in k}
    report = copy_weights(model, cnn | {f"bert.{k}": v for k, v in language.items()})
    if any(name.startswith("cnn.") for name in report.mismatched + report.unexpected):
        raise ValueError(f"{resnet}: not a {model.cfg.backbone}; give torchvision's {model.cfg.backbone}-*.pth")
    return report


@contextmanager
def whole_file(path, previous=None):
    """A file, open for writing, that takes the place of `path` when it is complete: flushed, then renamed.

    previous: where the file that it replaces is kept. Whenever the process dies, one of the two is there and whole.
    An OSError names the file and leaves the old one in place.
    """
    temporary = f"{path}.tmp"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the disk may be gone altogether
            os.unlink(temporary)
        # torch.save wraps what was raised inside it: by the disk, a signal, or the news of a dead worker
        cause = (isinstance(error, RuntimeError) and error.__context__) or error
        if not isinstance(cause, OSError):
            raise cause from None
        raise OSError(f"{path}: not written ({cause.strerror or cause}): make room or choose another --out; what was "
                      "saved before is still there, and --resume goes on from it") from error  # fmt: skip


def save_checkpoint(path, state, previous=None):
    """Tensors and plain values, by the first process."""
    if RANK:
        return
    with whole_file(path, previous) as file:
        torch.save(state, file)


def write_text(path, text):
    if RANK:
        return
    with whole_file(path) as file:
        file.write(text.encode())


def load_checkpoint(path):
    """Read tensors and plain values only (weights_only): a stranger's file can't run code."""
    try:
        with warnings.catch_warnings():  # of an odd pickle; what matters is said below
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: no such checkpoint ({error.strerror}); give a file that training wrote") from None
    except Exception as error:  # noqa: BLE001 - unpickling a stranger's bytes can raise anything
        raise ValueError(
            f"{path}: not a whole checkpoint of tensors and plain values ({type(error).__name__}). Code in a pickle "
            "never runs: copy the file again, or have its state dict saved alone"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a checkpoint's named values")  # noqa: TRY004
    return state


def load_stopped(args, task):
    """--resume: the newest whole checkpoint in args.out. Its seed and --blind are also the resumed run's."""
    problems = []
    for path in (args.out / "last.pt", args.out / "previous.pt"):
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if "optimizer" not in state:
            raise ValueError(f"{path}: holds no optimizer, so it can't go on; start from it with --init")
        for problem in problems:
            print(f"note: {problem}; taking the one before it")
        if state.get("task") != task:
            raise ValueError(f"{path}: a checkpoint of {state.get('task')}, which can't go on as {task}")
        args.seed, args.blind = state["seed"], state["blind"]
        print(f"resuming from {path}, step {state['step']}")
        return state
    raise ValueError(f"{problems[0]}: nothing to go on from; start anew without --resume")


def config_from(state):
    """The ClipBertConfig that a checkpoint of ours was made with."""
    try:
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()}
        return replace(ClipBertConfig(), **config)
    except (AttributeError, TypeError):
        raise ValueError("the checkpoint's config is not one of ClipBERT's; give one that our training wrote") from None


# ----------------------------------------------------------------------------------------------------------------------
# What the two scripts share: flags, several GPUs, the device, the log, one training run, errors in one line

# -------------------------------------------------- flags
def add_flags(parser):
    """The flags that fine-tuning and pretraining have in common. Hyper-parameters default to the script's settings.

    parser: a data.Parser, whose numbers() refuses what is out of range.
    """
    add, numbers = parser.add_argument, parser.numbers
    # which model, and what it starts from
    add("--model", choices=["tiny", "base"], help="default: tiny; with --init, the checkpoint's")
    add("--backbone", choices=["resnet50", "resnet18"], help="base: the CNN (default: resnet50, the paper's)")
    add("--init", type=Path, metavar="CKPT", help="start from this checkpoint, ours or the official one")
    add("--resnet", type=Path, metavar="FILE", help="base: torchvision's weights of it (default: the hub's)")
    add("--bert", type=Path, metavar="DIR", help="base: a bert-base-uncased folder (default: the hub's)")
    add("--scratch", action="store_true", help="base: start from random weights")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in the output folder")
    # hyper-parameters; those in force are printed at the start
    numbers("--size", low=16, high=64 * VisualEmbedding.MAX_GRID)
    numbers("--frames", high=256)
    numbers("--text_length", low=3, high=512)  # [CLS], a word, [SEP]; as many as BERT has positions for
    numbers("--batch_size", "--grad_accum", "--epochs")
    numbers("--fps", kind=float, low=0.001, high=1000)
    numbers("--lr", "--weight_decay", kind=float, low=0, high=1)
    numbers("--clip_grad", kind=float, low=1e-6)
    numbers("--max_steps", help="stop the schedule after so many updates, whatever --epochs says")
    add("--blind", action="store_true", help="zero all frames: what can be guessed from the text alone?")
    numbers("--limit", help="use only the first so many examples or images of each split")
    add("--precision", choices=["bf16", "fp16", "fp32"], help="default: bf16 or fp16 on a GPU, fp32 on a CPU")
    numbers("--chunk", metavar="FRAMES", help="short of memory: pass so many frames through the CNN at a time, and "
            "again when their gradient is due (activation checkpointing)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the CNN and the transformer: slow to start, then faster")
    numbers("--workers", low=0, high=256, help="processes that read videos (default: 0 on a CPU, else one a core, "
            "at most 8)")  # fmt: skip
    numbers("--save_every", default=500, help="steps between checkpoints")
    numbers("--seed", low=0, high=2**32 - 1, default=0)
    add("--debug", action="store_true", help="show the traceback of an error")


def check_flags(parser, args):
    """Flags that can't be meant together."""
    if sum(map(bool, (args.init, args.resume, args.eval))) > 1:
        parser.error("--init, --resume and --eval exclude each other; choose one")
    base = args.model == "base"
    if not base and (args.backbone or args.resnet or args.scratch or args.bert and not args.init):
        parser.error("--backbone, --resnet, --bert and --scratch are for --model base; add that, or leave them out")


def override(settings, args, cfg):
    """The settings with the command line's values; cfg: of the model that must be able to take them."""
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    if "epochs" in given:
        settings = settings | {"max_steps": None}  # asked for in epochs: a number of steps does not apply
    args.settings = settings = settings | given  # where an out-of-memory message starts from
    largest = VisualEmbedding.MAX_GRID * cfg.stride
    if not cfg.stride <= settings["size"] <= largest:
        raise ValueError(f"--size {settings['size']}: this model's grid takes {cfg.stride} to {largest} pixels")
    return settings


# -------------------------------------------------- several GPUs
# `torchrun --nproc_per_node=K SCRIPT ...` starts K processes and numbers them. Each has the whole model
# and takes every K-th batch; backward averages the gradients over them (DistributedDataParallel), so that K processes
# do what one does with K times the --grad_accum. All of them evaluate; the first one prints and writes.
RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def join_processes():
    """Meet the other processes, if there are any; all but the first one fall silent."""
    if PROCESSES > 1:
        gpu, place = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
        if gpu and place >= torch.cuda.device_count():
            raise ValueError(f"{torch.cuda.device_count()} GPUs: --nproc_per_node can't be more, one process each")
        if gpu:
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1))
        if RANK:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for good


@contextmanager
def first_one_first():
    """The others wait: there may be toy data to write, or weights to download."""
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


# -------------------------------------------------- the device
class Device(NamedTuple):
    """Where and how precisely to compute."""

    name: str  # "cuda" | "cpu"
    dtype: torch.dtype  # of the forward pass under autocast; weights stay float32
    workers: int
    chunk: int | None = None  # frames that go through the CNN at a time
    compile: bool = False

    def autocast(self):
        return torch.autocast(self.name, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def place(self, model):
        """The model to the device. The tiny one gets a single CPU thread: its operations are so small that two threads
        mostly wait for each other (on a busy machine: four times the CPU time, five times the wall time)."""
        if self.name == "cpu" and model.cfg.backbone == "tiny":
            torch.set_num_threads(1)
        model.cnn.chunk = self.chunk
        if self.compile:  # in place: the names in a checkpoint stay
            model.cnn.compile()
            model.bert.encoder.compile()
        return model.to(self.name)

    def move(self, batch):
        """Tensors to the device; frames stay uint8 until they are there, a quarter of the bytes."""
        return {k: v.to(self.name, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def scaler(self):
        """fp16: loss scaling. Otherwise a constant 1, for the other thing that a GradScaler does: an update whose
        gradients are not finite is skipped on the device, so the weights survive until the loss is next looked at."""
        constant = {} if self.dtype == torch.float16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
        return torch.amp.GradScaler(self.name, **constant)


def choose_device(args):
    """A GPU if there is one, with the fastest precision that it is good at; --precision and --workers overrule."""
    gpu = torch.cuda.is_available()
    best = "fp32" if not gpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = args.precision or best
    if precision == "fp16" and not gpu:
        raise ValueError("--precision fp16 needs a GPU: choose fp32 or bf16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # for each of this machine's processes
    workers = args.workers if args.workers is not None else min(8, cores) if gpu else 0
    return Device("cuda" if gpu else "cpu", dtype, workers, args.chunk, args.compile)


# -------------------------------------------------- the log
class Log:
    """log.jsonl: a line a step or evaluation."""

    def __init__(self, path, start):
        """start: the step to go on from. The lines of later steps, which will be done again, are dropped."""
        lines = path.read_text().splitlines() if start and path.exists() else []
        kept = [line for line in lines if logged_step(line) <= start]
        write_text(path, "".join(line + "\n" for line in kept))
        self.path = path

    def write(self, *rows):
        """Whole lines in one system call: a kill comes before or after it."""
        if RANK:
            return
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(lines) < len(lines):  # a disk that is full in the middle of a line
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(f"{self.path}: not written ({error.strerror}): make room, then --resume") from error


def logged_step(line):
    """The step that a line of the log is about."""
    try:
        return json.loads(line)["step"]
    except ValueError:  # half a line, as a power cut may leave it
        return math.inf


def mean_row(rows):
    """One line of the log from every process's."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} | {"step": int(rows[0]["step"])}


# -------------------------------------------------- a training run
class Interrupted(KeyboardInterrupt):
    """(signal number, a message that says how to go on)"""


def stop_now(number, _):
    """A signal's handler where there is no step to finish."""
    raise Interrupted(number, "stopped: --resume goes on from the last checkpoint, if there is one")


class Training:
    """What surrounds both scripts' loops: AdamW, the log, checkpoints, and how a run stops and goes on.

    with Training(...) as training:                     inside, Ctrl-C and SIGTERM wait for the end of the step
        for step in training.steps():
            for batch in training.batches(loader):      grad_accum of them
                ... training.forward(...) ...
                training.scaler.scale(loss).backward()
            training.update(step, loss=...)             one update; logged
            training.end_step(step)                     last.pt, if it is time
    """

    def __init__(self, args, run, model, n_examples, stopped, **contents):
        """n_examples: in an epoch. stopped: the checkpoint to go on from, or None. contents: of the script's own, for
        its checkpoints."""
        self.model, self.run, self.out, self.save_every, s = model, run, args.out, args.save_every, run.settings
        self.per_step = s["batch_size"] * s["grad_accum"] * PROCESSES  # examples to an update
        self.n_examples = n_examples
        self.total_steps = s["max_steps"] or -(-s["epochs"] * n_examples // self.per_step)
        self.contents = contents | {"seed": run.seed, "blind": run.blind, "settings": s,
                                    "config": asdict(model.cfg)}  # fmt: skip
        config = {name: value for name, value in self.contents.items() if name not in ("vocabulary", "answers")} | {
            "init": str(args.init or ""), "device": run.device.name, "precision": str(run.device.dtype).split(".")[1],
            "total_steps": self.total_steps,
        }  # fmt: skip
        write_text(self.out / "config.json", json.dumps(config, indent=2) + "\n")
        run.device.place(model)
        self.optimizer = build_optimizer(model, s["weight_decay"])
        self.scaler = run.device.scaler()
        self.start, self.best = 0, -math.inf  # the step to go on from; the highest validation score so far
        if RANK:
            torch.manual_seed(run.seed + 1_000_003 * RANK)  # the same model, but each process its own dropout
        self.saved = bool(stopped)  # whether the folder's checkpoints are this run's
        if stopped:
            self.restore(stopped)
        self.forward = nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model
        self.log, self.waiting, self.unreadable = Log(self.out / "log.jsonl", self.start), [], Counter()
        self.signal, self.began = 0, time.time()

    def restore(self, state):
        self.start, self.best = state["step"], state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]["growth_interval"] == self.scaler.get_growth_interval():  # else another --precision
            self.scaler.load_state_dict(state["scaler"])
        if RANK < len(state["random"]):  # the stopped run may have had fewer processes
            own = state["random"][RANK]
            torch.set_rng_state(own["torch"])
            if torch.cuda.is_available() and own["cuda"] is not None:
                torch.cuda.set_rng_state(own["cuda"])

    def summary(self, unit):
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        settings = ", ".join(f"{name} {value}" for name, value in self.run.settings.items() if value is not None)
        return (f"{parameters:.1f}M parameters, {self.total_steps:,} steps of {self.per_step} {unit} on "
                f"{self.run.device.name}: {settings}")  # fmt: skip

    def list_unreadable(self):
        list_unreadable(sum(gather(self.unreadable), Counter()), "replaced by other examples in training")

    def steps(self):
        """start + 1, ..., total_steps, with a progress bar."""
        self.progress = tqdm(
            range(self.start + 1, self.total_steps + 1), initial=self.start, total=self.total_steps, unit="step",
            disable=True if RANK else None,
        )  # fmt: skip
        return self.progress

    def batches(self, loader):
        """The next grad_accum batches, on the device."""
        n = self.run.settings["grad_accum"]
        for i in range(n):
            self.forward.require_backward_grad_sync = i == n - 1  # else as in DDP's no_sync()
            batch = self.run.device.move(next(loader))
            self.unreadable.update(line for lines in batch["unreadable"] for line in lines)
            yield batch

    def update(self, step, **losses):
        """An update by the gradients so far, with the step's learning rate; and a line of the log, some time later."""
        lr = learning_rate(step, self.total_steps, self.run.settings["lr"])
        set_step(self.optimizer, step, lr)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.settings["clip_grad"])
        self.scaler.step(self.optimizer)  # skips the update if a gradient is not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.waiting.append({"step": step, **losses, "lr": lr, "grad_norm": norm})
        if step % 10 == 0 or step == self.total_steps:  # reading a number off the GPU waits for it: not at every step
            self.flush()

    def flush(self):
        """Log the waiting steps. If one was not finite, the run ends here."""
        rows = [{name: float(value) for name, value in row.items()} for row in self.waiting]
        self.waiting = []
        rows = [mean_row(same) for same in zip(*gather(rows), strict=True)]
        self.log.write(*rows)
        for row in rows:
            overflow = self.run.device.dtype == torch.float16 and math.isfinite(row["loss"])  # the scaler sees to it
            if not math.isfinite(row["loss"] + row["grad_norm"]) and not overflow:
                self.stop_at_nonfinite(row)
        if rows:
            rate = (rows[-1]["step"] - self.start) * self.per_step / (time.time() - self.began)
            loss = sum(row["loss"] for row in rows) / len(rows)
            self.progress.set_postfix(loss=f"{loss:.3f}", lr=f"{rows[-1]['lr']:.1e}", examples_per_s=f"{rate:.0f}")

    def stop_at_nonfinite(self, row):
        """Save what is needed to look into it: the step, its examples, and weights that are still finite."""
        path = self.out / "nonfinite.pt"
        self.save(path.name, row["step"], examples=self.examples_of(row["step"]))
        raise ValueError(
            f"the loss is {row['loss']} (gradient norm {row['grad_norm']}) at step {row['step']}: try a lower --lr, or "
            f"--precision fp32 or bf16. Its examples and the weights are in {path}; --resume goes on from before"
        )

    def save(self, name, step, previous=None, **more):
        contents = self.contents | {"step": step, "model": self.model.state_dict(), **more}
        save_checkpoint(self.out / name, contents, previous)

    def save_best(self, step, score):
        if score > self.best:
            self.best = score
            self.save("best.pt", step)

    def ends_epoch(self, step):
        """Whether the examples of this step are an epoch's last ones, or the run's."""
        epochs = [n * self.per_step // self.n_examples for n in (step - 1, step)]
        return epochs[0] < epochs[1] or step == self.total_steps

    def due(self, step):
        return step % self.save_every == 0 or step == self.total_steps

    def end_step(self, step):
        """A checkpoint if one is due, or if a signal came: then the run ends here."""
        number = self.signal
        if PROCESSES > 1:  # they must agree on a step to stop at: they ask each other now and then
            number = max(gather(number)) if step % 10 == 0 else 0
        if self.due(step) or number:
            self.flush()
            self.checkpoint(step)
        if number:
            raise Interrupted(number, f"{signal.Signals(number).name} after step {step} of {self.total_steps}, "
                                      "which is saved: the same command with --resume goes on from there")  # fmt: skip

    def checkpoint(self, step):
        """last.pt, with all that a resumed run needs to repeat the uninterrupted one; the last but one is kept."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        random_states = {"torch": torch.get_rng_state(), "cuda": cuda}  # dropout's; clips and masks have own seeds
        previous = self.out / "previous.pt"
        self.save("last.pt", step, previous, best=self.best, optimizer=self.optimizer.state_dict(),
                  scaler=self.scaler.state_dict(), random=gather(random_states))  # fmt: skip
        if not self.saved:
            previous.unlink(missing_ok=True)  # another run's
        self.saved = True

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, _):
        if self.signal:
            stop_now(number, _)  # a second time: not even the step is finished
        self.signal = number


def list_unreadable(errors, what):
    """On stderr: how many files, and the twenty that failed most often."""
    errors = Counter(errors)
    if RANK or not errors:
        return
    print(f"unreadable files, {what}: {len(errors):,}", file=sys.stderr)
    for line, times in errors.most_common(20):
        print(f"  {times}x {line}", file=sys.stderr)


# -------------------------------------------------- errors in one line
def less_memory(settings, chunk):
    """What to run with instead, cheapest first: settings in force -> a sentence of flags."""
    batch, accum, size = (settings[name] for name in ("batch_size", "grad_accum", "size"))
    smaller = max((b for b in range(1, batch // 2 + 1) if batch * accum % b == 0), default=None)
    frames = batch * settings["frames"] * settings.get("train_clips", 1)  # in one pass of the CNN
    fewer = min(chunk or frames, frames, 32) // 2
    choices = [
        smaller and f"--batch_size {smaller} --grad_accum {batch * accum // smaller} (the same update)",
        fewer and f"--chunk {fewer} (the same numbers; a third more work for the CNN)",
        size >= 128 and f"--size {size * 3 // 4 // 64 * 64} (fewer pixels: other numbers)",
    ]
    return "Try, in this order or together: " + "; ".join(choice for choice in choices if choice)


def main(job, args):
    """Run a script's job; an error that the user can mend ends in one line and exit code 2 (--debug: the traceback)."""
    signal.signal(signal.SIGTERM, stop_now)
    try:
        join_processes()
        job(args)
        if PROCESSES > 1:
            dist.destroy_process_group()
        return
    except BaseException as error:
        if args.debug:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the data loader, which now ends its workers
        message, code = explain(error, args)
        if not message:
            raise
    print(message, file=sys.stderr)
    sys.exit(code)


def explain(error, args):
    """The line to print and the exit code; ("", 1) if it is no error that the user can mend."""
    if isinstance(error, KeyboardInterrupt):
        number, message = error.args or (signal.SIGINT, "stopped: --resume goes on from the last checkpoint, if any")
        return message, 128 + number
    if isinstance(error, torch.OutOfMemoryError):
        return f"error: out of GPU memory. {less_memory(args.settings, args.chunk)}", 2
    # a data loader's worker that died: torch says so, or the pipe to it breaks first
    if "DataLoader worker (pid" in str(error) or isinstance(error, ConnectionError | EOFError):
        return ("error: a data loader's worker was killed, perhaps for memory: try fewer --workers; --resume goes on "
                "from the last checkpoint"), 2  # fmt: skip
    if isinstance(error, ValueError | OSError):
        return f"error: {one_line(error)}", 2
    return "", 1


def one_line(error):
    """Its message; of one that a data loader's worker raised, the last line, behind the traceback."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return " ".join(text.split())
