"""The sheets show what the model looked at: its frames, its attention, its clips' scores and weights, no other ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clipbert
import data
import finetune

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
    clipbert.main(finetune.run_prediction, finetune.parse_arguments([str(a) for a in arguments]))


def job(toy, *more):
    """(settings, model, collator) of the trained checkpoint."""
    arguments = ["--task", "tgif_qa", "--eval", str(toy.parent / "run" / "best.pt"), "--data", str(toy), *more]
    return finetune.load_for_use(finetune.parse_arguments(arguments))[:3]


@pytest.fixture(scope="module")
def seen(toy):
    """(settings, model, collator, example, its clips as a batch, Seen) of three clips."""
    s, model, collate = job(toy, "--agg", "lse")
    example = data.read_examples("tgif_qa_action", toy, "test")[0]
    example = example._replace(options=("jump", "a very long thing that it does", "spin"))  # uneven: there is padding
    batch = collate([data.ClipDataset([example], s, n_clips=3, train=False)[0, 0]])
    return s, model, collate, example, batch, finetune.look(s, model, collate, example, 3)


def test_scores_and_ranking_are_the_models_own(seen):
    _, model, _, _, batch, what = seen
    assert model.bert.config._attn_implementation == "sdpa"  # as it was
    with torch.no_grad():
        logits = clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])[:, :, 0]
    assert torch.allclose(what.scores, logits.softmax(1), atol=1e-5)
    assert torch.allclose(what.ranking, logits.logsumexp(0).softmax(0), atol=1e-5)
    assert torch.allclose(what.points, logits[:, what.ranking.argmax()], atol=1e-5)
    assert what.frames.equal(batch["frames"][0])


@pytest.mark.parametrize("best", [0, 1, 2])
def test_attention_is_the_last_layers_from_cls_to_the_grid_with_the_winning_option(seen, best):
    s, model, collate, example, batch, _ = seen
    order = [best, *(i for i in range(3) if i != best)]
    example = example._replace(options=tuple(example.options[i] for i in order))
    batch = batch | {k: batch[k][order] for k in ("input_ids", "attention_mask")}
    what, kept = finetune.look(s, model, collate, example, 3), []
    last = model.bert.encoder.layer[-1].attention.self
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
    hook.remove()
    text, Lt = what.ranking.argmax(), batch["input_ids"].shape[1]
    hidden = kept[0].view(3, 3, Lt + 16, -1)[:, text]  # of each clip, with the winning option's text
    q, k = (f(hidden).unflatten(2, (4, 24)).transpose(1, 2) for f in (last.query, last.key))  # (N, heads, ...)
    visible = torch.cat([batch["attention_mask"][text], torch.ones(16)]) == 1
    weights = (q @ k.transpose(2, 3) / 24**0.5).masked_fill(~visible, -torch.inf).softmax(-1).mean(1)
    assert torch.allclose(what.attention, weights[:, 0, Lt:].view(3, 4, 4), atol=1e-5)


def test_outputs_without_an_answer_are_never_shown(seen):
    """A model of open questions may have more outputs than there are answers."""
    s, model, collate, example, _, _ = seen
    collate = data.Collator(collate.tokenizer, s.text_length, answers=["one"])
    what = finetune.look(s, model, collate, example._replace(options=()), 3)
    assert what.names == ["one"] and what.scores.shape == (3, 1) and what.ranking.shape == (1,)


@pytest.mark.parametrize("how, weights", [
    ("mean", [1 / 3] * 3), ("max", [0, 1, 0]), ("lse", np.exp([1.0, 2.0, -1.0]) / np.exp([1.0, 2.0, -1.0]).sum()),
])  # fmt: skip
def test_weights_are_shares_of_the_aggregate(how, weights):
    with torch.no_grad():
        assert np.allclose(finetune.clip_weights(torch.tensor([1.0, 2.0, -1.0]), how), weights, atol=1e-6)


def test_the_grid_has_cells_with_borders_and_is_brightest_where_the_attention_is():
    attention = torch.zeros(4, 4)
    attention[1, 2] = 0.5
    grey = np.asarray(data.overlay(Image.new("RGB", (160, 160)), attention, 0.5).convert("L")).astype(int)
    cells = grey.reshape(4, 40, 4, 40)[:, 5:35, :, 5:35]
    assert (cells == cells[:, :1, :, :1]).all()  # one shade each: no smooth cloud
    assert np.unravel_index(cells[:, 0, :, 0].argmax(), (4, 4)) == (1, 2)
    assert (grey[[40, 80, 120]] == 255).all() and (grey[:, [40, 80, 120]] == 255).all()
    shades = np.asarray(data.colors(torch.linspace(0, 1, 50)[None], 1.0).convert("L"))[0]
    assert (np.diff(shades.astype(int)) >= 0).all() and shades[-1] - shades[0] > 180  # readable without colour


@pytest.fixture
def drawn(monkeypatch):
    """What sheets are made of, in their order: (title, about), (title, pictures, bars) of rows, arguments of lines."""
    calls, made = SimpleNamespace(sheets=[], rows=[], lines=[]), {}
    draw_sheet, row_strip, time_line = data.draw_sheet, data.row_strip, data.time_line

    def sheet(title, about, strips, path):
        calls.sheets.append((title, about))
        calls.rows += [made[id(strip)] for strip in strips if id(strip) in made]
        return draw_sheet(title, about, strips, path)

    def row(title, pictures, bars=(), color=data.DARK):
        strip = row_strip(title, pictures, bars, color)
        made[id(strip)] = (title, pictures, bars)
        return strip

    def line(*given):
        calls.lines.append(given)
        return time_line(*given)

    for function in (sheet, row, line):
        name = {"sheet": "draw_sheet", "row": "row_strip", "line": "time_line"}[function.__name__]
        monkeypatch.setattr(data, name, function)
    return calls


def names(bars):
    return [text.split("  ")[1] for text, *_ in bars]


def test_predict_draws_a_strip_for_each_clip(toy, tmp_path, drawn):
    predict(toy, "--test_clips", 3, "--agg", "max", "--sheet", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == data.WIDTH + 2 * data.MARGIN
    gif, rows, (line,) = toy / "gifs" / "toy_test_0000.gif", drawn.rows, drawn.lines
    assert drawn.sheets[0][0] == "what does it do ?" and len(line[1]) == len(line[3]) == 3
    for row, frame in zip(rows[:3], data.read_clips(gif, 3, 1, 1.0, 64, False)[:, 0], strict=True):
        assert row[1][0][0].tobytes() == data.picture(frame, data.probe(gif)).tobytes()
        assert {*names(row[2])} == {*OPTIONS, "is its weight in G"}
    assert sorted(row[2][-1][1] for row in rows[:3]) == [0, 0, 1]  # G = max: one clip's weight is 1, the others' 0
    assert len(rows) == 5 and {*names(rows[3][2])} == {*OPTIONS}  # all clips together; the last is the legend
    assert "not an explanation" in rows[4][0]


def test_at_most_six_clips_are_drawn_unless_asked(toy, tmp_path, drawn):
    for more in ((), ("--clips", 7)):
        predict(toy, "--test_clips", 8, "--sheet", tmp_path / "a.png", *more)
    numbers = [int(title.split()[1]) for title, *_ in drawn.rows if title.startswith("Clip ")]
    assert len(numbers) == 6 + 7 and numbers[:6] == sorted(numbers[:6]) and numbers[6:] == sorted(numbers[6:])
    assert "shown are the 6 with the highest score" in drawn.sheets[0][1]
    grey = [i + 1 for i, color in enumerate(drawn.lines[0][3]) if color == data.PALE]
    assert {*grey} == {*range(1, 9)} - {*numbers[:6]}  # on the time line the others are grey


def test_training_leaves_right_and_wrong_examples(toy, drawn):
    assert Image.open(toy.parent / "run" / "sheet.png").width == data.WIDTH + 2 * data.MARGIN
    s, model, collate = job(toy)
    examples = data.read_examples("tgif_qa_action", toy, "test")
    (toy / "gifs" / f"{examples[3].video}.gif").write_bytes(b"")  # unreadable: black, and said
    rows = [{"clips": 2, "accuracy": right, "prediction": ""} for right in (True, False, True, False)]
    finetune.example_sheet(s, model, collate, examples, rows)
    *rows, legend = drawn.rows
    order = [(examples[i], right) for i, right in ((0, "Right"), (2, "Right"), (1, "Wrong"), (3, "Wrong"))]
    assert [row[0] for row in rows] == [f"{right}: {e.text} Answer: {e.options[e.answer]}" for e, right in order]
    assert all(len(pictures) == 2 and len(bars) == 5 for _, pictures, bars in rows) and len(legend[1]) == 1
    assert rows[3][1][0][0].tobytes() == data.picture(torch.zeros(3, 64, 64).byte(), None).tobytes()


def test_retrieval_shows_the_right_video_beside_the_best_other_one(tmp_path, drawn):
    data.write_toy_msrvtt(tmp_path / "toy", train=8, test=8)
    arguments = ["--task", "msrvtt_retrieval", "--data", tmp_path / "toy", "--out", tmp_path, "--batch_size", 2,
                 "--max_steps", 1, "--test_clips", 1]  # fmt: skip
    clipbert.main(finetune.run_training, finetune.parse_arguments([str(a) for a in arguments]))
    *rows, _ = drawn.rows
    assert 4 <= len(rows) <= 8
    for title, pictures, bars in rows:
        (_, own, _), _, (_, other, _), _ = pictures
        right = title.startswith("Right")
        assert names(bars) == [own, other]
        assert (own == "its own: number 1") == right and other == f"other: number {2 if right else 1}"
