"""The assignment keeps its word: right solutions pass, wrong ones fail, and no exercise depends on another.

Tests of exercises are run here on versions of the project's files that exist in memory only.
"""

import subprocess
import sys
from pathlib import Path

import assignment
import pytest
from assignment import EXERCISES, SOURCES

HERE = Path(__file__).resolve().parent
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()}
OTHERS = (HERE / "other_solutions.py").read_text(encoding="utf-8")

# What students get wrong: {exercise: [(what, a piece of the other solution, what stands there instead)]}.
MISTAKES = {
    1: [
        ("a single training clip in the middle", "if train:", "if train and n_clips > 1:"),
        ("starts of whole frames", "generator=generator).double() * free", "generator=generator).double() * int(free)"),
        ("before the video", "if n_frames > 1 and length > 1:", "if n_frames > 1:"),
        ("ends left out", "(length - 1) * steps", "length * steps"),
        ("frames spread to the next clip's first", "/ (n_frames - 1)", "/ n_frames"),
        ("start rounded down", "start.ceil()", "start.floor()"),
        ("start rounded to the nearest", "start.ceil()", "start.round()"),
        ("offsets rounded up", "steps.floor()", "steps.ceil()"),
        ("offsets rounded to the nearest", "steps.floor()", "steps.round()"),
        ("integer division", "* free / n_clips", "* free // n_clips"),
        ("last clip at the very end", "free / n_clips", "free / (n_clips - 1)"),
        ("clips in the middle of their share", "arange(n_clips).double()", "arange(n_clips).double().add(0.5)"),
        ("single clip at the start", "free / 2", "0.0"),
        ("single clip at a third", "free / 2", "free / 3"),
        ("clips overlap by the clip's length", "num_frames - length if", "num_frames if"),
        ("free range one too long", "num_frames - length if", "num_frames - length + 1 if"),
        ("free range one too short", "num_frames - length if", "num_frames - length - 1 if"),
        ("last frame never seen", "num_frames - 1)", "num_frames - 2)"),
        ("one frame beyond the end", "num_frames - 1)", "num_frames)"),
        ("around the end to the start", "torch.minimum(frames, torch.tensor(num_frames - 1))", "(frames % num_frames)"),
        ("one random start for all clips", "torch.rand(n_clips, 1,", "torch.rand(1, 1,"),
        ("random starts in order", "generator=generator).double()", "generator=generator).double().sort(0).values"),
        ("another generator", "generator=generator", "generator=None"),
        ("normal instead of uniform", "torch.rand(", "torch.randn("),
        ("random in testing", "if train:", "if train or n_clips > 1:"),
        ("uniform in training", "if train:", "if train and n_clips == 1:"),
        ("rate upside down", "n_frames * fps / target_fps", "n_frames * target_fps / fps"),
        ("floats", ".to(torch.int64)", ""),
        ("32 bits", "torch.int64", "torch.int32"),
        ("clip cut to whole frames", "n_frames * fps / target_fps", "int(n_frames * fps / target_fps)"),
    ],
    2: [
        ("floats cut to a byte's range",
         "    if frames.dtype == torch.uint8:\n        exact = (exact + 0.5).floor().clamp(0, 255)",
         "    exact = (exact + 0.5).floor().clamp(0, 255) if frames.dtype == torch.uint8 else exact.clamp(0, 255)"),
        ("on the CPU, whatever the input's device", ", device=frames.device)", ")"),
        ("corners aligned", 'mode="bilinear", antialias=False', 'mode="bilinear", align_corners=True'),
        ("antialiased", "antialias=False", "antialias=True"),
        ("nearest pixel", 'mode="bilinear", antialias=False', 'mode="nearest"'),
        ("bytes cut off", "(exact + 0.5).floor()", "exact.floor()"),
        ("bytes become floats", "dtype=frames.dtype", "dtype=torch.float32"),
        ("padded with white", "torch.zeros(", "torch.ones("),
        ("padded left", "out[..., :height, :width] = exact", "out[..., :height, size - width :] = exact"),
        ("padded on top", "out[..., :height, :width] = exact", "out[..., size - height :, :width] = exact"),
        ("in the middle", "out[..., :height, :width] = exact",
         "top = (size - height) // 2\n    out[..., top : top + height, :width] = exact"),
        ("distorted to a square", "(height, width), mode", "(size, size), mode"),
        ("short side rounded", "width * size // height", "round(width * size / height)"),
        ("short side rounded up", "height * size // width", "-(-height * size // width)"),
        ("no pixel left", "max(1, height * size // width)", "height * size // width"),
        ("short side to size", "if height >= width:", "if height <= width:"),
        ("height and width confused", "(height, width), mode", "(width, height), mode"),
        ("scale in whole numbers", "height * size // width", "height * (size // width)"),
        ("small frames stay small", "return max(1, height * size // width), size",
         "return (max(1, height * size // width), size) if width > size else (height, width)"),
        ("only four axes", "flat = frames.flatten(0, -4) if frames.dim() > 3 else frames[None]", "flat = frames"),
        ("input overwritten", "        out[..., :height, :width] = frames\n        return out",
         "        frames[..., :1] = 0\n        out[..., :height, :width] = frames\n        return out"),
    ],
    3: [
        ("neighbouring places", "torch.multinomial(torch.ones(h * w, device=grid.device), keep)",
         "(torch.arange(keep, device=grid.device) + torch.randint(h * w, ())) % (h * w)"),
        ("sum for mean", " / T + ", " + "),
        ("first frame only", "grid.sum(dim=1)", "grid[:, 0] * T"),
        ("middle frame only", "grid.sum(dim=1)", "grid[:, T // 2] * T"),
        ("max over frames", "grid.sum(dim=1)", "grid.amax(1) * T"),
        ("mean over the batch", "grid.sum(dim=1)", "grid.sum(1).mean(0, keepdim=True).expand(B, h, w, d)"),
        ("column by column", "grid.sum(dim=1)", "grid.sum(dim=1).transpose(1, 2)"),
        ("rows and columns confused", "cells // w", "cells % w"),
        ("columns by the height", "cells % w", "cells % h"),
        ("rows by the height", "cells // w", "cells // h"),
        ("positions from one", "cells // w", "cells // w + 1"),
        ("no rows", "(rows + columns + visual)", "(columns + visual)"),
        ("no columns", "(rows + columns + visual)", "(rows + visual)"),
        ("no type", "(rows + columns + visual)", "(rows + columns)"),
        ("a sign", "rows + columns", "rows - columns"),
        ("no LayerNorm", "tokens = self.LayerNorm(tokens)", ""),
        ("LayerNorm before positions", "grid.sum(dim=1).reshape(B, h * w, d) / T",
         "self.LayerNorm(grid.sum(dim=1).reshape(B, h * w, d) / T)"),
        ("no dropout", "return self.dropout(tokens)", "return tokens"),
        ("dropout before LayerNorm", "tokens = self.LayerNorm(tokens)\n        return self.dropout(tokens)",
         "return self.LayerNorm(self.dropout(tokens))"),
        ("the first tokens kept", "torch.multinomial(torch.ones(h * w, device=grid.device), keep)", "cells[:keep]"),
        ("tokens kept twice", "torch.ones(h * w, device=grid.device), keep", "torch.ones(h * w), keep, True"),
        ("other places in each video", "tokens.index_select(1, chosen)",
         "torch.stack([t[torch.randperm(h * w)[:keep]] for t in tokens])"),
        ("drawn before the positions", "tokens = tokens.index_select(1, chosen)",
         "tokens = tokens[:, :keep] - (rows + columns)[:keep] + 0 * tokens[:, chosen] + (rows + columns)[chosen]"),
        ("keep fails on small grids", "h * w > keep", "True"),
        ("keep in training only", "keep is not None and", "self.training and keep is not None and"),
        ("one too many", ", keep)\n", ", keep + 1)\n"),
        ("rows unchecked", "if h > limit or w > limit", "if w > limit"),
        ("columns unchecked", "if h > limit or w > limit", "if h > limit"),
        ("the hundredth refused", "h > limit or", "h >= limit or"),
        ("made on the CPU", "torch.arange(h * w, device=grid.device)", "torch.arange(h * w)"),
        ("no gradient", "grid.sum(dim=1)", "grid.detach().sum(dim=1)"),
        ("in place", "B, T, h, w, d = grid.shape", "B, T, h, w, d = grid.shape\n        grid.data.mul_(1.01)"),
    ],
    4: [
        ("dropout that is not its own", "return states, self.bert.pooler(states)",
         "return states, self.dropout(self.bert.pooler(states))"),
        ("on the CPU, whatever the input's device", "device=hide.device).masked_fill", ").masked_fill"),
        ("padding seen", "attention_mask == 0", "attention_mask != attention_mask"),
        ("polarity", "attention_mask == 0", "attention_mask == 1"),
        ("grid masked", "value=False", "value=True"),
        ("black cells masked", "value=False)",
         "value=False)\n        hide[:, -visual.shape[1] :] |= (visual == 0).all(-1)"),
        ("mask before the text's", "(0, visual.shape[1])", "(visual.shape[1], 0)"),
        ("mask added as 1", "-1e9", "-1"),
        ("masked cells preferred", "-1e9", "1e9"),
        ("no mask", "attention_mask=bias.view(texts, 1, 1, -1)", "attention_mask=None"),
        ("grid first", "(words, visual)", "(visual, words)"),
        ("videos in turn", "// (texts // videos)", "% videos"),
        ("the first video for all", "[owner]", "[owner * 0]"),
        ("keep forgotten", "keep=keep", "keep=None"),
        ("first state as all states", "return states,", "return states[:, 0],"),
        ("text states only", "return states,", "return states[:, : input_ids.shape[1]],"),
        ("pooled of the last", "self.bert.pooler(states)", "self.bert.pooler(states.flip(1))"),
        ("mean instead of the pooler", "self.bert.pooler(states)", "states.mean(1)"),
        ("[CLS] without the pooler", "self.bert.pooler(states)", "states[:, 0]"),
        ("pooled before the layers", "self.bert.pooler(states)", "self.bert.pooler(sequence)"),
        ("words without positions", "self.bert.embeddings(input_ids=input_ids)",
         "self.bert.embeddings.word_embeddings(input_ids)"),
        ("grid of text type", "visual = self.visual_embeddings(grid, keep=keep)[owner]",
         "visual = self.bert.embeddings(inputs_embeds=self.visual_embeddings(grid, keep=keep)[owner])"),
        ("not refused", "texts < videos or texts % videos != 0", "False"),
        ("too few texts not refused", "texts % videos != 0", "False"),
        ("grid without gradient", "(grid, keep=keep)[owner]", "(grid, keep=keep)[owner].detach()"),
    ],
    5: [
        ("any name where there is one clip", "    n = logits.shape[0]\n",
         "    n = logits.shape[0]\n    if n == 1:\n        return logits[0]\n"),
        ("in single precision", "return logits.max(dim=0).values",
         "return logits.float().max(dim=0).values.to(logits.dtype)"),
        ("softmax before the mean", 'torch.einsum("nbk->bk", logits)', "logits.softmax(-1).sum(0)"),
        ("sum for mean", " / n", ""),
        ("mean over answers", "    return torch.einsum", "    n = logits.shape[2]\n        return torch.einsum"),
        ("mean over the batch", "logits.shape[0]", "logits.shape[1]"),
        ("max over videos", "logits.max(dim=0).values", "logits.max(dim=1).values"),
        ("max over answers", "logits.max(dim=0).values", "logits.max(dim=2).values"),
        ("places for values", "logits.max(dim=0).values", "logits.max(dim=0).indices.float()"),
        ("largest by size", "logits.max(dim=0).values", "logits.abs().max(dim=0).values"),
        ("min", "logits.max(dim=0).values", "logits.min(dim=0).values"),
        ("LSE overflows", "(logits - largest).exp().sum(0).log() + largest[0]", "logits.exp().sum(0).log()"),
        ("LSE underflows", "logits.max(dim=0, keepdim=True).values.detach()", "logits.amax() + logits[:1] * 0"),
        ("log-mean-exp", ".exp().sum(0)", ".exp().mean(0)"),
        ("no log", ".sum(0).log()", ".sum(0)"),
        ("LSE over answers", ".exp().sum(0).log()", ".exp().sum(-1).log().mean()"),
        ("LSE without its largest", " + largest[0]", ""),
        ("names confused", 'how == "lse"', 'how == "max"'),
        ("unknown is mean", 'if how == "mean":', "if True:"),
        ("probabilities out", 'torch.einsum("nbk->bk", logits) / n',
         '(torch.einsum("nbk->bk", logits) / n).softmax(-1)'),
    ],
    6: [
        ("options not brought together", "p.reshape(target.shape[0], -1)", "p.reshape(-1, target.shape[0]).T"),
        ("softmax over questions", ".log_softmax(1)", ".log_softmax(0)"),
        ("sum for mean", "target].mean()", "target].sum()"),
        ("a sign", "return -scores", "return scores"),
        ("softmax twice", "F.log_softmax(p, dim=-1)", "F.log_softmax(p.softmax(-1), dim=-1)"),
        ("log of softmax overflows", "F.log_softmax(p, dim=-1)", "p.softmax(-1).log()"),
        ("match upside down", 'if kind in ("answer", "match"):',
         'if kind == "match":\n        return F.cross_entropy(p, 1 - target)\n    if kind == "answer":'),
        ("count without squares", ".square()", ".abs()"),
        ("count summed", ".square().mean()", ".square().sum()"),
        ("count of all pairs", "p[:, 0] - target", "p - target"),
        ("count halved", ".square().mean()", ".square().mean() / 2"),
        ("soft averaged over answers", "loss.sum(1).mean()", "loss.mean()"),
        ("soft summed over questions", "loss.sum(1).mean()", "loss.sum()"),
        ("soft times the list, not the outputs", "loss.sum(1).mean()", "loss.mean() * target.shape[1]"),
        ("soft ignores other outputs", "return loss.sum(1)", "return loss[:, : target.shape[1]].sum(1)"),
        ("other outputs are right", "torch.zeros_like(p)", "torch.ones_like(p)"),
        ("soft as hard", "= target\n", "= (target > 0).float()\n"),
        ("soft overflows", "p.clamp(min=0) - p * all_targets + (-p.abs()).exp().log1p()",
         "p.exp().log1p() - p * all_targets"),
        ("rank by logits", "torch.sigmoid(p[:, 0]), torch.sigmoid(p[:, 1:])", "p[:, 0], p[:, 1:]"),
        ("rank with a sign", "margin - (own", "margin + (own"),
        ("rank without margin", "margin - (own", "-(own"),
        ("rank without clamp", "F.relu(margin - (own.unsqueeze(1) - wrong))", "(margin - (own.unsqueeze(1) - wrong))"),
        ("rank summed", "wrong)).mean()", "wrong)).sum()"),
        ("rank per video", "wrong)).mean()", "wrong)).sum(1).mean()"),
        ("rank only of the worst", "wrong)).mean()", "wrong)).amax(1).mean()"),
        ("rank without zeros in the mean", "return F.relu(margin - (own.unsqueeze(1) - wrong)).mean()",
         "loss = F.relu(margin - (own.unsqueeze(1) - wrong))\n    return loss.sum() / (loss > 0).sum().clamp(min=1)"),
        ("own caption last", "p[:, 0]), torch.sigmoid(p[:, 1:])", "p[:, -1]), torch.sigmoid(p[:, :-1])"),
        ("another margin", "margin=0.2", "margin=0.1"),
        ("rank in pairs only", "p.reshape((target == 1).sum(), -1)", "p.reshape(-1, 2)"),
        ("unknown passes", 'if kind == "rank":', "if True:"),
    ],
    7: [
        ("always the same number", "chosen = (torch.rand(input_ids.shape, generator=generator) < rate) & ~special",
         ("draw = torch.rand(input_ids.shape, generator=generator).masked_fill(special, 2.0)\n"
         "    order = draw.flatten().argsort().argsort().view(draw.shape)\n"
         "    chosen = (order < round(rate * int((~special).sum()))) & ~special")),
        ("one die for a whole text", "fate = torch.rand(input_ids.shape, generator=generator)",
         "fate = torch.rand(*input_ids.shape[:-1], 1, generator=generator).expand(input_ids.shape)"),
        ("special tokens chosen", " & ~special", ""),
        ("padding chosen", "for token in tokenizer.all_special_ids:", "for token in (1, 2, 3, 4):"),
        ("only padding spared", "for token in tokenizer.all_special_ids:", "for token in (tokenizer.pad_token_id,):"),
        ("unknown words chosen", "for token in tokenizer.all_special_ids:", "for token in (0, 2, 3, 4):"),
        ("all become [MASK]", "(fate < 0.8)", "(fate < 1.0)"),
        ("90 / 10", "(fate < 0.9)", "(fate < 0.8)"),
        ("80 / 20 / 0", "(fate < 0.9)", "(fate < 1.0)"),
        ("70 / 20 / 10", "fate < 0.8", "fate < 0.7"),
        ("rates swapped", "(fate < 0.8)", "(fate < 0.1)"),
        ("rate fixed", "< rate", "< 0.15"),
        ("10% chosen", "< rate", "< rate * 0.9"),
        ("polarity", "< rate)", ">= rate)"),
        ("labels everywhere", "torch.where(chosen, input_ids, -100)", "torch.where(special, -100, input_ids)"),
        ("labels of [MASK] only", "masked = input_ids.clone()",
         "labels = torch.where(fate < 0.8, labels, -100)\n    masked = input_ids.clone()"),
        ("labels after masking", "    return masked, labels", "    return masked, torch.where(chosen, masked, -100)"),
        ("labels where nothing is masked", "torch.where(chosen, input_ids, -100)",
         "torch.where(chosen, -100, input_ids)"),
        ("labels 0", "-100)", "0)"),
        ("in place", "input_ids.clone()", "input_ids"),
        ("random special tokens", "torch.randint(0, len(tokenizer)", "torch.randint(0, 5"),
        ("last token never drawn", "len(tokenizer), (", "len(tokenizer) - 1, ("),
        ("one random token for all", "(int(swapped.sum()),)", "(1,)"),
        ("a dice per column", "torch.rand(input_ids.shape, generator=generator) < rate",
         "torch.rand(input_ids.shape[-1:], generator=generator).expand(input_ids.shape) < rate"),
        ("one dice for both", "fate = torch.rand(input_ids.shape, generator=generator)",
         "fate = torch.rand(input_ids.shape, generator=generator.manual_seed(1))"),
        ("torch's own generator", "torch.rand(input_ids.shape, generator=generator) < rate",
         "torch.rand(input_ids.shape) < rate"),
        ("torch's own generator for tokens", "(int(swapped.sum()),), generator=generator", "(int(swapped.sum()),)"),
        ("always the same", "chosen = (", "generator.manual_seed(0)\n    chosen = ("),
    ],
    8: [
        ("all in half precision", "scores[masked].float()",
         "(scores[masked] if over == 'all' else scores[masked].float())"),
        ("over all by default", 'over="masked"', 'over="all"'),
        ("names confused", 'if over == "all"', 'if over == "masked"'),
        ("all is the masked mean", "labels.numel() if", "masked.sum() if"),
        ("all is the number of texts", "labels.numel() if", "len(labels) if"),
        ("0 / 0", "max(int(masked.sum()), 1)", "masked.sum()"),
        ("one more", "max(int(masked.sum()), 1)", "(masked.sum() + 1)"),
        ("mean of the texts' means", "    total = ",
         "    losses = [F.cross_entropy(s.float(), y) for s, y in zip(scores, labels)]\n"
         + "    return torch.stack(losses).nan_to_num().mean()\n    total = "),
        ("padding counts as word 0", "masked = labels != -100", "masked, labels = labels > -200, labels.clamp(min=0)"),
        ("word 0 ignored", "labels != -100", "labels > 0"),
        ("a sign", "total = -log_p", "total = log_p"),
        ("no softmax", ".float().log_softmax(-1)", ".float()"),
        ("softmax without log", "log_softmax(-1)", "softmax(-1)"),
        ("softmax over positions", "log_softmax(-1)", "log_softmax(0)"),
        ("log of softmax overflows", "log_softmax(-1)", "softmax(-1).log()"),
        ("half precision", "scores[masked].float()", "scores[masked]"),
        ("float after the softmax", ".float().log_softmax(-1)", ".log_softmax(-1).float()"),
        ("unknown passes", 'over not in ("masked", "all")', "False"),
        ("last word of a text left out", "masked = labels != -100",
         "masked = labels != -100\n    masked[:, -1] = False"),
        ("detached", "-log_p.gather", "-log_p.detach().gather"),
    ],
    9: [
        ("thirty tries", "tries < 100", "tries < 30"),
        ("part of an own caption", "text.lower() in own", "any(text.lower() in mine for mine in own)"),
        ("own captions drawn", "if text.lower() in own:", "if False:"),
        ("capitals tell", "text.lower() in own", "text in own"),
        ("lower case returned", "            return text", "            return text.lower()"),
        ("polarity", "text.lower() in own", "text.lower() not in own"),
        ("one try", "tries < 100", "tries < 1"),
        ("never gives up", "tries < 100", "tries < 10**6"),
        ("last never drawn", "* count)", "* (count - 1))"),
        ("first never drawn", "* count)", "* (count - 1)) + 1"),
        ("one too far", "* count)", "* (count + 1))"),
        ("always the same one", "number = int(torch.rand((), generator=generator, dtype=torch.float64) * count)",
         "number = tries % count"),
        ("another generator", "torch.rand((), generator=generator,", "torch.rand((),"),
        ("labels upside down", "int(wrong is None)", "int(wrong is not None)"),
        ("labels of the plan, not of what was found", "int(wrong is None)", "int(right)"),
        ("always right first", "torch.rand(1, generator=generator).item() < 0.5", "True"),
        ("a coin for each", "(i % 2 == 0) == right_first", "torch.rand(1, generator=generator).item() < 0.5"),
        ("mostly right", "i % 2 == 0", "i % 3 != 0"),
        ("a biased coin", ".item() < 0.5", ".item() < 0.7"),
        ("the coin is not the generator's", "torch.rand(1, generator=generator)", "torch.rand(1)"),
        ("all right", "None if right else", "None if True else"),
        ("always the first caption", "deck[used % len(deck)]", "deck[0]"),
        ("never the last caption", "% len(deck)]", "% max(len(deck) - 1, 1)]"),
        ("in the file's order", "deck[i], deck[j] = deck[j], deck[i]", "pass"),
        ("the same caption again", "used += 1", "pass"),
        ("too few captions", "used % len(deck)", "used"),
        ("one caption too few", "range(self.captions)", "range(self.captions - 1)"),
        ("nothing in place of none", "if wrong is None:", "if right:"),
    ],
    10: [
        ("sum for mean", "p.grad.div_(len(batches))", "pass"),
        ("divided twice", "loss = loss_of(model, batch)", "loss = loss_of(model, batch) / len(batches)"),
        ("old gradients stay", "p.grad = None", "pass"),
        ("gradients of the last batch only", "        loss.backward()",
         "        optimizer.zero_grad()\n        loss.backward()"),
        ("a step a batch", "        losses.append", "        optimizer.step()\n        losses.append"),
        ("all graphs at once", "        loss.backward()\n        losses.append(loss.detach())\n",
         "        losses.append(loss)\n    sum(losses).backward()\n    losses = [loss.detach() for loss in losses]\n"),
        ("clipped after the step", "    optimizer.step()\n", ""),
        ("no step", "optimizer.step()", "pass"),
        ("two steps", "optimizer.step()", "optimizer.step(), optimizer.step()"),
        ("no clipping", "norm > max_norm", "False"),
        ("always scaled", "norm > max_norm", "True"),
        ("each parameter clipped by itself", "        for p in used:\n            p.grad.mul_(max_norm / norm)",
         "        for p in used:\n            p.grad.mul_((max_norm / p.grad.norm()).clamp(max=1))"),
        ("each batch clipped", "        losses.append",
         "        nn.utils.clip_grad_norm_(parameters, max_norm)\n        losses.append"),
        ("clipped by value", "p.grad.mul_(max_norm / norm)", "p.grad.clamp_(-max_norm, max_norm)"),
        ("norm after clipping", "\n    optimizer.step()", "\n        norm = norm * 0 + max_norm\n    optimizer.step()"),
        ("norms added", "for p in used]).norm()", "for p in used]).sum()"),
        ("sum of losses", "torch.stack(losses).mean()", "torch.stack(losses).sum()"),
        ("last loss", "torch.stack(losses).mean()", "losses[-1]"),
        ("graph kept", "loss.detach()", "loss"),
        ("a float", "torch.stack(losses).mean(), norm", "torch.stack(losses).mean().item(), norm"),
        ("one batch fewer", "in batches:\n        loss =", "in batches[:-1] or batches:\n        loss ="),
    ],
    11: [
        ("small learning rates made larger", "return max(share * peak, 0.0) if share > 0 else 1e-8",
         "return max(share * peak, 1e-8)"),
        ("integer division", "share = step / warmup", "share = step // warmup"),
        ("counted from 0", "share = step / warmup", "share = (step - 1) / warmup"),
        ("one step late", "share = step / warmup", "share = step / (warmup + 1)"),
        ("no decay", "1 - (step - warmup) / (total_steps - warmup)", "1"),
        ("decay as if without warm-up", "1 - (step - warmup) / (total_steps - warmup)", "1 - step / total_steps"),
        ("decay over all steps", "(total_steps - warmup)\n", "total_steps\n"),
        ("decay one step early", "1 - (step - warmup)", "1 - (step - warmup + 1)"),
        ("not in a straight line", "1 - (step - warmup) / (total_steps - warmup)",
         "(1 - (step - warmup) / (total_steps - warmup)) ** 2"),
        ("warm-up rounded up", "// 1)", "// 1) + 1"),
        ("warm-up rounded", "int(total_steps * warmup_ratio // 1)", "round(total_steps * warmup_ratio)"),
        ("warm-up not whole", "int(total_steps * warmup_ratio // 1)", "max(total_steps * warmup_ratio, 1e-9)"),
        ("at least one step of warm-up", "int(total_steps * warmup_ratio // 1)",
         "max(int(total_steps * warmup_ratio // 1), 1) + 1"),
        ("0 at the end", "else 1e-8", "else 0.0"),
        ("a floor for all", "max(share * peak, 0.0)", "max(share * peak, 1e-6)"),
        ("negative afterwards", "    elif step >= total_steps:\n        share = 0\n", ""),
        ("peak ignored", "share * peak", "share * 1e-4"),
        ("another default", "warmup_ratio=0.1", "warmup_ratio=0.06"),
        ("ratio ignored", "total_steps * warmup_ratio", "total_steps * 0.1"),
        ("1e-8 added", "max(share * peak, 0.0)", "max(share * peak, 0.0) + 1e-8"),
        ("1e-8 times the peak", "else 1e-8", "else 1e-8 * peak"),
    ],
    12: [
        ("in single precision", "np.asarray(own), np.asarray(scores)", "np.float32(own), np.float32(scores)"),
        ("scores overwritten", "column = scores[:, video].clone()",
         "column = scores[:, video]\n        column -= column.min()"),
        ("ranks from 0", "lucky = 1 + (scores > own)", "lucky = (scores > own)"),
        ("lucky ties", "(lucky + unlucky) / 2", "lucky / 1"),
        ("unlucky ties", "(lucky + unlucky) / 2", "unlucky / 1"),
        ("ties in whole numbers", "(lucky + unlucky) / 2", "(lucky + unlucky) // 2"),
        ("itself a tie", "(scores >= own).sum(axis=1)", "(scores >= own).sum(axis=1) + 1"),
        ("lowest first", "scores > own", "scores < own"),
        ("rank among texts", ".sum(axis=1)\n    unlucky", ".sum(axis=0)\n    unlucky"),
        ("ways swapped", '"text_to_video": recalls(torch.cat(texts)), "video_to_text": recalls(torch.cat(videos))',
         '"text_to_video": recalls(torch.cat(videos)), "video_to_text": recalls(torch.cat(texts))'),
        ("one way for both", "recalls(torch.cat(videos))", "recalls(torch.cat(texts))"),
        ("diagonal", "row[video].reshape(1, 1), row[None]",
         "row[min(len(texts), len(row) - 1)].reshape(1, 1), row[None]"),
        ("last caption counts", "best = max(own, key=lambda i: column[i].item())", "best = own[-1]"),
        ("first caption counts", "best = max(own, key=lambda i: column[i].item())", "best = own[0]"),
        ("worst caption counts", "best = max(", "best = min("),
        ("own captions compete", "if i not in own or i == best", "if True"),
        ("without itself", "if i not in own or i == best", "if i not in own"),
        ("videos without captions counted", "            continue\n", "            own = [0]\n"),
        ("all videos have captions", "        if not own:\n            continue\n", ""),
        ("mean of captions", "column[best].reshape(1, 1), column[rivals]",
         "column[own].mean().reshape(1, 1), column[rivals]"),
        ("row for column", "column = scores[:, video].clone()", "column = scores[video % len(scores)].clone()"),
    ],
    13: [
        ("only single precision", "return nn.functional.batch_norm(\n            x,",
         "return nn.functional.batch_norm(\n            x.float(),"),
        ("statistics of the batch", "training=False", "training=self.training"),
        ("always statistics of the batch", "training=False", "training=True"),
        ("statistics of the batch, numbers kept", "x, self.running_mean, self.running_var,",
         "x, x.mean((0, 2, 3)), x.var((0, 2, 3)),"),
        ("parameters", "self.register_buffer(name, torch.full((channels,), value))",
         "setattr(self, name, nn.Parameter(torch.full((channels,), value)))"),
        ("weight and bias are parameters", "        self.eps = eps",
         "        for name in ('weight', 'bias'):\n            value = self._buffers.pop(name)\n"
         + "            self.register_parameter(name, nn.Parameter(value))\n        self.eps = eps"),
        ("plain tensors", "self.register_buffer(name,", "setattr(self, name,"),
        ("not saved", "torch.full((channels,), value))", "torch.full((channels,), value), persistent=False)"),
        ("no eps", "eps=self.eps", "eps=0.0"),
        ("eps fixed", "eps=self.eps", "eps=1e-5"),
        ("another eps", "eps=1e-5):", "eps=1e-3):"),
        ("eps beside the root", "        return nn.functional.batch_norm(",
         "        v = [t[:, None, None] for t in (self.running_mean, self.running_var, self.weight, self.bias)]\n"
         + "        return (x - v[0]) / (v[1].sqrt() + self.eps) * v[2] + v[3]\n"
         + "        return nn.functional.batch_norm("),
        ("no root", "self.running_var,", "self.running_var.square(),"),
        ("mean and bias confused", "x, self.running_mean, self.running_var, self.weight, self.bias",
         "x, self.bias, self.running_var, self.weight, self.running_mean"),
        ("weight ignored", "self.weight, self.bias", "None, self.bias"),
        ("bias ignored", "self.weight, self.bias", "self.weight, None"),
        ("starts at zero", '("running_var", 1.0)', '("running_var", 0.0)'),
        ("weights of zero", '("weight", 1.0)', '("weight", 0.0)'),
        ("one number for all channels", "torch.full((channels,)", "torch.full((1,)"),
        ("last axis for channels", "        return nn.functional.batch_norm(",
         "        x = x.transpose(1, 3)\n        return nn.functional.batch_norm("),
        ("no gradient", "            x, self.running_mean", "            x.detach(), self.running_mean"),
    ],
}  # fmt: skip


def other(number):
    """An exercise's file with the other solution in place."""
    exercise = EXERCISES[number]
    source = TEXTS[exercise.module]
    for name in exercise.functions:
        source = assignment.splice(source, name, assignment.extract(OTHERS, name))
    return source


def failed(number, source):
    results = assignment.run_tests(number, assignment.load(EXERCISES[number].module, source))
    assert len(results) >= 5
    return [reason for reason in results.values() if reason]


@pytest.mark.parametrize("number", EXERCISES)
def test_every_exercise_finds_its_functions_and_passes_when_all_others_are_undone(number):
    """In particular, no exercise's tests depend on another exercise."""
    module = EXERCISES[number].module
    source = TEXTS[module]
    for i, exercise in EXERCISES.items():
        for name in exercise.functions if exercise.module == module and i != number else ():
            source = assignment.blank(source, name, f"Exercise {i}")
    assert failed(number, source) == []


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_that_is_not_done_fails_all_its_tests(number):
    exercise = EXERCISES[number]
    source = TEXTS[exercise.module]
    for name in exercise.functions:
        source = assignment.blank(source, name, f"Exercise {number}")
    results = assignment.run_tests(number, assignment.load(exercise.module, source))
    assert all(f"NotImplementedError: Exercise {number}" in reason for reason in results.values())


@pytest.mark.parametrize("number", EXERCISES)
def test_another_right_solution_passes(number):
    assert failed(number, other(number)) == []


@pytest.mark.parametrize("number", EXERCISES)
def test_every_mistake_is_found(number):
    assert len(MISTAKES[number]) >= 5
    source, exercise = other(number), EXERCISES[number]
    unfound = []
    for what, old, new in MISTAKES[number]:
        changed = source
        for name in exercise.functions:  # in the exercise's functions alone
            text = assignment.extract(source, name)
            changed = assignment.splice(changed, name, text.replace(old, new)) if old in text else changed
        assert changed != source, f"{what}: {old!r} does not stand in the solution"
        results = assignment.run_tests(number, assignment.load(exercise.module, changed), all_of_them=False)
        if not any(results.values()):
            unfound.append(what)
    assert unfound == []


# ---------------------------------------------------------------- the copy and its grading


@pytest.fixture
def copy(tmp_path):
    assignment.write_copy(tmp_path / "out")
    return tmp_path / "out"


def test_the_copy_holds_no_solution_and_everything_that_its_tests_need(copy):
    for exercise in EXERCISES.values():
        source = (copy / SOURCES[exercise.module].name).read_text(encoding="utf-8")
        for name in exercise.functions:
            kept, whole = assignment.extract(source, name), assignment.extract(TEXTS[exercise.module], name)
            assert "raise NotImplementedError" in kept.splitlines()[-1]
            code = [line for line in kept.splitlines()[:-1] if not line.lstrip().startswith("# ")]
            assert whole.startswith("\n".join(code))  # signature and docstring, and no line after them
    text = (copy / "ASSIGNMENT.md").read_text(encoding="utf-8")
    for number, exercise in EXERCISES.items():
        assert f"## Exercise {number}: {exercise.title} ({exercise.points} points)" in text
        assert all(f"`{name}`" in text for name in exercise.functions)
    # It can be imported, and a function that is not done says which exercise it is.
    modules = {name: assignment.load(name, (copy / path.name).read_text(encoding="utf-8"))
               for name, path in SOURCES.items()}  # fmt: skip
    with pytest.raises(NotImplementedError, match="Exercise 5: From clips to a video"):
        modules["clipbert"].aggregate_clips(None, "mean")


def test_blank_keeps_decorators_signature_docstring_and_shapes():
    kept = 'class A:\n    @property\n    def f(self):\n        """Doc."""\n'
    source = kept + "        x = 1  # (B, d)\n        return x\n\n    y = 2\n"
    blank = kept + '        # x: (B, d)\n        raise NotImplementedError("Exercise 1")\n\n    y = 2\n'
    assert assignment.blank(source, "A.f", "Exercise 1") == blank
    assert assignment.blank("def g():\n    return 1\n", "g", "no") == 'def g():\n    raise NotImplementedError("no")\n'
    with pytest.raises(LookupError, match="A.g"):
        assignment.blank(source, "A.g", "")


def test_each_exercise_is_graded_with_all_others_solved(copy):
    """A student's file: one exercise in another way with a helper, one lost, one wrong, all others not begun."""
    source = (copy / "clipbert.py").read_text(encoding="utf-8")
    helper = 'def aggregate_clips(logits, how):\n    return help_with(logits, how)\n'
    source = assignment.splice(source, "aggregate_clips", helper)
    source += assignment.extract(OTHERS, "aggregate_clips").replace("aggregate_clips", "help_with") + "\n"
    source = assignment.splice(source, "learning_rate", "")
    solved = assignment.solved(source, TEXTS["clipbert"], but=5)
    assert failed(5, solved) == [] and "Exercise 5" not in solved and "Exercise 4" not in solved
    assert len(failed(4, assignment.solved(source, TEXTS["clipbert"], but=4))) >= 5
    with pytest.raises(LookupError, match="learning_rate"):
        assignment.find(source, "learning_rate")


def test_grading_survives_what_students_write(copy, monkeypatch, capsys):
    """In processes of their own, with a limit: solutions that hang or end the process, files that can't be imported."""
    monkeypatch.setattr(assignment, "LIMIT", 20)
    (copy / "clipbert.py").write_text(TEXTS["clipbert"], encoding="utf-8")  # all solved
    hang = "def ranks_of(own, scores):\n    while True:\n        pass"
    code = assignment.splice(TEXTS["finetune"], "ranks_of", hang)
    (copy / "finetune.py").write_text(code, encoding="utf-8")
    (copy / "data.py").write_text("def sample_clips(:\n", encoding="utf-8")
    die = "def accumulate_gradients(*_):\n    __import__('os')._exit(0)"
    code = assignment.splice(TEXTS["exercises"], "accumulate_gradients", die)
    (copy / "exercises.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(assignment, "EXERCISES", {i: EXERCISES[i] for i in (1, 5, 10)})
    assert assignment.grade(copy) == EXERCISES[5].points
    lines = capsys.readouterr().out.splitlines()
    assert "data.py: SyntaxError" in lines[1] and " 0 of 10" in lines[1]
    assert lines[2].endswith("10 of 10") and " 6 of  6" in lines[2]
    assert "ended without an answer" in lines[3]
    assert lines[-1].split() == ["all", "6", "of", "24"]
    monkeypatch.setattr(assignment, "EXERCISES", {12: EXERCISES[12]})
    monkeypatch.setattr(assignment, "LIMIT", 4)
    assert assignment.grade(copy) == 0 and "stopped after 4 seconds" in capsys.readouterr().out


def test_grading_counts_all_tests_or_nothing(tmp_path, monkeypatch, capsys):
    answers = {number: {"a": None, "b": None} for number in EXERCISES} | {2: {"a": None, "b": "b: wrong"}, 3: "no file"}
    monkeypatch.setattr(assignment, "isolated", lambda context, number, out: answers[number])
    everything = sum(exercise.points for exercise in EXERCISES.values())
    assert everything == 100
    assert assignment.grade(tmp_path) == everything - EXERCISES[2].points - EXERCISES[3].points
    out = capsys.readouterr().out
    assert "1 of 2  b: wrong" in out and "-  no file" in out


def test_errors_are_one_line(copy, tmp_path):
    for arguments, line in ([copy], "not empty"), ([tmp_path / "nowhere", "--grade"], "no such folder"):
        command = [sys.executable, HERE / "assignment.py", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and line in result.stderr
