"""Tests of pretraining: its losses, its data and its script. One property at a time: `pytest tests/test_pretrain.py -k
golden`, or one of: loss, mask, mismatch, mix, fixed, resume, overfit, source, error, real.

`golden_pretrain.json` holds losses recorded from the reference implementation's own lines.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import clipbert
import data
import pretrain

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden_pretrain.json").read_text())
SHARED = HERE.parents[1] / "shared"
WORDS = [f"word{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
TOKENIZER = data.build_tokenizer(data.SPECIAL_TOKENS + WORDS)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Twenty training and six validation photos with their captions."""
    folder = tmp_path_factory.mktemp("toy") / "coco_captions"
    data.write_toy_coco(folder, train=20, val=6)
    return folder


def run(*arguments):
    args = pretrain.parse_arguments([str(arg) for arg in arguments])
    clipbert.main(pretrain.run_evaluation if args.eval else pretrain.run_training, args)
    return json.loads((args.out / "metrics.json").read_text())


def short(toy, out, *more):
    return run("--data", toy, "--out", out, "--batch_size", 4, "--max_steps", 6, *more)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def captions(folder, rows):
    """A folder whose captions.jsonl says these captions of these pictures (path, caption)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"path": path, "caption": caption}) + "\n" for path, caption in rows)
    (folder / "captions.jsonl").write_text(text)
    return folder


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("case", GOLDEN, ids=[case["case"] for case in GOLDEN])
def test_golden_losses_are_the_references(case):
    """Averaged over all positions, as its training does, and over the masked ones, as its validation does."""
    scores, labels = torch.tensor(case["mlm_scores"]), torch.tensor(case["mlm_labels"])
    itm = clipbert.itm_loss(torch.tensor(case["itm_scores"]), torch.tensor(case["itm_labels"]))
    over_all = clipbert.mlm_loss(scores, labels, over="all")
    assert over_all.item() == pytest.approx(case["mlm_loss"], abs=1e-6)
    assert clipbert.mlm_loss(scores, labels).item() == pytest.approx(case["valid_mlm_loss"], abs=1e-6)
    assert itm.item() == pytest.approx(case["itm_loss"], abs=1e-6)
    assert (over_all + itm).item() == pytest.approx(case["loss"], abs=1e-6)


def test_loss_refuses_an_unknown_average():
    with pytest.raises(ValueError, match="masked or all"):
        clipbert.mlm_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), over="words")


def test_loss_of_half_precision_scores_is_computed_in_float32():
    scores = 100 * torch.randn(2, 3, 7)
    labels = torch.tensor([[-100, 3, -100], [1, -100, -100]])
    assert clipbert.mlm_loss(scores.half(), labels).dtype == torch.float32


# ---------------------------------------------------------------- masks


def test_mask_rates_are_15_percent_of_which_80_10_10():
    ids = torch.randint(5, 31, (200_000,), generator=torch.Generator().manual_seed(0))
    masked, labels = data.mask_tokens(ids, TOKENIZER, torch.Generator().manual_seed(1))
    chosen = labels != -100
    assert (labels[chosen] == ids[chosen]).all() and (masked[~chosen] == ids[~chosen]).all()
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.005)
    masks = (masked == TOKENIZER.mask_token_id)[chosen].float().mean().item()
    same = (masked == ids)[chosen].float().mean().item()
    share = 0.1 / len(TOKENIZER)  # of the random tokens, some are [MASK], and some the word itself
    assert masks == pytest.approx(0.8 + share, abs=0.01) and same == pytest.approx(0.1 + share, abs=0.01)


def test_mask_never_touches_special_tokens():
    tokens = TOKENIZER(["worda wordb unknownword", "worda"], padding=True, return_tensors="pt")["input_ids"]
    tokens = tokens.repeat(500, 1)
    special = torch.isin(tokens, torch.tensor(TOKENIZER.all_special_ids))
    masked, labels = data.mask_tokens(tokens, TOKENIZER, torch.Generator().manual_seed(0))
    assert (masked[special] == tokens[special]).all() and (labels[special] == -100).all()
    assert (labels[~special] != -100).any()


# ---------------------------------------------------------------- mismatches


def dataset(images, n, **changes):
    settings = {"captions": n, "n_frames": 1, "fps": 1.0, "size": 64, "train": True, "blind": False} | changes
    return data.CaptionDataset(images, ".", **settings)


def drawn(images, n, times=1000):
    """(image, caption, is it said to match) of many draws."""
    source, generator = dataset(images, n), torch.Generator().manual_seed(0)
    for i in range(times):
        image = images[i % len(images)]
        yield from ((image, *pair) for pair in zip(*source.draw_captions(image, generator), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_mismatch_rate_is_one_half_at_every_place(n):
    images = [data.CaptionedImage(f"{i}.png", (f"worda {w}", f"wordb {w}")) for i, w in enumerate(WORDS)]
    rows = list(drawn(images, n, 2000))
    for place in range(n):
        assert sum(row[2] for row in rows[place::n]) / 2000 == pytest.approx(0.5, abs=0.05)
    assert all((caption in image.captions) == match for image, caption, match in rows)
    assert len({caption for _, caption, match in rows if not match}) == 52  # any other caption may come


def test_mismatch_is_never_a_caption_that_the_image_has_itself():
    """Whatever its case: the tokenizer knows no capitals."""
    images = [data.CaptionedImage("0", ("a dog", "one")), data.CaptionedImage("1", ("A Dog", "two"))]
    wrong = {(image.video, caption) for image, caption, match in drawn(images, 2) if not match}
    assert wrong == {("0", "two"), ("1", "one")}


def test_mismatch_that_does_not_exist_leaves_a_match():
    images = [data.CaptionedImage("0", ("a dog",)), data.CaptionedImage("1", ("a dog",))]
    assert {match for _, _, match in drawn(images, 2, 4)} == {1}


def test_mismatch_captions_differ_within_an_image_while_there_are_enough():
    images = [data.CaptionedImage(str(i), tuple(f"{i} {w}" for w in WORDS[:4])) for i in range(5)]
    for image in images:
        texts, matches = dataset(images, 4).draw_captions(image, torch.Generator().manual_seed(0))
        own = [text for text, match in zip(texts, matches, strict=True) if match]
        assert len(own) == len(set(own)) == 2


# ---------------------------------------------------------------- several data sets


def test_mix_follows_the_ratio_and_each_part_its_own_order():
    batches = list(data.mixed_order([40, 12], [3, 1], 4, 400, seed=0))
    assert Counter(batch[0][0] for batch in batches)[0] / 400 == pytest.approx(0.75, abs=0.07)
    assert all(len({key[0] for key in batch}) == 1 for batch in batches)
    keys = [key for batch in batches for key in batch]
    assert len(keys) == len(set(keys))  # an image comes once an epoch


def test_mix_goes_on_where_it_stopped():
    whole = list(data.mixed_order([40, 12], [3, 1], 4, 50, seed=7))
    assert list(data.mixed_order([40, 12], [3, 1], 4, 50, seed=7, start=23)) == whole[23:]


def test_mix_of_two_folders_trains(toy, tmp_path):
    metrics = run("--data", toy, toy, "--ratio", 1, 3, "--out", tmp_path, "--batch_size", 4, "--max_steps", 2,
                  "--grad_accum", 2, "--mlm_over", "all")  # fmt: skip
    assert metrics["examples"] == 12


# ---------------------------------------------------------------- the script


def test_fixed_masks_make_two_evaluations_agree(toy, tmp_path):
    metrics = short(toy, tmp_path)
    again = run("--data", toy, "--out", tmp_path, "--eval", tmp_path / "last.pt", "--seed", 5, "--batch_size", 3)
    drop = {"seconds", "mlm_loss", "itm_loss"}  # losses up to rounding: other batches
    assert {k: v for k, v in again.items() if k not in drop} == {k: v for k, v in metrics.items() if k not in drop}
    assert again["mlm_loss"] == pytest.approx(metrics["mlm_loss"], abs=1e-3)
    assert 0 < metrics["masked_words"] < 0.3 * metrics["captions"] * 10
    assert metrics["matched"] == metrics["captions"] / 2


def test_resume_equals_the_uninterrupted_run(toy, tmp_path, monkeypatch):
    """With grid tokens drawn at random (--keep), which depend on torch's random state."""
    short(toy, tmp_path / "whole", "--keep", 5, "--save_every", 3)

    class Stop(Exception):
        pass

    original, saved = clipbert.save_checkpoint, []

    def stop_after_step_3(path, state, *previous):
        original(path, state, *previous)
        saved.append(path)
        if path.name == "last.pt" and state["step"] == 3:
            raise Stop

    monkeypatch.setattr(clipbert, "save_checkpoint", stop_after_step_3)
    with pytest.raises(Stop):
        short(toy, tmp_path / "cut", "--keep", 5, "--save_every", 3)
    monkeypatch.setattr(clipbert, "save_checkpoint", original)
    short(toy, tmp_path / "cut", "--keep", 5, "--save_every", 3, "--resume")
    whole, cut = weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "cut" / "last.pt")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]  # 3 and 6 also as evaluations


def test_checkpoint_starts_a_finetuning(toy, tmp_path):
    short(toy, tmp_path)
    state = clipbert.load_checkpoint(tmp_path / "last.pt")
    assert state["task"] == "pretrain" and "num_outputs" not in state
    model = clipbert.ClipBert(clipbert.config_from(state), 5)
    report = clipbert.copy_weights(model, state["model"])
    assert all(name.startswith("classifier.") for name in report.missing)
    assert all(name.startswith("cls.") for name in report.unexpected) and not report.mismatched


def test_overfit_tells_match_from_mismatch_and_flips_when_the_images_are_swapped(toy):
    """Four photos, each with one caption of its own: ITM must become right, and must come from looking."""
    torch.manual_seed(0)
    images = data.captioned_images(data.read_captions(toy, "train"))[:4]
    frames = torch.stack([data.read_clips(data.find_media(toy, i.video), 1, 1, 1.0, 64, False)[0] for i in images])
    tokenizer = data.build_tokenizer(data.SPECIAL_TOKENS + WORDS)
    tokens = tokenizer(WORDS[:4] * 4, return_tensors="pt")  # all four captions of every image
    labels = torch.eye(4, dtype=torch.long).flatten()
    model = clipbert.ClipBertForPreTraining(clipbert.ClipBertConfig.tiny(len(tokenizer)))
    optimizer = clipbert.build_optimizer(model)
    for step in range(1, 301):
        for group in optimizer.param_groups:
            group["lr"] = clipbert.learning_rate(step, 301, 1e-3)
        _, itm = model(frames, tokens["input_ids"], tokens["attention_mask"])
        loss = clipbert.itm_loss(itm, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    with torch.no_grad():
        _, right = model(frames, tokens["input_ids"], tokens["attention_mask"])
        _, swapped = model(frames.roll(1, 0), tokens["input_ids"], tokens["attention_mask"])
    assert (right.argmax(1) == labels).all()
    assert (swapped.argmax(1) == labels.view(4, 4).roll(1, 0).flatten()).all()


def test_blind_run_cannot_tell_matches(toy, tmp_path):
    """Every caption is another photo's somewhere: black frames leave nothing but chance."""
    metrics = short(toy, tmp_path, "--blind")
    assert metrics["blind"] and metrics["itm_loss"] == pytest.approx(math.log(2), abs=0.1)


def test_source_without_validation_captions_holds_images_out(toy, tmp_path, capsys):
    folder = captions(tmp_path / "own", [(f"{i:012d}.png", f"{word} {i}") for i in range(1, 21) for word in "ab"])
    shutil.copytree(toy / "train2017", folder / "images")
    metrics = short(folder, tmp_path / "out", "--limit", 12)
    assert metrics["examples"] == 2 and "2 of 20 images are held out" in capsys.readouterr().out


def test_source_with_an_unreadable_image_goes_on_and_lists_it(toy, tmp_path, capsys):
    folder = captions(tmp_path / "own", [(f"{i:012d}.png", f"a {i}") for i in range(1, 21)])
    shutil.copytree(toy / "train2017", folder / "images")
    for i in range(1, 9):
        (folder / "images" / f"{i:012d}.png").write_bytes(b"no image")
    short(folder, tmp_path / "out")
    err = capsys.readouterr().err
    assert "replaced by other examples in training" in err and "000000000" in err


def failing(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.count("\n") == 0
    return err


def test_error_caption_without_an_image_is_one_line_or_allowed(toy, tmp_path, capsys):
    rows = [(f"{i:012d}.png", f"a {i}") for i in range(1, 20)] + [("99.png", "gone")]
    folder = captions(tmp_path / "own", rows)
    shutil.copytree(toy / "train2017", folder / "images")
    err = failing(capsys, "--data", folder, "--out", tmp_path / "out", "--max_steps", 1)
    assert "1 of 20 captioned images are missing" in err and "99.png" in err and "--allow_missing" in err
    assert short(folder, tmp_path / "out", "--allow_missing")["examples"] == 2


def test_error_empty_split_is_one_line(toy, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no train captions" in failing(capsys, "--data", tmp_path / "empty", "--out", tmp_path / "out")
    one = captions(tmp_path / "one", [("000000000001.png", "a")])
    shutil.copytree(toy / "train2017", one / "images")
    assert "too few" in failing(capsys, "--data", one, "--out", tmp_path / "out")


def test_error_resume_from_another_task_is_one_line(tmp_path, capsys):
    torch.save({"task": "tgif_qa_action"}, tmp_path / "last.pt")
    assert "--init" in failing(capsys, "--out", tmp_path, "--resume")


def test_real_captioned_videos_go_through_the_same_loop(tmp_path):
    """MSRVTT's layout, two frames of each video; it has no validation part, so some videos are held out."""
    folder = SHARED / "real" / "msrvtt"
    if not folder.is_dir():
        pytest.skip(f"the real videos are not here: {folder}")
    metrics = short(folder, tmp_path, "--frames", 2, "--fps", 2, "--max_steps", 2)
    assert metrics["examples"] == 3 and metrics["unreadable"] == 0
