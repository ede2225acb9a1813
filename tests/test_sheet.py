"""The sheets show what the model looked at: its frames, its attention, its clips' scores and weights, no other ones."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import clipbert
import data
import finetune

COLORS = [ImageColor.getrgb(color) for color in data.SHEET_COLORS]
OPTIONS = ("jump", "spin", "grow")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheet") / "toy"
    data.write_toy_tgif_qa(folder, train=6, test=4)
    arguments = ["--task", "tgif_qa", "--data", folder, "--out", folder.parent / "run", "--batch_size", 2,
                 "--max_steps", 2, "--test_clips", 1, 3]  # fmt: skip
    clipbert.main(finetune.run_training, finetune.parse_arguments([str(a) for a in arguments]))
    return folder


def predict(toy, *more):
    arguments = ["--task", "tgif_qa", "--eval", toy.parent / "run" / "best.pt", "--question", "what does it do ?",
                 "--predict", toy / "gifs" / "toy_test_0000.gif", "--options", *OPTIONS, *more]  # fmt: skip
    args = finetune.parse_arguments([str(a) for a in arguments])
    clipbert.main(finetune.run_prediction, args)
    return args


@pytest.fixture(scope="module")
def seen(toy):
    """(run, model, batch, Seen) of three clips."""
    args = finetune.parse_arguments(["--task", "tgif_qa", "--eval", str(toy.parent / "run" / "best.pt"), "--data",
                                     str(toy), "--agg", "lse"])  # fmt: skip
    run, model = finetune.load_for_use(args)
    example = data.read_examples("tgif_qa_action", toy, "test")[0]
    example = example._replace(options=("jump", "a very long thing that it does", "spin"))  # uneven: there is padding
    batch = next(iter(run.loader([example], 3, False, [[(0, 0)]])))
    return run, model, batch, finetune.look(run, model, batch)


def test_scores_and_ranking_are_the_models_own(seen):
    _, model, batch, what = seen
    assert model.bert.config._attn_implementation == "sdpa"  # as it was
    with torch.no_grad():
        logits = clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(what.scores, logits[:, :, 0].softmax(1), atol=1e-5)
    assert torch.allclose(what.ranking, clipbert.aggregate_clips(logits, "lse")[:, 0].softmax(0), atol=1e-5)
    assert torch.allclose(what.weights, logits[:, what.ranking.argmax(), 0].softmax(0), atol=1e-5)
    assert what.frames.equal(batch["frames"][0])


@pytest.mark.parametrize("best", [0, 1, 2])
def test_attention_is_the_last_layers_from_the_winning_options_words_to_the_grid(seen, best):
    run, model, batch, _ = seen
    order = [best, *(i for i in range(3) if i != best)]
    batch = batch | {k: batch[k][order] for k in ("input_ids", "attention_mask")}
    what, kept, last = finetune.look(run, model, batch), [], model.bert.encoder.layer[-1].attention.self
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
    hook.remove()
    text, Lt = what.ranking.argmax(), batch["input_ids"].shape[1]
    hidden = kept[0].view(3, 3, Lt + 16, -1)[:, text]  # of each clip, with the winning option's text
    q, k = (f(hidden).unflatten(2, (4, 24)).transpose(1, 2) for f in (last.query, last.key))  # (N, heads, ...)
    visible = torch.cat([batch["attention_mask"][text], torch.ones(16)]) == 1
    weights = (q @ k.transpose(2, 3) / 24**0.5).masked_fill(~visible, -torch.inf).softmax(-1).mean(1)
    words = batch["attention_mask"][text].sum() - 1
    assert torch.allclose(what.attention, weights[:, :words, Lt:].view(3, words, 4, 4), atol=1e-5)
    assert what.words[0] == "[CLS]" and len(what.words) == words and not {"[SEP]", "[PAD]"} & set(what.words)


def test_a_compiled_model_shows_its_attention_too(seen):
    run, model, batch, what = seen
    model.bert.encoder.compile(backend="eager")
    with torch.no_grad():
        clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(finetune.look(run, model, batch).attention, what.attention, atol=1e-5)


@pytest.mark.parametrize("how, weights", [
    ("mean", [1 / 3] * 3), ("max", [0, 1, 0]), ("lse", np.exp([1.0, 2.0, -1.0]) / np.exp([1.0, 2.0, -1.0]).sum()),
])  # fmt: skip
def test_weights_are_shares_of_the_aggregate(how, weights):
    with torch.no_grad():
        assert np.allclose(finetune.clip_weights(torch.tensor([1.0, 2.0, -1.0]), how), weights, atol=1e-6)


def test_overlay_is_brightest_where_the_attention_is():
    attention = torch.zeros(4, 4)
    attention[1, 2] = 0.5
    grey = np.asarray(data.overlay(torch.zeros(3, 64, 64, dtype=torch.uint8), attention, 0.5, 160).convert("L"))
    y, x = np.unravel_index(grey.argmax(), grey.shape)
    assert 40 <= y < 80 and 80 <= x < 120  # row 1, column 2 of four
    shades = np.asarray(data.colors(torch.linspace(0, 1, 50)[None], 1.0).convert("L"))[0]
    assert (np.diff(shades.astype(int)) >= 0).all() and shades[-1] - shades[0] > 180  # readable without colour


def test_predict_draws_a_row_for_each_clip(toy, tmp_path, capsys):
    args = predict(toy, "--test_clips", 3, "--agg", "max", "--sheet", tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert sheet.shape[1] == 1600
    frames = data.read_clips(args.predict, 3, 1, 1.0, 64, False)[:, 0]
    top = np.flatnonzero((sheet[:, 44:56] == COLORS[0]).any((1, 2)))  # "clip 1", below the bar on the time line
    top = top[top > 150][0]
    for i, frame in enumerate(frames):
        column, expected = sheet[:, 130:310], np.asarray(data.picture(frame, 180))
        assert any(np.array_equal(column[y : y + 180], expected) for y in range(top - 12 + 256 * i, top + 256 * i))
    full = [int((sheet[150:, 1430:1502] == color).all(-1).any(0).sum()) for color in COLORS[:3]]
    assert sorted(full) == [2, 2, 72]  # G = max: one clip's weight is 1, the others' 0
    predict(toy, "--test_clips", 3, "--sheet", tmp_path / "words.png", "--words")
    assert Image.open(tmp_path / "words.png").height - len(sheet) == 3 * 150  # a row of tiles below each clip


def test_training_leaves_right_and_wrong_examples(toy, monkeypatch):
    assert Image.open(toy.parent / "run" / "sheet.png").width == 1600
    args = finetune.parse_arguments(["--task", "tgif_qa", "--eval", str(toy.parent / "run" / "best.pt"), "--data",
                                     str(toy)])  # fmt: skip
    run, model = finetune.load_for_use(args)
    examples, columns = data.read_examples("tgif_qa_action", toy, "test"), []
    (toy / "gifs" / f"{examples[3].video}.gif").write_bytes(b"")  # unreadable: black, and said
    rows = [{"clips": 2, "accuracy": right, "prediction": word} for right, word in
            ((True, "jump"), (False, "spin"), (True, "grow"), (False, None))]  # fmt: skip
    monkeypatch.setattr(data, "example_sheet", lambda title, *cards: columns.extend(cards))
    finetune.example_sheet(run, model, examples, rows)
    said = [[lines[1] for _, lines in cards] for cards in columns]
    assert said == [["predicted: jump", "predicted: grow"], ["predicted: spin", "predicted: nothing"]]
    assert [len(pictures) for cards in columns for pictures, _ in cards] == [2] * 4  # a frame and its attention


def test_retrieval_shows_a_captions_best_videos(tmp_path, monkeypatch):
    data.write_toy_msrvtt(tmp_path / "toy", train=8, test=8)
    columns = []
    monkeypatch.setattr(data, "example_sheet", lambda title, *cards: columns.extend(cards) or Image.new("L", (9, 9)))
    arguments = ["--task", "msrvtt_retrieval", "--data", tmp_path / "toy", "--out", tmp_path, "--batch_size", 2,
                 "--max_steps", 1, "--test_clips", 1]  # fmt: skip
    clipbert.main(finetune.run_training, finetune.parse_arguments([str(a) for a in arguments]))
    right, wrong = columns
    assert 4 <= len(right) + len(wrong) <= 8 and all(len(pictures) == 3 for pictures, _ in right + wrong)
    assert all("number 1" in lines[1] for _, lines in right) and not any(lines[1][-1] == "1" for _, lines in wrong)


def test_the_sheet_of_selected_clips_shows_those(toy, tmp_path):
    args = predict(toy, "--test_clips", 2, "--select", "difference", "--sheet", tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for frame in data.read_clips(args.predict, 2, 1, 1.0, 64, False, select="difference")[:, 0]:
        expected = np.asarray(data.picture(frame, 180))
        assert any(np.array_equal(sheet[y : y + 180, 130:310], expected) for y in range(150, 500))
