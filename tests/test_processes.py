"""Tests of several processes, as torchrun starts them for several GPUs; here two, on the CPU: `pytest -k processes`.

What two processes do is what one does with twice the accumulation.
"""

import json
import os
import signal
import socket

import pytest
import torch
from stress_runs import errors, finish, logged, start, tensors, wait_for_step

import clipbert
import data
import pretrain

STEPS = ["--max_steps", 20, "--save_every", 10]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Thirteen examples: with batches of 4, the last one of an epoch has a single example."""
    folder = tmp_path_factory.mktemp("toy")
    data.write_toy_tgif_qa(folder / "tgif_qa", train=13, test=2)
    data.write_toy_coco(folder / "coco_captions", train=13, val=4)
    return folder


def rank(number, port):
    """Turns a forked process into one of the two, as torchrun's environment would."""

    def before():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(number),
                       "RANK": str(number), "WORLD_SIZE": "2"}  # fmt: skip
        clipbert.RANK, clipbert.PROCESSES = number, 2

    return before


def two(*arguments, **options):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [start(*arguments, **options, before=rank(number, port)) for number in (0, 1)]


@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_two_processes_equal_one_with_twice_the_accumulation(toy, tmp_path, script):
    folder = toy / ("tgif_qa" if script == "finetune" else "coco_captions")
    job = pretrain if script == "pretrain" else None
    assert finish(start(folder, tmp_path / "one", *STEPS, "--grad_accum", 2, script=job)) == 0
    assert [finish(process) for process in two(folder, tmp_path / "two", *STEPS, script=job)] == [0, 0]
    one, other = (clipbert.load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]  # fmt: skip
    for row, same in zip(*logs, strict=True):
        assert row == pytest.approx(same, abs=1e-4)


def test_two_processes_stop_at_the_same_step_and_go_on(toy, tmp_path):
    """A signal that reaches only one of them, and at any step."""
    folder, out = toy / "tgif_qa", tmp_path / "run"
    assert [finish(process) for process in two(folder, tmp_path / "whole", *STEPS)] == [0, 0]
    processes = two(folder, out, "--max_steps", 20, "--save_every", 1)
    wait_for_step(out, 2, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [143, 143]
    stopped_at = clipbert.load_checkpoint(out / "last.pt")["step"]
    assert stopped_at in (10, 20) and f"after step {stopped_at} of 20" in errors(out)[-1]
    assert [finish(process) for process in two(folder, out, *STEPS, "--resume")] == [0, 0]
    whole, resumed = tensors(tmp_path / "whole" / "last.pt"), tensors(out / "last.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logged(out) == list(range(1, 21))
