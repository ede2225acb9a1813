"""Tests of several processes, as torchrun starts them for several GPUs; here two, on the CPU: `pytest -k processes`.

What two processes do is what one does with twice the accumulation.
"""

import json
import os
import signal
import socket

import pytest
import torch
from runs import errors, finish, logged, same, start, tensors, wait_for

import clipbert
import data
import finetune
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


@pytest.fixture(scope="module")
def fine_tuned(toy, tmp_path_factory):
    """Two processes, undisturbed."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert [finish(process) for process in two(toy / "tgif_qa", out, *STEPS)] == [0, 0]
    return out


@pytest.mark.parametrize("script", [finetune, pretrain], ids=["finetune", "pretrain"])
def test_two_processes_equal_one_with_twice_the_accumulation(toy, tmp_path, fine_tuned, script):
    one, other, folder, more = tmp_path / "one", fine_tuned, toy / "tgif_qa", ["--grad_accum", 2]
    if script is pretrain:  # with two batches an update each, that is, four
        other, folder, more = tmp_path / "two", toy / "coco_captions", ["--batch_size", 2, "--grad_accum", 4]
        both = two(folder, other, *STEPS, "--batch_size", 2, "--grad_accum", 2, script=script)
        assert [finish(process) for process in both] == [0, 0]
    assert finish(start(folder, one, *STEPS, *more, script=script)) == 0
    weights, twins = (clipbert.load_checkpoint(out / "last.pt")["model"] for out in (one, other))
    for name in weights:
        torch.testing.assert_close(weights[name], twins[name], rtol=0, atol=1e-5)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, other)]
    for row, twin in zip(*logs, strict=True):
        assert row == pytest.approx(twin, abs=1e-4)


def test_two_processes_stop_at_the_same_step_and_go_on(toy, tmp_path, fine_tuned):
    """Though the signal reaches only one of them."""
    folder, out = toy / "tgif_qa", tmp_path / "run"
    processes = two(folder, out, "--max_steps", 20, "--save_every", 1)
    wait_for(out, 2, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [143, 143]
    stopped_at = clipbert.load_checkpoint(out / "last.pt")["step"]
    assert stopped_at in (10, 20) and f"after step {stopped_at} of 20" in errors(out)[-1]
    assert [finish(process) for process in two(folder, out, *STEPS, "--resume")] == [0, 0]
    assert same(tensors(fine_tuned / "last.pt"), tensors(out / "last.pt"))
    assert logged(out) == list(range(1, 21))
