"""What the tests and tests/stress.py share: toy data; a script called as a user would, here or in its own process."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: the tests are about a CPU, and they fork
import pytest
import torch

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"  # recorded numbers and real videos that are not part of the project: tests skip
sys.path.insert(0, str(HERE.parent))
import clipbert
import data
import finetune

FORK = multiprocessing.get_context("fork")  # processes that need not import everything again
torch.set_num_threads(1)  # the models are tiny: on a busy machine, threads would mostly wait for each other


def drawn(write, name, **size):
    """A fixture: toy data of this size, drawn once, in a folder of this name."""

    def draw(tmp_path_factory):
        folder = tmp_path_factory.mktemp("toy") / name
        write(folder, **size)
        return folder

    return pytest.fixture(draw, scope="session")


toy_videos = drawn(data.write_toy_videos, "videos", train=12, test=6)
toy_photos = drawn(data.write_toy_photos, "photos", train=20, val=6)


def settings(script=finetune, **changes):
    """A Settings object without a command line: small frames, read in this process, computed in float32."""
    return script.Settings(**{"size": 64, "text_length": 25, "workers": 0, "precision": "fp32", **changes})


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


def run(script, *arguments):
    """`python SCRIPT.py ARGUMENTS` in this process; script: the module finetune or pretrain. Errors: SystemExit."""
    given = flags(script, *arguments)
    job = "run_prediction" if "predict" in given else "run_evaluation" if "eval" in given else "run_training"
    clipbert.main(getattr(script, job), given)


def short(script, folder, out, *more):
    """A run of a few small steps; of several flags the last one counts. -> its metrics."""
    run(script, *small(script, folder, out, "--max_steps", 4, *more))
    return metrics(out)


def failing(capsys, script, *arguments):
    """The one line that a run ends in, after checking that it is one line and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(script, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def refused(function, *arguments, error=data.DataError, **named):
    """The one line of the error that a call ends with."""
    with pytest.raises(error) as caught:
        function(*arguments, **named)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def start(folder, out, *more, before=lambda: None, script=finetune):
    """Training as a forked process, which writes what it says to <out>.txt."""

    def job():
        sys.stdout = sys.stderr = open(f"{out}.txt", "a", buffering=1)  # noqa: SIM115
        before()
        run(script, *small(script, folder, out, *more))

    process = FORK.Process(target=job)
    process.start()
    return process


def finish(process):
    """Its exit code."""
    process.join()
    return process.exitcode


def wait_for(out, step, process):
    """Until this step is logged (every tenth, or with a checkpoint)."""
    while process.is_alive() and step not in logged(out):
        time.sleep(0.005)


def metrics(folder, ending=""):
    """metrics.json of a run; ending: of an evaluation's."""
    return json.loads((folder / f"metrics{ending}.json").read_text())


def lines(path):
    """A .jsonl file's rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder, name="last.pt"):
    """The weights that a run ended with."""
    return clipbert.load_checkpoint(folder / name)["model"]


def errors(out):
    """The lines a run said after its progress: its error, or how it was stopped."""
    lines = Path(f"{out}.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("error: ", "SIG"))]


def tensors(out):
    """The weights, optimizer, random states and best score that a run ended with, by name."""
    state = clipbert.load_checkpoint(out / "last.pt")
    random_states = {f"random{rank}": each["torch"] for rank, each in enumerate(state["random"])}
    moments = {f"{k}.{n}": v for k, s in state["optimizer"]["state"].items() for n, v in s.items()}
    return state["model"] | moments | random_states | {"best": torch.tensor(state["best"])}


def same_end(one, other):
    """Whether two runs ended with the same tensors, to the bit, and the very same log."""
    ours, twins = tensors(one), tensors(other)
    logs = [(out / "log.jsonl").read_text() for out in (one, other)]
    return logs[0] == logs[1] and all(torch.equal(ours[name], twins[name]) for name in ours | twins)


def logged(out):
    """The steps in log.jsonl; ValueError if a line is not whole."""
    path = Path(out) / "log.jsonl"
    *rows, rest = path.read_text().split("\n") if path.exists() else [""]
    if rest:
        raise ValueError(f"{path} ends in half a line: {rest!r}")
    return [json.loads(row)["step"] for row in rows]
