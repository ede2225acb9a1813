"""The paper's claims (section 4, analysis), tried on the toy data: small variants of one training run, side by side.

    python tests/ablations.py                    every claim, three seeds each
    python tests/ablations.py clips_in_training  one of them
    python tests/ablations.py --quick            one seed

Every variant fine-tunes the tiny model on toy TGIF-QA transition from the toy pretraining (runs/pretrain/last.pt,
made first if it is not there) for so few steps that the variants still differ; all other settings are the task's.
What a variant does otherwise is in its title: flags, or a changed function, each of them an example of how to try an
idea. A table a claim: accuracy in percent, mean and spread (largest minus smallest) over the seeds, beside what the
paper says. What does not come out as in the paper is left as it is: a tiny model on toy clips need not agree.
"""

import argparse
import io
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import clipbert
import data

PRETRAINED = Path("runs/pretrain/last.pt")
STEPS = 60  # 150 are enough for 99%: where all variants are right, none is better


# ----------------------------------------------------------------------------------------------------------------------
# Variants that no flag asks for: a changed function each


def same_clips_always():
    """Training takes the uniform clips of testing, the same in every epoch."""
    sample = data.sample_clips
    data.sample_clips = lambda *args, **kw: sample(*args[:5], False, None)


def frozen_cnn():
    """F_v keeps its pretrained weights, as features computed once and for all would."""
    start = clipbert.start_model

    def start_frozen(*args):
        model, vocabulary = start(*args)
        model.cnn.requires_grad_(False)
        return model, vocabulary

    clipbert.start_model = start_frozen


def other_videos():
    """Videos unlike the pictures of pretraining, which are otherwise drawn alike: as if the CNN came from elsewhere."""
    read = data.read_clips
    data.read_clips = lambda *args, **named: 255 - read(*args, **named)


def other_videos_frozen_cnn():
    other_videos()
    frozen_cnn()


def different_clips():
    """Clips for testing chosen by what they show, of which the paper speaks as future work: those that differ most.

    An example of how to change one function: whatever reads a video calls data.read_clips, so what stands in its place
    is used everywhere. It reads four times as many uniform clips and keeps some; the model sees no more than before.
    """
    read = data.read_clips

    def read_different(path, n_clips, n_frames, fps, size, train, *others, **named):
        if train:  # the paper's random clips, as ever
            return read(path, n_clips, n_frames, fps, size, train, *others, **named)
        candidates = read(path, 4 * n_clips, n_frames, fps, size, train, *others, **named)  # (4N, T, 3, L, L)
        return candidates[farthest_points(candidates[:, 0], n_clips)]  # (N, T, 3, L, L)

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
    change: object = None
    pretrained: bool = True


class Claim(NamedTuple):
    paper: str  # in words; the paper's numbers are of real data and say nothing here
    variants: dict  # row title -> Variant
    clips: tuple = (16,)  # N_test


BASE = Variant()
OTHER = "--task tgif_qa --max_steps 300"  # the easier task, for what is now harder to see
FEW = "--limit 200 --max_steps 100"  # each video 16 times: real data sets are small beside a schedule, too
CLAIMS = {
    "clips_in_testing": Claim(
        "more clips in testing help, with less and less to gain", {"N_train = 1": BASE}, (1, 2, 4, 8, 16)),
    "clips_by_content": Claim(
        "names it as future work to choose clips by what they show",
        {"uniform": Variant(OTHER), "those that differ most": Variant(OTHER, different_clips)}, (1, 2, 4)),
    "clips_in_training": Claim(
        "more clips in training help, most of it from the first few",
        {"N_train = 1": BASE, "N_train = 2": Variant("--train_clips 2"), "N_train = 4": Variant("--train_clips 4")}),
    "aggregation": Claim(
        "compares mean, max and LogSumExp; takes the mean for TGIF-QA, LogSumExp for retrieval and MSRVTT-QA",
        {f"{agg}, N_train = 2": Variant(f"--train_clips 2 --agg {agg}") for agg in ("mean", "max", "lse")}),
    "sparse_sampling": Claim(
        "random clips, new ones at every step, do better than always the same uniform ones",
        {"random": BASE, "uniform": Variant(change=same_clips_always),
         "random, 200 questions, 100 steps": Variant(FEW),
         "uniform, 200 questions, 100 steps": Variant(FEW, same_clips_always)}),
    "pretraining": Claim(
        "image-text pretraining helps video-text tasks", {"pretrained": BASE, "scratch": Variant(pretrained=False)}),
    "end_to_end": Claim(
        "training the CNN with the rest does better than fixed features",
        {"end to end": BASE, "frozen CNN": Variant(change=frozen_cnn),
         "end to end, action task, inverted colors, 300 steps": Variant(OTHER, other_videos),
         "frozen CNN, action task, inverted colors, 300 steps": Variant(OTHER, other_videos_frozen_cnn)}),
    "image_size": Claim(
        "larger images help, up to a point",
        {f"L = {size}": Variant(f"--size {size}") for size in (32, 48)} | {"L = 64": BASE}),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------


def run_script(name, flags):
    """`python NAME FLAGS` in this process, whose functions may have been changed; silently, if all goes well."""
    said, sys.argv = io.StringIO(), [name, *flags]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit:
        raise RuntimeError(f"{name} {' '.join(flags)}: {said.getvalue()[-500:]}") from None


def train(variant, clips, seed, steps):
    """Run a variant in this process; -> {N_test: accuracy}."""
    if variant.change:
        variant.change()
    with tempfile.TemporaryDirectory() as out:
        flags = f"--task tgif_qa_transition --out {out} --seed {seed} --max_steps {steps} {variant.flags} --workers 0"
        start = ["--init", str(PRETRAINED)] if variant.pretrained else []
        run_script("finetune.py", [*flags.split(), *start, "--test_clips", *map(str, clips)])
        by_clips = json.loads((Path(out) / "metrics.json").read_text())["by_clips"]
    return {int(n): row["accuracy"] for n, row in by_clips.items()}


def run_all(claims, seeds, steps):
    """{(variant, clips, seed): {N_test: accuracy}}, each trained once, however many claims it stands in."""
    jobs = {}
    for claim in claims:
        for variant in claim.variants.values():
            jobs[variant] = tuple(sorted({*jobs.get(variant, ()), *claim.clips}))
    # A process for each run: a changed function must not outlive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        futures = {(variant, seed): pool.submit(train, variant, clips, seed, steps)
                   for seed in seeds for variant, clips in jobs.items()}  # fmt: skip
        for done, future in enumerate(futures.values(), 1):
            future.result()
            print(f"\r{done} of {len(futures)} runs", end="", file=sys.stderr, flush=True)
    return {key: future.result() for key, future in futures.items()}


def print_claim(name, claim, results, seeds):
    print(f"\n**{name}**: the paper says: {claim.paper}\n\n| | accuracy | spread | seeds |\n| --- | --- | --- | --- |")
    for title, variant in claim.variants.items():
        for n in claim.clips:
            found = [results[variant, seed][n] for seed in seeds]
            row = f"{title}, N_test = {n}" if len(claim.clips) > 1 else title
            print(f"| {row} | {mean(found):.1f} | {max(found) - min(found):.1f} | {', '.join(map(str, found))} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(CLAIMS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument("--steps", type=int, default=STEPS, help="fine-tuning steps where a variant names no other")
    args = parser.parse_args()
    if unknown := set(args.claims) - set(CLAIMS):
        parser.error(f"no claim {min(unknown)!r}; there are {', '.join(CLAIMS)}")
    began, seeds = time.time(), (0,) if args.quick else (0, 1, 2)
    data.toy_data("tgif_qa")
    if not PRETRAINED.exists():
        run_script("pretrain.py", [])
    chosen = {name: CLAIMS[name] for name in args.claims or CLAIMS}
    results = run_all(chosen.values(), seeds, args.steps)
    for name, claim in chosen.items():
        print_claim(name, claim, results, seeds)
    print(f"\n{len(results)} runs, mostly of {args.steps} steps, {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
