"""Solutions of the exercises that are as right as the project's own, but written in another way. test_assignment.py
puts them in place: the tests must accept them, and must refuse what its list of mistakes makes of them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def sample_clips(num_frames, fps, n_clips, n_frames, target_fps, train, generator=None):
    length = n_frames * fps / target_fps
    free = num_frames - length if length < num_frames else 0.0
    if train:
        start = torch.rand(n_clips, 1, generator=generator).double() * free
    elif n_clips == 1:
        start = torch.full((1, 1), free / 2, dtype=torch.float64)
    else:
        start = torch.arange(n_clips).double()[:, None] * free / n_clips
    steps = torch.arange(n_frames).double()
    if n_frames > 1 and length > 1:
        steps = (length - 1) * steps / (n_frames - 1)
    else:
        steps = torch.zeros(n_frames).double()
    frames = start.ceil() + steps.floor()
    return torch.minimum(frames, torch.tensor(num_frames - 1)).to(torch.int64)


def resized_shape(height, width, size):
    if height >= width:
        return size, max(1, width * size // height)
    return max(1, height * size // width), size


def resize_and_pad(frames, size):
    height, width = resized_shape(frames.shape[-2], frames.shape[-1], size)
    out = torch.zeros(*frames.shape[:-2], size, size, dtype=frames.dtype, device=frames.device)
    if (height, width) == tuple(frames.shape[-2:]):
        out[..., :height, :width] = frames
        return out
    flat = frames.flatten(0, -4) if frames.dim() > 3 else frames[None]
    exact = flat.to(torch.promote_types(flat.dtype, torch.float32))
    exact = F.interpolate(exact, (height, width), mode="bilinear", antialias=False)
    if frames.dtype == torch.uint8:
        exact = (exact + 0.5).floor().clamp(0, 255)
    out[..., :height, :width] = exact.reshape(*frames.shape[:-2], height, width).to(frames.dtype)
    return out


class VisualEmbedding:
    def forward(self, grid, keep=None):
        B, T, h, w, d = grid.shape
        limit = len(self.row_position_embeddings.weight)
        if h > limit or w > limit:
            raise ValueError(f"a {h} x {w} grid is larger than {limit} x {limit}")
        cells = torch.arange(h * w, device=grid.device)
        rows = self.row_position_embeddings(cells // w)
        columns = self.col_position_embeddings(cells % w)
        visual = self.token_type_embeddings(torch.zeros_like(cells))
        tokens = grid.sum(dim=1).reshape(B, h * w, d) / T + (rows + columns + visual)
        if keep is not None and h * w > keep:
            chosen = torch.multinomial(torch.ones(h * w, device=grid.device), keep)
            tokens = tokens.index_select(1, chosen)
        tokens = self.LayerNorm(tokens)
        return self.dropout(tokens)


class VideoTextEncoder:
    def fuse(self, grid, input_ids, attention_mask, keep=None):
        videos, texts = len(grid), len(input_ids)
        if texts < videos or texts % videos != 0:
            raise ValueError(f"{texts} texts cannot be shared out among {videos} videos")
        owner = torch.arange(texts, device=grid.device) // (texts // videos)
        visual = self.visual_embeddings(grid, keep=keep)[owner]
        words = self.bert.embeddings(input_ids=input_ids)
        sequence = torch.cat((words, visual), 1)
        hide = F.pad(attention_mask == 0, (0, visual.shape[1]), value=False)
        bias = torch.zeros(hide.shape, dtype=sequence.dtype, device=hide.device).masked_fill(hide, -1e9)
        states = self.bert.encoder(sequence, attention_mask=bias.view(texts, 1, 1, -1))[0]
        return states, self.bert.pooler(states)


def aggregate_clips(logits, how):
    n = logits.shape[0]
    if how == "lse":
        largest = logits.max(dim=0, keepdim=True).values.detach()
        return (logits - largest).exp().sum(0).log() + largest[0]
    if how == "max":
        return logits.max(dim=0).values
    if how == "mean":
        return torch.einsum("nbk->bk", logits) / n
    raise ValueError(f"{how} is none of mean, max, lse")


def video_loss(p, target, kind):
    if kind == "choice":
        scores = p.reshape(target.shape[0], -1).log_softmax(1)
        return -scores[torch.arange(len(target), device=p.device), target].mean()
    if kind in ("answer", "match"):
        return F.nll_loss(F.log_softmax(p, dim=-1), target)
    if kind == "count":
        return (p[:, 0] - target).square().mean()
    if kind == "soft":
        all_targets = torch.zeros_like(p)
        all_targets[:, : target.shape[1]] = target
        loss = p.clamp(min=0) - p * all_targets + (-p.abs()).exp().log1p()
        return loss.sum(1).mean()
    if kind == "rank":
        return rank_loss(p.reshape((target == 1).sum(), -1))
    raise ValueError(f"no such kind of answer: {kind}")


def rank_loss(p, margin=0.2):
    own, wrong = torch.sigmoid(p[:, 0]), torch.sigmoid(p[:, 1:])
    return F.relu(margin - (own.unsqueeze(1) - wrong)).mean()


def mask_tokens(input_ids, tokenizer, generator, rate=0.15):
    special = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in tokenizer.all_special_ids:
        special |= input_ids == token
    chosen = (torch.rand(input_ids.shape, generator=generator) < rate) & ~special
    labels = torch.where(chosen, input_ids, -100)
    fate = torch.rand(input_ids.shape, generator=generator)
    masked = input_ids.clone()
    masked[chosen & (fate < 0.8)] = tokenizer.mask_token_id
    swapped = chosen & (fate >= 0.8) & (fate < 0.9)
    masked[swapped] = torch.randint(0, len(tokenizer), (int(swapped.sum()),), generator=generator)
    return masked, labels


def mlm_loss(scores, labels, over="masked"):
    if over not in ("masked", "all"):
        raise ValueError(f"{over} is neither masked nor all")
    masked = labels != -100
    log_p = scores[masked].float().log_softmax(-1)
    total = -log_p.gather(1, labels[masked][:, None]).sum()
    return total / (labels.numel() if over == "all" else max(int(masked.sum()), 1))


def draw_mismatch(caption_of, count, own, generator):
    tries = 0
    while tries < 100:
        number = int(torch.rand((), generator=generator, dtype=torch.float64) * count)
        text = caption_of(number)
        if text.lower() in own:
            tries += 1
        else:
            return text


class CaptionDataset:
    def draw_captions(self, image, generator):
        deck = list(image.captions)
        for i in range(len(deck) - 1, 0, -1):
            j = int(torch.randint(i + 1, (1,), generator=generator))
            deck[i], deck[j] = deck[j], deck[i]
        right_first = torch.rand(1, generator=generator).item() < 0.5
        texts, labels, used = [], [], 0
        for i in range(self.captions):
            right = (i % 2 == 0) == right_first
            wrong = None if right else self.draw_mismatch(image, generator)
            if wrong is None:
                texts.append(deck[used % len(deck)])
                used += 1
            else:
                texts.append(wrong)
            labels.append(int(wrong is None))
        return texts, labels


def accumulate_gradients(model, optimizer, batches, loss_of, max_norm):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in model.parameters():
        p.grad = None
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.detach())
    used = [p for p in parameters if p.grad is not None]
    for p in used:
        p.grad.div_(len(batches))
    norm = torch.stack([p.grad.norm() for p in used]).norm()
    if norm > max_norm:
        for p in used:
            p.grad.mul_(max_norm / norm)
    optimizer.step()
    return torch.stack(losses).mean(), norm


def learning_rate(step, total_steps, peak, warmup_ratio=0.1):
    warmup = int(total_steps * warmup_ratio // 1)
    if step < warmup:
        share = step / warmup
    elif step >= total_steps:
        share = 0
    else:
        share = 1 - (step - warmup) / (total_steps - warmup)
    return max(share * peak, 0.0) if share > 0 else 1e-8


def retrieval_metrics(scores, video_of_caption):
    video_of_caption = [int(video) for video in video_of_caption]
    texts, videos = [], []
    for row, video in zip(scores, video_of_caption, strict=True):
        texts.append(ranks_of(row[video].reshape(1, 1), row[None]))
    for video in range(scores.shape[1]):
        own = [i for i, v in enumerate(video_of_caption) if v == video]
        if not own:
            continue
        column = scores[:, video].clone()
        best = max(own, key=lambda i: column[i].item())
        rivals = [i for i in range(len(column)) if i not in own or i == best]
        videos.append(ranks_of(column[best].reshape(1, 1), column[rivals].reshape(1, -1)))
    return {"text_to_video": recalls(torch.cat(texts)), "video_to_text": recalls(torch.cat(videos))}  # noqa: F821


def ranks_of(own, scores):
    own, scores = np.asarray(own), np.asarray(scores)
    lucky = 1 + (scores > own).sum(axis=1)
    unlucky = (scores >= own).sum(axis=1)
    return torch.tensor((lucky + unlucky) / 2)


class FrozenBatchNorm:
    def __init__(self, channels, eps=1e-5):
        nn.Module.__init__(self)
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.eps = eps

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )
