"""Fine-tune and evaluate ClipBERT on a task (paper section 4).

    python finetune.py --task tgif_qa                                         the toy data: minutes on a laptop CPU
    python finetune.py --task tgif_qa --data DIR --model base                 the paper's model on real data, one GPU
    python finetune.py --task tgif_qa --data DIR --init CKPT                  from image-text pretraining
    python finetune.py --task tgif_qa --data DIR --eval CKPT --test_clips 1 4 16
    python finetune.py --task tgif_qa --eval CKPT --predict cat.gif --question "what does the cat do 3 times ?" \\
                       --options jump spin wave
    python finetune.py --task tgif_qa --resume                                go on after an interruption

Everything is written to runs/<task>/: config.json, log.jsonl (a line a step or evaluation), last.pt, best.pt,
predictions.jsonl and metrics.json.
"""

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import clipbert
import data

# ----------------------------------------------------------------------------------------------------------------------
# The tasks. One row each; the loop below knows no data set by name.


class Task(NamedTuple):
    """A data set and the paper's hyper-parameters for it."""

    title: str
    read: object  # (folder, split) -> examples
    toy: str  # which part of the toy data has its layout
    kind: str  # of answer: choice | answer | count (see clipbert.video_loss)
    answers: int = 1  # outputs of the head: 1 score per option or count; or at least this many answers
    size: int = 448  # L, pixels
    fps: float = 1.0  # a clip of T frames spans T / fps seconds
    frames: int = 1  # T
    train_clips: int = 1  # N_train
    agg: str = "mean"  # G
    text_length: int = 25  # Lt at most, [CLS] and [SEP] included
    batch_size: int = 16  # videos at a time
    grad_accum: int = 2  # ... and how many such batches to an update
    epochs: int = 15
    lr: float = 1e-4  # peak
    weight_decay: float = 1e-3
    clip_grad: float = 5.0  # the gradient's largest norm


def tgif(kind):
    return partial(data.read_tgif_qa, kind=kind)


# TGIF-QA: L, batch and learning rate are the paper's; the reference code's own config has 768, 16 and 5e-5.
TASKS = {
    "tgif_qa_action": Task("TGIF-QA action", tgif("action"), "tgif_qa", "choice"),
    "tgif_qa_transition": Task("TGIF-QA transition", tgif("transition"), "tgif_qa", "choice"),
    "tgif_qa_frameqa": Task("TGIF-QA FrameQA", tgif("frameqa"), "tgif_qa", "answer", answers=1540),
    "tgif_qa_count": Task("TGIF-QA count", tgif("count"), "tgif_qa", "count"),
}
ALIASES = {"tgif_qa": "tgif_qa_action"}

# What the tiny model changes. The learning rate decides whether it leaves ln(5) at all: most toy frames do not show the
# answer, and at 1e-3 that noise teaches the scores to ignore the options before attention has learned to match them.
TINY = {"size": 64, "batch_size": 32, "grad_accum": 1, "lr": 3e-4, "max_steps": 600}

# ----------------------------------------------------------------------------------------------------------------------
# Settings: a task's row, then the tiny model's changes, then the command line


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="tgif_qa", choices=[*ALIASES, *TASKS], metavar="TASK", help=", ".join([*ALIASES, *TASKS]))
    add("--data", type=Path, help="the data set's folder (default: the toy data, written to toy_data/)")
    add("--out", type=Path, help="where to write (default: runs/TASK)")
    # which model, and what it starts from
    add("--model", choices=["tiny", "base"], help="default: tiny; with --init, the checkpoint's")
    add("--init", type=Path, metavar="CKPT", help="start from this checkpoint, ours or the official one")
    add("--resnet", type=Path, metavar="FILE", help="base: torchvision's ResNet-50 weights (default: the hub's)")
    add("--bert", type=Path, metavar="DIR", help="base: a bert-base-uncased folder (default: the hub's)")
    add("--scratch", action="store_true", help="base: start from random weights")
    # other things to do than train
    add("--resume", action="store_true", help="go on from last.pt in the output folder")
    add("--eval", type=Path, metavar="CKPT", help="only evaluate this checkpoint of ours")
    add("--predict", type=Path, metavar="VIDEO", help="with --eval: answer --question about one video")
    add("--question")
    add("--options", nargs="+", default=[], help="multiple choice: the options")
    # hyper-parameters; the default is the task's row, printed at the start
    for name in ("size", "frames", "train_clips", "text_length", "batch_size", "grad_accum", "epochs", "max_steps"):
        add(f"--{name}", type=positive)
    for name in ("fps", "lr", "weight_decay", "clip_grad"):
        add(f"--{name}", type=float)
    add("--agg", choices=["mean", "max", "lse"], help="G: how clips become a video")
    add("--test_clips", type=positive, nargs="+", default=[1, 4, 16], help="N_test: evaluate at each of these")
    add("--blind", action="store_true", help="zero all frames: what can be guessed from the text alone?")
    add("--limit", type=positive, help="use only the first so many examples of each split")
    add("--allow_missing", action="store_true", help="train without missing videos; in testing they count as wrong")
    add("--precision", choices=["bf16", "fp16", "fp32"], help="default: bf16 or fp16 on a GPU, fp32 on a CPU")
    add("--workers", type=int, help="processes that decode videos (default: 0 on a CPU, else one a core, at most 8)")
    add("--save_every", type=positive, default=500, help="steps between checkpoints")
    add("--seed", type=int, default=0)
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    args.task = ALIASES.get(args.task, args.task)
    args.out = args.out or Path("runs") / args.task
    if args.predict and not (args.eval and args.question):
        parser.error("--predict VIDEO needs --eval CKPT and --question TEXT")
    return args


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def settings_for(args, model_name, stored=None):
    """The hyper-parameters in force: the task's row, tiny's changes, a checkpoint's settings, the command line's."""
    row = TASKS[args.task]._asdict()
    settings = {name: row[name] for name in list(row)[list(row).index("size") :]} | {"max_steps": None}
    settings |= TINY if model_name == "tiny" else {}
    settings |= stored or {}
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    if "epochs" in given:
        settings["max_steps"] = None  # asked for in epochs: tiny's number of steps does not apply
    return settings | given


# ----------------------------------------------------------------------------------------------------------------------
# Data and model


def load_examples(args, split, training=None):
    """The examples of a split. Missing videos stop the run, unless --allow_missing."""
    task = TASKS[args.task]
    folder = args.data or data.toy_data() / task.toy
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
    if task.kind != "answer":
        return None
    return data.read_answer_list(folder) or data.answer_list(train, None)


def outputs_for(task, answers):
    """K. The reference gives FrameQA max(n, 1540) answers."""
    return max(task.answers, len(answers or []))


def build_model(args, task, answers, texts):
    """A new model and its vocabulary, started from --init, or ImageNet and BERT, or at random."""
    state = clipbert.load_checkpoint(args.init) if args.init else None
    if state and "config" in state:  # a checkpoint of ours brings its own sizes and vocabulary
        cfg, vocabulary = clipbert.config_from(state), state["vocabulary"]
    elif state:
        cfg, vocabulary = clipbert.ClipBertConfig.official(), data.read_vocabulary(args.bert)
    elif args.model == "base" and not (args.scratch and not args.bert):
        cfg, vocabulary = clipbert.ClipBertConfig.base(), data.read_vocabulary(args.bert)
    else:
        vocabulary = data.vocabulary_from_text(texts)
        cfg = clipbert.ClipBertConfig.base() if args.model == "base" else clipbert.ClipBertConfig.tiny()
        cfg.vocab_size = len(vocabulary)
        cfg.frozen_stages = 0  # random weights are not worth freezing
    model = clipbert.ClipBert(cfg, outputs_for(task, answers))
    if state:
        print(f"{args.init}: {clipbert.load_any_checkpoint(model, state)}")
    elif args.model == "base" and not args.scratch:
        print(clipbert.load_pretrained(model, args.resnet, args.bert))
    return model, vocabulary


def load_run(path, task_name):
    """A model and everything needed to use it, from one of our fine-tuning checkpoints."""
    state = clipbert.load_checkpoint(path)
    if "num_outputs" not in state:
        raise ValueError(f"{path}: not a fine-tuned checkpoint of ours; fine-tune from it with --init")
    if state["task"] != task_name:
        raise ValueError(f"{path}: a checkpoint of --task {state['task']}, not {task_name}")
    model = clipbert.ClipBert(clipbert.config_from(state), state["num_outputs"])
    model.load_state_dict(state["model"])
    return model, state


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

    def loader(self, examples, n_clips, train, batches):
        s = self.settings
        dataset = data.ClipDataset(
            examples, self.folder, n_clips=n_clips, n_frames=s["frames"], fps=s["fps"], size=s["size"],
            train=train, seed=self.seed, blind=self.blind,
        )  # fmt: skip
        labels = {answer: i for i, answer in enumerate(self.answers or [])}
        collate = data.Collator(self.tokenizer, s["text_length"], labels)
        return data.data_loader(dataset, batches, collate, self.device.workers, self.device.name == "cuda")


def to_device(batch, device):
    """Tensors to the device; frames stay uint8 until they are there, a quarter of the bytes."""
    return {k: v.to(device.name, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(run, model, optimizer, scaler, examples, args, checkpoint, start, total_steps, validate):
    """The training loop, the same for every task.

    A step is grad_accum batches, one update. Which examples and which random clips it sees depends on the seed and the
    step alone, so a resumed run repeats the uninterrupted one.
    """
    s, device = run.settings, run.device
    batches = data.training_order(
        len(examples), s["batch_size"], total_steps * s["grad_accum"], run.seed, start * s["grad_accum"]
    )
    loader = iter(run.loader(examples, s["train_clips"], True, batches))
    steps_per_epoch = -(-len(examples) // (s["batch_size"] * s["grad_accum"]))
    log = clipbert.Log(args.out / "log.jsonl", start)
    unreadable, seen, began = Counter(), 0, time.time()
    progress = tqdm(range(start + 1, total_steps + 1), initial=start, total=total_steps, unit="step", disable=None)
    model.train()
    for step in progress:
        lr = clipbert.learning_rate(step, total_steps, s["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0.0
        for _ in range(s["grad_accum"]):
            batch = to_device(next(loader), device)
            with device.autocast():
                logits = clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
                p = clipbert.aggregate_clips(logits.float(), s["agg"])  # p = G(p_1, ..., p_N)
                # The reference sums the gradients of accumulated batches; the mean makes two batches of 16 one of 32.
                part = clipbert.video_loss(p, batch["target"], run.task.kind) / s["grad_accum"]
            scaler.scale(part).backward()
            loss = loss + part.detach()
            seen += len(batch["target"])
            unreadable.update(line for lines in batch["unreadable"] for line in lines)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip_grad"])
        scaler.step(optimizer)  # skips the update if fp16 gradients overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        log.step(step=step, loss=loss, lr=lr, grad_norm=norm)
        if step % 10 == 0 or step == total_steps:  # reading a number off the GPU waits for it: not at every step
            loss = log.flush()
            rate = seen / (time.time() - began)
            progress.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", examples_per_s=f"{rate:.0f}")
        if step % args.save_every == 0 or step == total_steps:
            log.flush()
            checkpoint("last.pt", step)
        if validate and (step % steps_per_epoch == 0 or step == total_steps):
            log.flush()
            log.write(step=step, **validate(step))
            model.train()
    return unreadable


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation (paper 3.1: N_test uniform clips, aggregated as in training; table 3 and figure 3 vary N_test)


@torch.no_grad()
def score_videos(run, model, examples, n_clips):
    """p of every example at N_test = n_clips, as (scores, readable) pairs in order."""
    model.eval()
    size = max(1, 2 * run.settings["batch_size"] // n_clips)  # keep the number of clips in memory level
    batches = [[(0, i) for i in range(b, min(b + size, len(examples)))] for b in range(0, len(examples), size)]
    results, errors = [], []
    for batch in run.loader(examples, n_clips, False, batches):
        batch = to_device(batch, run.device)
        with run.device.autocast():
            logits = clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
        p = clipbert.aggregate_clips(logits.float(), run.settings["agg"]).view(len(batch["examples"]), -1).cpu()
        results += [(scores, not lines) for scores, lines in zip(p, batch["unreadable"], strict=True)]
        errors += [line for lines in batch["unreadable"] for line in lines]
    return results, errors


def judge(task, example, scores, readable, answers):
    """A prediction and how good it is: right or wrong, or, in counting, the squared error."""
    if task.kind == "count":
        prediction = scores.item() if readable else 0.0
        return prediction, (prediction - example.answer) ** 2
    best = scores.argmax().item()
    names = example.options or answers
    prediction = names[best] if readable and best < len(names) else None  # None: unreadable, or an unused output
    truth = example.options[example.answer] if example.options else example.answer
    correct = best == example.answer if example.options else prediction == truth
    return prediction, bool(readable and correct)


def evaluate(run, model, examples, clip_counts):
    """{n: {"accuracy": percent} or {"mse": ...}} for each N_test, the predictions at the last of them, and errors."""
    by_clips, predictions, errors = {}, [], []
    for n in clip_counts:
        results, errors = score_videos(run, model, examples, n)
        judged = [judge(run.task, e, *result, run.answers) for e, result in zip(examples, results, strict=True)]
        name, factor = ("mse", 1) if run.task.kind == "count" else ("accuracy", 100)
        by_clips[str(n)] = {name: round(factor * float(np.mean([value for _, value in judged])), 4)}
        kinds = sorted({example.kind for example in examples} - {""})
        for kind in kinds:
            values = [value for example, (_, value) in zip(examples, judged, strict=True) if example.kind == kind]
            by_clips[str(n)][f"{name}_{kind}"] = round(factor * float(np.mean(values)), 4)
        predictions = [
            {"id": e.id, "video": e.video, "text": e.text, "options": list(e.options), "answer": e.answer,
             "prediction": prediction, name: value, "clips": n}
            for e, (prediction, value) in zip(examples, judged, strict=True)
        ]  # fmt: skip
    return by_clips, predictions, errors


def chance_level(task, train, test):
    """What can be had without looking: a random option, the most frequent training answer, the mean training count."""
    if task.kind == "choice":
        return 100 * float(np.mean([1 / len(example.options) for example in test]))
    if task.kind == "count":
        mean = np.mean([example.answer for example in train])
        return float(np.mean([(example.answer - mean) ** 2 for example in test]))
    common = data.answer_list(train, 1)[0]
    return 100 * float(np.mean([example.answer == common for example in test]))


def report(run, args, by_clips, predictions, errors, chance, seconds, split):
    """Write metrics.json and predictions.jsonl; print the table."""
    metrics = {
        "task": args.task, "data": str(args.data or "toy"), "split": split, "examples": len(predictions),
        "chance": round(chance, 4), "seconds": round(seconds, 1), "blind": args.blind, "unreadable": len(errors),
        "by_clips": by_clips,
    }  # fmt: skip
    clipbert.write_text(args.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    clipbert.write_text(args.out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in predictions))
    names = list(next(iter(by_clips.values())))
    print(f"\n{run.task.title}, {'toy' if not args.data else args.data} data, {len(predictions):,} {split} questions, "
          f"G = {run.settings['agg']}{', blind' if args.blind else ''}")  # fmt: skip
    print("N_test" + "".join(f"{name:>20}" for name in names))
    for n, row in by_clips.items():
        print(f"{n:>6}" + "".join(f"{row[name]:20.2f}" for name in names))
    print(f"{'chance':>6}{chance:20.2f}")
    clipbert.list_unreadable(errors, "counted as wrong")


# ----------------------------------------------------------------------------------------------------------------------
# The three things this script does


def run_training(args):
    task, device = TASKS[args.task], clipbert.choose_device(args)
    clipbert.seed_everything(args.seed)
    state = clipbert.load_checkpoint(args.out / "last.pt") if args.resume else None
    if state and (state["task"] != args.task or "optimizer" not in state):
        raise ValueError(f"{args.out / 'last.pt'}: a checkpoint of {state['task']}, which can't go on as {args.task}")
    folder, examples = load_examples(args, "train")
    _, test = load_examples(args, "test")
    if state:
        model, _ = load_run(args.out / "last.pt", args.task)
        vocabulary, answers = state["vocabulary"], state["answers"]
    else:
        answers = answers_for(task, folder, examples)
        texts = [text for example in examples for text in data.input_texts(example)]
        model, vocabulary = build_model(args, task, answers, texts)
    tiny = model.cfg.backbone == "tiny"
    settings = settings_for(args, "tiny" if tiny else "base", state and state["settings"])
    run = Run(task, folder, settings, device, data.build_tokenizer(vocabulary), answers, args.seed, args.blind)
    known = [e for e in examples if answers is None or e.answer in set(answers)]
    per_step = settings["batch_size"] * settings["grad_accum"]
    total_steps = settings["max_steps"] or settings["epochs"] * -(-len(known) // per_step)

    model.to(device.name)
    optimizer = clipbert.build_optimizer(model, settings["weight_decay"])
    scaler = torch.amp.GradScaler(device.name, enabled=device.dtype == torch.float16)
    start = 0
    if state:
        start = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        clipbert.restore_random_states(state["random"])
        print(f"resuming from {args.out / 'last.pt'} at step {start} of {total_steps}")
    args.out.mkdir(parents=True, exist_ok=True)
    config = {
        "task": args.task, "data": str(folder), "seed": args.seed, "init": str(args.init or ""), "blind": args.blind,
        "device": device.name, "precision": str(device.dtype).split(".")[1], "total_steps": total_steps,
        "settings": settings, "model": clipbert.config_dict(model.cfg),
    }  # fmt: skip
    clipbert.write_text(args.out / "config.json", json.dumps(config, indent=2) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{task.title}: {len(known):,} training and {len(test):,} test examples from {folder}")
    print(f"{parameters / 1e6:.1f}M parameters, {total_steps:,} steps of {per_step} examples on {device.name}: "
          + ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None))  # fmt: skip

    def checkpoint(name, step, training=True):
        contents = {
            "task": args.task, "step": step, "model": model.state_dict(), "num_outputs": model.num_outputs,
            "config": clipbert.config_dict(model.cfg), "settings": settings, "vocabulary": vocabulary,
            "answers": answers,
        }  # fmt: skip
        if training:
            contents |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            contents |= {"random": clipbert.random_states()}
        clipbert.save_checkpoint(args.out / name, contents)

    began = time.time()
    unreadable = train(run, model, optimizer, scaler, known, args, checkpoint, start, total_steps, None)
    clipbert.list_unreadable(unreadable.elements(), "replaced by other examples in training")
    # TGIF-QA has no validation split, and choosing a step by the test set would be cheating: the last is the best.
    checkpoint("best.pt", total_steps, training=False)
    by_clips, predictions, errors = evaluate(run, model, test, args.test_clips)
    report(run, args, by_clips, predictions, errors, chance_level(task, known, test), time.time() - began, "test")
    print_next_steps(args)


def load_for_use(args):
    """A fine-tuned checkpoint, ready to answer: (run, model)."""
    model, state = load_run(args.eval, args.task)
    settings = settings_for(args, None, state["settings"])
    task, device = TASKS[args.task], clipbert.choose_device(args)
    tokenizer = data.build_tokenizer(state["vocabulary"])
    folder = args.data or (None if args.predict else data.toy_data() / task.toy)
    run = Run(task, folder, settings, device, tokenizer, state["answers"], args.seed, args.blind)
    return run, model.to(device.name)


def run_evaluation(args):
    run, model = load_for_use(args)
    _, train_examples = load_examples(args, "train")
    _, test = load_examples(args, "test")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    by_clips, predictions, errors = evaluate(run, model, test, args.test_clips)
    chance = chance_level(run.task, train_examples, test)
    report(run, args, by_clips, predictions, errors, chance, time.time() - began, "test")


@torch.no_grad()
def run_prediction(args):
    """Answer one question about one video, at the largest N_test."""
    run, model = load_for_use(args)
    if run.task.kind == "choice" and len(args.options) < 2:
        raise ValueError(f"--task {args.task} is multiple choice: give --options A B ...")
    s, n = run.settings, max(args.test_clips)
    example = data.Example(id="0", video=args.predict.name, text=args.question, options=tuple(args.options), answer=0)
    frames = data.read_clips(args.predict, n, s["frames"], s["fps"], s["size"], False, None)
    item = {"example": example, "frames": frames, "unreadable": [], "index": 0}
    batch = to_device(data.Collator(run.tokenizer, s["text_length"])([item]), run.device)
    model.eval()
    with run.device.autocast():
        logits = clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
    p = clipbert.aggregate_clips(logits.float(), s["agg"]).flatten().cpu()
    print(f"{args.predict.name}, {n} clips of {s['frames']} frames: {args.question}")
    if run.task.kind == "count":
        print(f"  {p.item():.2f}")
        return
    names = args.options or run.answers
    probabilities = p.softmax(0)
    for i in p.argsort(descending=True).tolist()[:5]:
        print(f"  {probabilities[i]:6.1%}  {names[i] if i < len(names) else '(unused)'}")


def print_next_steps(args):
    if args.data is None:
        command = f"python finetune.py --task {args.task}"
        print(f"\nNext: {command} --eval {args.out / 'best.pt'} --predict VIDEO --question ...\n"
              f"      {command} --blind                   what the text alone gives away\n"
              f"      {command} --data DIR --model base   the paper's model on real data")  # fmt: skip


if __name__ == "__main__":
    args = parse_arguments()
    clipbert.main(run_prediction if args.predict else run_evaluation if args.eval else run_training, args)
