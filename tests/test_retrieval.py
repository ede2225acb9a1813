"""Tests of retrieval, multiple choice by a retrieval model, and open questions: scores against the reference's numbers,
and the cheap order of evaluation. The metrics are an exercise, see test_exercises.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HERE, settings

import clipbert
import data
import finetune

GOLDEN = json.loads((HERE / "golden_retrieval.json").read_text())


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
