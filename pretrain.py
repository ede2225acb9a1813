"""Pretrain ClipBERT on captioned images (paper, section 3): masked language modelling, image-text matching.

    python pretrain.py                                            the toy photos: minutes on a laptop CPU
    python finetune.py --task tgif_qa --init runs/pretrain/last.pt          ... and what it is good for
    python pretrain.py --data coco vg --model base                the paper's: COCO captions and Visual Genome regions
    python pretrain.py --data coco vg --ratio 1 3 --model base    ... with three batches of VG to one of COCO
    python pretrain.py --data msrvtt --frames 2 --fps 2           captioned videos: the same loop, one clip per video
    python pretrain.py --data DIR --eval runs/pretrain/last.pt    only evaluate
    python pretrain.py --resume                                   go on after an interruption
    torchrun --nproc_per_node=8 pretrain.py --data coco vg --model base     the paper's eight GPUs

DIR holds COCO's captions_*.json, Visual Genome's region_descriptions.json, MSRVTT's json, or any .csv or .jsonl with
the columns path and caption, and the images or videos. Validation captions are those of a val file there; without one,
a tenth of the images is held out. Everything is written to runs/pretrain/: config.json, log.jsonl (a line a step or
evaluation), last.pt and the one before it, previous.pt, best.pt (lowest validation loss) and metrics.json; and
nonfinite.pt, if the loss stopped being a number.
"""

import json
import random
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

import clipbert
import data

# ----------------------------------------------------------------------------------------------------------------------
# Settings: the paper's, then the tiny model's changes, then the command line

# The reference's hyper-parameters: 32 images x 2 captions a batch and GPU, two batches to an update, eight GPUs.
PAPER = {
    "size": 768,  # L, pixels
    "keep": 100,  # random grid tokens that a training step keeps, of 144 at L = 768: faster, and a regulariser
    "frames": 1,  # T; an image is a video of one frame
    "fps": 1.0,  # captioned video: a clip of T frames spans T / fps seconds
    "captions": 2,  # of an image at a time; they share its pass through the CNN
    "text_length": 30,  # Lt at most, [CLS] and [SEP] included
    "batch_size": 32,  # images at a time
    "grad_accum": 2,  # ... and how many such batches to an update
    "epochs": 40,  # each shows every caption once: with COCO and VG 6,000 updates of eight GPUs
    "eval_every": None,  # steps from one evaluation to the next (None: an epoch)
    "max_steps": None,
    "lr": 5e-5,  # peak
    "weight_decay": 1e-3,
    "clip_grad": 5.0,  # the gradient's largest norm
    "mask_rate": 0.15,  # of the words
    "mlm_over": "masked",  # what the MLM loss is averaged over, see clipbert.mlm_loss
}

# What the tiny model changes. From random weights ITM stays at ln(2) for hundreds of steps, the longer, the more MLM
# weighs: its large, easy gains (which word follows which, without looking) teach attention to leave the picture alone.
# Hence the reference's average over all positions, that is, a small weight, and a low learning rate.
# No toy caption has more than 9 tokens, so text_length, by which that average divides, is theirs.
TINY = {"size": 64, "captions": 6, "text_length": 9, "grad_accum": 1, "lr": 3e-4, "max_steps": 1200,
        "eval_every": 400, "mlm_over": "all"}  # fmt: skip


def parse_arguments(arguments=None):
    parser = data.Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=data.folder, nargs="+", metavar="DIR", help="folders of captioned images (default: toy photos)")
    parser.numbers("--ratio", kind=float, low=1e-6, nargs="+",
                   help="batches from each of several DIRs (default: by number of images)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/pretrain"), help="where to write")
    add("--eval", type=Path, metavar="CKPT", help="only evaluate this checkpoint of pretraining")
    clipbert.add_flags(parser)
    # hyper-parameters of pretraining; the default is the paper's, printed at the start
    parser.numbers("--keep", help="random grid tokens that a training step keeps")
    parser.numbers("--captions", high=1000, help="of an image at a time")
    parser.numbers("--eval_every", help="steps from one evaluation to the next (default: an epoch)")
    parser.numbers("--mask_rate", kind=float, low=0.001, high=1, help="the share of words that are masked")
    add("--mlm_over", choices=["masked", "all"], help="average the MLM loss over masked tokens, or all positions")
    add("--allow_missing", action="store_true", help="leave out captions whose image is missing")
    args = parser.parse_args(arguments)
    if args.ratio and len(args.ratio) != len(args.data or [None]):
        parser.error(f"--ratio wants a number for each DIR of --data, of which there are {len(args.data or [None])}")
    clipbert.check_flags(parser, args)
    return args


def settings_for(args, cfg, stored=None):
    """The hyper-parameters in force: the paper's, tiny's changes, a checkpoint's settings, the command line's."""
    return clipbert.override(PAPER | (TINY if cfg.backbone == "tiny" else {}) | (stored or {}), args, cfg)


# ----------------------------------------------------------------------------------------------------------------------
# Data and model


MOST_VALIDATION = 2000  # images of a folder: all of COCO's would be more forward passes than the training between


class Source(NamedTuple):
    """A folder of captioned images."""

    folder: Path
    train: list  # of data.CaptionedImage
    val: list


def load_source(folder, args):
    """The images of both splits. Where there are no validation captions, a tenth of the images is held out."""
    train = with_files(folder, data.captioned_images(data.read_captions(folder, "train")), args)
    val = with_files(folder, data.captioned_images(data.read_captions(folder, "val", required=False)), args)
    if not val:
        random.Random(0).shuffle(train)  # whatever --seed is: a checkpoint is never judged on what it has seen
        held_out = min(-(-len(train) // 10), 1000)
        train, val = train[held_out:], train[:held_out]
        print(f"{folder}: no validation captions, so {len(val):,} of {len(train) + len(val):,} images are held out")
    if not train or len(val) < 2:
        raise data.DataError(f"{folder}: {len(train)} training and {len(val)} validation images are too few: put more "
                             "captioned images there")  # fmt: skip
    return Source(folder, train[: args.limit], val[: min(args.limit or MOST_VALIDATION, MOST_VALIDATION)])


def grouped(source, n):
    """The source with each image's captions in groups of n, the examples of an epoch."""
    return source._replace(train=data.caption_groups(source.train, n), val=data.caption_groups(source.val, n))


def with_files(folder, images, args):
    """The images whose file is there. Missing ones stop the run, unless --allow_missing."""
    missing = {image.video for image in images if data.find_media(folder, image.video) is None}
    if missing:
        what = f"{len(missing):,} of {len(images):,} captioned images are missing under {folder} ({min(missing)}, ...)"
        if not args.allow_missing:
            raise data.DataError(f"{what}: put them there, or pretrain without them (--allow_missing)")
        print(f"note: {what}", file=sys.stderr)
    return [image for image in images if image.video not in missing]


def text_vocabulary(sources, args):
    """From the captions, and, of the toy data, from all toy questions: fine-tuning on them will need those words."""
    texts = [text for source in sources for image in source.train for text in image.captions]
    return data.vocabulary_from_text(texts + ([] if args.data else data.toy_texts(data.toy_data())))


def model_from(state, path):
    """The model that one of our pretraining checkpoints holds."""
    if state.get("task") != "pretrain":
        raise ValueError(f"{path}: not a checkpoint of pretrain.py; start from it with --init")
    model = clipbert.ClipBertForPreTraining(clipbert.config_from(state))
    model.load_state_dict(state["model"])
    return model


class Run(NamedTuple):
    """What training and evaluation share."""

    sources: list
    settings: dict
    device: clipbert.Device
    tokenizer: object
    seed: int
    blind: bool

    def loader(self, split, seed, batches):
        s = self.settings
        dataset = data.Mix([
            data.CaptionDataset(
                getattr(source, split), source.folder, captions=s["captions"], n_frames=s["frames"], fps=s["fps"],
                size=s["size"], train=split == "train", seed=seed, blind=self.blind,
            ) for source in self.sources
        ])  # fmt: skip
        collate = data.CaptionCollator(self.tokenizer, s["text_length"], s["mask_rate"])
        return data.data_loader(dataset, batches, collate, self.device.workers, self.device.name == "cuda")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(run, model, training, ratio):
    """The training loop, as in finetune.py: a step is grad_accum batches, one update.

        loss = L_MLM + L_ITM        (paper, section 3: pretraining)

    Which images, captions and masks it sees depends on the seed and the step alone; the grid tokens that are kept, and
    dropout, on torch's random state, which checkpoints hold: a resumed run repeats the uninterrupted one.
    """
    s, sizes = run.settings, [len(source.train) for source in run.sources]
    batches_per_step = s["grad_accum"] * clipbert.PROCESSES

    def batches_after(step):
        total = training.total_steps * batches_per_step
        return data.mixed_order(sizes, ratio or sizes, s["batch_size"], total, run.seed, step * batches_per_step)

    training.examples_of = lambda step: [
        run.sources[k].train[i].video
        for batch in islice(batches_after(step - 1), batches_per_step) for k, _, i in batch
    ]  # fmt: skip
    own_batches = islice(batches_after(training.start), clipbert.RANK, None, clipbert.PROCESSES)
    loader = iter(run.loader("train", run.seed, own_batches))
    model.train()
    for step in training.steps():
        losses = torch.zeros(2, device=run.device.name)
        for batch in training.batches(loader):
            frames = batch["frames"][:, 0]  # (B, T, 3, L, L): the one clip
            with run.device.autocast():
                mlm, itm = training.forward(frames, batch["input_ids"], batch["attention_mask"], s["keep"])
            mlm = clipbert.mlm_loss(mlm, batch["mlm_labels"], s["mlm_over"], s["text_length"])
            itm = clipbert.itm_loss(itm, batch["itm_labels"])
            training.scaler.scale((mlm + itm) / s["grad_accum"]).backward()
            losses += torch.stack([mlm, itm]).detach() / s["grad_accum"]
        training.update(step, loss=losses.sum(), mlm=losses[0], itm=losses[1])  # clipbert.Training: AdamW; the log
        every = s["eval_every"]
        if step % every == 0 or step == training.total_steps if every else training.ends_epoch(step):
            training.flush()
            metrics, _ = evaluate(run, model)
            training.log.write({"step": step, **metrics})
            training.save_best(step, -(metrics["mlm_loss"] + metrics["itm_loss"]))
            model.train()
        training.end_step(step)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: masks and mismatches are the same every time, whatever the seed and the batch size


@torch.no_grad()
def evaluate(run, model):
    """Accuracies in percent, mean losses (MLM's over masked tokens, always), and what could not be read."""
    model.eval()
    keys = [(k, 0, i) for k, source in enumerate(run.sources) for i in range(len(source.val))]
    batches = [keys[b : b + run.settings["batch_size"]] for b in range(0, len(keys), run.settings["batch_size"])]
    sums, errors = Counter(), []
    for batch in run.loader("val", 0, batches[clipbert.RANK :: clipbert.PROCESSES]):  # each process its share
        batch = run.device.move(batch)
        with run.device.autocast():
            mlm, itm = model(batch["frames"][:, 0], batch["input_ids"], batch["attention_mask"])
        masked = batch["mlm_labels"] != -100  # (B*n, Lt)
        match = batch["itm_labels"] == 1  # (B*n,)
        right = mlm.argmax(-1) == batch["mlm_labels"]  # (B*n, Lt)
        sums["words"] += masked.sum().item()
        sums["words_right"] += right.sum().item()
        sums["matched_words"] += masked[match].sum().item()
        sums["matched_words_right"] += right[match].sum().item()
        sums["texts"] += len(itm)
        sums["matched_texts"] += match.sum().item()
        sums["texts_right"] += (itm.argmax(-1) == batch["itm_labels"]).sum().item()
        sums["mlm"] += clipbert.mlm_loss(mlm, batch["mlm_labels"]).item() * masked.sum().item()
        sums["itm"] += clipbert.itm_loss(itm, batch["itm_labels"]).item() * len(itm)
        errors += [line for lines in batch["unreadable"] for line in lines]
    sums, errors = sum(clipbert.gather(sums), Counter()), sum(clipbert.gather(errors), [])

    def ratio(a, b, factor=100):
        return round(factor * sums[a] / max(sums[b], 1), 4)

    return {
        "mlm_accuracy": ratio("words_right", "words"), "mlm_loss": ratio("mlm", "words", 1),
        "mlm_accuracy_matched": ratio("matched_words_right", "matched_words"),
        "itm_accuracy": ratio("texts_right", "texts"), "itm_loss": ratio("itm", "texts", 1),
        "masked_words": sums["words"], "captions": sums["texts"], "matched": sums["matched_texts"],
    }, errors  # fmt: skip


def report(run, args, metrics, errors, seconds):
    """Write metrics.json; print the table."""
    where = [str(source.folder) for source in run.sources] if args.data else "toy"
    images = len({image.video for source in run.sources for image in source.val})
    everything = {"task": "pretrain", "data": where, "split": "val", "examples": images, "chance": 50.0,
                  "seconds": round(seconds, 1), "blind": run.blind, "unreadable": len(errors), **metrics}  # fmt: skip
    clipbert.write_text(args.out / "metrics.json", json.dumps(everything, indent=2) + "\n")
    print(f"\npretraining, {images:,} validation images, {metrics['captions']:,} captions, {metrics['matched']:,} of "
          f"them the image's own, {metrics['masked_words']:,} masked tokens{', blind' if run.blind else ''}")
    print(f"{'':28}{'accuracy':>10}{'loss':>10}")
    print(f"{'masked language modelling':28}{metrics['mlm_accuracy']:10.2f}{metrics['mlm_loss']:10.4f}")
    print(f"{'  in matching captions':28}{metrics['mlm_accuracy_matched']:10.2f}")
    print(f"{'image-text matching':28}{metrics['itm_accuracy']:10.2f}{metrics['itm_loss']:10.4f}")
    clipbert.list_unreadable(errors, "seen as black in evaluation")


# ----------------------------------------------------------------------------------------------------------------------
# The two things this script does


def run_training(args):
    """Pretrain, then evaluate the last weights on the validation images."""
    state = clipbert.load_stopped(args, "pretrain") if args.resume else None
    torch.manual_seed(args.seed)
    with clipbert.first_one_first():
        run, model, vocabulary = prepare(args, state)
    images, folders = sum(len(source.train) for source in run.sources), [str(source.folder) for source in run.sources]
    training = clipbert.Training(
        args, run, model, images, state, task="pretrain", data=folders, vocabulary=vocabulary
    )
    for source in run.sources:
        print(f"{len(source.train):,} training and {len(source.val):,} validation images, each with "
              f"{run.settings['captions']} captions at a time, from {source.folder}")
    print(training.summary("images"))
    with training:
        train(run, model, training, args.ratio)
    training.list_unreadable()
    report(run, args, *evaluate(run, model), time.time() - training.began)
    if not args.data:
        print(f"\nNext: python finetune.py --task tgif_qa --init {args.out / 'last.pt'}")


def prepare(args, state):
    """-> the Run, the model (a new one, if there is no checkpoint's state to go on with) and its vocabulary."""
    device = clipbert.choose_device(args)
    if state:
        model, vocabulary = model_from(state, args.eval or args.out), state["vocabulary"]
    folders = args.data or [data.toy_data("coco_captions") / "coco_captions"]
    sources = [load_source(folder, args) for folder in folders]
    if not state:
        model, vocabulary = clipbert.start_model(
            clipbert.ClipBertForPreTraining, args,
            lambda: text_vocabulary(sources, args), lambda: data.read_vocabulary(args.bert),
        )  # fmt: skip
    settings = settings_for(args, model.cfg, state and state["settings"])
    sources = [grouped(source, settings["captions"]) for source in sources]
    return Run(sources, settings, device, data.build_tokenizer(vocabulary), args.seed, args.blind), model, vocabulary


def run_evaluation(args):
    """--eval: evaluate a checkpoint."""
    run, model, _ = prepare(args, clipbert.load_checkpoint(args.eval))
    began = time.time()
    report(run, args, *evaluate(run, run.device.place(model)), time.time() - began)


if __name__ == "__main__":
    args = parse_arguments()
    clipbert.main(run_evaluation if args.eval else run_training, args)
