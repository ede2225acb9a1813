"""Pretrain ClipBERT on captioned images: masked words, image-text matching (paper, section 3).

    python pretrain.py                                            toy photos: minutes on a CPU
    python finetune.py --task tgif_qa --init runs/pretrain/last.pt    ... and what it is good for
    python pretrain.py --data coco vg --model base                the paper's: COCO, Visual Genome
    python pretrain.py --data msrvtt --frames 2 --fps 2           videos: one clip of each
    python pretrain.py --data DIR --eval runs/pretrain/last.pt    only evaluate
    python pretrain.py --resume                                   go on after an interruption
    torchrun --nproc_per_node=8 pretrain.py --data coco vg --model base    the paper's eight GPUs

DIR holds COCO's captions_*.json, Visual Genome's region_descriptions.json, MSRVTT's json, or any
.csv, .tsv or .jsonl with the columns path and caption, and the images or videos. Validation
captions are those of a val file there; without one, a tenth of the images is held out. A run writes
to a folder of its own, runs/pretrain/ if that is free: config.json, log.jsonl (a line a step or
evaluation), last.pt and the one before it, previous.pt, best.pt (lowest validation loss) and
metrics.json.

Read it from `run_training` on: settings -> data -> model -> loop -> evaluation.
"""

import json
import os
import random
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

# Threads that wait for each other sleep instead of spinning: on a busy CPU five times as fast.
# torch reads this as it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import clipbert
import data
from clipbert import setting

# ----------------------------------------------------------------------------------------------------------------------
# Settings: clipbert.Settings and these


@dataclass
class Settings(clipbert.Settings):
    """The reference's numbers for each of its eight GPUs: 32 images x 2 captions a batch, two
    batches to an update."""

    size: int = setting(768, "L, pixels", low=16, high=64 * clipbert.VisualEmbedding.MAX_GRID)
    # The paper's "pixel random sampling": faster, and a regulariser.
    keep: int = setting(100, "random grid tokens that a training step keeps, of 144 at L = 768")
    captions: int = setting(2, "of an image at a time, for one pass through the CNN", high=1000)
    batch_size: int = setting(32, "images at a time, on each GPU")
    epochs: int = setting(40, "each goes through all groups of captions (8 GPUs: 6,000 updates)")
    eval_every: int = setting(None, "steps from one evaluation to the next (default: an epoch)")
    mask_rate: float = setting(0.15, "the share of words that are masked", low=0.001, high=1)
    mlm_over: str = setting("masked", "what the MLM loss is averaged over: masked tokens, or all",
                            choices=["masked", "all"])  # fmt: skip


# What the tiny model changes. From random weights ITM stays at ln(2), the loss of guessing, for
# hundreds of steps; and the more MLM weighs, the longer: its large, easy gains (which word follows
# which, without looking) teach attention to leave the picture alone. Hence the reference's average
# over all positions, that is, a small weight.
TINY = {"size": 64, "grad_accum": 1, "lr": 3e-4, "max_steps": 1200, "eval_every": 400,
        "mlm_over": "all"}  # fmt: skip
# No toy caption has more than 9 tokens, by which that average then divides; a photo has 6 of them.
TOY = {"captions": 6, "text_length": 9}

# Images of a folder that an evaluation looks at: all of COCO's would take longer than the training
# from one evaluation to the next.
MOST_VALIDATION = 2000


# ----------------------------------------------------------------------------------------------------------------------
# Training


def run_training(given):
    """Pretrain, then evaluate the last weights on the validation images.

    Fine-tuning starts from them, too: as in the paper, nothing is chosen by validation. (best.pt is
    there for those who want to.)
    """
    toy = {} if "data" in given else TOY
    changes = {"tiny": TINY | toy, "base": {}}  # the defaults are the paper's
    s, state = clipbert.begin(Settings, given, "pretrain", lambda model: changes[model])
    torch.manual_seed(s.seed)  # of the initial weights, and of dropout
    with clipbert.first_one_first():
        examples, val = load_examples(s)
        data.check_cached(examples + val, s)
        model, vocabulary = load_model(s, state) if s.resume else new_model(s, state, examples)
    model = clipbert.use_machine(s, model)
    collate = data.Collator(data.build_tokenizer(vocabulary), s.text_length, mask_rate=s.mask_rate)
    print(f"{len(examples):,} groups of {s.captions} captions for training, {len(val):,} for "
          "validation")  # fmt: skip
    stopped = state if s.resume else None
    training = clipbert.Training(s, model, len(examples), stopped, vocabulary=vocabulary)
    train(s, model, collate, training, examples, val)
    report(s, val, *evaluate(s, model, collate, val), time.time() - training.began)
    if not s.data:
        print(f"\nNext: python finetune.py --task tgif_qa --init {training.out / 'last.pt'}")


def train(s, model, collate, training, examples, val):
    """The training loop, as in finetune.py: a step is grad_accum batches, one update.

        loss = L_MLM + L_ITM        (paper, section 3: pretraining)

    Which images, captions and masks it sees depends on the seed and the step alone; the grid tokens
    that are kept, and dropout, on torch's random state, which checkpoints hold: a resumed run
    repeats the uninterrupted one.
    """
    draw = data.CaptionDraw(examples, s.captions)
    dataset = data.ClipDataset(examples, s, n_clips=1, train=True, draw=draw)
    order = data.training_order(
        len(examples), s.batch_size, training.n_batches, s.seed, training.first_batch
    )
    own = islice(order, clipbert.RANK, None, clipbert.PROCESSES)
    loader = iter(data.data_loader(dataset, own, collate, s.workers))
    model.train()
    for step in training.steps():
        totals = torch.zeros(2, device=clipbert.DEVICE)
        for batch in training.batches(loader):
            frames = batch["frames"][:, 0]  # (B, T, 3, L, L): the one clip
            text = batch["input_ids"], batch["attention_mask"]  # (B*n, Lt): n captions an image
            with clipbert.autocast(s):
                mlm_scores, itm_scores = training.parallel(frames, *text, s.keep)
            labels, match = batch["mlm_labels"], batch["target"]
            mlm = clipbert.mlm_loss(mlm_scores, labels, s.mlm_over, s.text_length)
            itm = clipbert.itm_loss(itm_scores, match)
            training.backward(mlm + itm)
            totals += torch.stack([mlm, itm]).detach()
        training.update(step, loss=totals.sum(), mlm=totals[0], itm=totals[1])
        # A score is the better, the higher: hence the minus. best.pt has the lowest sum of losses.
        last = step == training.total_steps
        if last or (step % s.eval_every == 0 if s.eval_every else training.ends_epoch(step)):
            metrics, _ = evaluate(s, model, collate, val)
            training.validated(step, -(metrics["mlm_loss"] + metrics["itm_loss"]), metrics)
            model.train()


# ----------------------------------------------------------------------------------------------------------------------
# Data and model


def load_examples(s):
    """(training, validation) examples of all folders: groups of captions of one image."""
    examples, val = [], []
    for folder in s.data or [data.toy_data("photos") / "photos"]:
        parts = load_folder(s, folder)
        examples, val = examples + parts[0], val + parts[1]
    return data.caption_groups(examples, s.captions), data.caption_groups(val, s.captions)


def load_folder(s, folder):
    """(training, validation) examples, a caption each.

    Without validation captions a tenth of the images is held out, with all that is said of them: a
    caption of an image that was seen in training would be no test.
    """
    train, val = (
        data.without_missing(data.read_examples("pretrain", [folder], split), split, folder,
                             s.allow_missing) for split in ("train", "val")
    )  # fmt: skip
    images, val_images = images_of(train), images_of(val)
    if not val:
        images, val_images = hold_out(images)
        val = train
        print(f"{folder}: no validation captions, so {len(val_images):,} images are held out")
    images, val_images = set(images[: s.limit]), set(val_images[: s.limit][:MOST_VALIDATION])
    if not images or len(val_images) < 2:
        raise data.DataError(f"{folder}: {len(images)} training and {len(val_images)} validation "
                             "images are too few: put more captioned images there")  # fmt: skip
    return [e for e in train if e.source in images], [e for e in val if e.source in val_images]


def hold_out(images):
    """(training, validation): a tenth, at least two: one has no other to be confused with.

    Seed 0, whatever --seed is: --eval with another seed would hold out other images, on which the
    checkpoint may have been trained.
    """
    shuffled = random.Random(0).sample(images, len(images))
    held_out = shuffled[: max(2, len(images) // 10)]
    return [image for image in images if image not in set(held_out)], held_out


def images_of(examples):
    """The source of each image, once, in order."""
    return list(dict.fromkeys(example.source for example in examples))


def new_model(s, state, examples):
    """-> (model, vocabulary); state: the checkpoint of --init, or None.

    A tiny model's words: of the captions, and, of the toy data, of all that fine-tuning will ask.
    """
    texts = [text for example in examples for text in example.captions]
    model, vocabulary = clipbert.start_model(
        clipbert.ClipBertForPreTraining, s, state,
        lambda: data.vocabulary_from_text(texts + ([] if s.data else data.TOY_WORDS)),
        lambda: data.read_vocabulary(s.bert),
    )  # fmt: skip
    return model, vocabulary


def load_model(s, state):
    """-> (model, vocabulary) of one of our pretraining checkpoints."""
    model = clipbert.ClipBertForPreTraining(clipbert.config_from(state))
    model.load_state_dict(state["model"])
    return model, state["vocabulary"]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: masks and mismatches are the same every time, whatever the seed and the batch size


@torch.no_grad()
def evaluate(s, model, collate, val):
    """-> ({accuracies in percent, mean losses, counts}, what could not be read).

    Of each group CaptionDraw takes some captions from other images, the same ones every time.
    MLM's loss is over the masked tokens, always.
    """
    model.eval()
    draw = data.CaptionDraw(val, s.captions)
    dataset = data.ClipDataset(val, replace(s, seed=0), n_clips=1, train=False, draw=draw)
    own = data.ordered_batches(len(val), s.batch_size)[clipbert.RANK :: clipbert.PROCESSES]
    words, texts, errors = [], [], []  # a row for each masked word, for each text (see compare)
    for batch in data.data_loader(dataset, own, collate, s.workers):
        batch = clipbert.to_device(batch)
        with clipbert.autocast(s):
            mlm_scores, itm_scores = model(
                batch["frames"][:, 0], batch["input_ids"], batch["attention_mask"]
            )
        match, labels = batch["target"], batch["mlm_labels"]
        masked = labels != -100  # (B*n, Lt)
        words.append(
            compare(mlm_scores[masked], labels[masked], match.repeat_interleave(masked.sum(1)))
        )
        texts.append(compare(itm_scores, match, match))
        errors += [line for lines in batch["unreadable"] for line in lines]
    # From all processes, of which one may have had no batch at all: hence a beginning of no rows.
    words, texts, errors = ([x for part in clipbert.gather(mine) for x in part]
                            for mine in (words, texts, errors))  # fmt: skip
    words, texts = (torch.cat([torch.zeros(0, 3), *rows]) for rows in (words, texts))
    return {
        "mlm_accuracy": mean(100 * words[:, 0]), "mlm_loss": mean(words[:, 1]),
        "mlm_accuracy_matched": mean(100 * words[words[:, 2] == 1, 0]),
        "itm_accuracy": mean(100 * texts[:, 0]), "itm_loss": mean(texts[:, 1]),
        "masked_words": len(words), "captions": len(texts), "matched": int(texts[:, 2].sum()),
    }, errors  # fmt: skip


def compare(scores, labels, match):
    """scores (n, classes), labels (n,), match (n,) -> (n, 3) on the CPU: right, loss, match."""
    losses = torch.nn.functional.cross_entropy(scores.float(), labels, reduction="none")
    return torch.stack([scores.argmax(1) == labels, losses, match], dim=1).double().cpu()


def mean(values):
    """Of a tensor; 0 of an empty one, where no word was masked."""
    return round(values.mean().item(), 4) if len(values) else 0.0


def run_evaluation(given):
    """--eval: evaluate a checkpoint. The results lie beside it."""
    s, state = clipbert.load_finished(Settings, given)
    _, val = load_examples(s)
    model, vocabulary = load_model(s, state)
    model, began = clipbert.use_machine(s, model), time.time()
    collate = data.Collator(data.build_tokenizer(vocabulary), s.text_length, mask_rate=s.mask_rate)
    results = evaluate(s, model, collate, val)
    report(s, val, *results, time.time() - began, clipbert.result_suffix(s, "val"))


def report(s, val, metrics, errors, seconds, ending=""):
    """Write metrics.json (--eval: with an ending to its name); print the table."""
    images, path = len(images_of(val)), Path(s.out) / f"metrics{ending}.json"
    everything = {
        "task": "pretrain", "data": [str(x) for x in s.data] if s.data else "toy", "split": "val",
        "examples": images, "chance": 50.0, "seconds": round(seconds, 1), "blind": s.blind,
        "unreadable": len(errors), **metrics,
    }  # fmt: skip
    clipbert.write_file(path, json.dumps(everything, indent=2) + "\n")
    print(f"\npretraining, {images:,} validation images, {metrics['captions']:,} captions, "
          f"{metrics['matched']:,} of them the image's own, {metrics['masked_words']:,} masked "
          f"tokens{', blind' if s.blind else ''}")  # fmt: skip
    print(f"{'':28}{'accuracy':>10}{'loss':>10}")
    for name, key in (("masked language modelling", "mlm"), ("image-text matching", "itm")):
        print(f"{name:28}{metrics[f'{key}_accuracy']:10.2f}{metrics[f'{key}_loss']:10.4f}")
        if key == "mlm":  # the others are about other images: there the words alone must do
            print(f"{'  in matching captions':28}{metrics['mlm_accuracy_matched']:10.2f}")
    print(f"written to {path}")
    clipbert.list_unreadable(errors, "seen as black in evaluation")


if __name__ == "__main__":
    given = clipbert.parse_flags(data.Parser(description=__doc__), Settings)
    clipbert.main(run_evaluation if "eval" in given else run_training, given)
