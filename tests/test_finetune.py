"""Tests of the fine-tuning script on a handful of toy videos. One property at a time: `pytest tests/test_finetune.py -k
resume`, or one of: order, task, seed, unreadable, missing, blind, predict, error, judge, real."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import clipbert
import data
import finetune

SHARED = Path(__file__).resolve().parents[2] / "shared"
KINDS = ["action", "transition", "frameqa", "count"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Twelve training and six test GIFs, with the questions of all four tasks."""
    folder = tmp_path_factory.mktemp("toy") / "tgif_qa"
    data.write_toy_tgif_qa(folder, train=12, test=6)
    return folder


def run(toy, out, *more, task="tgif_qa"):
    args = ["--task", task, "--data", toy, "--out", out]
    args += ["--batch_size", 4, "--max_steps", 4, "--test_clips", 1, 2, *more]
    args = finetune.parse_arguments([str(arg) for arg in args])
    job = finetune.run_prediction if args.predict else finetune.run_evaluation if args.eval else finetune.run_training
    clipbert.main(job, args)
    return json.loads((args.out / "metrics.json").read_text()) if not args.predict else None


def weights(path):
    return torch.load(path, weights_only=True)["model"]


# ---------------------------------------------------------------- the order of training


def test_order_shows_every_example_once_an_epoch_and_epochs_differ():
    batches = list(data.training_order(10, 4, n_batches=6, seed=1))
    first, second = (sorted(i for batch in half for _, i in batch) for half in (batches[:3], batches[3:]))
    assert first == second == list(range(10))
    assert [i for b in batches[:3] for _, i in b] != [i for b in batches[3:] for _, i in b]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
def test_order_of_a_resumed_run_is_the_rest_of_the_whole_one(start):
    whole = list(data.training_order(10, 4, n_batches=6, seed=1))
    assert list(data.training_order(10, 4, n_batches=6, seed=1, start=start)) == whole[start:]


def test_order_and_clips_do_not_depend_on_the_reader(toy):
    examples = data.read_examples("tgif_qa_action", toy, "train")
    options = {"n_clips": 2, "n_frames": 1, "fps": 1.0, "size": 32, "train": True}
    one, other = (data.ClipDataset(examples, toy, **options) for _ in range(2))
    other[(0, 3)]  # reading something else first changes nothing
    assert torch.equal(one[(1, 2)]["frames"], other[(1, 2)]["frames"])
    assert not torch.equal(one[(0, 2)]["frames"], one[(1, 2)]["frames"])  # another epoch, other random clips


# ---------------------------------------------------------------- the run


@pytest.mark.parametrize("kind", KINDS)
def test_task_trains_evaluates_and_leaves_its_files(kind, toy, tmp_path):
    task = f"tgif_qa_{kind}"
    metrics = run(toy, tmp_path, task=task)
    name = "mse" if kind == "count" else "accuracy"
    assert metrics["examples"] == 6 and list(metrics["by_clips"]) == ["1", "2"] and name in metrics["by_clips"]["2"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["batch_size"] == 4
    only_test = shutil.ignore_patterns("toy_train_*", "Train_*")  # all that evaluation needs, the chance level included
    shutil.copytree(toy, tmp_path / "toy", ignore=only_test)
    again = run(tmp_path / "toy", tmp_path / "again", "--eval", tmp_path / "best.pt", task=task)
    assert (again["by_clips"], again["chance"]) == (metrics["by_clips"], metrics["chance"])


def test_task_table_holds_the_papers_settings():
    action = finetune.TASKS["tgif_qa_action"]
    assert (action.size, action.frames, action.train_clips, action.agg, action.text_length) == (448, 1, 1, "mean", 25)
    assert (action.batch_size * action.grad_accum, action.lr, action.epochs) == (32, 1e-4, 15)


def test_seed_decides_everything(toy, tmp_path):
    one, two = run(toy, tmp_path / "1"), run(toy, tmp_path / "2", "--workers", 1)
    assert one["by_clips"] == two["by_clips"]
    first, second, third = (weights(tmp_path / n / "last.pt") for n in ("1", "2", "1"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    run(toy, tmp_path / "3", "--seed", 1)
    third = weights(tmp_path / "3" / "last.pt")
    assert any(not torch.equal(first[k], third[k]) for k in first)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resume_ends_with_the_weights_of_the_uninterrupted_run(stop_after, toy, tmp_path, monkeypatch):
    more = ["--save_every", 1, "--grad_accum", 2, "--batch_size", 3]
    run(toy, tmp_path / "whole", *more)
    save, saved = clipbert.save_checkpoint, []

    def save_and_stop(path, state, *previous):
        save(path, state, *previous)
        saved.append(path)
        if len(saved) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(clipbert, "save_checkpoint", save_and_stop)
    with pytest.raises(SystemExit):  # as after Ctrl-C
        run(toy, tmp_path / "cut", *more)
    monkeypatch.undo()
    run(toy, tmp_path / "cut", *more, "--resume")
    whole, cut = (weights(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_accumulation_equals_one_large_batch(toy, tmp_path):
    """Two batches of 3 and one of 6: the mean of the gradients, so the same update (up to the order of sums)."""
    run(toy, tmp_path / "one", "--batch_size", 6, "--max_steps", 2)
    run(toy, tmp_path / "two", "--batch_size", 3, "--grad_accum", 2, "--max_steps", 2)
    one, two = (weights(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def broken(toy, tmp_path):
    """The toy data with one broken training GIF and one broken test GIF."""
    shutil.copytree(toy, tmp_path / "broken")
    for name in ("toy_train_0002", "toy_test_0001"):
        (tmp_path / "broken" / "gifs" / f"{name}.gif").write_bytes(b"GIF89a")
    return tmp_path / "broken"


def test_unreadable_videos_are_replaced_in_training_and_wrong_in_evaluation(broken, tmp_path, capsys):
    metrics = run(broken, tmp_path / "out")
    messages = capsys.readouterr().err
    assert "replaced by other examples in training: 1" in messages and "toy_train_0002.gif" in messages
    assert "counted as wrong: 1" in messages and "toy_test_0001.gif" in messages
    assert metrics["unreadable"] == 1 and metrics["examples"] == 6
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["accuracy"] for row in rows if row["video"] == "toy_test_0001"] == [False]


def test_unreadable_examples_are_replaced_by_the_next(broken):
    examples = data.read_examples("tgif_qa_action", broken, "train")
    dataset = data.ClipDataset(examples, broken, n_clips=1, n_frames=1, fps=1.0, size=32, train=True)
    item = dataset[(0, 2)]
    assert item["example"] == examples[3] and len(item["unreadable"]) == 1


def failing(capsys, *args):
    """The one line that a wrong command prints, after checking that it is one line and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_missing_videos_are_counted_and_stop_the_run(toy, tmp_path, capsys):
    shutil.copytree(toy, tmp_path / "data")
    for i in range(5):
        (tmp_path / "data" / "gifs" / f"toy_train_{i:04d}.gif").unlink()
    assert "5 of 12 train videos are missing" in failing(capsys, tmp_path / "data", tmp_path / "out")
    metrics = run(tmp_path / "data", tmp_path / "out", "--allow_missing")
    assert metrics["examples"] == 6
    shutil.copytree(toy, tmp_path / "none", ignore=shutil.ignore_patterns("gifs"))
    assert "12 of 12" in failing(capsys, tmp_path / "none", tmp_path / "out", "--allow_missing")


def test_task_trains_on_a_lighter_backbone_and_its_checkpoint_remembers_it(toy, tmp_path, monkeypatch, capsys):
    small = clipbert.ClipBertConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32)
    monkeypatch.setattr(clipbert.ClipBertConfig, "base", classmethod(lambda cls: small))
    run(toy, tmp_path, "--model", "base", "--backbone", "resnet18", "--scratch", "--size", 64, "--max_steps", 1)
    state = clipbert.load_checkpoint(tmp_path / "best.pt")
    assert state["config"]["backbone"] == "resnet18" and "cnn.resnet.layer4.1.conv2.weight" in state["model"]
    first = run(toy, tmp_path / "eval", "--eval", tmp_path / "best.pt")
    assert first["by_clips"] == json.loads((tmp_path / "metrics.json").read_text())["by_clips"]
    more = ("--init", tmp_path / "best.pt", "--model", "base", "--backbone", "resnet50")
    assert "best.pt: not a checkpoint on resnet50; leave out --backbone" in failing(capsys, toy, tmp_path / "x", *more)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the public annotation samples are not here: {SHARED}")
def test_missing_gifs_of_the_real_annotations_are_counted(tmp_path, capsys):
    line = failing(capsys, SHARED / "annotations" / "tgif_qa", tmp_path)
    assert "of 175 train videos are missing" in line or "train videos are missing" in line


def test_error_lines_name_the_thing_and_the_remedy(toy, tmp_path, capsys):
    run(toy, tmp_path / "run")
    checkpoint = tmp_path / "run" / "best.pt"
    assert "no annotation file" in failing(capsys, tmp_path, tmp_path / "out")
    assert "no such checkpoint" in failing(capsys, toy, tmp_path / "out", "--eval", tmp_path / "none.pt")
    with pytest.raises(SystemExit):
        finetune.parse_arguments(["--task", "tgif"])
    args = finetune.parse_arguments(["--task", "tgif_qa_count", "--data", str(toy), "--eval", str(checkpoint)])
    with pytest.raises(SystemExit):
        clipbert.main(finetune.run_evaluation, args)
    assert "a checkpoint of --task tgif_qa_action, not tgif_qa_count" in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "not a whole checkpoint" in failing(capsys, toy, tmp_path / "out", "--eval", tmp_path / "text.pt")
    if not torch.cuda.is_available():
        assert "fp16 needs a GPU" in failing(capsys, toy, tmp_path / "out", "--precision", "fp16")


def test_error_of_a_loss_that_is_not_a_number_stops_the_run(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clipbert, "video_loss", lambda p, *_: p.sum() * float("nan"))
    assert "the loss is nan" in failing(capsys, toy, tmp_path)


def test_blind_runs_see_black_frames_only(toy):
    examples = data.read_examples("tgif_qa_action", toy, "train")
    options = {"n_clips": 1, "n_frames": 1, "fps": 1.0, "size": 32, "train": True}
    assert data.ClipDataset(examples, toy, **options)[(0, 0)]["frames"].any()
    assert not data.ClipDataset(examples, toy, **options, blind=True)[(0, 0)]["frames"].any()


# ---------------------------------------------------------------- one video, one example


def test_predict_ranks_the_given_options(toy, tmp_path, capsys):
    run(toy, tmp_path)
    capsys.readouterr()
    options = ["jump", "spin", "grow"]
    video, checkpoint = toy / "gifs" / "toy_test_0000.gif", tmp_path / "best.pt"
    run(toy, tmp_path, "--eval", checkpoint, "--predict", video, "--question", "what ?", "--options", *options)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert sorted(line.split()[1] for line in lines) == sorted(options)
    shares = [float(line.split()[0].rstrip("%")) for line in lines]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.5


def test_judge_right_wrong_unreadable_and_unused_outputs():
    choice = data.Example("1", "v", "q", options=("a", "b"), answer=1)
    task = finetune.TASKS["tgif_qa_action"]
    assert finetune.judge(task, choice, torch.tensor([0.0, 1.0]), True, None) == ("b", True)
    assert finetune.judge(task, choice, torch.tensor([1.0, 0.0]), True, None) == ("a", False)
    assert finetune.judge(task, choice, torch.tensor([0.0, 1.0]), False, None) == (None, False)
    frameqa, example = finetune.TASKS["tgif_qa_frameqa"], data.Example("1", "v", "q", answer="red")
    assert finetune.judge(frameqa, example, torch.tensor([0.0, 1.0, 0.5]), True, ["blue", "red"]) == ("red", True)
    assert finetune.judge(frameqa, example, torch.tensor([0.0, 0.5, 1.0]), True, ["blue", "red"]) == (None, False)
    count = data.Example("1", "v", "q", answer=3)
    assert finetune.judge(finetune.TASKS["tgif_qa_count"], count, torch.tensor([5.0]), True, None) == (5.0, 4.0)


def test_init_reports_what_fits_and_carries_the_vocabulary(toy, tmp_path, capsys):
    run(toy, tmp_path / "action")
    run(toy, tmp_path / "frameqa", "--init", tmp_path / "action" / "best.pt", task="tgif_qa_frameqa")
    text = capsys.readouterr().out
    assert "2 mismatched" in text and "classifier.2.weight: (1, 192), (1540, 192)" in text
    a, b = (clipbert.load_checkpoint(tmp_path / name / "best.pt") for name in ("action", "frameqa"))
    assert a["vocabulary"] == b["vocabulary"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real GIFs are not here: {SHARED}")
@pytest.mark.parametrize("kind", KINDS)
def test_real_gifs_and_their_questions_train(kind, tmp_path):
    metrics = run(SHARED / "real" / "tgif_qa", tmp_path, task=f"tgif_qa_{kind}")
    assert metrics["examples"] == 1
