"""Tests of the fine-tuning script on a handful of toy videos. How runs stop and go on: test_reliability.py.

Retrieval: scores against the reference's numbers, and the cheap order of evaluation. The metrics: test_exercises.py.
"""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import HERE, SHARED, failing, lines, logged, metrics, refused, run, settings, short

import clipbert
import data
import finetune
import pretrain

KINDS = ["action", "transition", "frameqa", "count"]
GOLDEN = json.loads((HERE / "golden_retrieval.json").read_text())


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


@pytest.mark.parametrize("kind", KINDS)
def test_task_trains_evaluates_and_leaves_its_files(kind, toy_videos, tmp_path):
    task, out = f"tgif_qa_{kind}", tmp_path / "run"
    said = short(finetune, toy_videos, out, "--task", task, "--test_clips", 1, 2)
    name = "mse" if kind == "count" else "accuracy"
    assert said["examples"] == 6 and list(said["by_clips"]) == ["1", "2"] and name in said["by_clips"]["2"]
    assert logged(out) == [1, 2, 3, 4] and len(lines(out / "predictions.jsonl")) == 6
    assert json.loads((out / "config.json").read_text())["batch_size"] == 4 and (out / "sheet.png").exists()
    only_test = shutil.ignore_patterns("toy_train_*", "Train_*")  # all that evaluation needs, the chance level included
    shutil.copytree(toy_videos, tmp_path / "toy", ignore=only_test)
    run(finetune, "--task", task, "--data", tmp_path / "toy", "--eval", out / "best.pt", "--workers", 0)
    again = metrics(out, f"-best-{task}-test-toy")  # beside the checkpoint
    assert (again["by_clips"], again["chance"]) == (said["by_clips"], said["chance"])


def test_task_aggregates_all_clips_of_training_and_of_testing(toy_videos, tmp_path, monkeypatch):
    """N_train of them, then N_test, by the G that was asked for."""
    aggregate, seen = clipbert.aggregate_clips, []
    monkeypatch.setattr(clipbert, "aggregate_clips", lambda p, how: seen.append((len(p), how)) or aggregate(p, how))
    clips = ["--train_clips", 3, "--test_clips", 2, "--agg", "lse"]
    assert short(finetune, toy_videos, tmp_path, *clips, "--max_steps", 1, "--limit", 5)["examples"] == 5
    assert seen[0] == (3, "lse") and set(seen[1:]) == {(2, "lse")}


def test_task_table_holds_the_papers_settings(toy_videos, tmp_path, monkeypatch):
    """config.json of a base and a tiny model, of runs that are stopped as training begins."""
    small = clipbert.ClipBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    monkeypatch.setattr(clipbert.ClipBertConfig, "base", classmethod(lambda cls: small))
    monkeypatch.setattr(finetune, "train", Mock(side_effect=KeyboardInterrupt))
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


@pytest.mark.parametrize("script, said", [
    (finetune, "mismatched: classifier.2.weight (1, 192), here (1540, 192), classifier.2.bias (1,), here (1540,)\n"),
    (pretrain, ", ...\n  at random: classifier.0, classifier.2\n"),  # nothing else, and nothing of another shape
], ids=["finetune", "pretrain"])  # fmt: skip
def test_init_reports_what_fits_and_carries_the_vocabulary(script, said, toy_videos, toy_photos, tmp_path, capsys):
    short(script, toy_videos if script is finetune else toy_photos, tmp_path / "first")
    init = ("--init", tmp_path / "first" / "last.pt")
    short(finetune, toy_videos, tmp_path / "frameqa", *init, "--task", "tgif_qa_frameqa")
    assert said in capsys.readouterr().out
    a, b = (clipbert.load_checkpoint(tmp_path / name / "last.pt") for name in ("first", "frameqa"))
    assert a["vocabulary"] == b["vocabulary"]


def test_unreadable_videos_are_replaced_in_training_and_wrong_in_evaluation(toy_videos, tmp_path, capsys):
    broken = shutil.copytree(toy_videos, tmp_path / "broken")
    for name in ("toy_train_0002", "toy_test_0001"):
        (broken / "gifs" / f"{name}.gif").write_bytes(b"GIF89a")
    said = short(finetune, broken, tmp_path / "out")
    messages = capsys.readouterr().err
    assert "replaced by other examples in training: 1" in messages and "toy_train_0002.gif" in messages
    assert "counted as wrong: 1" in messages and "toy_test_0001.gif" in messages
    assert said["unreadable"] == 1 and said["examples"] == 6
    rows = lines(tmp_path / "out" / "predictions.jsonl")
    assert [row["accuracy"] for row in rows if row["video"] == "toy_test_0001"] == [False]
    dataset = items(broken)
    good, bad, following = dataset.examples[1:4]
    assert dataset[0, 2]["example"] == following and len(dataset[0, 2]["unreadable"]) == 1
    dataset.examples = [good] + [bad] * 20
    assert len(dataset[0, 2]["unreadable"]) == 19  # behind the last example comes the first
    assert "20 unreadable videos in a row" in refused(dataset.__getitem__, (0, 1))


def test_missing_videos_are_counted_and_stop_the_run(toy_videos, tmp_path, capsys):
    folder, step = tmp_path / "data", ("--out", tmp_path / "out", "--max_steps", 1)
    shutil.copytree(toy_videos, folder)
    for i in range(5):
        (folder / "gifs" / f"toy_train_{i:04d}.gif").unlink()
    assert "5 of 12 train videos are missing" in failing(capsys, finetune, "--data", folder, *step)
    assert short(finetune, folder, tmp_path / "short", "--allow_missing")["examples"] == 6
    shutil.rmtree(folder / "gifs")
    assert "12 of 12" in failing(capsys, finetune, "--data", folder, "--allow_missing", *step)


def predicted(capsys, out, video, *question):
    """What --predict says: a line with a share and a name for each option or caption."""
    capsys.readouterr()
    run(finetune, "--eval", out / "best.pt", "--predict", video, "--question", *question)
    return [line for line in capsys.readouterr().out.splitlines() if "%" in line]


def test_predict_ranks_the_given_options(toy_videos, tmp_path, capsys):
    short(finetune, toy_videos, tmp_path)
    video, options = toy_videos / "gifs" / "toy_test_0000.gif", ["grow", "jump", "spin"]
    said = [line.split() for line in predicted(capsys, tmp_path, video, "what ?", "--options", *options)]
    assert sorted(option for _, option in said) == options
    shares = [float(share.rstrip("%")) for share, _ in said]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.5


def test_predict_judges_each_caption_for_itself(toy_videos, tmp_path, capsys):
    """--question and --options of a retrieval model are captions, scored as one of them alone is."""
    short(finetune, toy_videos, tmp_path, "--max_steps", 1, "--task", "msrvtt_retrieval")
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


@pytest.mark.parametrize("case", GOLDEN["scores"], ids=lambda c: f"{c['case']}-{c['pool']}")
def test_golden_scores_and_losses_of_a_match(case):
    p = clipbert.aggregate_clips(torch.tensor(case["logits"]), case["pool"])
    scores = torch.tensor(case["eval_scores"], dtype=torch.float64)
    torch.testing.assert_close(clipbert.match_score(p), scores, rtol=0, atol=1e-6)
    if case["labels"]:  # extreme logits were recorded for evaluation only
        loss = clipbert.video_loss(p, torch.tensor(case["labels"]), "match")
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-6)


class Job:
    """A small retrieval model, settings, and the test captions of the toy videos."""

    def __init__(self, folder, task="msrvtt_retrieval", **changes):
        torch.manual_seed(0)
        captions = data.read_examples("msrvtt_retrieval", [folder], "train")
        vocabulary = data.vocabulary_from_text(caption.text for caption in captions)
        self.model = clipbert.ClipBert(clipbert.ClipBertConfig.tiny(len(vocabulary)), 2).eval()
        self.examples = data.read_examples(task, [folder], "test")
        self.videos = list({example.video: example for example in self.examples}.values())
        self.collate = data.Collator(data.build_tokenizer(vocabulary), 20)
        given = {"fps": 2.0, "frames": 2, "agg": "lse", "text_length": 20, "batch_size": 4}
        self.s = settings(task=task, **given | changes)
        self.parts = self.s, self.model, self.collate  # what every function of evaluation takes first

    def scores(self, n_clips, rerank=None):
        """All captions against all videos, and what could not be read."""
        grids, errors = finetune.encode_videos(*self.parts, self.videos, n_clips)
        texts = [text for example in self.examples for text in example.options or [example.text]]
        return finetune.score_pairs(*self.parts, texts, grids, rerank), errors


def test_evaluation_of_pairs_equals_scoring_each_pair_alone_and_runs_the_cnn_once_a_video(toy_videos):
    job, calls = Job(toy_videos), []
    job.model.cnn.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    scores, errors = job.scores(n_clips=3)
    assert calls == [3] * len(job.videos) and not errors
    for i, j in ((0, 0), (1, 4), (5, 2)):
        frames = data.read_clips(job.videos[j].path, 3, 2, 2.0, 64, False)
        tokens = job.collate.tokenizer([job.examples[i].text], return_tensors="pt")
        with torch.no_grad():
            logits = clipbert.clip_logits(job.model, frames[None], tokens["input_ids"], tokens["attention_mask"])
        score = clipbert.match_score(clipbert.aggregate_clips(logits, "lse"))
        assert scores[i, j].item() == pytest.approx(score.item(), abs=1e-5)


def test_evaluation_of_a_video_that_cannot_be_read_never_retrieves_it(toy_videos, tmp_path):
    shutil.copytree(toy_videos, tmp_path / "toy")
    job, place = Job(tmp_path / "toy"), 2
    Path(job.videos[place].path).write_bytes(b"")
    scores, errors = job.scores(1)
    assert len(errors) == 1 and job.videos[place].path in errors[0]
    assert (scores[:, place] == 0).all() and (scores[:, 0] > 0).all()
    scores, _ = job.scores(2, rerank=5)  # five of six videos: not even there
    assert (scores.argmin(1) == place).all()


def test_evaluation_in_two_stages_scores_the_best_in_full_and_ranks_all_others_below(toy_videos):
    """For each caption K pairs hold their exhaustive score; the others, in the order of one clip, a negative one."""
    job = Job(toy_videos, fps=1.0)
    full, two, everything = (job.scores(4, rerank)[0] for rerank in (None, 2, 6))
    one = job.scores(1)[0]  # the middle clip, as clip 2 of 4 uniform ones
    assert torch.equal(full, everything)
    chosen = two >= 0
    assert (chosen.sum(1) == 2).all() and not chosen.all(0).all()
    torch.testing.assert_close(two[chosen], full[chosen], rtol=0, atol=1e-6)
    torch.testing.assert_close(two[~chosen], one[~chosen] - 1, rtol=0, atol=1e-6)
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, one.topk(2).indices, True))
    by_clips, predictions, _ = finetune.evaluate(*job.parts, job.examples, [1, 4])
    assert list(by_clips) == ["1", "4"] and len(predictions) == 6
    job.s.rerank = 6  # of six videos: all
    assert finetune.evaluate(*job.parts, job.examples, [1, 4])[0] == by_clips


def test_evaluation_batches_hold_every_caption_once_with_little_padding(toy_videos, monkeypatch):
    texts = ["the star", "the star does jump before spin", "star", "the star does jump"] * 400
    job, masks = Job(toy_videos), []
    monkeypatch.setattr(job.model, "classify", lambda grid, ids, mask: masks.append(mask) or torch.zeros(len(ids), 2))
    scores = finetune.score_pairs(job.s, job.model, job.collate, texts, [torch.zeros(2, 4, 4, 96)])
    assert (scores == 0.5).all() and sum(len(mask) for mask in masks) == 2 * 1600  # each for two clips
    assert all(len(mask) <= 1024 and mask.sum(1).max() == mask.shape[1] for mask in masks)
    assert sum(mask.numel() for mask in masks) < 1.2 * sum(mask.sum() for mask in masks)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_and_choice_among_captions_are_those_of_retrieval(toy_videos, precision, dtype):
    """Grids wait in that of the computation; scores have more, so that they hardly ever agree by chance. Those of a
    choice are the same, up to the rounding of other batches inside the transformer."""
    job = Job(toy_videos, "msrvtt_mc", precision=precision)
    grids, _ = finetune.encode_videos(*job.parts, job.videos, 2)
    assert {grid.dtype for grid in grids} == {dtype} and grids[0].shape == (2, 4, 4, 96)
    results, _ = finetune.score_videos(*job.parts, job.examples, 1)
    pairs, _ = job.scores(1)  # (captions, videos): five options an example, one video each
    texts = {text for example in job.examples for text in example.options}
    assert pairs.dtype == torch.float64 and len(pairs.unique()) >= len(texts) * len(job.videos) - 1
    for i, (scores, readable) in enumerate(results):
        assert readable and scores.dtype == pairs.dtype and len(scores.unique()) == 5
        place = [video.video for video in job.videos].index(job.examples[i].video)
        expected = pairs[5 * i : 5 * i + 5, place]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6 if precision == "fp32" else 5e-3)


def test_negatives_are_never_a_caption_of_the_same_video():
    """Whatever its case: the tokenizer knows no capitals."""
    texts = ["A cat", "a dog", "a cat", "a bird"]
    examples = [data.Example(str(i), f"video{i // 2}", text) for i, text in enumerate(texts)]
    draw, own = data.CaptionDraw(examples, 2), [{"a cat", "a dog"}] * 2 + [{"a cat", "a bird"}] * 2
    for epoch in range(10):
        for i, example in enumerate(examples):
            drawn, labels = draw(example, data.generator_of(0, "texts", epoch, i))
            assert sorted(labels) == [0, 1] and drawn[labels.index(1)] == example.text
            assert drawn[labels.index(0)].lower() not in own[i]
    alike = [example._replace(text="a cat") for example in examples]
    with pytest.raises(data.DataError, match="nothing to tell apart"):
        data.CaptionDraw(alike, 2)(alike[0], data.generator_of(0))


def test_answers_outside_the_training_list_are_wrong_and_counted(capsys):
    examples = [data.Example(str(i), "v", "q", answer=answer) for i, answer in enumerate(["cat", "dog", "cow"])]
    known = finetune.only_known_answers(examples, {"cat", "dog"}, "test")
    assert [e.answer for e in known] == ["cat", "dog"]
    assert "1 of 3 questions without an answer in the list of 2" in capsys.readouterr().out


@pytest.mark.skipif(not (SHARED / "real").is_dir(), reason=f"the real videos and photos are not here: {SHARED}")
@pytest.mark.parametrize("script, name, examples, more", [
    *[(finetune, "tgif_qa", 1, ["--task", f"tgif_qa_{kind}"]) for kind in KINDS],
    # two frames of each video; neither has a validation part, so some are held out
    *[(pretrain, name, images, ["--frames", 2, "--fps", 2]) for name, images in [("msrvtt", 3), ("coco_captions", 12)]],
])  # fmt: skip
def test_real_videos_and_photos_go_through_the_same_loops(script, name, examples, more, tmp_path):
    said = short(script, SHARED / "real" / name, tmp_path, *more)
    assert said["examples"] == examples and said["unreadable"] == 0
