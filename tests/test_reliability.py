"""Tests of what happens to a run when something goes wrong. One property at a time: `pytest tests/test_reliability.py
-k kill`, or one of: whole, truncated, signal, disk, folder, log, nonfinite, vanish, worker.

`python tests/stress.py kill disk` does the same at length.
"""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import errors, finish, logged, resume, same, start, tensors, wait_for

import clipbert
import data
import finetune

STEPS = ["--max_steps", 12, "--save_every", 1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "tgif_qa"
    data.write_toy_tgif_qa(folder, train=12, test=2)
    return folder


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """What the undisturbed run ends with, and how long it takes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.time()
    assert finish(start(toy, out, *STEPS)) == 0
    return tensors(out / "last.pt"), time.time() - began


def in_this_process(toy, out, *more):
    arguments = ["--data", toy, "--out", out, "--batch_size", 4, "--size", 32, "--test_clips", 1, *more]
    clipbert.main(finetune.run_training, finetune.parse_arguments([str(argument) for argument in arguments]))


def failing(capsys, toy, out, *more, code=2):
    """The one line that a failed run prints."""
    with pytest.raises(SystemExit) as stop:
        in_this_process(toy, out, *more)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == code and sum(line.startswith("error: ") for line in lines) == 1, lines
    return lines[-1]


# ---------------------------------------------------------------- killed, stopped


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_kill_in_the_middle_then_resume_ends_with_the_same_weights(toy, whole, tmp_path, share):
    expected, seconds = whole
    process = start(toy, tmp_path / "run", *STEPS)
    time.sleep(share * seconds)
    process.kill()
    process.join()
    logged(tmp_path / "run")  # no half line
    assert resume(toy, tmp_path / "run", *STEPS) == 0
    assert same(tensors(tmp_path / "run" / "last.pt"), expected)
    assert logged(tmp_path / "run") == list(range(1, 13))


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
    assert resume(toy, out, *steps) == 0 and same(tensors(out / "last.pt"), whole[0])


def test_signal_handlers_are_given_back_and_a_second_signal_stops_at_once(toy, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    args = finetune.parse_arguments(["--data", str(toy), "--out", str(tmp_path)])
    run, model, *_ = finetune.prepare(args, None)
    with clipbert.Training(args, run, model, 10, None) as training, pytest.raises(clipbert.Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        assert training.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------- checkpoints


def test_whole_checkpoint_before_is_kept(toy, tmp_path):
    in_this_process(toy, tmp_path, "--max_steps", 3, "--save_every", 1)
    assert clipbert.load_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert clipbert.load_checkpoint(tmp_path / "previous.pt")["step"] == 2


def test_whole_checkpoints_of_another_run_are_not_what_a_new_one_falls_back_on(toy, tmp_path):
    in_this_process(toy, tmp_path, "--max_steps", 3, "--save_every", 1)
    in_this_process(toy, tmp_path, "--max_steps", 1, "--seed", 1)
    assert clipbert.load_checkpoint(tmp_path / "last.pt")["seed"] == 1
    assert not (tmp_path / "previous.pt").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_truncated_last_checkpoint_falls_back_on_the_one_before(toy, whole, tmp_path, capsys, damage):
    in_this_process(toy, tmp_path, "--max_steps", 12, "--save_every", 5)  # saves 5, 10, 12
    last = tmp_path / "last.pt"
    if damage == "gone":
        last.unlink()
    else:
        os.truncate(last, last.stat().st_size // 2 if damage == "truncated" else 0)
    capsys.readouterr()
    in_this_process(toy, tmp_path, "--max_steps", 12, "--save_every", 5, "--resume")
    said = capsys.readouterr().out
    assert "last.pt" in said and f"resuming from {tmp_path / 'previous.pt'}, step 10" in said
    assert same(tensors(last), whole[0]) and logged(tmp_path) == list(range(1, 13))


def test_truncated_checkpoints_only_or_none_is_one_line(toy, tmp_path, capsys):
    assert "no such checkpoint" in failing(capsys, toy, tmp_path, "--resume")
    (tmp_path / "last.pt").write_bytes(b"PK")
    (tmp_path / "previous.pt").write_bytes(b"")
    line = failing(capsys, toy, tmp_path, "--resume")
    assert "last.pt: not a whole checkpoint" in line and "without --resume" in line


def full_disk(state, file):
    """torch.save as it fails on a full disk: the file half written, a RuntimeError around what the disk said."""
    file.write(b"half")
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 4 vs 2") from None


def test_disk_full_is_one_line_and_leaves_the_old_checkpoint(toy, whole, tmp_path, capsys, monkeypatch):
    save, calls = torch.save, []

    def third_time_full(state, file):
        calls.append(state["step"])
        (full_disk if len(calls) == 3 else save)(state, file)

    monkeypatch.setattr(torch, "save", third_time_full)
    line = failing(capsys, toy, tmp_path, *STEPS)
    assert "last.pt: not written (No space left on device)" in line and "--resume" in line
    assert clipbert.load_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    in_this_process(toy, tmp_path, *STEPS, "--resume")
    assert same(tensors(tmp_path / "last.pt"), whole[0])


def test_folder_that_cannot_be_written_is_one_line_before_training(toy, tmp_path, capsys):
    """A path below a file: it binds for root, too."""
    (tmp_path / "file").write_text("")
    line = failing(capsys, toy, tmp_path / "file" / "run")
    assert "config.json: not written (" in line and "another --out" in line


# ---------------------------------------------------------------- log.jsonl


def test_log_drops_half_a_line_and_later_steps_at_resume(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "nested": {"a": 1}')
    clipbert.Log(path, 2).write({"step": 3, "loss": 1.0})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'
    clipbert.Log(path, 0)
    assert path.read_text() == ""


def fill_up(path):
    log = clipbert.Log(path, 0)
    log.write({"step": 1})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
    with pytest.raises(OSError, match="not written"):
        log.write({"step": 2}, {"step": 3}, {"step": 4})


def test_log_on_a_full_disk_keeps_whole_lines(tmp_path):
    """Here, a limit on the file's size in a child process: the write stops in the middle of a line."""
    path = tmp_path / "log.jsonl"
    process = multiprocessing.get_context("fork").Process(target=fill_up, args=(path,))  # the limit can't be taken back
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.read_text() == '{"step": 1}\n'


# ---------------------------------------------------------------- a loss that is not a number


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nonfinite_stops_and_saves_the_step_its_examples_and_finite_weights(toy, tmp_path, capsys, monkeypatch, broken):
    original, calls = clipbert.video_loss, []

    def loss_with_one_nan(p, *more):
        calls.append(1)
        loss = original(p, *more)
        if len(calls) != 6:  # the second half of step 3
            return loss
        return loss * float("nan") if broken == "loss" else loss + (p.sum() * 0).sqrt()  # d sqrt(x) at 0: infinite

    monkeypatch.setattr(clipbert, "video_loss", loss_with_one_nan)
    line = failing(capsys, toy, tmp_path, "--max_steps", 12, "--save_every", 2, "--grad_accum", 2)
    assert "at step 3" in line and "nonfinite.pt" in line and "--lr" in line
    state = clipbert.load_checkpoint(tmp_path / "nonfinite.pt")
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())
    order = list(data.training_order(12, 4, 24, seed=0))
    examples = data.read_examples("tgif_qa_action", toy, "train")
    assert state["examples"] == [examples[i].id for batch in order[4:6] for _, i in batch]
    assert clipbert.load_checkpoint(tmp_path / "last.pt")["step"] == 2
    finetune.model_from(state, "nonfinite.pt", "tgif_qa_action")  # the weights can be loaded and looked at


def test_nonfinite_steps_are_found_without_reading_a_number_in_the_step(toy, tmp_path, monkeypatch):
    """Losses and norms become Python numbers in `flush` only, every tenth step: on a GPU each read is a wait."""
    args = finetune.parse_arguments(["--data", str(toy), "--out", str(tmp_path)])
    run, model, *_ = finetune.prepare(args, None)
    training = clipbert.Training(args, run, model, 100, None)
    training.steps()
    monkeypatch.setattr(training, "flush", lambda: flushed.append(step))
    flushed = []
    for step in range(1, 21):
        loss = sum(p.sum() for p in model.parameters())
        training.scaler.scale(loss).backward()
        training.update(step, loss=loss.detach())
    assert flushed == [10, 20] and all(torch.is_tensor(row["loss"]) for row in training.waiting)


# ---------------------------------------------------------------- data and workers


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_data_are_one_line_and_the_run_goes_on_when_they_are_back(toy, whole, tmp_path, workers):
    folder, out = tmp_path / "toy", tmp_path / "run"
    shutil.copytree(toy, folder)
    more = ["--max_steps", 12, "--save_every", 1, "--workers", workers]
    process = start(folder, out, *more)
    wait_for(out, 2, process)
    (folder / "gifs").rename(folder / "elsewhere")
    assert finish(process) == 2
    (line,) = errors(out)
    assert "unreadable videos in a row" in line and "Traceback" not in line
    (folder / "elsewhere").rename(folder / "gifs")
    assert resume(folder, out, *more) == 0
    assert same(tensors(out / "last.pt"), whole[0])


def test_worker_that_is_killed_is_one_line(toy, whole, tmp_path):
    out, more = tmp_path / "run", [*STEPS, "--workers", 1]
    process = start(toy, out, *more)
    wait_for(out, 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("no /proc to find the worker in")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert finish(process) == 2
    (line,) = errors(out)
    assert "worker was killed" in line and "--resume" in line
    assert resume(toy, out, *more) == 0
    assert same(tensors(out / "last.pt"), whole[0])
