"""Training runs as processes of their own, for the tests that kill them and for tests/stress.py."""

import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clipbert
import data
import finetune

FORK = multiprocessing.get_context("fork")  # processes that need not import everything again


def flags(script, *arguments):
    """What a command line gives, as the script reads it."""
    arguments = [str(argument) for argument in arguments]
    if script is finetune:
        return finetune.parse_arguments(arguments)
    return clipbert.parse_flags(data.Parser(), script.Settings, arguments)


def small(script, folder, out, *more):
    """The arguments of a small run; folder or out None: without --data or --out."""
    where = [*(["--data", folder] if folder else []), *(["--out", out] if out else [])]
    clips = ["--test_clips", 1] if script is finetune else []
    return [*where, "--batch_size", 4, "--size", 32, "--workers", 0, *clips, *more]


def job(script, run, log, before):
    """What a started process does: training, its output in a file."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    before()
    clipbert.main(script.run_training, flags(script, *small(script, *run)))


def start(folder, out, *more, before=lambda: None, script=finetune):
    """Training as a forked process, which writes what it says to <out>.txt."""
    process = FORK.Process(target=job, args=(script, (folder, out, *more), f"{out}.txt", before))
    process.start()
    return process


def finish(process):
    process.join()
    return process.exitcode


def resume(folder, out, *more):
    """Go on, with or without a checkpoint, as someone would who finds the folder."""
    found = any((Path(out) / name).exists() for name in ("last.pt", "previous.pt"))
    return finish(start(folder, out, *more, "--resume" if found else "--overwrite"))


def errors(out):
    """The lines a run said after its progress: its error, or how it was stopped."""
    lines = Path(f"{out}.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("error: ", "SIG"))]


def tensors(path):
    """Everything in a checkpoint that a run goes on from, flattened."""
    state = clipbert.load_checkpoint(path)
    random_states = {f"random{rank}": each["torch"] for rank, each in enumerate(state["random"])}
    moments = {f"{k}.{n}": v for k, s in state["optimizer"]["state"].items() for n, v in s.items()}
    return state["model"] | moments | random_states


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def logged(out):
    """The steps in log.jsonl; ValueError if a line is not whole."""
    path = Path(out) / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        raise ValueError(f"half a line at the end of {path}: {text[-80:]!r}")
    return [json.loads(line)["step"] for line in text.splitlines()]


def wait_for(out, step, process):
    """Until this step is logged (every tenth, or with a checkpoint)."""
    while process.is_alive() and step not in logged(out):
        time.sleep(0.005)
