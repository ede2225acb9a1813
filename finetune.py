"""Fine-tune and evaluate ClipBERT on a task (paper, section 4).

    python finetune.py --task tgif_qa                            toy data: minutes on a laptop CPU
    python finetune.py --task tgif_qa --data DIR --model base    the paper's model on real data
    python finetune.py --task tgif_qa --data DIR --init CKPT     from image-text pretraining
    python finetune.py --task tgif_qa --data DIR --eval CKPT --test_clips 1 4 16
    python finetune.py --task tgif_qa --eval CKPT --predict VIDEO.gif --sheet out.png \\
                       --question "what does the red triangle do 3 times ?" --options jump spin wave
    python finetune.py --task tgif_qa --resume                   go on after an interruption
    torchrun --nproc_per_node=8 finetune.py --task tgif_qa ...   eight GPUs, eight times the batch

A run writes to a folder of its own, runs/<task>/ if that is free: config.json, log.jsonl (a line a
step or evaluation), last.pt and the one before it, previous.pt, best.pt, predictions.jsonl,
metrics.json and sheet.png (some of the test examples, right and wrong). --eval writes beside its
checkpoint, into files named after what was evaluated.

Read it from `run_training` on: settings -> data -> model -> loop -> evaluation. What --help prints
as defaults, a task may have otherwise (TASKS), and the tiny model again (TINY).
"""

import json
import math
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# Threads that wait for each other sleep instead of spinning: on a busy CPU five times as fast.
# torch reads this as it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import clipbert
import data
from clipbert import setting

# ----------------------------------------------------------------------------------------------------------------------
# Settings: clipbert.Settings and these; a task's row has what the paper has instead of the defaults


@dataclass
class Settings(clipbert.Settings):
    """What fine-tuning can be told, besides."""

    task: str = setting(
        "tgif_qa_action", "what to learn",
        choices=[*data.ALIASES, *(name for name in data.LAYOUTS if name != "pretrain")],
    )  # fmt: skip
    text_length: int = setting(
        None, "Lt at most, [CLS] and [SEP] included (default: the task's)", low=3, high=512
    )
    train_clips: int = setting(1, "N_train", high=1000)
    agg: str = setting("mean", "G: how clips become a video", choices=["mean", "max", "lse"])
    test_clips: tuple = setting(
        (1, 4, 16), "N_test: evaluate at each of these", high=1000, nargs="+"
    )
    rerank: int = setting(None, "retrieval: score all pairs on one clip, only each caption's best "
                          "K on all", metavar="K")  # fmt: skip
    # other things to do than train
    split: str = setting("test", "with --eval: on which examples", choices=["train", "val", "test"])
    predict: str = setting(None, "with --eval: answer --question about one video", metavar="VIDEO")
    question: str = setting(None, "... this one; of a retrieval model: a caption")
    options: tuple = setting(
        (), "... multiple choice: the options; retrieval: more captions", nargs="+"
    )
    sheet: str = setting(None, "with --predict: draw what the model looked at", metavar="FILE")
    rows: int = setting(6, "with --sheet: for so many clips", high=64)


class Task(NamedTuple):
    """A data set, and what is not the default there. data.LAYOUTS says how its files are read."""

    title: str
    kind: str  # of answer: choice | answer | soft | count | match (see clipbert.video_loss)
    outputs: int = 1  # K: 1 a score an option, or a count; 2 "match"; FrameQA: at least so many
    validation: bool = False  # best.pt is chosen by a "val" split; False: the last is the best
    paper: dict | None = None  # settings: the paper's; where it is silent, the reference's
    tiny: dict | None = None  # what the tiny model changes, besides TINY


# One clip of one frame: the paper's TGIF-QA. The reference code's own is another: size 768,
# grad_accum 1, lr 5e-5.
CLIPS_1x1 = {"size": 448, "fps": 1.0, "frames": 1, "train_clips": 1, "agg": "mean",
             "batch_size": 16, "grad_accum": 2, "epochs": 15, "lr": 1e-4}  # fmt: skip
# Eight clips of two frames, a second each: its MSRVTT. LogSumExp lets one clip decide.
CLIPS_8x2 = {"size": 448, "fps": 2.0, "frames": 2, "train_clips": 8, "agg": "lse",
             "batch_size": 16, "grad_accum": 1, "epochs": 20, "lr": 5e-5}  # fmt: skip

TASKS = {
    "tgif_qa_action": Task("TGIF-QA action", "choice", paper=CLIPS_1x1),
    "tgif_qa_transition": Task("TGIF-QA transition", "choice", paper=CLIPS_1x1,
                               tiny={"max_steps": 1200}),
    "tgif_qa_frameqa": Task("TGIF-QA FrameQA", "answer", outputs=1540,  # the reference's
                            paper=CLIPS_1x1),
    "tgif_qa_count": Task("TGIF-QA count", "count", paper=CLIPS_1x1),
    "msrvtt_retrieval": Task("MSRVTT retrieval", "match", 2, paper=CLIPS_8x2),
    "didemo_retrieval": Task("DiDeMo paragraph retrieval", "match", 2, validation=True,
                             paper=CLIPS_8x2 | {"batch_size": 8, "grad_accum": 4}),
    "activitynet_retrieval": Task("ActivityNet paragraph retrieval", "match", 2,
                                  paper=CLIPS_8x2 | {"fps": 1.0, "train_clips": 4, "grad_accum": 2,
                                                     "epochs": 80}),
    "msrvtt_qa": Task("MSRVTT-QA", "answer", validation=True, paper=CLIPS_8x2 | {"epochs": 10},
                      tiny={"train_clips": 2, "lr": 5e-4, "max_steps": 1200}),
    "qa": Task("one's own questions", "answer", validation=True, paper=CLIPS_8x2 | {"epochs": 10}),
    # Five captions, scored by a retrieval model: train (or --eval) one; only the test is its own.
    "msrvtt_mc": Task("MSRVTT multiple choice", "match", 2, paper=CLIPS_8x2),
    "vqa": Task("VQA v2", "soft",
                paper=CLIPS_1x1 | {"size": 768, "batch_size": 32, "grad_accum": 1, "epochs": 5,
                                   "clip_grad": 2.0, "test_clips": (1,)},
                tiny={"lr": 5e-4, "max_steps": 2400}),
}  # fmt: skip

# What the tiny model changes. The learning rate decides whether it leaves ln(5) at all: half of the
# toy frames do not show the answer, and at 1e-3 that noise teaches the scores to ignore the options
# before attention has learned to match them.
TINY = {"size": 64, "fps": 1.0, "frames": 1, "train_clips": 1, "batch_size": 32, "grad_accum": 1,
        "lr": 3e-4, "max_steps": 800}  # fmt: skip


def parse_arguments(arguments=None):
    """The values that the command line gives, by name; flags that need each other are checked."""
    parser = data.Parser(description=__doc__)
    given = clipbert.parse_flags(parser, Settings, arguments)
    # --eval's checkpoint knows its task; --resume without --out looks for the default task's runs
    if not {"resume", "eval"} & given.keys():
        given.setdefault("task", Settings.task)
    if "task" in given:
        given["task"] = data.ALIASES.get(given["task"], given["task"])
    for flag, needed in {
        "split": ["eval"], "predict": ["eval", "question"], "question": ["predict"],
        "options": ["predict"], "sheet": ["predict"], "rows": ["sheet"],
    }.items():  # fmt: skip
        missing = [f"--{name}" for name in needed if name not in given]
        if flag in given and missing:
            parser.error(f"--{flag} needs {' and '.join(missing)}; add that, or leave it out")
    return given


def task_settings(name, model):
    """What a task has instead of the defaults: the paper's settings; the tiny model's changes."""
    task, length = TASKS[name], {"text_length": data.LAYOUTS[name].text_length}
    return length | (task.paper or {}) | (TINY | (task.tiny or {}) if model == "tiny" else {})


# ----------------------------------------------------------------------------------------------------------------------
# Training


def run_training(given):
    """Train, then evaluate best.pt on the test split."""
    name = given.get("task", Settings.task)
    s, state = clipbert.begin(Settings, given, name, lambda model: task_settings(name, model))
    if s.data and s.model == "tiny":
        print("note: the tiny model, on small frames; the paper's is --model base")
    torch.manual_seed(s.seed)  # of the initial weights, and of dropout
    with clipbert.first_one_first():
        examples, test = load_examples(s, "train"), load_examples(s, "test")
        val = validation_examples(s)
        data.check_cached(examples + val + test, s)
        model, extras = load_model(s, state) if s.resume else new_model(s, state, examples)
    if extras["answers"]:
        examples = only_known_answers(examples, set(extras["answers"]), "training: left out")
        only_known_answers(test, set(extras["answers"]), "counted as wrong")  # only says how many
    if not examples:
        raise data.DataError(f"{where(s)}: no answer of training is in the list; remove ans2label")
    model, collate = clipbert.use_machine(s, model), build_collator(s, extras)
    print(f"{TASKS[s.task].title}: {len(examples):,} training and {len(test):,} test examples from "
          f"{where(s)}")  # fmt: skip
    stopped = state if s.resume else None
    training = clipbert.Training(s, model, len(examples), stopped, **extras)
    train(s, model, collate, training, examples, val)
    if val:
        model.load_state_dict(clipbert.load_checkpoint(training.out / "best.pt")["model"])
    else:
        # To choose a step by the test set would be cheating: the last is the best.
        training.save("best.pt", training.total_steps)
    print(f"testing at N_test = {', '.join(map(str, s.test_clips))}", flush=True)
    results = evaluate(s, model, collate, test, s.test_clips)
    chance = chance_level(s, extras["guess"], test)
    report(s, results, chance, time.time() - training.began)
    if not clipbert.RANK:
        example_sheet(s, model, collate, test, results[1]).save(training.out / "sheet.png")
    print_next_steps(s)


def train(s, model, collate, training, examples, val):
    """The training loop, the same for every task.

    A step is grad_accum batches, one update. Which examples and which random clips it sees depends
    on the seed and the step alone, dropout on torch's random state, which checkpoints hold: so a
    resumed run repeats the uninterrupted one.
    """
    kind = TASKS[s.task].kind
    draw = data.CaptionDraw(examples, 2) if kind == "match" else None  # a right and a wrong caption
    dataset = data.ClipDataset(examples, s, n_clips=s.train_clips, train=True, draw=draw)
    order = data.training_order(
        len(examples), s.batch_size, training.n_batches, s.seed, training.first_batch
    )
    own = islice(order, clipbert.RANK, None, clipbert.PROCESSES)  # every K-th of K processes
    loader = iter(data.data_loader(dataset, own, collate, s.workers))
    model.train()
    for step in training.steps():
        total = 0.0
        for batch in training.batches(loader):
            with clipbert.autocast(s):  # p_1, ..., p_N: (N, B*n, K)
                p = training.parallel(batch["frames"], batch["input_ids"], batch["attention_mask"])
            p = clipbert.aggregate_clips(p, s.agg)  # p = G(p_1, ..., p_N)
            loss = clipbert.video_loss(p, batch["target"], kind)  # NLL(p, q)
            training.backward(loss)
            total = total + loss.detach()
        training.update(step, loss=total)  # the learning rate, clipped gradients, AdamW; the log
        if val and training.ends_epoch(step):
            by_clips, *_ = evaluate(s, model, collate, val, [1])  # one clip: a cheap look
            found = by_clips["1"]
            score = found["accuracy"] if "accuracy" in found else found["text_to_video"]["r1"]
            training.validated(step, score, {"validation": score})
            model.train()


# ----------------------------------------------------------------------------------------------------------------------
# Data and model


def folders(s):
    """The data set's folders; without --data that of the toy data, which is written if need be."""
    toy = data.LAYOUTS[s.task].toy
    return s.data or [data.toy_data(toy) / toy]


def where(s):
    """The data set in words."""
    return " ".join(map(str, folders(s)))


def load_examples(s, split):
    """The examples of a split. Missing videos stop the run, unless --allow_missing."""
    examples = data.read_examples(s.task, folders(s), split)[: s.limit]
    return data.without_missing(examples, split, where(s), s.allow_missing)


def validation_examples(s):
    """The val split of a task that chooses best.pt by it; toy data and some folders have none."""
    if not TASKS[s.task].validation or not s.data:
        return []
    try:
        return load_examples(s, "val")
    except data.NoAnnotations as error:
        print(f"note: {error}: without a validation split the last checkpoint counts as the best")
        return []


def new_model(s, state, examples):
    """-> (model, what else a checkpoint must hold to be used alone). state: --init's, or None.

    answers: of an open-ended task, those that the model can give, in the order of its outputs, else
    None. guess: see best_guess.
    """
    task, answers = TASKS[s.task], None
    if task.kind in ("answer", "soft"):
        # A list in the folder, as the official checkpoints have one; else training's most frequent.
        listed = data.read_answer_list(folders(s)[0])
        answers = listed or data.answer_list(examples, data.LAYOUTS[s.task].top_answers)
    # FrameQA has at least 1,540 outputs, as the reference, and so perhaps some without an answer.
    outputs = max(task.outputs, len(answers or []))
    texts = (text for example in examples for text in data.input_texts(example))
    model, vocabulary = clipbert.start_model(
        lambda cfg: clipbert.ClipBert(cfg, outputs), s, state,
        lambda: data.vocabulary_from_text(texts), lambda: data.read_vocabulary(s.bert),
    )  # fmt: skip
    return model, {"num_outputs": outputs, "vocabulary": vocabulary, "answers": answers,
                   "guess": best_guess(task, examples)}  # fmt: skip


def load_model(s, state):
    """-> (model, what else its checkpoint holds, see new_model) of a fine-tuning checkpoint."""
    # One retrieval model does for all of them, and for multiple choice among captions.
    task = state["settings"]["task"]
    retrieval = TASKS[task].kind == TASKS[s.task].kind == "match"
    if task != s.task and not retrieval:
        raise ValueError(f"{s.eval or s.out}: a checkpoint of --task {task}, not {s.task}")
    model = clipbert.ClipBert(clipbert.config_from(state), state["num_outputs"])
    model.load_state_dict(state["model"])
    return model, {k: state[k] for k in ("num_outputs", "vocabulary", "answers", "guess")}


def build_collator(s, extras):
    """Texts to tokens and answers to labels, as the model knows them."""
    tokenizer = data.build_tokenizer(extras["vocabulary"])
    return data.Collator(tokenizer, s.text_length, extras["answers"])


def only_known_answers(examples, answers, what):
    """The examples with an answer in the list; the others are counted.

    In training they have no label, so they are left out; a test without them would be too easy.
    """
    known = [e for e in examples if not answers.isdisjoint(
        [e.answer] if isinstance(e.answer, str) else e.answer)]  # fmt: skip
    if others := len(examples) - len(known):
        print(f"note: {others:,} of {len(examples):,} questions without an answer in the list of "
              f"{len(answers):,} ({what})")  # fmt: skip
    return known


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation (paper, section 4: N_test uniform clips, aggregated as in training)


def evaluate(s, model, collate, examples, clip_counts):
    """-> ({N_test: metrics}, predictions at the last N_test, what could not be read).

    Retrieval asks of every pair of a caption and a video; all other tasks, of each example alone.
    Of several processes each does all of it, so that all know the score.
    """
    retrieval = TASKS[s.task].kind == "match" and not examples[0].options
    evaluate_at = evaluate_retrieval if retrieval else evaluate_answers
    by_clips = {}
    for n_clips in clip_counts:
        results = evaluate_at(s, model, collate, examples, n_clips)
        by_clips[str(n_clips)], predictions, errors = results
    return by_clips, [row | {"clips": n_clips} for row in predictions], errors


def evaluate_answers(s, model, collate, examples, n_clips):
    """-> (metrics, predictions, what could not be read) at N_test = n_clips."""
    results, errors = score_videos(s, model, collate, examples, n_clips)
    predictions = [
        judge(TASKS[s.task].kind, example, scores, readable, collate.answers)
        for example, (scores, readable) in zip(examples, results, strict=True)
    ]
    return metrics(examples, predictions), predictions, errors


@torch.no_grad()
def score_videos(s, model, collate, examples, n_clips):
    """p at N_test = n_clips: a pair (scores, readable) an example; and what could not be read."""
    model.eval()
    # Twice as many clips as a training batch has videos: without gradients there is room for them.
    batches = data.ordered_batches(len(examples), max(1, 2 * s.batch_size // n_clips))
    dataset = data.ClipDataset(examples, s, n_clips=n_clips, train=False)
    results, errors = [], []
    for batch in data.data_loader(dataset, batches, collate, s.workers):
        batch = clipbert.to_device(batch)
        with clipbert.autocast(s):  # all N clips: (N, B*n, K)
            p = model(batch["frames"], batch["input_ids"], batch["attention_mask"])
        # float64, as in retrieval: no two options share a score by rounding alone
        p = clipbert.aggregate_clips(p.double(), s.agg)
        if TASKS[s.task].kind == "match":  # multiple choice by a retrieval model
            p = clipbert.match_score(p)
        p = p.view(len(batch["examples"]), -1).cpu()  # (B, K); (B, n), a score for each option
        results += zip(p, [not lines for lines in batch["unreadable"]], strict=True)
        errors += [line for lines in batch["unreadable"] for line in lines]
    return results, errors


def judge(kind, example, scores, readable, answers):
    """A row of predictions.jsonl: the prediction, and how good it is, as `grade` has it.

    The answer stands there as in Example (of options an index), the prediction in words.
    """
    # What a model says of a video that can't be read would be a blind guess: 0 (rounded: 1), or no
    # answer.
    said = prediction = None
    if kind == "count":
        said = scores.item() if readable else 0.0
        prediction = whole_count(said)
    elif readable:
        best, names = scores.argmax().item(), example.options or answers
        prediction = names[best] if best < len(names) else None  # FrameQA has unused outputs
        said = best if example.options else prediction  # options may be worded alike
    return {"id": example.id, "video": example.video, "text": example.text,
            "options": list(example.options), "answer": example.answer, "prediction": prediction,
            **grade(kind, example, said)}  # fmt: skip


def grade(kind, example, said):
    """How good an answer is: right or wrong, VQA's accuracy from 0 to 1, or the squared error.

    said: what stands in Example.answer for it; of VQA an answer in words; of a count any number.
    mse_rounded, what papers print, is that of the nearest whole number from 1 to 10. (Of an example
    it is a squared error; `metrics` takes the mean.)
    """
    if kind == "count":
        return {"mse": (said - example.answer) ** 2,
                "mse_rounded": (whole_count(said) - example.answer) ** 2}  # fmt: skip
    if kind == "soft":
        return {"accuracy": data.vqa_accuracy(said, example) if said else 0.0}
    return {"accuracy": said == example.answer}


def whole_count(number):
    """TGIF-QA counts from 1 to 10."""
    return min(max(round(number), 1), 10)


def metrics(examples, grades):
    """Means of the grades; accuracies in percent, also of each type of question."""
    if "mse" in grades[0]:
        return {name: mean(row[name] for row in grades) for name in ("mse", "mse_rounded")}
    values = {}
    for example, row in zip(examples, grades, strict=True):
        # FrameQA and VQA have types; where there are none, both names are one
        for name in {"accuracy", f"accuracy_{example.question_type}".rstrip("_")}:
            values.setdefault(name, []).append(100 * row["accuracy"])
    return {name: mean(values[name]) for name in sorted(values)}


def mean(values):
    """Rounded to the digits that files and tables keep."""
    return round(float(np.mean(list(values))), 4)


def best_guess(task, train):
    """What to say without looking: training's most frequent answer, or its mean count.

    None where there is nothing to say: all options are equally likely.
    """
    if task.kind == "count":
        return float(np.mean([example.answer for example in train]))
    return data.answer_list(train, 1)[0] if task.kind in ("answer", "soft") else None


def chance_level(s, guess, test):
    """How good the best guess is on the test examples, by the name of the metric.

    The line to compare with: a toy model above it has seen something.
    """
    kind = TASKS[s.task].kind
    if test[0].options:
        return {"accuracy": mean(100 / len(example.options) for example in test)}
    if kind == "match":
        videos = len({example.source for example in test})
        # a random order of m videos: R@k is k/m, and the mean rank (m + 1) / 2; both ways, where a
        # video has one caption
        found = {f"r{k}": min(100.0, 100 * k / videos) for k in (1, 5, 10)}
        return found | {"median_rank": (videos + 1) / 2, "mean_rank": (videos + 1) / 2}
    return metrics(test, [grade(kind, example, guess) for example in test])


# -------------------------------------------------- retrieval: every caption against every video
# For each N_test a clip goes through the CNN once and a caption through the tokenizer once; the
# reference repeats the CNN for every batch of captions.


def evaluate_retrieval(s, model, collate, examples, n_clips):
    """-> (metrics, predictions, what could not be read) at N_test = n_clips."""
    videos = list({example.source: example for example in examples}.values())  # each once
    places = {example.source: i for i, example in enumerate(videos)}
    columns = torch.tensor([places[example.source] for example in examples])
    grids, errors = encode_videos(s, model, collate, videos, n_clips)
    texts = [example.text for example in examples]
    scores = score_pairs(s, model, collate, texts, grids, s.rerank if n_clips > 1 else None)
    ranks = ranks_of(scores.gather(1, columns[:, None]), scores).tolist()
    best = scores.topk(min(5, len(videos))).indices.tolist()
    predictions = [
        {"id": e.id, "video": e.video, "text": e.text, "rank": rank,
         "prediction": [videos[i].video for i in top]}
        for e, rank, top in zip(examples, ranks, best, strict=True)
    ]  # fmt: skip
    return retrieval_metrics(scores, columns), predictions, errors


@torch.no_grad()
def encode_videos(s, model, collate, videos, n_clips):
    """The CNN's grids of each video, means over T: (N, h, w, d), None where it can't be read; and
    what could not be.

    They wait in CPU memory, in the precision of the computation: half, where that is bf16 or fp16.
    """
    model.eval()
    grids, errors = [], []
    dataset = data.ClipDataset(videos, s, n_clips=n_clips, train=False)
    batches = data.ordered_batches(len(videos), 1)
    for batch in data.data_loader(dataset, batches, collate, s.workers):
        with clipbert.autocast(s):
            grid = model.encode_frames(batch["frames"][0].to(clipbert.DEVICE))  # (N, T, h, w, d)
        grid = grid.mean(1).cpu()  # over T: every caption would take it again
        grids.append(None if batch["unreadable"][0] else grid)
        errors += batch["unreadable"][0]
    return grids, errors


def score_pairs(s, model, collate, texts, grids, rerank=None):
    """Probabilities (captions, videos) that they belong together; 0 if the video can't be read.

    rerank = K: all pairs are scored on the middle clip alone, and only the best K videos of each
    caption on all clips. The other pairs keep that first score minus 1: in both directions they
    rank among themselves, below all pairs that were scored in full.
    """
    tokens = collate.tokenizer(texts, padding=True, truncation=True, max_length=s.text_length,
                               return_tensors="pt")  # fmt: skip
    every = torch.ones(len(texts), len(grids)).bool()
    if not rerank or rerank >= len(grids):
        return score_chosen(s, model, tokens, grids, every)
    middle = [grid if grid is None else grid[len(grid) // 2][None] for grid in grids]
    first = score_chosen(s, model, tokens, middle, every)
    best = torch.zeros_like(first).bool().scatter(1, first.topk(rerank).indices, True)
    return torch.where(best, score_chosen(s, model, tokens, grids, best), first - 1)


@torch.no_grad()
def score_chosen(s, model, tokens, grids, chosen):
    """As score_pairs, of the pairs in the mask chosen (captions, videos); the others are 0."""
    model.eval()
    lengths = tokens["attention_mask"].sum(1)
    by_length = lengths.argsort()  # captions of like length together: little is padding
    # float64: float32 would lose small scores beside the -1 of rerank
    scores = torch.zeros(chosen.shape, dtype=torch.float64)
    for column, grid in enumerate(grids):
        captions = by_length[chosen[by_length, column]]
        if grid is None or not len(captions):
            continue
        for some in captions.split(max(1, 1024 // len(grid))):  # 1,024 sequences: a GPU of 12 GB
            text = (tokens[key][some, : lengths[some].max()]
                    for key in ("input_ids", "attention_mask"))  # fmt: skip
            scores[some, column] = score_captions(s, model, grid, *text)
    return scores


def score_captions(s, model, grid, input_ids, attention_mask):
    """Probabilities (C,) that captions (C, Lt) belong to a video; grid (N, h, w, d): its clips."""
    N, C = len(grid), len(input_ids)
    grid = grid[:, None].to(clipbert.DEVICE)  # (N, 1, h, w, d): N videos of one frame
    # (N*C, Lt): all captions for clip 1, all for clip 2, ...
    text = (x.repeat(N, 1).to(clipbert.DEVICE) for x in (input_ids, attention_mask))
    with clipbert.autocast(s):
        logits = model.classify(grid, *text).view(N, C, 2)
    return clipbert.match_score(clipbert.aggregate_clips(logits.double(), s.agg)).cpu()


def retrieval_metrics(scores, video_of_caption):
    """R@1/5/10, median and mean rank, both ways (paper, section 4: text-to-video retrieval).

    scores (captions, videos); video_of_caption: the column of each caption's own video. ->
    {"text_to_video": what `recalls` makes of the captions' ranks, "video_to_text": of the videos'}.
    Exact ties share their mean position: a model that scores everything alike gets the rank of
    chance, not 1. A video with several captions is found by any of them: its best-ranked one
    counts.
    """
    columns = torch.as_tensor(video_of_caption)
    own = scores.gather(1, columns[:, None])  # (captions, 1)
    by_caption = ranks_of(own, scores)
    ranks = []
    for column in range(scores.shape[1]):
        mine = scores[columns == column, column]
        others = scores[columns != column, column]  # its own other captions do not compete
        if len(mine):
            best = mine.max()[None]
            ranks.append(ranks_of(best[None], torch.cat([best, others])[None]))
    return {"text_to_video": recalls(by_caption), "video_to_text": recalls(torch.cat(ranks))}


def ranks_of(own, scores):
    """1 + how many score higher + half of how many others score the same.

    own (n, 1), scores (n, m), own ones among them -> (n,).
    """
    return 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2


def recalls(ranks):
    """R@k, the percentage of ranks up to k; the median and the mean rank, the lower the better."""
    found = {f"r{k}": mean((100.0 * (ranks <= k)).tolist()) for k in (1, 5, 10)}
    return found | {"median_rank": float(np.median(ranks)), "mean_rank": mean(ranks.tolist())}


########################################################################################################################
# Here the paper's part ends. What follows puts it to use: reports, --eval and --predict, pictures.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def report(s, results, chance, seconds, ending=""):
    """Write metrics.json and predictions.jsonl (--eval: with an ending to their names); print the table."""
    by_clips, predictions, errors = results
    everything = {
        "task": s.task, "data": where(s) if s.data else "toy", "split": s.split, "examples": len(predictions),
        "chance": round(next(iter(chance.values())), 4), "seconds": round(seconds, 1), "blind": s.blind,
        "unreadable": len(errors), "by_clips": by_clips,
    }  # fmt: skip
    path = Path(s.out) / f"metrics{ending}.json"
    clipbert.write_file(path, json.dumps(everything, indent=2) + "\n")
    lines = "".join(json.dumps(prediction) + "\n" for prediction in predictions)
    clipbert.write_file(path.with_name(f"predictions{ending}.jsonl"), lines)
    print(f"\n{TASKS[s.task].title}, {everything['data']} data, {len(predictions):,} {s.split} examples, "
          f"G = {s.agg}{', blind' if s.blind else ''}")  # fmt: skip
    if "text_to_video" in next(iter(by_clips.values())):  # one line a direction
        by_clips = {f"{N} {way}": both[way] for N, both in by_clips.items() for way in both}
    names = list(next(iter(by_clips.values())))
    wide = {name: max(len(name), 6) + 2 for name in names}  # 6: 100.00
    print(f"{'N_test':18}" + "".join(f"{name:>{wide[name]}}" for name in names))
    for N, row in (by_clips | {"chance": chance}).items():
        print(f"{N:18}" + "".join(f"{row[name]:{wide[name]}.2f}" for name in names))
    print(f"written to {path}")
    clipbert.list_unreadable(errors, "counted as wrong")


def print_next_steps(s):
    """What a newcomer to the toy data may want to do next."""
    if s.data is None:
        command = f"python finetune.py --task {s.task}"
        options = " --options A B ..." if TASKS[s.task].kind == "choice" else ""
        print(f"\nNext: {command} --eval {Path(s.out) / 'best.pt'} --predict VIDEO --question TEXT{options}")
        if not s.blind:
            print(f"      {command} --blind                   what the text alone gives away")
        print(f"      {command} --data DIR --model base   the paper's model on real data")


# ----------------------------------------------------------------------------------------------------------------------
# --eval and --predict: what a checkpoint is good for


def load_for_use(given):
    """--eval: (s, model, collate, extras) of a fine-tuned checkpoint, with its settings where no flag says otherwise."""
    s, state = clipbert.load_finished(Settings, given)
    model, extras = load_model(s, state)
    return s, clipbert.use_machine(s, model), build_collator(s, extras), extras


def run_evaluation(given):
    """--eval: evaluate a checkpoint at each N_test. The results lie beside it, named after what was evaluated."""
    s, model, collate, extras = load_for_use(given)
    test = load_examples(s, s.split)
    data.check_cached(test, s)
    if extras["answers"]:
        only_known_answers(test, set(extras["answers"]), "counted as wrong")  # only says how many
    began = time.time()
    results = evaluate(s, model, collate, test, s.test_clips)
    chance, ending = chance_level(s, extras["guess"], test), clipbert.result_suffix(s, s.task, s.split)
    report(s, results, chance, time.time() - began, ending)


def run_prediction(given):
    """Answer one question about one video, at the largest N_test."""
    s, model, collate, _ = load_for_use(given)
    kind, N = TASKS[s.task].kind, max(s.test_clips)
    if kind == "choice" and len(s.options) < 2 or kind in ("answer", "soft", "count") and s.options:
        raise ValueError(f"--task {s.task}: --options A B ... for multiple choice; none for open questions")
    # Of a retrieval model all are captions, and nothing is asked.
    text, options = ("", (s.question, *s.options)) if kind == "match" else (s.question, s.options)
    example = data.Example("0", Path(s.predict).name, text, options, path=s.predict)
    seen, known = look(s, model, collate, example, N), collate.tokenizer.get_vocab()
    unknown = [word for text in (s.question, *s.options) for word in data.words_of(text) if word not in known]
    if s.model == "tiny" and unknown:
        print(f"note: a tiny model, which has never read {', '.join(unknown)}: it can only guess")
    asked = "how likely each caption is this video's, for itself" if kind == "match" else text
    print(f"{example.video}, {N} clips of {s.frames} frames: {asked}")
    for name, score in zip(seen.names, seen.scores[-1].tolist(), strict=True):
        print(f"  {score:.2f}" if kind == "count" else f"  {score:6.1%}  {name}")
    if s.sheet:
        prediction_sheet(s, seen).save(s.sheet)
        print(f"written to {s.sheet}")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: what the model looked at, and what it made of it


class Seen(NamedTuple):
    """What a model looked at in one video, and what it said; all of it on the CPU."""

    media: data.Media
    clips: torch.Tensor  # (N, T): indices of the frames
    frames: torch.Tensor  # (N, T, 3, L, L) uint8
    attention: torch.Tensor  # (N, h, w): from [CLS] to each cell of the grid; the rest of 1 goes to the words
    names: list  # of the m <= 5 best answers of all clips together, the best first
    scores: torch.Tensor  # (N + 1, m): what each clip says alone, and, last, all together: 0..1, or a count
    points: torch.Tensor  # (N,): p_i of the best, before any softmax: what G makes one number of


def look(s, model, collate, example, n_clips):
    """-> Seen of an example at N_test = n_clips. A video that can't be read is an error."""
    batch = collate([data.ClipDataset([example], s, n_clips=n_clips, train=False)[0, 0]])  # epoch, index
    if batch["unreadable"][0]:
        raise data.DataError(batch["unreadable"][0][0])
    # --blind opens no video, so that a missing one, whose path is None, comes so far
    media, kind = data.probe(example.path or example.video), TASKS[s.task].kind
    clips = data.sample_clips(media.num_frames, media.fps, n_clips, s.frames, s.fps, train=False)
    p, attention = attend(s, model, batch)  # (N, n, K), (N, n, h, w); n: texts
    p = torch.cat([p, clipbert.aggregate_clips(p, s.agg)[None]])  # each clip, and all together
    points = p[..., -1] if kind == "match" else p.flatten(1)  # (N + 1, options or answers): a number each
    if kind == "match":
        scores = clipbert.match_score(p.flatten(0, 1)).view_as(points)
    elif kind == "soft":  # as in its loss, each answer for itself
        scores = points.sigmoid()
    else:
        scores = points if kind == "count" else points.softmax(1)
    names = example.options or collate.answers or [example.text]
    # FrameQA's model has more outputs than there are answers: those without a name are never shown
    order = scores[-1, : len(names)].argsort(descending=True)[:5].tolist()
    best = order[0]
    attention = attention[:, best if example.options else 0]  # multiple choice has a text for each option
    names = [names[i] for i in order]
    return Seen(media, clips, batch["frames"][0], attention, names, scores[:, order], points[:-1, best])


def attend(s, model, batch):
    """-> p_1 ... p_N (N, n, K) of a video with n texts, and the attention to the grid that led to them, (N, n, h, w).

    It is that of [CLS], of which the answer is made, in the last layer; the mean of all heads.
    """
    batch, kept = clipbert.to_device(batch), []
    model.eval()
    model.bert.set_attn_implementation("eager")  # which has the attention weights as a tensor; SDPA never does
    last = model.bert.encoder.layer[-1].attention.self
    hook = last.register_forward_hook(lambda *call: kept.extend(call[2]))  # its outputs: vectors, weights
    with hook, torch.no_grad(), clipbert.autocast(s):
        p = model(batch["frames"], batch["input_ids"], batch["attention_mask"]).float().cpu()
    model.bert.set_attn_implementation("sdpa")
    weights = kept[1].float().mean(1).cpu()  # (N*n, queries, keys)
    grid = weights[:, 0, batch["input_ids"].shape[1] :]  # [CLS] is the first query; the grid stands behind the words
    return p, grid.reshape(*p.shape[:2], math.isqrt(grid.shape[1]), -1)


def clip_weights(points, how):
    """Each clip's weight in G, dp / dp_i: 1/N in mean, 1 for the highest in max, softmax in lse. (N,) -> (N,)."""
    return torch.func.grad(lambda p: clipbert.aggregate_clips(p, how))(points)


def clip_strip(s, title, seen, i, color):
    """Clip i: its frames, the grid, what it says beside what all clips say together, its weight in G."""
    frames, times, T = seen.frames[i], seen.clips[i] / seen.media.fps, seen.frames.shape[1]
    columns = [
        data.picture(frames[t], seen.media, f"{times[t]:.2f} s", color)
        for t in range(0, T, -(-T // 3))  # at most three, so that the bars have half of the sheet
    ]
    # The model takes the mean over the T frames of a clip: there is one grid, drawn over the middle frame. All clips
    # of a video have one scale of colours, and one of bars.
    text, heat = f"{seen.attention[i].sum():.0%} on the grid", seen.attention[i] / seen.attention.max()
    columns.append(data.picture(frames[T // 2], seen.media, text, color, heat))
    full = 10 if seen.scores.max() > 1 else 1  # the longest bar: a count, TGIF-QA's go up to 10; or a probability
    bars = [data.bar(f"{alone:.3f}  {name}  (all clips: {together:.3f})", alone / full, color)
            for name, alone, together in zip(seen.names, *seen.scores[[i, -1]].tolist(), strict=True)]  # fmt: skip
    weight = clip_weights(seen.points, s.agg)[i].item()
    bars.append(data.bar(f"{weight:.3f}  is its weight in G", weight, data.DARK))
    return data.pile([data.text_strip(title, color=color), data.row([*columns, data.pile(bars)])])


def legend(s, top):
    """What a clip's numbers and colours mean, and what they do not. top: what yellow is, in words."""
    text = (f"Bars: what a clip says alone; in brackets, the best first: what G = {s.agg} makes of all clips. Colours on "
            f"the grid, from 0 to {top}: [CLS]'s attention to each cell in the last layer, the mean of all heads; the rest "
            "of 100% goes to the words. Attention is not an explanation: the answer may hang on something else.")  # fmt: skip
    scale = data.colors(torch.linspace(0, 1, data.SIDE).expand(16, -1))
    return data.pile([data.text_strip(text, color=data.GREY), scale])


def prediction_sheet(s, seen):
    """What led to an answer: all clips on the time line, and a strip for each of the s.rows best, in order of time."""
    N, T = seen.clips.shape
    # Whatever G is, mean, max or lse: the higher a clip's own p_i, the more it speaks for the answer.
    shown = sorted(seen.points.argsort(descending=True)[: s.rows].tolist())
    colors = dict(zip(shown, data.SHEET_COLORS, strict=False))
    strips = [data.time_line(seen.media, seen.clips, T / s.fps, [colors.get(i, data.PALE) for i in range(N)])]
    strips += [clip_strip(s, f"Clip {i + 1} of {N}", seen, i, color) for i, color in colors.items()]
    strips.append(legend(s, f"{seen.attention.max():.1%} in one cell"))
    about = (f"{Path(s.predict).name}: N = {N} clips of T = {T} frames. Shown are at most {s.rows} (--rows), those "
             "with the highest score for the answer; others are grey.")  # fmt: skip
    return data.draw_sheet(s.question, about, strips, s.predict)


def example_sheet(s, model, collate, examples, predictions):
    """The first test examples that were right, and the first that were wrong: four strips of each.

    The first, not the best: chosen ones would tell nothing about the model.
    """
    strips, paths = {True: [], False: []}, {example.video: example.path for example in examples}
    for example, said in zip(examples, predictions, strict=True):
        # retrieval: its own video comes first; counting: off by less than a half
        right = said.get("rank") == 1 or said.get("mse", 1) < 0.25 or said.get("accuracy", 0) >= 0.5
        if "rank" in said:
            answer, found = f"{example.video}, in place {said['rank']:g}", said["prediction"][0]
        else:
            answer, found = example.options[example.answer] if example.options else example.answer, example.video
        title, color = ("Right", "#009e73") if right else ("Wrong", "#d55e00")
        title += f": {example.text} (answer: {answer}). Shown: "
        if len(strips[right]) < 4:
            for video in dict.fromkeys([example.video, found]):  # two of a retrieval mistake
                shown = example._replace(path=paths[video])
                strips[right].append(best_strip(s, model, collate, shown, said["clips"], title + video, color))
    title = f"{TASKS[s.task].title}, N_test = {said['clips']}: the first test examples right and wrong"
    about = "Shown is the clip with the highest score for the answer."
    strips = [*strips[True], *strips[False], legend(s, "a video's highest")]
    return data.draw_sheet(title, about, strips, examples[0].path or "")  # a missing video has none


def best_strip(s, model, collate, example, n_clips, title, color):
    """The clip with the highest score for the answer."""
    try:
        seen = look(s, model, collate, example, n_clips)
    except data.DataError as error:
        return data.text_strip(f"{title}, unreadable. {error}", color=color)
    best = seen.points.argmax().item()
    return clip_strip(s, f"{title}, clip {best + 1} of {n_clips}", seen, best, color)


if __name__ == "__main__":
    given = parse_arguments()
    job = run_prediction if "predict" in given else run_evaluation if "eval" in given else run_training
    clipbert.main(job, given)
