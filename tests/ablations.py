"""The paper's claims (section 4, analysis), tried on the toy data: small variants of one training run, side by side.

    python tests/ablations.py                    every claim, three seeds each
    python tests/ablations.py clips_in_training  one of them
    python tests/ablations.py --quick            one seed

Every variant fine-tunes the tiny model on toy TGIF-QA transition from the toy pretraining (runs/pretrain/last.pt,
made first if it is not there) for so few steps that the variants still differ; all other settings are the task's.
What a variant does otherwise: flags, or changed functions, each an example of how to try an idea. A table a claim:
accuracy in percent, mean and spread (largest minus smallest) over the seeds. What does not come out as in the paper is
left as it is: a tiny model on toy clips need not agree.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clipbert
import data
import finetune
import pretrain

PRETRAINED = Path("runs/pretrain/last.pt")
STEPS = 60  # 150 are enough for 99%: where all variants are right, none is better


# ----------------------------------------------------------------------------------------------------------------------
# Variants that no flag asks for: a changed function each


def same_clips_always():
    """Training takes the uniform clips of testing, the same in every epoch."""
    sample = data.sample_clips
    data.sample_clips = lambda *args, **kw: sample(*args[:5], False, None)


def frozen_cnn():
    """F_v keeps its pretrained weights, as features computed once and for all would: no gradient reaches it."""
    clipbert.ClipBert.encode_frames = torch.no_grad()(clipbert.ClipBert.encode_frames)


def other_videos():
    """Videos unlike the pictures of pretraining, which are otherwise drawn alike: as if the CNN came from elsewhere."""
    read = data.read_clips
    data.read_clips = lambda *args, **named: 255 - read(*args, **named)


def different_clips():
    """Clips for testing chosen by what they show, of which the paper speaks as future work: those that differ most.

    An example of how to change one function: whatever reads a video calls data.read_clips, so what stands in its place
    is used everywhere. It reads four times as many uniform clips and keeps some; the model sees no more than before.
    """
    read = data.read_clips

    def read_different(path, n_clips, n_frames, fps, size, train, *others, **named):
        n = n_clips if train else 4 * n_clips  # training: the paper's random clips, as ever
        clips = read(path, n, n_frames, fps, size, train, *others, **named)  # (n, T, 3, L, L)
        return clips if train else clips[farthest_points(clips[:, 0], n_clips)]  # (N, T, 3, L, L)

    data.read_clips = read_different


def farthest_points(frames, n):
    """n places among frames (M, 3, L, L) that differ most: start with the middle one, then take again and again the one
    that is farthest from all taken so far (farthest-point sampling). -> ascending places."""
    # 16 x 16 grey pixels: what is where, without the noise that sets any two frames of a video apart.
    grey = torch.nn.functional.adaptive_avg_pool2d(frames.float().mean(1), 16).flatten(1)  # (M, 256)
    taken, nearest = [len(grey) // 2], torch.full((len(grey),), torch.inf)  # nearest: distance to those taken
    while len(taken) < n:
        nearest = nearest.minimum((grey - grey[taken[-1]]).norm(dim=1))
        nearest[taken] = -1  # never twice, though all may look alike
        taken.append(nearest.argmax().item())
    return sorted(taken)


class Variant(NamedTuple):
    """One training run, but for its seed."""

    flags: str = ""
    changes: tuple = ()  # functions that are called before it begins
    start: str = f"--init {PRETRAINED}"


BASE = Variant()
OTHER = "--task tgif_qa --max_steps 300"  # the easier task, for what is now harder to see
FEW = "--limit 200 --max_steps 100"  # each video 16 times: real data sets are small beside a schedule, too
# claim -> (what the paper says, in words: its numbers are of real data and say nothing here; title -> Variant)
CLAIMS = {
    "clips_in_testing": ("more clips in testing help, with less and less to gain", {
        "N_train = 1": Variant("--test_clips 1 2 4 8 16")}),
    "clips_by_content": ("names it as future work to choose clips by what they show", {
        "uniform": Variant(f"{OTHER} --test_clips 1 2 4"),
        "those that differ most": Variant(f"{OTHER} --test_clips 1 2 4", (different_clips,))}),
    "clips_in_training": ("more clips in training help, most of it from the first few", {
        "N_train = 1": BASE, "N_train = 2": Variant("--train_clips 2"), "N_train = 4": Variant("--train_clips 4")}),
    "aggregation": ("compares mean, max and LogSumExp; takes the mean for TGIF-QA, LogSumExp for the others", {
        f"{agg}, N_train = 2": Variant(f"--train_clips 2 --agg {agg}") for agg in ("mean", "max", "lse")}),
    "sparse_sampling": ("random clips, new ones at every step, do better than always the same uniform ones", {
        "random": BASE, "uniform": Variant(changes=(same_clips_always,)),
        "random, 200 questions, 100 steps": Variant(FEW),
        "uniform, 200 questions, 100 steps": Variant(FEW, (same_clips_always,))}),
    "pretraining": ("image-text pretraining helps video-text tasks", {
        "pretrained": BASE, "scratch": Variant(start="")}),
    "end_to_end": ("training the CNN with the rest does better than fixed features", {
        "end to end": BASE, "frozen CNN": Variant(changes=(frozen_cnn,)),
        "end to end, action task, inverted colors, 300 steps": Variant(OTHER, (other_videos,)),
        "frozen CNN, action task, inverted colors, 300 steps": Variant(OTHER, (other_videos, frozen_cnn))}),
    "image_size": ("larger images help, up to a point", {
        "L = 32": Variant("--size 32"), "L = 48": Variant("--size 48"), "L = 64": BASE}),
}  # fmt: skip


def train(variant, seed):
    """Run a variant in this process, silently; -> {N_test: accuracy}."""
    for change in variant.changes:
        change()
    # Of a flag that is given twice, the last one counts: the variant's.
    flags = f"--task tgif_qa_transition --max_steps {STEPS} --test_clips 16 {variant.start} {variant.flags} --workers 0"
    with tempfile.TemporaryDirectory() as out:
        given = finetune.parse_arguments([*flags.split(), "--seed", str(seed), "--out", out])
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            finetune.run_training(given)
        by_clips = json.loads((Path(out) / "metrics.json").read_text())["by_clips"]
    return {n: row["accuracy"] for n, row in by_clips.items()}


def run_all(claims, seeds):
    """{(variant, seed): {N_test: accuracy}}, each trained once, however many claims it stands in."""
    variants = dict.fromkeys(variant for _, variants in claims for variant in variants.values())
    runs = [(variant, seed) for variant in variants for seed in seeds]
    # A process for each run: a changed function must not outlive it.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return dict(zip(runs, tqdm(pool.map(train, *zip(*runs)), total=len(runs), unit=" runs"), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], metavar="CLAIM", help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    args = parser.parse_args()
    seeds = (0,) if args.quick else (0, 1, 2)
    data.toy_data("videos")
    if not PRETRAINED.exists():
        pretrain.run_training({})
    chosen = {name: CLAIMS[name] for name in args.claims or CLAIMS}
    results = run_all(chosen.values(), seeds)
    for name, (paper, variants) in chosen.items():
        print(f"\n**{name}**: the paper says: {paper}\n\n| | accuracy | spread | seeds |\n| --- | --- | --- | --- |")
        for title, variant in variants.items():
            for n in results[variant, 0]:
                found = [results[variant, seed][n] for seed in seeds]
                numbers = f"{mean(found):.1f} | {max(found) - min(found):.1f} | {', '.join(map(str, found))}"
                print(f"| {title}, N_test = {n} | {numbers} |")


if __name__ == "__main__":
    main()
