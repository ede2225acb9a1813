"""Tests of pretraining: its data and its script. Its losses, masks and mismatches are exercises: test_exercises.py."""

import math
import shutil
from collections import Counter

import pytest
import torch
from conftest import lines, metrics, run, settings, short
from test_annotations import save

import data
import pretrain


@pytest.mark.parametrize("n", [1, 2, 4])
def test_epoch_shows_every_caption_once(n):
    """In groups of n of one image: of five captions, three groups of two. A caption that stands twice counts once."""
    said = {"a": 5, "b": 1, "c": 2, "d": 4}
    rows = [data.Example("", image, f"{image} {i}") for image, times in said.items() for i in range(times)]
    groups = data.caption_groups(rows + rows[:3], n)
    assert len(groups) == sum(math.ceil(times / n) for times in said.values())
    assert all(len(group.captions) <= n and {text[0] for text in group.captions} == {group.video} for group in groups)
    epoch = [groups[i] for _, i in (next(data.training_order(len(groups), len(groups), 1, seed=0)))]
    assert Counter(text for group in epoch for text in group.captions) == Counter(row.text for row in rows)


def test_masks_do_not_depend_on_the_other_texts_of_the_batch():
    tokenizer = data.build_tokenizer(data.SPECIAL_TOKENS + [f"word{c}" for c in "abcdefgh"])
    collate = data.Collator(tokenizer, 30, mask_rate=0.5)

    def item(text):
        return {"example": data.Example("0", "v", ""), "texts": [text], "target": [1], "unreadable": [],
                "frames": torch.zeros(1, 1, 3, 8, 8), "generator": data.generator_of(text)}  # fmt: skip

    long, short = "worda wordb wordc wordd worde wordf", "wordg wordh worda"
    one, both = collate([item(short)]), collate([item(short), item(long)])
    assert both["input_ids"].shape[1] > one["input_ids"].shape[1] == 5
    for name, padding in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("mlm_labels", -100)):
        assert both[name][0].tolist() == one[name][0].tolist() + [padding] * 3
    assert (one["mlm_labels"] != -100).any()


def test_evaluation_comes_at_the_ends_of_epochs_or_when_it_is_asked_for(toy_photos, tmp_path, monkeypatch, capsys):
    def evaluations(out, *more):
        short(pretrain, toy_photos, out, "--captions", 6, "--max_steps", 12, "--mask_rate", 0.5, *more)
        return [row["step"] for row in lines(out / "log.jsonl") if "mlm_accuracy" in row]

    monkeypatch.setitem(pretrain.TINY, "eval_every", None)  # what base has
    assert evaluations(tmp_path / "epochs") == [5, 10, 12]  # 20 groups, 4 a step
    assert "20 groups of 6 captions for training, 6 for validation" in capsys.readouterr().out
    assert evaluations(tmp_path / "asked", "--eval_every", 8) == [8, 12]


def test_evaluation_looks_at_2000_images_of_a_folder_at_most(toy_photos, tmp_path, monkeypatch, capsys):
    assert pretrain.MOST_VALIDATION == 2000
    monkeypatch.setattr(pretrain, "MOST_VALIDATION", 3)
    s = settings(pretrain, data=[toy_photos], captions=2)
    train, val = pretrain.load_examples(s)
    assert len({example.video for example in val}) == 3 and len({example.video for example in train}) == 20
    shutil.copytree(toy_photos / "train2017", tmp_path / "own" / "images")
    rows = [{"path": f"{i:012d}.png", "caption": f"{word} {i}"} for i in range(1, 21) for word in "ab"]
    s.data.append(save(tmp_path, "own/captions.jsonl", rows).parent)
    train, val = pretrain.load_examples(s)
    assert len({example.path for example in val}) == 3 + 2 and "2 images are held out" in capsys.readouterr().out
    parts = pretrain.load_examples(settings(pretrain, data=s.data[1:], captions=2))
    seen, held_out = ({example.path for example in part} for part in parts)
    assert (len(seen), len(held_out), len(seen | held_out)) == (18, 2, 20)


def test_fixed_masks_make_two_evaluations_agree(toy_photos, tmp_path):
    said = short(pretrain, toy_photos, tmp_path)
    run(pretrain, "--data", toy_photos, "--eval", tmp_path / "last.pt", "--seed", 5, "--batch_size", 3)
    again = metrics(tmp_path, "-last-val-photos")
    drop = {"seconds", "mlm_loss", "itm_loss"}  # losses up to rounding: other batches
    assert {k: v for k, v in again.items() if k not in drop} == {k: v for k, v in said.items() if k not in drop}
    assert again["mlm_loss"] == pytest.approx(said["mlm_loss"], abs=1e-3)
    assert 0 < said["masked_words"] < 0.3 * said["captions"] * 10
    assert said["matched"] == said["captions"] / 2
