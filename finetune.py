"""Fine-tune and evaluate ClipBERT on a task (paper, section 4).

    python finetune.py --task tgif_qa                                         the toy data: minutes on a laptop CPU
    python finetune.py --task tgif_qa --data DIR --model base                 the paper's model on real data, one GPU
    python finetune.py --task tgif_qa --data DIR --init CKPT                  from image-text pretraining
    python finetune.py --task tgif_qa --data DIR --eval CKPT --test_clips 1 4 16
    python finetune.py --task tgif_qa --eval CKPT --predict cat.gif --question "what does the cat do 3 times ?" \\
                       --options jump spin wave --sheet out.png
    python finetune.py --task tgif_qa --resume                                go on after an interruption
    torchrun --nproc_per_node=8 finetune.py --task tgif_qa --data DIR ...     eight GPUs, eight times the batch

Everything is written to runs/<task>/: config.json, log.jsonl (a line a step or evaluation), last.pt and the one before
it, previous.pt, best.pt, predictions.jsonl, metrics.json and sheet.png (some of the test examples, right and wrong);
nonfinite.pt, if the loss stopped being a number.
"""

import functools
import json
import math
import sys
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import clipbert
import data

# ----------------------------------------------------------------------------------------------------------------------
# The tasks. One row each; the loop below knows no data set by name.


class Task(NamedTuple):
    """A data set and the paper's hyper-parameters for it."""

    title: str
    kind: str  # of answer: choice | answer | soft | count | match, or, asked for, rank (see clipbert.video_loss)
    answers: int = 1  # K: a score per option or count; 2 for "match"; open-ended: at least this many (FrameQA: 1540)
    validation: bool = False  # choose best.pt by a "val" split (False: there is none, the last is the best)
    read: object = None  # (folder, split) -> examples; this, the next two and text_length are those of data.LAYOUTS
    toy: str = ""  # which part of the toy data has its layout
    top_answers: int | None = None  # open-ended: only so many, the most frequent; others count as wrong (None: all)
    size: int = 448  # L, pixels
    fps: float = 1.0  # a clip of T frames spans T / fps seconds
    frames: int = 1  # T
    train_clips: int = 1  # N_train
    agg: str = "mean"  # G
    text_length: int = 0  # Lt at most, [CLS] and [SEP] included
    batch_size: int = 16  # videos at a time
    grad_accum: int = 2  # ... and how many such batches to an update
    epochs: int = 15
    lr: float = 1e-4  # peak
    weight_decay: float = 1e-3
    clip_grad: float = 5.0  # the gradient's largest norm
    test_clips: tuple = (1, 4, 16)  # N_test: evaluate at each of these
    tiny: dict | None = None  # what the tiny model changes for this task, besides TINY


# Eight clips of two frames, as in the paper's MSRVTT rows.
RETRIEVAL = {"fps": 2.0, "frames": 2, "train_clips": 8, "agg": "lse", "grad_accum": 1, "epochs": 20, "lr": 5e-5}

# TGIF-QA: L, batch and learning rate are the paper's; the reference code's own config has 768, 16 and 5e-5.
TASKS = {
    "tgif_qa_action": Task("TGIF-QA action", "choice"),
    "tgif_qa_transition": Task("TGIF-QA transition", "choice", tiny={"max_steps": 1200}),
    "tgif_qa_frameqa": Task("TGIF-QA FrameQA", "answer", answers=1540),
    "tgif_qa_count": Task("TGIF-QA count", "count"),
    "msrvtt_retrieval": Task("MSRVTT retrieval", "match", 2, **RETRIEVAL),
    "didemo_retrieval": Task("DiDeMo paragraph retrieval", "match", 2,
                             **RETRIEVAL | {"validation": True, "batch_size": 8, "grad_accum": 4}),
    "activitynet_retrieval": Task("ActivityNet paragraph retrieval", "match", 2,
                                  **RETRIEVAL | {"fps": 1.0, "train_clips": 4, "grad_accum": 2, "epochs": 80}),
    "msrvtt_qa": Task("MSRVTT-QA", "answer", validation=True, **RETRIEVAL | {"epochs": 10},
                      tiny={"train_clips": 2, "lr": 5e-4, "max_steps": 1200}),
    # Five captions, scored by a retrieval model: train (or --eval) one; only the test file is this task's own.
    "msrvtt_mc": Task("MSRVTT multiple choice", "match", 2, **RETRIEVAL),
    "vqa": Task("VQA v2", "soft", size=768, batch_size=32, grad_accum=1, epochs=5, clip_grad=2.0, test_clips=(1,),
                tiny={"lr": 5e-4, "max_steps": 2400}),
}  # fmt: skip
TASKS["qa"] = TASKS["msrvtt_qa"]._replace(title="one's own questions")
# How a task's data is read stands in data.py, where `data.py check` needs it, too.
TASKS = {name: task._replace(**{field: getattr(data.LAYOUTS[name], field)
                                for field in ("read", "toy", "top_answers", "text_length")})
         for name, task in TASKS.items()}  # fmt: skip

# What the tiny model changes. The learning rate decides whether it leaves ln(5) at all: most toy frames do not show the
# answer, and at 1e-3 that noise teaches the scores to ignore the options before attention has learned to match them.
TINY = {"size": 64, "fps": 1.0, "frames": 1, "train_clips": 1, "batch_size": 32, "grad_accum": 1, "lr": 3e-4,
        "max_steps": 800}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Settings: a task's row, then the tiny model's changes, then the command line


def parse_arguments(arguments=None):
    parser = data.Parser(description=__doc__)
    add = parser.add_argument
    names = [*data.ALIASES, *TASKS]
    add("--task", default="tgif_qa", choices=names, metavar="TASK", help=", ".join(names))
    add("--data", type=data.folder, help="the data set's folder (default: the toy data, written to toy_data/)")
    add("--out", type=Path, help="where to write (default: runs/TASK)")
    # other things to do than train
    add("--eval", type=Path, metavar="CKPT", help="only evaluate this checkpoint of ours")
    add("--split", choices=["train", "val", "test"], default="test", help="with --eval: on which examples")
    add("--predict", type=Path, metavar="VIDEO", help="with --eval: answer --question about one video")
    add("--question")
    add("--options", nargs="+", default=[], help="multiple choice: the options")
    add("--sheet", type=Path, metavar="FILE", help="with --predict: draw what the model looked at")
    add("--words", action="store_true", help="with --sheet: the attention from each word, too")
    clipbert.add_flags(parser)
    # hyper-parameters of the tasks; the default is the task's row, printed at the start
    parser.numbers("--train_clips", high=1000, help="N_train")
    add("--agg", choices=["mean", "max", "lse"], help="G: how clips become a video")
    parser.numbers("--test_clips", high=1000, nargs="+", help="N_test: evaluate at each of these")
    add("--select", choices=["uniform", "difference"], default="uniform", help="in testing: clips at equal distances, "
        "or those that differ most out of four times as many")  # fmt: skip
    parser.numbers("--rerank", nargs="+", metavar="K", help="retrieval: score all pairs on one clip, then only each "
                   "caption's best K on all; several K: side by side; as many K as videos: all pairs")  # fmt: skip
    add("--rank_loss", action="store_true", help="retrieval: a margin between captions, not cross entropy")
    add("--cache", action="store_true", help="take frames from the small files that `python data.py cache` wrote")
    add("--allow_missing", action="store_true", help="train without missing videos; in testing they count as wrong")
    args = parser.parse_args(arguments)
    args.task = data.ALIASES.get(args.task, args.task)
    args.out = args.out or Path("runs") / args.task
    if args.split != "test" and not args.eval:
        parser.error("--split chooses what --eval CKPT evaluates")
    if (args.predict or args.question or args.options) and not (args.eval and args.predict and args.question):
        parser.error("--predict VIDEO needs --eval CKPT and --question TEXT, and they need it")
    if args.sheet and not args.predict or args.words and not args.sheet:
        parser.error("--sheet draws what --predict VIDEO looked at, --words adds to it; give what is missing")
    if args.rank_loss and TASKS[args.task].kind != "match":
        parser.error(f"--rank_loss is for retrieval, which {args.task} is not; leave it out")
    clipbert.check_flags(parser, args)
    return args


def settings_for(args, cfg, stored=None):
    """The hyper-parameters in force: the task's row, tiny's changes, a checkpoint's settings, the command line's."""
    task = TASKS[args.task]
    names = Task._fields[Task._fields.index("size") : Task._fields.index("test_clips") + 1]
    settings = {name: getattr(task, name) for name in names} | {"max_steps": None, "rerank": None}
    if cfg.backbone == "tiny":
        settings |= TINY | (task.tiny or {})
    return clipbert.override(settings | (stored or {}), args, cfg)


# ----------------------------------------------------------------------------------------------------------------------
# Data and model


def load_examples(args, split):
    """The examples of a split. Missing videos stop the run, unless --allow_missing."""
    task = TASKS[args.task]
    folder = args.data or data.toy_data(task.toy) / task.toy
    examples = task.read(folder, split=split)[: args.limit]
    videos = {example.video for example in examples}
    missing = sorted(video for video in videos if data.find_media(folder, video) is None)
    if missing:
        what = f"{len(missing):,} of {len(videos):,} {split} videos are missing under {folder} ({missing[0]}, ...)"
        if not args.allow_missing or len(missing) == len(videos):
            raise data.DataError(f"{what}: put them there, or train without them (--allow_missing)")
        print(f"note: {what}", file=sys.stderr)
        if split == "train":
            missing = set(missing)
            examples = [example for example in examples if example.video not in missing]
    return folder, examples


def answers_for(task, folder, train):
    """The list of answers of an open-ended task; an answer's place is its label. None for other kinds."""
    if task.kind not in ("answer", "soft"):
        return None  # a score per option, per caption or per count needs no list
    return data.read_answer_list(folder) or data.answer_list(train, task.top_answers)


def task_row(args, state):
    """The task's row of the table; with --rank_loss, or a checkpoint trained with it, one score instead of two."""
    task = TASKS[args.task]
    if task.kind == "match" and (state["num_outputs"] == 1 if state else args.rank_loss):
        return task._replace(kind="rank", answers=1)
    return task


def model_from(state, path, task_name):
    """The model that one of our fine-tuning checkpoints holds."""
    if not {"num_outputs", "guess"} <= state.keys():
        raise ValueError(f"{path}: not a fine-tuned checkpoint of ours; fine-tune from it with --init")
    retrieval = TASKS[state["task"]].kind == TASKS[task_name].kind == "match"  # one retrieval model does for them all
    if state["task"] != task_name and not retrieval:
        raise ValueError(f"{path}: a checkpoint of --task {state['task']}, not {task_name}")
    model = clipbert.ClipBert(clipbert.config_from(state), state["num_outputs"])
    model.load_state_dict(state["model"])
    return model


class Run(NamedTuple):
    """What training and evaluation share."""

    task: Task
    folder: Path
    settings: dict
    device: clipbert.Device
    tokenizer: object
    answers: list | None
    seed: int
    blind: bool
    cache: bool = False
    select: str = "uniform"
    guess: object = None  # see best_guess

    def loader(self, examples, n_clips, train, batches):
        s = self.settings
        pairs = train and self.task.kind in ("match", "rank")  # a right and a wrong caption for each video
        dataset = (data.MatchDataset if pairs else data.ClipDataset)(
            examples, self.folder, n_clips=n_clips, n_frames=s["frames"], fps=s["fps"], size=s["size"],
            train=train, seed=self.seed, blind=self.blind, cache=self.cache, select=self.select,
        )  # fmt: skip
        collate = data.Collator(self.tokenizer, s["text_length"], self.answers)
        return data.data_loader(dataset, batches, collate, self.device.workers, self.device.name == "cuda")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(run, model, training, examples, validate):
    """The training loop, the same for every task.

    A step is grad_accum batches, one update. Which examples and which random clips it sees depends on the seed and the
    step alone, so a resumed run repeats the uninterrupted one.
    """
    s, batches_per_step = run.settings, run.settings["grad_accum"] * clipbert.PROCESSES

    def batches_after(step):
        total = training.total_steps * batches_per_step
        return data.training_order(len(examples), s["batch_size"], total, run.seed, step * batches_per_step)

    training.examples_of = lambda step: [
        examples[i].id for batch in islice(batches_after(step - 1), batches_per_step) for _, i in batch
    ]
    own_batches = islice(batches_after(training.start), clipbert.RANK, None, clipbert.PROCESSES)
    loader = iter(run.loader(examples, s["train_clips"], True, own_batches))
    steps_per_epoch = -(-len(examples) // training.per_step)
    model.train()
    for step in training.steps():
        loss = 0.0
        for batch in training.batches(loader):
            with run.device.autocast():
                p = training.forward(batch["frames"], batch["input_ids"], batch["attention_mask"])  # p_1, ..., p_N
                p = clipbert.aggregate_clips(p.float(), s["agg"])  # p = G(p_1, ..., p_N)
                # The reference sums the gradients of accumulated batches; the mean makes two batches of 16 one of 32.
                part = clipbert.video_loss(p, batch["target"], run.task.kind) / s["grad_accum"]
            training.scaler.scale(part).backward()
            loss = loss + part.detach()
        training.update(step, loss=loss)  # clipbert.Training: learning rate, clipped gradient, AdamW; the log
        if validate and (step % steps_per_epoch == 0 or step == training.total_steps):
            training.flush()
            score = validate()
            training.log.write({"step": step, "validation": score})
            training.save_best(step, score)
            model.train()
        training.end_step(step)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation (paper, section 4: N_test uniform clips, aggregated as in training; --select: others)


@torch.no_grad()
def score_videos(run, model, examples, n_clips):
    """p of every example at N_test = n_clips, as (scores, readable) pairs in order, and what could not be read."""
    model.eval()
    size = max(1, 2 * run.settings["batch_size"] // n_clips)  # keep the number of clips in memory level
    keys = [(0, i) for i in range(len(examples))]
    batches = [keys[b : b + size] for b in range(0, len(keys), size)]
    results, errors = [], []
    for batch in run.loader(examples, n_clips, False, batches):
        batch = run.device.move(batch)
        with run.device.autocast():
            logits = clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
        p = clipbert.aggregate_clips(logits.float(), run.settings["agg"])
        if run.task.kind in ("match", "rank"):  # multiple choice by a retrieval model
            p = clipbert.match_score(p)
        p = p.view(len(batch["examples"]), -1).cpu()  # (B, K), or (B, n): a score for each of n options
        results += [(scores, not lines) for scores, lines in zip(p, batch["unreadable"], strict=True)]
        errors += [line for lines in batch["unreadable"] for line in lines]
    return results, errors


def judge(task, example, scores, readable, answers):
    """A prediction and how good it is: right or wrong, VQA's accuracy, or, in counting, the squared error."""
    if task.kind == "count":
        prediction = scores.item() if readable else 0.0
        return prediction, (prediction - example.answer) ** 2
    best = scores.argmax().item()
    names = example.options or answers
    prediction = names[best] if readable and best < len(names) else None  # None: unreadable, or an unused output
    if task.kind == "soft":
        return prediction, data.vqa_accuracy(prediction, example) if prediction else 0.0
    correct = best == example.answer if example.options else prediction == example.answer
    return prediction, bool(readable and correct)


def evaluate(run, model, examples, clip_counts):
    """{n: metrics} for each N_test, the predictions at the last of them, and what could not be read."""
    if run.task.kind in ("match", "rank") and not examples[0].options:
        return evaluate_retrieval(run, model, examples, clip_counts)
    by_clips, predictions, errors = {}, [], []
    name, factor = ("mse", 1) if run.task.kind == "count" else ("accuracy", 100)
    for n in clip_counts:
        results, errors = score_videos(run, model, examples, n)
        predictions, values = [], {"": []}  # values: of all examples, and of each kind of question
        for e, (scores, readable) in zip(examples, results, strict=True):
            prediction, value = judge(run.task, e, scores, readable, run.answers)
            predictions.append({"id": e.id, "video": e.video, "text": e.text, "options": list(e.options),
                                "answer": e.answer, "prediction": prediction, name: value, "clips": n})  # fmt: skip
            for kind in {"", e.kind}:
                values.setdefault(kind, []).append(value * factor)
        by_clips[str(n)] = {f"{name}_{kind}" if kind else name: mean(values[kind]) for kind in sorted(values)}
    return by_clips, predictions, errors


def mean(values):
    return round(float(np.mean(list(values))), 4)


def best_guess(task, train):
    """What to say without looking: the most frequent training answer, the mean training count; None: any option."""
    if task.kind == "count":
        return float(np.mean([example.answer for example in train]))
    return data.answer_list(train, 1)[0] if task.kind in ("answer", "soft") else None


def chance_level(task, guess, test):
    """How good the best guess is on the test examples."""
    if test[0].options:
        return mean(100 / len(example.options) for example in test)
    if task.kind in ("match", "rank"):
        return 100 / len({example.video for example in test})  # R@1
    if task.kind == "count":
        return mean((example.answer - guess) ** 2 for example in test)
    if task.kind == "soft":
        return mean(100 * data.vqa_accuracy(guess, example) for example in test)
    return mean(100 * (example.answer == guess) for example in test)


# Retrieval: every caption against every video. Each clip goes through the CNN once and each caption through the
# tokenizer once; the reference repeats the CNN for every batch of captions.


@torch.no_grad()
def encode_videos(run, model, videos, n_clips):
    """F_v of one example a video: grids (N, h, w, d), None where a video can't be read; and what could not be read.

    They wait in CPU memory, in the precision of the computation: half, where that is bf16 or fp16.
    """
    model.eval()
    grids, errors = [], []
    for batch in run.loader(videos, n_clips, False, [[(0, i)] for i in range(len(videos))]):
        with run.device.autocast():
            grid = model.encode_frames(batch["frames"][0].to(run.device.name))  # (N, T, h, w, d)
        grid = grid.mean(1).to("cpu", run.device.dtype)  # the mean over T that every caption would take again
        grids.append(None if batch["unreadable"][0] else grid)
        errors += batch["unreadable"][0]
    return grids, errors


@torch.no_grad()
def score_pairs(run, model, texts, grids, rerank=None):
    """How well each caption fits each video, as probabilities (captions, videos); 0 for a video that can't be read.

    rerank = K: all pairs are scored on the middle clip alone, and only the best K of each caption on all clips. Of the
    other pairs it returns that first score minus 1: in both directions they rank among themselves, below all pairs that
    were scored in full.
    """
    model.eval()
    length = run.settings["text_length"]
    tokens = run.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    scores = torch.zeros(len(texts), len(grids), dtype=torch.float64)  # float32 would lose small scores beside the -1

    def fill(chosen, clips_of):
        for column, grid in enumerate(grids):
            rows = chosen[:, column].nonzero().flatten()
            if grid is not None and len(rows):
                for places, p in score_captions(run, model, tokens, rows, clips_of(grid)):
                    scores[places, column] = p

    chosen = torch.ones_like(scores, dtype=torch.bool)
    if rerank and rerank < len(grids):
        fill(chosen, lambda grid: grid[len(grid) // 2][None])
        chosen = torch.zeros_like(chosen).scatter(1, scores.topk(rerank).indices, True)
        scores -= 1
    fill(chosen, lambda grid: grid)
    return scores


def score_captions(run, model, tokens, rows, grid):
    """The captions in `rows` against one video, whose clips are grid (N, h, w, d): places (C,), probabilities (C,)."""
    N, grid = len(grid), grid[:, None].to(run.device.name)  # (N, 1, h, w, d): N clips as N videos of one frame
    for places, *text in caption_batches(tokens, rows, max(1, 1024 // N)):
        ids, mask = (x.to(run.device.name).repeat(N, 1) for x in text)  # (N*C, Lt): all captions for clip 1, ...
        with run.device.autocast():
            logits = model.classify(grid, ids, mask).view(N, len(places), -1)  # (N, C, 2 or 1)
        logits = logits.double()  # as float32, all probabilities from a difference of 17 on would be 1: no ranking them
        yield places, clipbert.match_score(clipbert.aggregate_clips(logits, run.settings["agg"])).cpu()


def caption_batches(tokens, rows, size):
    """The captions in `rows`: their places (C,), ids and mask (C, Lt); like lengths together: little padding."""
    lengths = tokens["attention_mask"].sum(1)
    for places in rows[lengths[rows].argsort()].split(size):
        longest = lengths[places].max()
        yield places, tokens["input_ids"][places, :longest], tokens["attention_mask"][places, :longest]


def retrieval_metrics(scores, video_of_caption):
    """R@1/5/10, median and mean rank, both ways. scores (captions, videos); video_of_caption: a column per caption.

    Exact ties share their mean position: a model that scores everything alike gets the rank of chance, not 1. A video
    with several captions is found by any of them: its best-ranked one counts.
    """
    columns = torch.as_tensor(video_of_caption)
    own = scores.gather(1, columns[:, None])  # (captions, 1)
    by_caption = ranks_of(own, scores)
    ranks = []
    for column in range(scores.shape[1]):
        mine = scores[columns == column, column]
        others = scores[columns != column, column]  # its own other captions do not compete
        if len(mine):
            ranks.append(ranks_of(mine.max().view(1, 1), torch.cat([mine.max()[None], others])[None]))
    return {"text_to_video": recalls(by_caption), "video_to_text": recalls(torch.cat(ranks))}


def ranks_of(own, scores):
    """1 + how many score higher + half of how many others score the same. own (n, 1), scores (n, m) -> (n,)."""
    return 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2


def recalls(ranks):
    """R@k, the percentage of ranks up to k; and the median and the mean rank, the lower the better."""
    found = {f"r{k}": mean((100.0 * (ranks <= k)).tolist()) for k in (1, 5, 10)}
    return found | {"median_rank": float(np.median(ranks)), "mean_rank": mean(ranks.tolist())}


def evaluate_retrieval(run, model, examples, clip_counts):
    """As `evaluate`; with --rerank K a row "n best K" for each K, side by side: the clips are read and encoded once."""
    by_clips, predictions, errors = {}, [], []
    videos = list({example.video: example for example in examples}.values())  # one example of each video
    places = {example.video: i for i, example in enumerate(videos)}
    columns = [places[example.video] for example in examples]
    for n in clip_counts:
        grids, errors = encode_videos(run, model, videos, n)
        reranks = run.settings.get("rerank") if n > 1 else None  # one clip: the first score is the full one
        for rerank in reranks or [None]:
            scores = score_pairs(run, model, [example.text for example in examples], grids, rerank)
            by_clips[f"{n} best {rerank}" if rerank else str(n)] = retrieval_metrics(scores, columns)
        ranks = ranks_of(scores.gather(1, torch.tensor(columns)[:, None]), scores).tolist()
        best = scores.topk(min(5, len(videos))).indices.tolist()
        predictions = [
            {"id": e.id, "video": e.video, "text": e.text, "rank": rank,
             "prediction": [videos[i].video for i in top], "clips": n}
            for e, rank, top in zip(examples, ranks, best, strict=True)
        ]  # fmt: skip
    return by_clips, predictions, errors


########################################################################################################################
# Here the paper's part ends. What follows puts it to use: reports, the three things this script does, pictures.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def report(run, args, by_clips, predictions, errors, chance, seconds):
    """Write metrics.json and predictions.jsonl; print the table."""
    metrics = {
        "task": args.task, "data": str(args.data or "toy"), "split": args.split, "examples": len(predictions),
        "chance": round(chance, 4), "seconds": round(seconds, 1), "blind": args.blind, "select": run.select,
        "unreadable": len(errors), "by_clips": by_clips,
    }  # fmt: skip
    clipbert.write_text(args.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    clipbert.write_text(args.out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in predictions))
    where = "toy" if not args.data else args.data
    print(f"\n{run.task.title}, {where} data, {len(predictions):,} {args.split} examples, "
          f"G = {run.settings['agg']}{', blind' if args.blind else ''}"
          f"{', clips by difference' if run.select != 'uniform' else ''}")  # fmt: skip
    if "text_to_video" in next(iter(by_clips.values())):  # one line a direction
        by_clips = {f"{n} {way}": row for n, both in by_clips.items() for way, row in both.items()}
    names, wide = list(next(iter(by_clips.values()))), max(18, *(len(n) + 2 for n in by_clips))
    print(f"{'N_test':<{wide}}" + "".join(f"{name:>{max(len(name), 8) + 2}}" for name in names))
    for n, row in by_clips.items():
        print(f"{n:<{wide}}" + "".join(f"{row[name]:{max(len(name), 8) + 2}.2f}" for name in names))
    print(f"{'chance':<{wide}}{chance:{max(len(names[0]), 8) + 2}.2f}")
    clipbert.list_unreadable(errors, "counted as wrong")


# ----------------------------------------------------------------------------------------------------------------------
# The three things this script does


def run_training(args):
    """Train, then evaluate best.pt on the test split."""
    state = clipbert.load_stopped(args, args.task) if args.resume else None
    torch.manual_seed(args.seed)
    with clipbert.first_one_first():
        run, model, vocabulary, examples, test = prepare(args, state)
    training = clipbert.Training(
        args, run, model, len(examples), state, task=args.task, data=str(run.folder), vocabulary=vocabulary,
        answers=run.answers, guess=run.guess, num_outputs=model.num_outputs,
    )  # fmt: skip
    print(f"{run.task.title}: {len(examples):,} training and {len(test):,} test examples from {run.folder}")
    print(training.summary("examples"))
    validate = validation(args, run, model) if run.task.validation and args.data else None
    with training:
        train(run, model, training, examples, validate)
    training.list_unreadable()
    if validate:
        model.load_state_dict(clipbert.load_checkpoint(args.out / "best.pt")["model"])
    else:  # without a validation split: choosing a step by the test set would be cheating, so the last is the best
        training.save("best.pt", training.total_steps)
    by_clips, predictions, errors = evaluate(run, model, test, run.settings["test_clips"])
    seconds = time.time() - training.began
    report(run, args, by_clips, predictions, errors, chance_level(run.task, run.guess, test), seconds)
    if not clipbert.RANK:
        with clipbert.whole_file(args.out / "sheet.png") as file:
            example_sheet(run, model, test, predictions).save(file, "PNG")
    print_next_steps(args)


def prepare(args, state):
    """-> the Run, a new (or, with a checkpoint's state, the stopped) model, its vocabulary, training, test examples."""
    task = task_row(args, state)
    folder, examples = load_examples(args, "train")
    _, test = load_examples(args, "test")
    if state:
        model = model_from(state, args.out, args.task)
        vocabulary, answers = state["vocabulary"], state["answers"]
    else:
        answers = answers_for(task, folder, examples)
        # FrameQA: the reference's max(n, 1540)
        outputs = len(answers) if task.top_answers else max(task.answers, len(answers or []))
        texts = (text for example in examples for text in data.input_texts(example))
        model, vocabulary = clipbert.start_model(
            lambda cfg: clipbert.ClipBert(cfg, outputs), args,
            lambda: data.vocabulary_from_text(texts), lambda: data.read_vocabulary(args.bert),
        )  # fmt: skip
    if answers:
        examples = only_known_answers(examples, set(answers), "training: left out")
        if not examples:
            raise data.DataError(f"{folder}: no training answer is in the list of answers there; remove the list")
        only_known_answers(test, set(answers), "test: counted as wrong")
    settings = settings_for(args, model.cfg, state and state["settings"])
    tokenizer = data.build_tokenizer(vocabulary)
    device = clipbert.choose_device(args)
    guess = state["guess"] if state else best_guess(task, examples)
    run = Run(task, folder, settings, device, tokenizer, answers, args.seed, args.blind, args.cache, args.select, guess)
    if args.cache:
        data.check_cached(folder, examples + test, settings["size"])
    return run, model, vocabulary, examples, test


def only_known_answers(examples, answers, what):
    """The examples with an answer in the list; the others are counted."""
    known = [e for e in examples if (e.answer in answers if isinstance(e.answer, str) else answers & e.answer.keys())]
    if others := len(examples) - len(known):
        print(f"{others:,} of {len(examples):,} questions have no answer in the list of {len(answers):,} ({what})")
    return known


def validation(args, run, model):
    """-> a function that evaluates on the validation split, one clip a video; None without such a split."""
    try:
        _, examples = load_examples(args, "val")
    except data.NoAnnotations as error:
        print(f"{error}: without a validation split the last checkpoint counts as the best")
        return None

    def validate():
        metrics = evaluate(run, model, examples, [1])[0]["1"]
        return metrics["text_to_video"]["r1"] if "text_to_video" in metrics else metrics["accuracy"]

    return validate


def load_for_use(args):
    """A fine-tuned checkpoint, ready to answer: (run, model)."""
    state = clipbert.load_checkpoint(args.eval)
    model = model_from(state, args.eval, args.task)
    settings = settings_for(args, model.cfg, state["settings"])
    task, device = task_row(args, state), clipbert.choose_device(args)
    tokenizer = data.build_tokenizer(state["vocabulary"])
    folder = args.data or (None if args.predict else data.toy_data(task.toy) / task.toy)
    run = Run(task, folder, settings, device, tokenizer, state["answers"], args.seed, args.blind, args.cache,
              args.select, state["guess"])  # fmt: skip
    return run, device.place(model)


def run_evaluation(args):
    """--eval: evaluate a checkpoint at each N_test."""
    run, model = load_for_use(args)
    _, test = load_examples(args, args.split)
    if args.cache:
        data.check_cached(run.folder, test, run.settings["size"])
    began = time.time()
    by_clips, predictions, errors = evaluate(run, model, test, run.settings["test_clips"])
    chance = chance_level(run.task, run.guess, test)
    report(run, args, by_clips, predictions, errors, chance, time.time() - began)


def run_prediction(args):
    """Answer one question about one video, at the largest N_test."""
    run, model = load_for_use(args)
    if (run.task.kind == "choice") != (len(args.options) > 1) and run.task.kind not in ("match", "rank"):
        raise ValueError(f"--task {args.task}: multiple choice, and only that, takes --options A B ...")
    s, n = run.settings, max(run.settings["test_clips"])
    example = data.Example(id="0", video=args.predict.name, text=args.question, options=tuple(args.options), answer=0)
    media, read = data.probe(args.predict), functools.partial(data.read_frames, args.predict, size=s["size"])
    clips = data.choose_clips(read, media.num_frames, media.fps, n, s["frames"], s["fps"], False, select=args.select)
    frames = read(clips.flatten().tolist()).unflatten(0, clips.shape)
    item = {"example": example, "frames": frames, "unreadable": []}
    seen = look(run, model, data.Collator(run.tokenizer, s["text_length"])([item]))
    print(f"{args.predict.name}, {n} clips of {s['frames']} frames: {args.question}")
    for i in data.best_first(seen.ranking):
        score = seen.ranking[i].item()
        print(f"  {score:.2f}" if run.task.kind == "count" else f"  {score:6.1%}  {seen.names[i]}")
    if args.sheet:
        data.attention_sheet(args.predict, clips, s["frames"] / s["fps"], s["agg"], seen, args.words).save(args.sheet)


def look(run, model, batch):
    """What the model makes of a batch of one example, and what it looked at: a data.Seen."""
    kept, how, example = [], run.settings["agg"], batch["examples"][0]
    model.eval()
    model.bert.set_attn_implementation("eager")  # which has the attention weights as a tensor; SDPA never does
    attention = model.bert.encoder.layer[-1].attention.self
    hook = attention.register_forward_hook(lambda module, inputs, outputs: kept.append(outputs[1].float().mean(1)))
    batch = run.device.move(batch)
    with torch.no_grad(), run.device.autocast(), torch.compiler.set_stance("force_eager"):  # compiled, no hook runs
        logits = clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
    hook.remove()
    model.bert.set_attn_implementation("sdpa")
    logits = logits.float().cpu()  # (N, n, K)
    scores = torch.stack([probabilities(run.task, p) for p in logits])  # (N, names)
    ranking = probabilities(run.task, clipbert.aggregate_clips(logits, how))
    best, counting = ranking.argmax().item(), run.task.kind == "count"
    points = logits[..., -1] if run.task.kind in ("match", "rank") else logits.flatten(1)  # (N, names), one each
    names = list(example.options) or (["count"] if counting else run.answers) or [example.text]
    text = best if example.options else 0  # multiple choice has a text for each option
    words = batch["attention_mask"][text].sum() - 1  # all but the last, [SEP]
    grid = kept[0].cpu().unflatten(0, logits.shape[:2])[:, text, :words, batch["input_ids"].shape[1] :]
    return data.Seen(
        example.text, batch["frames"][0].cpu(), run.tokenizer.convert_ids_to_tokens(batch["input_ids"][text, :words]),
        grid.unflatten(2, (math.isqrt(grid.shape[2]), -1)), names + ["(unused)"] * (len(ranking) - len(names)), scores,
        clip_weights(points[:, best], how), ranking, max(10.0, scores.max().item()) if counting else 1,
    )  # fmt: skip


def example_sheet(run, model, examples, predictions, each=4):
    """A picture of the first few test examples that were right, and of those that were wrong."""
    # Right is, in retrieval, a caption whose own video comes first, and in counting what is off by less than a half.
    columns, run = ([], []), run._replace(device=run.device._replace(workers=0))
    for example, row in zip(examples, predictions, strict=True):
        right = row["rank"] == 1 if "rank" in row else row["mse"] < 0.25 if "mse" in row else row["accuracy"] >= 0.5
        if len(columns[not right]) < each:
            columns[not right].append((retrieval_card if "rank" in row else answer_card)(run, model, example, row))
    title = f"{run.task.title}, N_test = {predictions[0]['clips']}: the first test examples right and wrong"
    return data.example_sheet(title, *columns)


def answer_card(run, model, example, row):
    """Pictures and lines: the clip that weighs most (in mean: that is surest), its attention, question and answers."""
    seen = look(run, model, next(iter(run.loader([example], row["clips"], False, [[(0, 0)]]))))
    best = seen.ranking.argmax()
    i = max(range(row["clips"]), key=lambda i: (seen.weights[i].item(), seen.scores[i, best].item()))
    pictures, attention = [data.picture(pixels, 180) for pixels in seen.frames[i][:3]], seen.attention[i, 0]
    pictures.append(data.overlay(seen.frames[i, seen.frames.shape[1] // 2], attention, attention.max().item(), 180))
    answer, said = example.answer, row["prediction"]
    answer = example.options[answer] if example.options else answer
    answer = max(answer, key=answer.get, default="") if isinstance(answer, dict) else answer
    said = f"{said:.2f}" if isinstance(said, float) else said or "nothing"
    return pictures, [example.text, f"predicted: {said}", f"answer: {answer}", f"(clip {i + 1} of {row['clips']})"]


def retrieval_card(run, model, example, row):
    """Pictures and lines: a frame from the middle of a caption's three best videos, and where its own one stands."""
    best = [example._replace(video=video) for video in row["prediction"][:3]]
    batches = run.loader(best, 1, False, [[(0, i)] for i in range(len(best))])
    pictures = [data.picture(batch["frames"][0, 0, 0], 180) for batch in batches]
    return pictures, [example.text, f"its own video: number {row['rank']:g}", f"shown: numbers 1 to {len(best)}"]


def probabilities(task, p):
    """p (n, K) of a clip or a video -> a number for each option or answer: probabilities, or the count itself."""
    if task.kind in ("match", "rank"):
        return clipbert.match_score(p)
    return p.flatten() if task.kind == "count" else p.flatten().softmax(0)


def clip_weights(scores, how):
    """Each clip's weight in G, dp / dp_i: 1/N in mean, 1 for the highest in max, softmax in lse. (N,) -> (N,)."""
    with torch.enable_grad():
        scores = scores.detach()[:, None].requires_grad_()
        return torch.autograd.grad(clipbert.aggregate_clips(scores, how).sum(), scores)[0][:, 0]


def print_next_steps(args):
    if args.data is None:
        command = f"python finetune.py --task {args.task}"
        print(f"\nNext: {command} --eval {args.out / 'best.pt'} --predict VIDEO --question ...\n"
              f"      {command} --blind                   what the text alone gives away\n"
              f"      {command} --data DIR --model base   the paper's model on real data")  # fmt: skip


if __name__ == "__main__":
    args = parse_arguments()
    clipbert.main(run_prediction if args.predict else run_evaluation if args.eval else run_training, args)
