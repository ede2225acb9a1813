"""What the tests share: toy data, and a script called as a user would. `from conftest import run`; fixtures by name."""

import json
from pathlib import Path

import pytest
import torch
from runs import flags  # first: it puts the project itself on the path

import clipbert
import data
import finetune

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"  # recorded numbers and real videos that are not part of the project: tests skip
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


def run(script, *arguments):
    """`python SCRIPT.py ARGUMENTS` in this process; script: the module finetune or pretrain. Errors: SystemExit."""
    given = flags(script, *arguments)
    job = "run_prediction" if "predict" in given else "run_evaluation" if "eval" in given else "run_training"
    clipbert.main(getattr(script, job), given)


def failing(capsys, script, *arguments, code=2):
    """The one line that a run ends in, after checking that it is one line and this exit code."""
    with pytest.raises(SystemExit) as stop:
        run(script, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == code and len(lines) == 1, lines
    return lines[0]


def metrics(folder, ending=""):
    """metrics.json of a run; ending: of an evaluation's."""
    return json.loads((folder / f"metrics{ending}.json").read_text())


def lines(path):
    """A .jsonl file's rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder, name="last.pt"):
    """The weights that a run ended with."""
    return clipbert.load_checkpoint(folder / name)["model"]


def settings(script=finetune, **changes):
    """A Settings object without a command line: small frames, read in this process, computed in float32."""
    return script.Settings(**{"size": 64, "text_length": 25, "workers": 0, "precision": "fp32", **changes})


def learn_by_heart(model, loss_of, steps, lr):
    """What the training loop does at every step, without its trimmings, until the loss is as good as zero."""
    optimizer = clipbert.build_optimizer(model.train())
    for step in range(1, steps + 1):
        clipbert.set_step(optimizer, step, lr)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if loss.item() < 0.01:
            return
    pytest.fail(f"after {steps} steps the loss is still {loss.item()}")
