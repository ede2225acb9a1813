"""Solutions of the exercises that are as right as the project's, but written in another way.

test_assignment.py puts them in place: the tests must accept them, and must refuse what slips and
mistakes make of them, but for EQUIVALENT ones.
"""

import numpy as np
import torch
import torch.nn.functional as F

import clipbert


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


class GridFeatures:
    def normalize(self, frames):
        if self.cfg.bgr:
            frames = frames[..., [2, 1, 0], :, :]
        order = [2, 1, 0] if self.cfg.bgr else [0, 1, 2]
        return (frames - self.pixel_mean[order]) / self.pixel_std[order]

    def forward(self, frames):
        x = self.normalize(frames).flatten(0, 1)
        x = self.resnet(x)
        x = F.conv2d(x, self.grid_encoder[0].weight, stride=1, padding=1).relu()
        x = F.max_pool2d(x, kernel_size=2, stride=2).movedim(1, -1)
        return x.reshape(*frames.shape[:2], *x.shape[1:])


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
        norm = self.LayerNorm
        tokens = F.layer_norm(tokens, (d,), norm.weight, norm.bias, norm.eps)
        return F.dropout(tokens, self.dropout.p, self.training)


class VideoTextEncoder:
    def fuse(self, grid, input_ids, attention_mask, keep=None):
        videos, texts = len(grid), len(input_ids)
        if texts < videos or texts % videos != 0:
            raise ValueError(f"{texts} texts cannot be shared out among {videos} videos")
        owner = torch.arange(texts, device=grid.device) // (texts // videos)
        visual = self.visual_embeddings(grid, keep)[owner]
        words = self.bert.embeddings(input_ids)
        sequence = torch.cat((words, visual), 1)
        hide = F.pad(attention_mask == 0, (0, visual.shape[1]))
        bias = torch.zeros(hide.shape, device=hide.device).masked_fill(hide, -1e9)
        states = self.bert.encoder(sequence, bias.view(texts, 1, 1, -1))[0]
        return states, self.bert.pooler(states)


def clip_logits(model, frames, input_ids, attention_mask):
    videos, clips = frames.shape[0], frames.shape[1]
    n = len(input_ids) // videos
    grids = model.encode_frames(frames.transpose(0, 1).flatten(0, 1))
    ids, mask = input_ids.repeat(clips, 1), attention_mask.repeat(clips, 1)
    return model.classify(grids, ids, mask).unflatten(0, (clips, videos * n))


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
    raise ValueError(f"no such kind of answer: {kind}")


def evaluate(model, questions, read, n_test, how, at_once=16):
    mode, right = model.training, []
    model.train(False)
    with torch.inference_mode():
        for video, ids, mask, answer in questions:
            clips = read(video, n_test)
            p = []
            for first in range(0, len(clips), at_once):
                p += clipbert.clip_logits(model, clips[None, first : first + at_once], ids, mask)
            p = clipbert.aggregate_clips(torch.stack(p), how).flatten()
            right.append(p.argmax().item() == answer)
    model.train(mode)
    return sum(right) / len(right) * 100


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
    masked[swapped] = torch.randint(len(tokenizer), (int(swapped.sum()),), generator=generator)
    return masked, labels


def mlm_loss(scores, labels, over="masked", text_length=30):
    if over not in ("masked", "all"):
        raise ValueError(f"{over} is neither masked nor all")
    masked = labels != -100
    log_p = scores[masked].float().log_softmax(-1)
    total = -log_p.gather(1, labels[masked][:, None]).sum()
    return total / (labels.shape[0] * text_length if over == "all" else max(int(masked.sum()), 1))


def itm_loss(scores, labels):
    other = scores.float().flip(1)
    margin = (other - scores.float()).gather(1, labels[:, None])
    return F.softplus(margin).mean()


def match_captions(images, captions, generator):
    said = {}
    for image, text in zip(images, captions, strict=True):
        said.setdefault(image, set()).add(text.lower())
    texts, labels = [], []
    for image, text in zip(images, captions, strict=True):
        others = [t for t in captions if t.lower() not in said[image]]
        stays = not others or int(torch.randint(2, (1,), generator=generator)) == 1
        if not stays:
            place = torch.multinomial(torch.ones(len(others)), 1, generator=generator)
            text = others[place.item()]
        texts.append(text)
        labels.append(int(stays))
    return texts, labels


def retrieval_metrics(scores, video_of_caption):
    video_of_caption = [int(video) for video in video_of_caption]
    texts, videos = [], []
    for row, video in zip(scores, video_of_caption, strict=True):
        texts.append(ranks_of(row[video].reshape(1, 1), row[None]))
    for video in range(scores.shape[1]):
        own = [i for i, v in enumerate(video_of_caption) if v == video]
        if not own:
            continue
        column = scores[:, video]
        best = max(own, key=lambda i: column[i].item())
        rivals = [i for i in range(len(column)) if i not in own or i == best]
        videos.append(ranks_of(column[best].reshape(1, 1), column[rivals].reshape(1, -1)))
    return {"text_to_video": recalls(torch.cat(texts)), "video_to_text": recalls(torch.cat(videos))}  # noqa: F821


def ranks_of(own, scores):
    own, scores = np.asarray(own), np.asarray(scores)
    lucky = 1 + (scores > own).sum(axis=1)
    unlucky = (scores >= own).sum(axis=1)
    return torch.tensor((lucky + unlucky) / 2)


# Slips that change nothing that anybody could see, where `assignment.py --mutants` finds them.
EQUIVALENT = {f"{name} {place}" for name, places in {
    # a difference of 0, or rounded away; float32 is precise enough for videos of some hours
    "sample_clips": "3:34-53/0 3:59-62/1 11:24-34/0 15:28-41/0 5:16-68/0 7:16-65/1 9:16-46/0 10:12-43/0 14:16-46/0",
    "forward": "4:8-69/1 5:8-48/2",  # the default
    "fuse": "5:12-51/1 10:74-77/0 10:74-77/1 11:69-70/1",  # an index may lie anywhere; 1e9 + 1; the only one
    "aggregate_clips": "4:18-65/0 5:63-64/1",  # gradients that cancel; the only one
    "video_loss": "3:40-41/1 4:23-65/1 6:26-50/1 6:47-49/0 8:21-22/1",  # the only axis, the only column
    "evaluate": "10:16-71/0 11:25-42/0",  # argmax flattens, too; a tensor of that number
    "mask_tokens": "5:14-69/0 9:21-31/0 10:24-35/0 10:40-50/0 11:53-71/0",  # a random number is hardly ever .8
    "mlm_loss": "5:47-49/0 7:76-93/0",  # the last axis; a tensor of that number
    "itm_loss": "2:12-26/0 3:22-36/0",  # float32 because of the other one
    # the other side of the coin; zip's check of lengths
    "match_captions": "3:23-57/1 3:52-56/0 6:23-57/1 6:52-56/0 8:30-83/0 8:30-78/0 8:82-83/1 11:26-38/0",
    # zip's check of lengths; shapes that torch would bring about by itself
    "retrieval_metrics": "2:24-34/0 4:22-64/1 4:59-63/0 5:30-54/0 11:38-54/0 13:31-57/0 13:59-88/0",
}.items() for place in places.split()}  # fmt: skip
