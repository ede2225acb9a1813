"""Tests of the fine-tuning script on a handful of toy videos. How runs stop and go on: test_reliability.py."""

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED, failing, lines, metrics, run, settings, weights
from runs import logged

import clipbert
import data
import finetune

KINDS = ["action", "transition", "frameqa", "count"]


def short(toy, out, *more, task="tgif_qa"):
    """A run of four steps; of several flags the last one counts. -> its metrics."""
    run(finetune, "--task", task, "--data", toy, "--out", out, "--batch_size", 4, "--max_steps", 4,
        "--test_clips", 1, 2, "--workers", 0, *more)  # fmt: skip
    return metrics(out)


def test_order_and_clips_and_captions_are_random_independently():
    """An epoch has every example once; no two seeds, purposes, epochs or examples share their numbers."""
    keys = [key for batch in data.training_order(10, 4, n_batches=10, seed=1) for key in batch]
    assert sorted(keys) == [(epoch, i) for epoch in range(4) for i in range(10)]
    orders = {tuple(i for _, i in batch) for seed in range(5) for batch in data.training_order(20, 20, 6, seed)}
    assert len(orders) == 5 * 6  # with seeds + epochs they were 10
    keys = list(itertools.product(range(4), ("order", "clips", "texts"), range(4), range(4)))
    drawn = [tuple(torch.rand(4, generator=data.generator_of(*key)).tolist()) for key in keys * 2]
    assert len(set(drawn)) == len(keys) and drawn[: len(keys)] == drawn[len(keys) :]  # but each is always the same


def items(folder, **changes):
    """The training set of a folder, as the loop reads it: [epoch, place] -> example, clips."""
    examples = data.read_examples("tgif_qa_action", [folder], "train")
    return data.ClipDataset(examples, settings(**changes), n_clips=2, train=True)


def test_order_and_clips_do_not_depend_on_the_reader(toy_videos):
    one, other = items(toy_videos), items(toy_videos)
    other[0, 3]  # reading something else first changes nothing
    assert torch.equal(one[1, 2]["frames"], other[1, 2]["frames"])
    assert not torch.equal(one[0, 2]["frames"], one[1, 2]["frames"])  # another epoch, other random clips


def test_blind_runs_see_black_frames_only(toy_videos):
    assert items(toy_videos)[0, 0]["frames"].any() and not items(toy_videos, blind=True)[0, 0]["frames"].any()


def test_accumulation_and_workers_change_nothing_and_the_seed_everything(toy_videos, tmp_path):
    """2 x 3 and 6 x 1, 24 examples in epochs of 5: the same weights but for the order of sums."""
    options = ("--limit", 5, "--lr", 1e-4, "--test_clips", 1)
    assert short(toy_videos, tmp_path / "one", "--batch_size", 6, *options)["examples"] == 5
    short(toy_videos, tmp_path / "two", "--batch_size", 3, "--grad_accum", 2, "--workers", 1, *options)
    short(toy_videos, tmp_path / "other", "--batch_size", 6, "--seed", 1, *options)
    assert logged(tmp_path / "one") == logged(tmp_path / "two") == [1, 2, 3, 4]
    one, two, other = (weights(tmp_path / name) for name in ("one", "two", "other"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)
    assert (one["classifier.0.weight"] - other["classifier.0.weight"]).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_task_trains_evaluates_and_leaves_its_files(kind, toy_videos, tmp_path):
    task, out = f"tgif_qa_{kind}", tmp_path / "run"
    said = short(toy_videos, out, task=task)
    name = "mse" if kind == "count" else "accuracy"
    assert said["examples"] == 6 and list(said["by_clips"]) == ["1", "2"] and name in said["by_clips"]["2"]
    assert logged(out) == [1, 2, 3, 4] and len(lines(out / "predictions.jsonl")) == 6
    assert json.loads((out / "config.json").read_text())["batch_size"] == 4 and (out / "sheet.png").exists()
    only_test = shutil.ignore_patterns("toy_train_*", "Train_*")  # all that evaluation needs, the chance level included
    shutil.copytree(toy_videos, tmp_path / "toy", ignore=only_test)
    before = (out / "metrics.json").read_bytes()
    run(finetune, "--task", task, "--data", tmp_path / "toy", "--eval", out / "best.pt", "--workers", 0)
    again = metrics(out, f"-best-{task}-test-toy")  # beside the checkpoint, and nothing is lost there
    assert (again["by_clips"], again["chance"]) == (said["by_clips"], said["chance"])
    assert (out / "metrics.json").read_bytes() == before


def test_task_aggregates_all_clips_of_training_and_of_testing(toy_videos, tmp_path, monkeypatch):
    """N_train of them, then N_test, by the G that was asked for."""
    aggregate, seen = clipbert.aggregate_clips, []
    monkeypatch.setattr(clipbert, "aggregate_clips", lambda p, how: seen.append((len(p), how)) or aggregate(p, how))
    short(toy_videos, tmp_path, "--train_clips", 3, "--test_clips", 2, "--agg", "lse", "--max_steps", 1)
    assert seen[0] == (3, "lse") and set(seen[1:]) == {(2, "lse")}


def test_task_table_holds_the_papers_settings(toy_videos, tmp_path, monkeypatch):
    """config.json of a base and a tiny model, of runs that are stopped as training begins."""

    def stop(*arguments):
        raise KeyboardInterrupt

    small = clipbert.ClipBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    monkeypatch.setattr(clipbert.ClipBertConfig, "base", classmethod(lambda cls: small))
    monkeypatch.setattr(finetune, "train", stop)
    for flags in (["--model", "base", "--scratch"], ["--model", "tiny", "--epochs", 2]):
        with pytest.raises(SystemExit):
            run(finetune, "--data", toy_videos, "--out", tmp_path / flags[1], *flags)
    base, tiny = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "tiny"))
    paper = {"size": 448, "frames": 1, "train_clips": 1, "agg": "mean", "text_length": 25, "lr": 1e-4, "epochs": 15}
    assert {name: base[name] for name in paper} == paper
    assert base["batch_size"] * base["grad_accum"] == 32 and base["max_steps"] is None
    assert (tiny["size"], tiny["epochs"], tiny["max_steps"]) == (64, 2, None)  # as many epochs as asked for
    assert (base["config"]["backbone"], tiny["config"]["backbone"]) == ("resnet50", "tiny")
    assert base["config"]["frozen_stages"] == 0  # nothing to protect in random weights


def test_init_reports_what_fits_and_carries_the_vocabulary(toy_videos, tmp_path, capsys):
    short(toy_videos, tmp_path / "action")
    init = ("--init", tmp_path / "action" / "best.pt")
    short(toy_videos, tmp_path / "frameqa", *init, task="tgif_qa_frameqa")
    assert "classifier.2.weight (1, 192), here (1540, 192)" in capsys.readouterr().out
    a, b = (clipbert.load_checkpoint(tmp_path / name / "best.pt") for name in ("action", "frameqa"))
    assert a["vocabulary"] == b["vocabulary"]


def test_unreadable_videos_are_replaced_in_training_and_wrong_in_evaluation(toy_videos, tmp_path, capsys):
    broken = shutil.copytree(toy_videos, tmp_path / "broken")
    for name in ("toy_train_0002", "toy_test_0001"):
        (broken / "gifs" / f"{name}.gif").write_bytes(b"GIF89a")
    said = short(broken, tmp_path / "out")
    messages = capsys.readouterr().err
    assert "replaced by other examples in training: 1" in messages and "toy_train_0002.gif" in messages
    assert "counted as wrong: 1" in messages and "toy_test_0001.gif" in messages
    assert said["unreadable"] == 1 and said["examples"] == 6
    rows = lines(tmp_path / "out" / "predictions.jsonl")
    assert [row["accuracy"] for row in rows if row["video"] == "toy_test_0001"] == [False]
    item = items(broken)[0, 2]
    assert item["example"] == items(broken).examples[3] and len(item["unreadable"]) == 1  # the next one


def test_missing_videos_are_counted_and_stop_the_run(toy_videos, tmp_path, capsys):
    folder, step = tmp_path / "data", ("--out", tmp_path / "out", "--max_steps", 1)
    shutil.copytree(toy_videos, folder)
    for i in range(5):
        (folder / "gifs" / f"toy_train_{i:04d}.gif").unlink()
    assert "5 of 12 train videos are missing" in failing(capsys, finetune, "--data", folder, *step)
    assert short(folder, tmp_path / "short", "--allow_missing")["examples"] == 6
    shutil.rmtree(folder / "gifs")
    assert "12 of 12" in failing(capsys, finetune, "--data", folder, "--allow_missing", *step)


def predicted(capsys, out, video, *question):
    """What --predict says: a line with a share and a name for each option or caption."""
    capsys.readouterr()
    run(finetune, "--eval", out / "best.pt", "--predict", video, "--question", *question)
    return [line for line in capsys.readouterr().out.splitlines() if "%" in line]


def test_predict_ranks_the_given_options(toy_videos, tmp_path, capsys):
    short(toy_videos, tmp_path)
    video, options = toy_videos / "gifs" / "toy_test_0000.gif", ["grow", "jump", "spin"]
    said = [line.split() for line in predicted(capsys, tmp_path, video, "what ?", "--options", *options)]
    assert sorted(option for _, option in said) == options
    shares = [float(share.rstrip("%")) for share, _ in said]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.5


def test_predict_judges_each_caption_for_itself(toy_videos, tmp_path, capsys):
    """--question and --options of a retrieval model are captions, scored as one of them alone is."""
    short(toy_videos, tmp_path, "--max_steps", 1, task="msrvtt_retrieval")
    video, captions = next(toy_videos.rglob("*.gif")), ["the star does jump", "a blue square", "it spins"]
    together = predicted(capsys, tmp_path, video, captions[0], "--options", *captions[1:])
    alone = [line for caption in captions for line in predicted(capsys, tmp_path, video, caption)]
    assert sorted(together) == sorted(alone) and len(alone) == 3


@pytest.mark.parametrize("task, answers, scores, readable, predictions, expected", [
    ("tgif_qa_action", [1, 1, 0], [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], True, ["b", "a", "a"], {"accuracy": 66.667}),
    ("tgif_qa_action", [1, 0], [[0.0, 1.0], [1.0, 0.0]], False, [None, None], {"accuracy": 0.0}),
    # an output more than there are answers
    ("tgif_qa_frameqa", ["red", "red"], [[0.0, 1.0, 0.5], [0.0, 0.5, 1.0]], True, ["red", None], {"accuracy": 50.0}),
    # the squared error of the output, and the one that papers print, of the whole number from 1 to 10 that is meant
    ("tgif_qa_count", [3, 2, 10], [[3.4], [-1.0], [12.5]], True, [3, 1, 10], {"mse": 5.137, "mse_rounded": 0.333}),
])  # fmt: skip
def test_judge_says_what_is_right(task, answers, scores, readable, predictions, expected, monkeypatch):
    """Of scores as they are given; what can't be read is wrong."""
    options = ("a", "b") if task == "tgif_qa_action" else ()
    examples = [data.Example("1", "v", "q", options=options, answer=answer) for answer in answers]
    results = [(torch.tensor(p), readable) for p in scores]
    monkeypatch.setattr(finetune, "score_videos", lambda *arguments: (results, []))
    collate = SimpleNamespace(answers=["blue", "red"])
    by_clips, rows, _ = finetune.evaluate(settings(task=task), None, collate, examples, [3])
    assert [row["prediction"] for row in rows] == predictions
    assert by_clips == {"3": pytest.approx(expected, abs=1e-3)}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real GIFs are not here: {SHARED}")
@pytest.mark.parametrize("kind", KINDS)
def test_real_gifs_and_their_questions_train(kind, tmp_path):
    assert short(SHARED / "real" / "tgif_qa", tmp_path, task=f"tgif_qa_{kind}")["examples"] == 1
