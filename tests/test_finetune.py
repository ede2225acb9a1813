"""Tests of the fine-tuning script on a handful of toy videos. One property at a time: `pytest tests/test_finetune.py -k
order`, or one of: accumulation, task, seed, init, unreadable, missing, blind, predict, judge, count. How runs stop and
go on: test_reliability.py; wrong commands: test_commands.py.
"""

import functools
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED, failing, lines, metrics, run, settings, weights

import clipbert
import data
import finetune

KINDS = ["action", "transition", "frameqa", "count"]


def short(toy, out, *more, task="tgif_qa"):
    """A run of four steps; of several flags the last one counts. -> its metrics."""
    run(finetune, "--task", task, "--data", toy, "--out", out, "--batch_size", 4, "--max_steps", 4, "--test_clips", 1, 2,
        "--workers", 0, *more)  # fmt: skip
    return metrics(out)


def steps(out):
    return [row["step"] for row in lines(out / "log.jsonl")]


# ---------------------------------------------------------------- what is random, and in which order


def test_order_and_clips_and_captions_are_random_independently():
    """No two streams of numbers are the same: not those of two seeds, purposes, epochs or examples."""
    orders = {tuple(i for _, i in batch) for seed in range(5) for batch in data.training_order(20, 20, 6, seed)}
    assert len(orders) == 5 * 6  # with seeds + epochs they were 10
    keys = list(itertools.product(range(4), ("order", "clips", "texts"), range(4), range(4)))
    drawn = [tuple(torch.rand(4, generator=data.generator_of(*key)).tolist()) for key in keys * 2]
    assert len(set(drawn)) == len(keys) and drawn[: len(keys)] == drawn[len(keys) :]  # but each is always the same


def test_order_shows_every_example_once_an_epoch():
    keys = [key for batch in data.training_order(10, 4, n_batches=10, seed=1) for key in batch]
    assert sorted(keys) == [(epoch, i) for epoch in range(4) for i in range(10)]


def items(folder, **changes):
    """The training set of a folder, as the loop reads it: [epoch, place] -> example, clips."""
    examples = data.read_examples("tgif_qa_action", [folder], "train")
    return data.ClipDataset(examples, settings(**changes), n_clips=2, train=True)


def test_order_and_clips_do_not_depend_on_the_reader(toy_tgif_qa):
    one, other = items(toy_tgif_qa), items(toy_tgif_qa)
    other[0, 3]  # reading something else first changes nothing
    assert torch.equal(one[1, 2]["frames"], other[1, 2]["frames"])
    assert not torch.equal(one[0, 2]["frames"], one[1, 2]["frames"])  # another epoch, other random clips


def test_blind_runs_see_black_frames_only(toy_tgif_qa):
    assert items(toy_tgif_qa)[0, 0]["frames"].any() and not items(toy_tgif_qa, blind=True)[0, 0]["frames"].any()


def test_accumulation_is_the_update_of_a_large_batch(toy_tgif_qa, tmp_path):
    """2 x 3 and 6 x 1, 24 examples in epochs of 7: the same weights but for the order of sums."""
    options = ("--limit", 7, "--lr", 1e-4, "--test_clips", 1)
    short(toy_tgif_qa, tmp_path / "one", "--batch_size", 6, *options)
    short(toy_tgif_qa, tmp_path / "two", "--batch_size", 3, "--grad_accum", 2, *options)
    assert steps(tmp_path / "one") == steps(tmp_path / "two") == [1, 2, 3, 4]
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


# ---------------------------------------------------------------- the run


@pytest.mark.parametrize("kind", KINDS)
def test_task_trains_evaluates_and_leaves_its_files(kind, toy_tgif_qa, tmp_path):
    task, out = f"tgif_qa_{kind}", tmp_path / "run"
    said = short(toy_tgif_qa, out, task=task)
    name = "mse" if kind == "count" else "accuracy"
    assert said["examples"] == 6 and list(said["by_clips"]) == ["1", "2"] and name in said["by_clips"]["2"]
    assert steps(out) == [1, 2, 3, 4] and len(lines(out / "predictions.jsonl")) == 6
    assert json.loads((out / "config.json").read_text())["batch_size"] == 4 and (out / "sheet.png").exists()
    only_test = shutil.ignore_patterns("toy_train_*", "Train_*")  # all that evaluation needs, the chance level included
    shutil.copytree(toy_tgif_qa, tmp_path / "toy", ignore=only_test)
    before = (out / "metrics.json").read_bytes()
    run(finetune, "--task", task, "--data", tmp_path / "toy", "--eval", out / "best.pt", "--workers", 0)
    again = metrics(out, f"-best-{task}-test-toy")  # beside the checkpoint, and nothing is lost there
    assert (again["by_clips"], again["chance"]) == (said["by_clips"], said["chance"])
    assert (out / "metrics.json").read_bytes() == before


def begun(monkeypatch, toy, out, *more):
    """config.json of a run that is stopped as its training begins."""

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", stop)
    with pytest.raises(SystemExit):
        run(finetune, "--data", toy, "--out", out, *more)
    return json.loads((out / "config.json").read_text())


def test_task_table_holds_the_papers_settings(toy_tgif_qa, tmp_path, monkeypatch):
    small = clipbert.ClipBertConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32)
    monkeypatch.setattr(clipbert.ClipBertConfig, "base", classmethod(lambda cls: small))
    s = begun(monkeypatch, toy_tgif_qa, tmp_path / "base", "--model", "base", "--scratch")
    paper = {"size": 448, "frames": 1, "train_clips": 1, "agg": "mean", "text_length": 25, "lr": 1e-4, "epochs": 15}
    assert {name: s[name] for name in paper} == paper
    assert s["batch_size"] * s["grad_accum"] == 32 and s["max_steps"] is None
    assert s["config"]["backbone"] == "resnet50" and s["config"]["hidden_size"] == 32
    s = begun(monkeypatch, toy_tgif_qa, tmp_path / "tiny", "--epochs", 2)
    assert (s["size"], s["epochs"], s["max_steps"]) == (64, 2, None)  # as many epochs as asked for
    assert s["config"]["backbone"] == "tiny"


def test_seed_decides_everything(toy_tgif_qa, tmp_path):
    one = short(toy_tgif_qa, tmp_path / "1")
    assert one["by_clips"] == short(toy_tgif_qa, tmp_path / "2", "--workers", 1)["by_clips"]
    short(toy_tgif_qa, tmp_path / "3", "--seed", 1)
    first, second, third = (weights(tmp_path / n) for n in ("1", "2", "3"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)


def test_init_reports_what_fits_and_carries_the_vocabulary(toy_tgif_qa, tmp_path, capsys):
    short(toy_tgif_qa, tmp_path / "action")
    init = ("--init", tmp_path / "action" / "best.pt")
    short(toy_tgif_qa, tmp_path / "frameqa", *init, task="tgif_qa_frameqa")
    assert "classifier.2.weight (1, 192), here (1540, 192)" in capsys.readouterr().out
    a, b = (clipbert.load_checkpoint(tmp_path / name / "best.pt") for name in ("action", "frameqa"))
    assert a["vocabulary"] == b["vocabulary"]


# ---------------------------------------------------------------- bad input


@pytest.fixture
def broken(toy_tgif_qa, tmp_path):
    """The toy data with one broken training GIF and one broken test GIF."""
    shutil.copytree(toy_tgif_qa, tmp_path / "broken")
    for name in ("toy_train_0002", "toy_test_0001"):
        (tmp_path / "broken" / "gifs" / f"{name}.gif").write_bytes(b"GIF89a")
    return tmp_path / "broken"


def test_unreadable_videos_are_replaced_in_training_and_wrong_in_evaluation(broken, tmp_path, capsys):
    said = short(broken, tmp_path / "out")
    messages = capsys.readouterr().err
    assert "replaced by other examples in training: 1" in messages and "toy_train_0002.gif" in messages
    assert "counted as wrong: 1" in messages and "toy_test_0001.gif" in messages
    assert said["unreadable"] == 1 and said["examples"] == 6
    rows = lines(tmp_path / "out" / "predictions.jsonl")
    assert [row["accuracy"] for row in rows if row["video"] == "toy_test_0001"] == [False]
    item = items(broken)[0, 2]
    assert item["example"] == items(broken).examples[3] and len(item["unreadable"]) == 1  # the next one


def test_missing_videos_are_counted_and_stop_the_run(toy_tgif_qa, tmp_path, capsys):
    folder, none = tmp_path / "data", tmp_path / "none"
    shutil.copytree(toy_tgif_qa, folder)
    for i in range(5):
        (folder / "gifs" / f"toy_train_{i:04d}.gif").unlink()
    assert "5 of 12 train videos are missing" in failing(capsys, finetune, "--data", folder, "--out", tmp_path / "out")
    assert short(folder, tmp_path / "out", "--allow_missing")["examples"] == 6
    shutil.copytree(toy_tgif_qa, none, ignore=shutil.ignore_patterns("gifs"))
    assert "12 of 12" in failing(capsys, finetune, "--data", none, "--out", tmp_path / "x", "--allow_missing")


# ---------------------------------------------------------------- one video, one example


def test_predict_ranks_the_given_options(toy_tgif_qa, tmp_path, capsys):
    short(toy_tgif_qa, tmp_path)
    capsys.readouterr()
    options, video = ["jump", "spin", "grow"], toy_tgif_qa / "gifs" / "toy_test_0000.gif"
    run(finetune, "--eval", tmp_path / "best.pt", "--predict", video, "--question", "what ?", "--options", *options)
    said = capsys.readouterr().out.splitlines()[-3:]
    assert sorted(line.split()[1] for line in said) == sorted(options)
    shares = [float(line.split()[0].rstrip("%")) for line in said]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.5


def test_predict_judges_each_caption_for_itself(toy_msrvtt, tmp_path, capsys):
    """--question and --options of a retrieval model are captions, scored as one of them alone is."""
    run(finetune, "--task", "msrvtt_retrieval", "--data", toy_msrvtt, "--out", tmp_path, "--max_steps", 1,
        "--batch_size", 2, "--test_clips", 1)  # fmt: skip
    said, captions = [], ["the star does jump", "a blue square", "it spins"]
    for given in (["--question", captions[0], "--options", *captions[1:]], *(["--question", text] for text in captions)):
        capsys.readouterr()
        run(finetune, "--eval", tmp_path / "best.pt", "--predict", next(toy_msrvtt.rglob("*.gif")), *given)
        said.append(capsys.readouterr().out.split("itself\n")[1].splitlines())
    assert sorted(said[0]) == sorted(line for lines in said[1:] for line in lines) and len(said[0]) == 3


def judged(monkeypatch, task, answers, *scores, readable=True, names=None):
    """evaluate's metrics and predictions of examples with these answers, whose scores are known."""
    options = ("a", "b") if task == "tgif_qa_action" else ()
    examples = [data.Example("1", "v", "q", options=options, answer=answer) for answer in answers]
    results = [(torch.tensor(p), readable) for p in scores]
    monkeypatch.setattr(finetune, "score_videos", lambda *arguments: (results, []))
    collate = SimpleNamespace(answers=names)
    by_clips, rows, _ = finetune.evaluate(settings(task=task), None, collate, examples, [3])
    return by_clips["3"], [row["prediction"] for row in rows]


def test_judge_right_wrong_unreadable_and_unused_outputs(monkeypatch):
    choice = functools.partial(judged, monkeypatch, "tgif_qa_action", [1, 1, 0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0])
    assert choice() == ({"accuracy": pytest.approx(200 / 3, abs=1e-3)}, ["b", "a", "a"])
    assert choice(readable=False) == ({"accuracy": 0.0}, [None] * 3)
    scores = [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]  # FrameQA has an output more than there are answers
    said = judged(monkeypatch, "tgif_qa_frameqa", ["red", "red"], *scores, names=["blue", "red"])
    assert said == ({"accuracy": 50.0}, ["red", None])


def test_count_is_judged_raw_and_as_a_whole_number_from_1_to_10(monkeypatch):
    """The squared error of the output, and the one that papers print; predictions hold the number that is meant."""
    errors, predictions = judged(monkeypatch, "tgif_qa_count", [3, 2, 10], [3.4], [-1.0], [12.5])
    assert predictions == [3, 1, 10]
    assert errors["mse"] == pytest.approx((0.4**2 + 3**2 + 2.5**2) / 3, abs=1e-4)
    assert errors["mse_rounded"] == pytest.approx((0 + 1 + 0) / 3, abs=1e-4)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real GIFs are not here: {SHARED}")
@pytest.mark.parametrize("kind", KINDS)
def test_real_gifs_and_their_questions_train(kind, tmp_path):
    assert short(SHARED / "real" / "tgif_qa", tmp_path, task=f"tgif_qa_{kind}")["examples"] == 1
