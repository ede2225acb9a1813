"""Tests of what happens to a run when something goes wrong. One property at a time: `pytest tests/test_reliability.py
-k kill`, or one of: signal, whole, truncated, disk, log, nonfinite, memory, vanish, worker, resume, overwritten, blind,
processes.

`python tests/stress.py kill disk` does the same at length.
"""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import weights
from runs import errors, finish, flags, logged, resume, same, small, start, tensors, wait_for

import clipbert
import data
import finetune
import pretrain

STEPS = ["--max_steps", 12, "--save_every", 1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "tgif_qa"
    data.write_toy_tgif_qa(folder, train=13, test=2)  # with batches of 4, an epoch ends in the middle of one
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "coco_captions"
    data.write_toy_coco(folder, train=13, val=4)
    return folder


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder that the undisturbed run leaves, and how long it takes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.time()
    assert finish(start(toy, out, *STEPS)) == 0
    return out, time.time() - began


def here(folder, out, *more, script=finetune):
    """Training, or with --eval evaluation, in this process."""
    conftest.run(script, *small(script, folder, out, *more))


def failing(capsys, folder, out, *more, script=finetune):
    """The one line that a failed run prints."""
    return conftest.failing(capsys, script, *small(script, folder, out, *more))


def same_end(one, other):
    """Whether two runs ended with the same weights, optimizer and random states, to the bit, and the same log."""
    return logged(one) == logged(other) and same(*(tensors(out / "last.pt") for out in (one, other)))


# ---------------------------------------------------------------- killed, stopped


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_kill_in_the_middle_then_resume_ends_with_the_same_weights(toy, whole, tmp_path, share):
    process = start(toy, tmp_path / "run", *STEPS)
    time.sleep(share * whole[1])
    process.kill()
    process.join()
    logged(tmp_path / "run")  # no half line
    assert resume(toy, tmp_path / "run", *STEPS) == 0
    assert same_end(tmp_path / "run", whole[0])


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
    assert resume(toy, out, *steps) == 0 and same_end(out, whole[0])


@pytest.fixture
def training(toy, tmp_path):
    """A `Training`, not begun; precision: what its settings say."""

    def build(precision="fp32"):
        given = flags(finetune, *small(finetune, toy, tmp_path, "--max_steps", 60, "--precision", precision))
        s = clipbert.settle(finetune.Settings, finetune.row("tgif_qa_action", "tiny"), given)
        model = clipbert.ClipBert(clipbert.ClipBertConfig.tiny(vocab_size=30), 1)
        return clipbert.Training(s, model, 13)

    return build


def test_signal_handlers_are_given_back_and_a_second_signal_stops_at_once(training):
    before, begun = signal.getsignal(signal.SIGTERM), training()
    with pytest.raises(KeyboardInterrupt):
        for _ in begun.steps():
            os.kill(os.getpid(), signal.SIGTERM)
            assert begun.signal == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------- checkpoints and logs on a disk


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_truncated_last_checkpoint_falls_back_on_the_one_before(toy, whole, tmp_path, capsys, damage):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    last = tmp_path / "last.pt"
    if damage == "gone":
        last.unlink()
    else:
        os.truncate(last, last.stat().st_size // 2 if damage == "truncated" else 0)
    here(toy, tmp_path, *STEPS, "--resume")
    said = capsys.readouterr().out
    assert "last.pt" in said and f"resuming from {tmp_path / 'previous.pt'}, step 11" in said
    assert same_end(tmp_path, whole[0])


def test_truncated_checkpoints_only_or_none_is_one_line(toy, tmp_path, capsys):
    assert "no such checkpoint" in failing(capsys, toy, tmp_path, "--resume")
    (tmp_path / "last.pt").write_bytes(b"PK")
    (tmp_path / "previous.pt").write_bytes(b"")
    line = failing(capsys, toy, tmp_path, "--resume")
    assert "last.pt: not a whole checkpoint" in line and "start anew with --overwrite" in line


def test_disk_full_is_one_line_and_leaves_the_old_checkpoint(toy, whole, tmp_path, capsys, monkeypatch):
    saved = []

    def full(number):
        if (size := os.fstat(number).st_size) > 10_000:  # a checkpoint
            saved.append(size)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = failing(capsys, toy, tmp_path, *STEPS)
    assert "last.pt: not written (No space left on device)" in line and "--resume" in line
    assert clipbert.load_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    here(toy, tmp_path, *STEPS, "--resume")
    assert same_end(tmp_path, whole[0])


def small_files():
    """A full disk for log.jsonl, emulated: a limit on the size of files, in a process, since it can't be taken back."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))


def test_log_on_a_full_disk_is_one_line_and_whole_again_after_resume(toy, whole, tmp_path):
    """The write stops in the middle of a line, which --resume drops, as it drops the lines after its checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "last.pt").unlink()  # so it goes on from step 11
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 12}) + '\n{"step": 13, "nested": {"a": 1}')
    assert resume(toy, out, *STEPS) == 0 and same_end(out, whole[0])
    process = start(toy, tmp_path / "other", "--max_steps", 40, before=small_files)
    assert finish(process) == 2
    (line,) = errors(tmp_path / "other")
    assert "not written (File too large)" in line


# ---------------------------------------------------------------- a loss that is not a number


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
    line = failing(capsys, toy, tmp_path, "--max_steps", 12, "--save_every", 2, "--grad_accum", 2)
    assert "at step 3" in line and "--lr" in line
    state = clipbert.load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def update(training, step, broken=False):
    """A step whose loss is finite and whose gradient may not be; the model's weights change unless it is skipped."""
    total = sum(p.sum() for p in training.model.parameters())
    loss = (total * 0).sqrt() if broken else total
    training.backward(loss)
    training.update(step, loss=loss.detach())


def test_nonfinite_gradients_in_fp16_stop_the_run_once_the_scale_is_below_one(training):
    """A scaler starts at 2^16 and is halved at each overflow: 16 are no reason to stop, more are no overflows."""
    begun = training("fp16")
    weights = [p.clone() for p in begun.model.parameters()]
    for step in range(1, 20):
        update(begun, step, broken=True)
    with pytest.raises(ValueError, match=r"the loss is 0.0 \(gradient norm nan\) at step 11: try a lower --lr"):
        update(begun, 20, broken=True)
    assert all(torch.equal(p, q) for p, q in zip(weights, begun.model.parameters(), strict=True))


def test_nonfinite_steps_are_found_without_reading_a_number_in_the_step(training, monkeypatch):
    """Losses and norms become Python numbers in `flush` only, every tenth step: on a GPU each read is a wait."""
    begun, flushed = training(), []
    monkeypatch.setattr(begun, "flush", lambda: flushed.append(len(begun.waiting)))
    for step in range(1, 21):
        update(begun, step)
    assert flushed == [10, 20] and all(torch.is_tensor(row["loss"]) for row in begun.waiting)


# ---------------------------------------------------------------- memory, workers, data

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


@pytest.mark.parametrize("text", MEMORY)
def test_memory_of_each_kind_that_runs_out_is_one_line_with_its_own_cure(text):
    line, code = clipbert.explain(RuntimeError(text))
    assert MEMORY[text] in line and "\n" not in line and code == 2


def test_memory_of_a_gpu_that_runs_out_is_known_by_whatever_class_it_comes():
    texts = [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory\nTraces")]
    assert all("out of GPU memory: halve" in clipbert.explain(error)[0] for error in texts)
    assert clipbert.explain(torch.AcceleratorError("CUDA error: an illegal memory access")) == ("", 1)  # ours to mend


def test_memory_is_not_what_a_folder_of_that_name_is_about():
    line, _ = clipbert.explain(ValueError("/data/torch_videos/shared/a.gif: no such file"))
    assert line == "error: /data/torch_videos/shared/a.gif: no such file"


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 1), (4, 3), (64, 4)])
def test_workers_on_a_cpu_leave_one_core_to_the_model(training, monkeypatch, cores, workers):
    begun = training()
    begun.s.workers = None
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(clipbert, "DEVICE", "cpu")
    clipbert.use_machine(begun.s, begun.model)
    assert begun.s.workers == workers


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_data_are_one_line_and_the_run_goes_on_when_they_are_back(toy, whole, tmp_path, workers):
    folder, out, more = tmp_path / "toy", tmp_path / "run", [*STEPS, "--workers", workers]
    shutil.copytree(toy, folder)
    process = start(folder, out, *more)
    wait_for(out, 2, process)
    (folder / "gifs").rename(folder / "elsewhere")
    assert finish(process) == 2
    (line,) = errors(out)
    assert "unreadable videos in a row" in line
    (folder / "elsewhere").rename(folder / "gifs")
    assert resume(folder, out, *more) == 0 and same_end(out, whole[0])


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
    assert resume(toy, out, *more) == 0 and same_end(out, whole[0])


def dying(*_):
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_worker_that_dies_as_a_checkpoint_ends_is_one_line(toy, tmp_path):
    """The news come as an exception out of nowhere. torch's writer, not ended, aborted the process when it found its
    file closed."""
    writer = torch.serialization._open_zipfile_writer_buffer
    assert finish(start(toy, tmp_path / "run", *STEPS, before=lambda: setattr(writer, "__exit__", dying))) == 2
    assert "worker was killed" in errors(tmp_path / "run")[-1]


# ---------------------------------------------------------------- a resumed run is its checkpoint's


def test_resume_takes_everything_from_the_checkpoint(toy, tmp_path, capsys):
    """Data, model, task, limit, blindness: one flag and the folder are enough, and go on to the same end."""
    own = ["--task", "tgif_qa_count", "--limit", 9, "--blind", "--seed", 3, "--lr", 1e-4, "--agg", "max"]
    here(toy, tmp_path / "whole", *own, "--max_steps", 4)
    here(toy, tmp_path / "run", *own, "--max_steps", 4, "--save_every", 2)
    (tmp_path / "run" / "last.pt").unlink()  # previous.pt is of step 2
    conftest.run(finetune, "--resume", "--out", tmp_path / "run")
    assert "from " + str(toy) in capsys.readouterr().out
    assert same_end(tmp_path / "run", tmp_path / "whole")


def test_resume_of_pretraining_draws_the_same_places_of_the_grid(photos, tmp_path):
    """Two of its four, by torch's random state."""
    steps = ["--max_steps", 6, "--save_every", 3, "--eval_every", 3, "--keep", 2]
    here(photos, tmp_path / "whole", *steps, script=pretrain)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "last.pt").unlink()  # previous.pt is of step 3
    conftest.run(pretrain, "--resume", "--out", tmp_path / "run")
    assert same_end(tmp_path / "run", tmp_path / "whole")
    assert logged(tmp_path / "run") == [1, 2, 3, 3, 4, 5, 6, 6]  # 3 and 6 also as evaluations


def test_resume_accepts_the_same_values_and_what_may_be_anew(toy, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    anew = ["--max_steps", 13, "--save_every", 7, "--workers", 1, "--precision", "bf16", "--debug"]
    here(f"{toy}/", out, *anew, "--resume", "--model", "tiny", "--task", "tgif_qa", "--lr", "3e-4")
    assert clipbert.load_checkpoint(out / "last.pt")["step"] == 13
    settings = json.loads((out / "config.json").read_text())
    assert [settings[name] for name in ("max_steps", "save_every", "workers", "precision")] == [13, 7, 1, "bf16"]
    here(toy, out, "--resume", "--epochs", 5)  # in place of --max_steps: 65 examples, 4 an update
    assert clipbert.load_checkpoint(out / "last.pt")["step"] == 17


@pytest.mark.parametrize("flags", ["--data .", "--limit 5", "--blind", "--cache", "--seed 1", "--lr 1e-5", "--agg lse",
                                   "--task tgif_qa_count", "--model base", "--test_clips 1 4"])  # fmt: skip
def test_resume_refuses_in_one_line_what_differs_and_may_not(toy, whole, tmp_path, capsys, flags):
    before = (whole[0] / "log.jsonl").read_text()
    line = failing(capsys, toy, whole[0], "--resume", *flags.split())
    assert f"last.pt: was begun with {flags.split()[0]} " in line and "leave that out, or start anew" in line
    assert (whole[0] / "log.jsonl").read_text() == before


# ---------------------------------------------------------------- nothing is overwritten


@pytest.mark.parametrize("script, name", [(finetune, "tgif_qa_action"), (pretrain, "pretrain")])
def test_nothing_is_overwritten_by_a_second_run(script, name, toy, photos, tmp_path, capsys, monkeypatch):
    """Each run takes the next free name and says so; an --out that holds a run takes --overwrite."""
    monkeypatch.chdir(tmp_path)
    folder = toy if script is finetune else photos
    for more in ([], [], ["--blind"], ["--blind"]):
        here(folder, None, "--max_steps", 1, *more, script=script)
    runs = [Path("runs") / f"{name}{ending}" for ending in ("", "-2", "_blind", "_blind-2")]
    said = capsys.readouterr().out
    assert sorted(Path("runs").iterdir()) == sorted(runs) and all(f"writing to {run}\n" in said for run in runs)
    before = {path: path.read_bytes() for path in runs[0].iterdir()}
    line = failing(capsys, folder, runs[0], "--max_steps", 1, script=script)
    assert f"{runs[0]}: holds a run" in line and all(word in line for word in ("--out", "--resume", "--overwrite"))
    assert before == {path: path.read_bytes() for path in runs[0].iterdir()}
    here(folder, None, "--max_steps", 2, "--resume", script=script)  # the newest run
    assert [max(logged(run)) for run in runs] == [1, 1, 1, 2]


def test_overwritten_is_a_run_with_its_checkpoints(toy, whole, tmp_path):
    """They are not what the new one falls back on."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    here(toy, tmp_path, "--overwrite", "--max_steps", 1, "--seed", 1)
    assert clipbert.load_checkpoint(tmp_path / "last.pt")["settings"]["seed"] == 1
    assert not (tmp_path / "previous.pt").exists() and logged(tmp_path) == [1]


@pytest.mark.parametrize("script", [finetune, pretrain], ids=["finetune", "pretrain"])
def test_overwritten_is_nothing_by_an_evaluation_and_blind_is_remembered(script, toy, photos, tmp_path, capsys):
    """It writes beside its checkpoint, under a name that says what was evaluated."""
    folder, out = (toy, tmp_path / "run") if script is finetune else (photos, tmp_path / "run")
    here(folder, out, "--max_steps", 1, "--blind", script=script)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    here(folder, None, "--eval", out / "best.pt", script=script)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    ending = "best-tgif_qa_action-test-tgif_qa-blind" if script is finetune else "best-val-coco_captions-blind"
    added = {f"metrics-{ending}.json"} | ({f"predictions-{ending}.jsonl"} if script is finetune else set())
    assert before.items() <= after.items() and after.keys() - before.keys() == added
    assert json.loads(after[f"metrics-{ending}.json"])["blind"] is True and ", blind\n" in capsys.readouterr().out


def test_blind_is_remembered_and_said_by_a_prediction(toy, tmp_path, capsys):
    here(toy, tmp_path, "--max_steps", 1, "--blind")
    question = ["--question", "q", "--options", "a", "b", "--predict"]
    for name in ("toy_test_0000.gif", "toy_test_0001.gif"):
        here(None, None, "--eval", tmp_path / "best.pt", *question, toy / "gifs" / name)
    said = [line for line in capsys.readouterr().out.splitlines() if "%" in line or "blind" in line]
    assert sum("trained blind" in line for line in said) == 2
    assert said[-3:] == said[-6:-3]  # another video changes nothing


# ---------------------------------------------------------------- several processes, as torchrun starts them; on the CPU


def rank(number, port):
    """Turns a forked process into one of two, as torchrun's environment would."""

    def before():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(number),
                       "RANK": str(number), "WORLD_SIZE": "2"}  # fmt: skip
        clipbert.RANK, clipbert.PROCESSES = number, 2

    return before


def two(*run, **script):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [start(*run, **script, before=rank(number, port)) for number in (0, 1)]


# 13 examples, 8 an update: no epoch is a multiple of the step, and the last update has a part of the 13th epoch.
EPOCHS = ["--epochs", 12, "--save_every", 10]


@pytest.fixture(scope="module")
def both(toy, tmp_path_factory):
    """Two processes, undisturbed."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert [finish(process) for process in two(toy, out, *EPOCHS)] == [0, 0]
    return out


@pytest.mark.parametrize("script", [finetune, pretrain], ids=["finetune", "pretrain"])
def test_two_processes_equal_one_with_twice_the_accumulation(toy, photos, tmp_path, both, script):
    one, other = tmp_path / "one", both
    if script is finetune:
        assert finish(start(toy, one, *EPOCHS, "--grad_accum", 2)) == 0
    else:  # with two batches an update each, that is, four
        other, more = tmp_path / "two", ["--max_steps", 20, "--eval_every", 10, "--batch_size", 2]
        processes = two(photos, other, *more, "--grad_accum", 2, script=script)
        processes.append(start(photos, one, *more, "--grad_accum", 4, script=script))
        assert [finish(process) for process in processes] == [0, 0, 0]
    ours, twins = weights(one), weights(other)
    for name in ours:
        # Sums in another order, which Adam enlarges in a few weights whose gradients are all but zero: 20 updates of
        # up to 3e-4 take those 2e-4 apart at most, and on average all are the same.
        torch.testing.assert_close(ours[name], twins[name], rtol=0, atol=2e-4)
        assert (ours[name] - twins[name]).abs().mean() < 5e-6
    logs = [conftest.lines(out / "log.jsonl") for out in (one, other)]
    assert logs[0][-1]["step"] == 20
    for row, twin in zip(*logs, strict=True):
        assert row == pytest.approx(twin, abs=1e-4)


def test_two_processes_stop_at_the_same_step_and_go_on(toy, tmp_path, both):
    """Though the signal reaches only one of them."""
    out = tmp_path / "run"
    processes = two(toy, out, "--epochs", 12, "--save_every", 1)
    wait_for(out, 2, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [143, 143]
    stopped_at = clipbert.load_checkpoint(out / "last.pt")["step"]
    assert stopped_at in (10, 20) and f"after step {stopped_at} of 20" in errors(out)[-1]
    assert [finish(process) for process in two(toy, out, *EPOCHS, "--resume")] == [0, 0]
    assert same_end(both, out)
