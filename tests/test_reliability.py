"""Tests of what happens to a run when something goes wrong: signals, damaged files, numbers that are not finite, memory.

Runs that are killed, and that lose their disk, their data or a worker: tests/stress.py, in small in test_scripts.py.
"""

import json
import os
import resource
import shutil
import signal
import socket
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import conftest
import pytest
import torch
from conftest import drawn, errors, failing, finish, logged, same_end, settings, small, start, wait_for, weights

import clipbert
import data
import finetune
import pretrain

STEPS = ["--max_steps", 12, "--save_every", 1]

toy = drawn(data.write_toy_videos, "videos", train=13, test=6)  # in batches of 4 an epoch ends in one
photos = drawn(data.write_toy_photos, "photos", train=13, val=4)
both = pytest.mark.parametrize("script", [finetune, pretrain], ids=["finetune", "pretrain"])


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder that the undisturbed run leaves."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(toy, out, *STEPS)) == 0
    return out


def here(folder, out, *more, script=finetune):
    """Training, or with --eval evaluation, in this process."""
    conftest.run(script, *small(script, folder, out, *more))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(toy, whole, tmp_path, number):
    """Though no checkpoint is due; with a worker, which the signal reaches, too."""
    out, steps = tmp_path / "run", ["--max_steps", 12, "--save_every", 100, "--workers", 1]
    process = start(toy, out, *steps, before=os.setpgrp)
    wait_for(out, 10, process)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number
    stopped_at = clipbert.load_checkpoint(out / "last.pt")["step"]
    assert stopped_at in (10, 11, 12) and logged(out) == list(range(1, stopped_at + 1))
    line = errors(out)[-1]
    assert f"{number.name} after step {stopped_at} of 12" in line and "--resume" in line
    assert finish(start(toy, out, *steps, "--resume")) == 0 and same_end(out, whole)


def test_signal_that_comes_twice_stops_at_once_and_handlers_are_given_back(toy, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(clipbert, "video_loss", interrupted)
    with pytest.raises(SystemExit) as stop:
        here(toy, tmp_path, *STEPS)
    assert stop.value.code == 130 and "stopped: --resume goes on from" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists() and signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("part", [0.5, 0])
def test_truncated_last_checkpoint_falls_back_on_the_one_before(toy, whole, tmp_path, capsys, part):
    """With it go the lines of the log that came later, the last of which a full disk has cut in half."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    last, log = tmp_path / "last.pt", tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 13, "nested": {"a": 1}')
    os.truncate(last, int(part * last.stat().st_size))
    here(toy, tmp_path, *STEPS, "--resume")
    said = capsys.readouterr().out
    assert f"resuming from {tmp_path / 'previous.pt'}, step 11" in said
    assert same_end(tmp_path, whole)


def test_resume_on_another_kind_of_machine(toy, whole, tmp_path):
    """A GPU's moments are channels_last; AdamW on a CPU pairs them with the weights by their addresses."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    state = clipbert.load_checkpoint(tmp_path / "previous.pt")
    for moments in state["optimizer"]["state"].values():
        moments |= {k: v.contiguous(memory_format=torch.channels_last) for k, v in moments.items() if v.dim() == 4}
    torch.save(state, tmp_path / "last.pt")
    here(toy, tmp_path, *STEPS, "--resume")
    assert same_end(tmp_path, whole)


def test_log_on_a_full_disk_is_one_line(toy, tmp_path):
    """Emulated: no file may grow beyond 2,500 bytes."""
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2500, 2500))
    assert finish(start(toy, tmp_path / "run", "--max_steps", 40, before=full)) == 2
    (line,) = errors(tmp_path / "run")
    assert "log.jsonl: not written (File too large)" in line and "--resume" in line


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nonfinite_stops_the_run_before_the_weights_are_touched(toy, tmp_path, capsys, monkeypatch, broken):
    original, calls = clipbert.video_loss, []

    def loss_with_one_nan(p, *more):
        calls.append(1)
        loss = original(p, *more)
        if len(calls) != 6:  # the second half of step 3
            return loss
        return loss * float("nan") if broken == "loss" else loss + (p.sum() * 0).sqrt()  # d sqrt(x) at 0: infinite

    monkeypatch.setattr(clipbert, "video_loss", loss_with_one_nan)
    line = failing(capsys, finetune, *small(finetune, toy, tmp_path, "--max_steps", 12, "--save_every", 2, "--grad_accum", 2))
    assert "at step 3" in line and "--lr" in line
    state = clipbert.load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_nonfinite_gradients_in_fp16_stop_the_run_once_the_scale_is_below_one(toy, tmp_path, capsys, monkeypatch):
    """A scaler starts at 2^16 and is halved at each overflow: 16 are no reason to stop, more are no overflows."""
    monkeypatch.setattr(clipbert, "use_machine", lambda s, model: setattr(s, "precision", "fp16") or model)
    monkeypatch.setattr(clipbert, "autocast", lambda s: nullcontext())  # on a CPU fp16 takes long
    monkeypatch.setattr(clipbert, "video_loss", lambda p, *_: (p.sum() * 0).sqrt())
    line = failing(capsys, finetune, *small(finetune, toy, tmp_path, "--max_steps", 60, "--save_every", 5))
    assert "the loss is 0.0 (gradient norm nan) at step 16: try a lower --lr" in line
    early, late = (weights(tmp_path, name) for name in ("previous.pt", "last.pt"))
    assert all(torch.equal(early[name], late[name]) for name in early)


def test_nonfinite_steps_are_found_without_reading_a_number_in_the_step(toy, tmp_path, monkeypatch):
    """Losses and norms become Python numbers at every tenth step only: on a GPU each read is a wait."""
    steps, reads = [], []

    def spied(owner, name, note):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *asked: note(*asked) or original(*asked))

    spied(clipbert, "set_step", lambda _, step, lr: steps.append(step))
    for way in ("item", "tolist", "__float__", "__bool__"):
        spied(torch.Tensor, way, lambda x: reads.append(len(steps)) if x.is_floating_point() else None)
    here(toy, tmp_path, "--max_steps", 15, "--workers", 1)  # which reads the videos
    assert set(reads) == {10, 15}


# ---------------------------------------------------------------- memory, workers

MEMORY = {  # what torch raises -> what our line advises
    "DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.": "--shm-size 8g or --ipc=host, or use --workers 0",
    "unable to write to file </torch_1_2>: No space left on device (28)": "--shm-size 8g or --ipc=host",
    "Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: unable to mmap 64 bytes from "
    "file </torch_1_2>: Cannot allocate memory (12)": "--shm-size 8g or --ipc=host",
    "DataLoader worker (pid 1) is killed by signal: Killed. ": "fewer --workers",
    "CUDA out of memory. Tried to allocate 2.00 GiB": "halve --batch_size and double --grad_accum",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": "halve --batch_size",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED": "halve --batch_size",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "halve --batch_size",
}


@pytest.mark.parametrize("error", [
    *map(RuntimeError, MEMORY), torch.OutOfMemoryError("CUDA out of memory."),
    torch.AcceleratorError("CUDA error: out of memory\nTraces"),
], ids=str)  # fmt: skip
def test_memory_of_each_kind_that_runs_out_is_one_line_with_its_own_cure(error, capsys):
    with pytest.raises(SystemExit) as stop:
        clipbert.main(Mock(side_effect=error), {})
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and MEMORY.get(str(error), "out of GPU memory: halve") in line


def test_memory_is_not_what_other_errors_are_about(capsys):
    with pytest.raises(torch.AcceleratorError):  # ours to mend: with its traceback
        clipbert.main(Mock(side_effect=torch.AcceleratorError("CUDA error: an illegal memory access")), {})
    with pytest.raises(SystemExit):
        clipbert.main(Mock(side_effect=ValueError("/data/torch_videos/shared/a.gif: no such file")), {})
    assert capsys.readouterr().err == "error: /data/torch_videos/shared/a.gif: no such file\n"


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 1), (4, 3), (64, 4)])
def test_workers_on_a_cpu_leave_one_core_to_the_model(monkeypatch, cores, workers):
    s = settings(workers=None)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(clipbert, "DEVICE", "cpu")
    clipbert.use_machine(s, clipbert.ClipBert(clipbert.ClipBertConfig.tiny(30), 1))
    assert s.workers == workers


def test_workers_that_die_as_a_checkpoint_ends_are_one_line(toy, tmp_path):
    """The news come as an exception out of nowhere. torch's writer, not ended, aborted the process when it found its
    file closed."""
    writer = torch.serialization._open_zipfile_writer_buffer
    dying = Mock(side_effect=RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))
    assert finish(start(toy, tmp_path / "run", *STEPS, before=lambda: setattr(writer, "__exit__", dying))) == 2
    assert "worker was killed" in errors(tmp_path / "run")[-1]


@pytest.mark.parametrize("script, own", [
    (finetune, ["--task", "tgif_qa_count", "--limit", 9, "--blind", "--seed", 3, "--lr", 1e-4, "--agg", "max"]),
    # two of four places of the grid, by torch's random state; the first evaluation stays the best at such a rate
    (pretrain, ["--keep", 2, "--eval_every", 3, "--lr", 0.03]),
], ids=["finetune", "pretrain"])  # fmt: skip
def test_resume_takes_everything_from_the_checkpoint(script, own, toy, photos, tmp_path, capsys):
    """Data, model, task, limit, blindness, random states, the best score: one flag and the folder go on to the same end."""
    folder = toy if script is finetune else photos
    here(folder, tmp_path / "whole", *own, "--max_steps", 6, "--save_every", 3, script=script)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "last.pt").unlink()  # previous.pt is of step 3
    conftest.run(script, "--resume", "--out", tmp_path / "run")
    assert same_end(tmp_path / "run", tmp_path / "whole")
    assert logged(tmp_path / "run") == ([1, 2, 3, 4, 5, 6] if script is finetune else [1, 2, 3, 3, 4, 5, 6, 6])


def test_resume_accepts_the_same_values_and_what_may_be_anew(toy, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    anew = ["--max_steps", 13, "--save_every", 7, "--workers", 1, "--precision", "bf16", "--debug"]
    here(f"{toy}/", out, *anew, "--resume", "--model", "tiny", "--task", "tgif_qa", "--lr", "3e-4")
    assert clipbert.load_checkpoint(out / "last.pt")["step"] == 13
    said = json.loads((out / "config.json").read_text())
    assert [said[name] for name in ("max_steps", "save_every", "workers", "precision")] == [13, 7, 1, "bf16"]
    here(toy, out, "--resume", "--epochs", 5)  # in place of --max_steps: 65 examples, 4 an update
    assert clipbert.load_checkpoint(out / "last.pt")["step"] == 17


@pytest.mark.parametrize("flags", ["--data .", "--limit 5", "--blind", "--cache", "--seed 1", "--lr 1e-5", "--agg lse",
                                   "--task tgif_qa_count", "--model base", "--test_clips 1 4"])  # fmt: skip
def test_resume_refuses_in_one_line_what_differs_and_may_not(toy, whole, tmp_path, capsys, flags):
    before = (whole / "log.jsonl").read_text()
    line = failing(capsys, finetune, *small(finetune, toy, whole, "--resume", *flags.split()))
    assert f"last.pt: was begun with {flags.split()[0]} " in line and "leave that out, give another --out" in line
    assert (whole / "log.jsonl").read_text() == before


@both
def test_nothing_is_overwritten_by_a_second_run(script, toy, photos, tmp_path, capsys, monkeypatch):
    """Each run takes the next free name and says so; an --out that holds a run takes --overwrite."""
    monkeypatch.chdir(tmp_path)
    folder, name = (toy, "tgif_qa_action") if script is finetune else (photos, "pretrain")
    for more in (["--blind"], ["--blind"], [], []):
        here(folder, None, "--max_steps", 1, *more, script=script)
    runs = [Path("runs") / f"{name}{ending}" for ending in ("_blind", "_blind-2", "", "-2")]
    said = capsys.readouterr().out
    assert sorted(Path("runs").iterdir()) == sorted(runs) and all(f"writing to {run}\n" in said for run in runs)
    before = {path: path.read_bytes() for path in runs[0].iterdir()}
    assert f"{runs[0]}: holds a run" in failing(capsys, script, *small(script, folder, runs[0], "--max_steps", 1))
    assert before == {path: path.read_bytes() for path in runs[0].iterdir()}
    here(folder, None, "--max_steps", 2, "--resume", script=script)  # the newest run that is not blind
    here(folder, None, "--max_steps", 3, "--resume", "--blind", script=script)
    assert [max(logged(run)) for run in runs] == [1, 3, 1, 2]


def test_overwritten_is_a_run_with_its_checkpoints(toy, whole, tmp_path):
    """They are not what the new one falls back on. Here it is of another seed, so its weights are others, too."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    here(toy, tmp_path, "--overwrite", "--max_steps", 1, "--seed", 1)
    one, other = (weights(folder)["classifier.0.weight"] for folder in (tmp_path, whole))
    assert (one - other).abs().max() > 0.01  # twelve steps take the same initial weights .004 apart at most
    assert clipbert.load_checkpoint(tmp_path / "last.pt")["settings"]["seed"] == 1
    assert not (tmp_path / "previous.pt").exists() and logged(tmp_path) == [1]


@both
def test_overwritten_is_nothing_by_an_evaluation_and_blind_is_remembered(script, toy, photos, tmp_path, capsys):
    """It writes beside its checkpoint, under a name that says what was evaluated."""
    folder, out = (toy, tmp_path / "run") if script is finetune else (photos, tmp_path / "run")
    here(folder, out, "--max_steps", 1, "--blind", script=script)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    here(folder, None, "--eval", out / "best.pt", script=script)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    ending = "best-tgif_qa_action-test-videos-blind" if script is finetune else "best-val-photos-blind"
    added = {f"metrics-{ending}.json"} | ({f"predictions-{ending}.jsonl"} if script is finetune else set())
    assert before.items() <= after.items() and after.keys() - before.keys() == added
    assert json.loads(after[f"metrics-{ending}.json"])["blind"] is True
    said = capsys.readouterr().out
    assert all(words in said for words in ("trained blind, so it sees no frames", ", blind\n"))


def become(number, port):
    """Turns a forked process into one of two, as torchrun's environment would."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(number),
                   "RANK": str(number), "WORLD_SIZE": "2"}  # fmt: skip
    clipbert.RANK, clipbert.PROCESSES = number, 2


def two(*run, **script):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [start(*run, **script, before=partial(become, number, port)) for number in (0, 1)]


# 13 examples, 8 an update: no epoch is a multiple of the step, and the last update has a part of the 13th epoch.
EPOCHS = ["--epochs", 12, "--save_every", 10]


@both
def test_two_processes_equal_one_with_twice_the_accumulation(script, toy, photos, tmp_path):
    folder, n, more = toy, 1, EPOCHS
    if script is pretrain:  # with two batches an update each, that is, four
        folder, n, more = photos, 2, ["--max_steps", 20, "--eval_every", 10, "--batch_size", 2]
    pair = two(folder, tmp_path / "two", *more, "--grad_accum", n, script=script)
    alone = start(folder, tmp_path / "one", *more, "--grad_accum", 2 * n, script=script)
    assert [finish(process) for process in (*pair, alone)] == [0, 0, 0]
    ours, twins = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in ours:
        # Sums in another order, which Adam enlarges in a few weights whose gradients are all but zero: 20 updates of
        # up to 3e-4 take those 2e-4 apart at most, and on average all are the same.
        torch.testing.assert_close(ours[name], twins[name], rtol=0, atol=2e-4)
        assert (ours[name] - twins[name]).abs().mean() < 5e-6
    logs = [conftest.lines(tmp_path / out / "log.jsonl") for out in ("one", "two")]
    assert logs[0][-1]["step"] == 20
    for row, twin in zip(*logs, strict=True):
        assert row == pytest.approx(twin, abs=1e-4)


def test_two_processes_stop_at_the_same_step_and_go_on(toy, tmp_path):
    """Though the signal reaches only one of them."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert [finish(process) for process in two(toy, whole, *EPOCHS)] == [0, 0]
    processes = two(toy, out, "--epochs", 12, "--save_every", 1)
    wait_for(out, 2, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [143, 143]
    stopped_at = clipbert.load_checkpoint(out / "last.pt")["step"]
    assert stopped_at in (10, 20) and f"after step {stopped_at} of 20" in errors(out)[-1]
    assert [finish(process) for process in two(toy, out, *EPOCHS, "--resume")] == [0, 0]
    assert same_end(whole, out)
