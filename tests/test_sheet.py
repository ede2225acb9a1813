"""The sheets show what the model looked at: its frames, its attention, its clips' scores and weights, no other ones."""

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
def test_attention_is_the_last_layers_from_cls_to_the_grid_with_the_winning_option(seen, best):
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
    assert torch.allclose(what.attention, weights[:, 0, Lt:].view(3, 4, 4), atol=1e-5)


def test_a_compiled_model_shows_its_attention_too(seen):
    run, model, batch, what = seen
    model.bert.encoder.compile(backend="eager")
    with torch.no_grad():
        clipbert.clip_logits(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(finetune.look(run, model, batch).attention, what.attention, atol=1e-5)


def test_outputs_without_an_answer_are_never_shown(seen):
    run, model, batch, _ = seen
    batch = batch | {"examples": [batch["examples"][0]._replace(options=OPTIONS[:2])]}  # a third output has no name
    what = finetune.look(run, model, batch)
    assert what.names == list(OPTIONS[:2]) and what.scores.shape == (3, 2) and what.ranking.shape == (2,)


@pytest.mark.parametrize("how, weights", [
    ("mean", [1 / 3] * 3), ("max", [0, 1, 0]), ("lse", np.exp([1.0, 2.0, -1.0]) / np.exp([1.0, 2.0, -1.0]).sum()),
])  # fmt: skip
def test_weights_are_shares_of_the_aggregate(how, weights):
    with torch.no_grad():
        assert np.allclose(finetune.clip_weights(torch.tensor([1.0, 2.0, -1.0]), how), weights, atol=1e-6)


def test_the_clips_that_tell_most_come_first(seen):
    scores, ranking = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]), torch.tensor([0.6, 0.4])
    what = seen[3]._replace(scores=scores, ranking=ranking, weights=torch.tensor([0.5, 0.2, 0.3]))
    assert finetune.telling_clips(what, "lse")[0] == [0, 2, 1]
    assert finetune.telling_clips(what._replace(weights=torch.ones(3) / 3), "mean")[0] == [1, 2, 0]


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
    """What is given to draw_sheet: [(title, about, rows, line, notes)]."""
    calls, draw = [], data.draw_sheet

    def record(title, about, rows, line=None, notes=()):
        calls.append((title, about, rows, line, notes))
        return draw(title, about, rows, line, notes)

    monkeypatch.setattr(data, "draw_sheet", record)
    return calls


def test_predict_draws_a_row_for_each_clip(toy, tmp_path, drawn):
    predict(toy, "--test_clips", 3, "--agg", "max", "--sheet", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == data.WIDTH
    (title, _, rows, line, notes), gif = drawn[0], toy / "gifs" / "toy_test_0000.gif"
    assert title == "what does it do ?" and line.width == data.WIDTH and "not an explanation" in notes[0]
    for row, frame in zip(rows, data.read_clips(gif, 3, 1, 1.0, 64, False)[:, 0], strict=False):
        assert row.pictures[0][0].tobytes() == data.picture(frame, 180, data.probe(gif)).tobytes()
        assert {name for name, *_ in row.bars} == {*OPTIONS, "its weight in G"}
    assert sorted(row.bars[-1][1] for row in rows[:3]) == [0, 0, 1]  # G = max: one clip's weight is 1, the others' 0
    assert len(rows) == 4 and {name for name, *_ in rows[3].bars} == set(OPTIONS)  # all clips together


def test_at_most_six_clips_are_drawn_unless_asked(toy, tmp_path, drawn):
    for more in ((), ("--clips", 7)):
        predict(toy, "--test_clips", 8, "--sheet", tmp_path / "a.png", *more)
    assert [len(rows) - 1 for _, _, rows, *_ in drawn] == [6, 7]
    assert "the 6 surest of the answer" in drawn[0][1]
    numbers = [int(row.lines[0].split()[1]) for row in drawn[0][2][:-1]]
    assert numbers == sorted(numbers)  # in order of time


def test_training_leaves_right_and_wrong_examples(toy, drawn):
    assert Image.open(toy.parent / "run" / "sheet.png").width == data.WIDTH
    arguments = ["--task", "tgif_qa", "--eval", str(toy.parent / "run" / "best.pt"), "--data", str(toy)]
    run, model = finetune.load_for_use(finetune.parse_arguments(arguments))
    examples = data.read_examples("tgif_qa_action", toy, "test")
    (toy / "gifs" / f"{examples[3].video}.gif").write_bytes(b"")  # unreadable: black, and said
    rows = [{"clips": 2, "accuracy": right, "prediction": ""} for right in (True, False, True, False)]
    finetune.example_sheet(run, model, examples, rows)
    *rows, legend = drawn[0][2]
    order = [(examples[i], right) for i, right in ((0, "right"), (2, "right"), (1, "wrong"), (3, "wrong"))]
    assert [row.lines for row in rows] == [[f"{right}: {e.text}", f"answer: {e.options[e.answer]}"] for e, right in order]
    assert all(len(row.pictures) == 2 and len(row.bars) == 5 for row in rows) and len(legend.pictures) == 1
    assert rows[3].pictures[0][0].tobytes() == data.picture(torch.zeros(3, 64, 64).byte(), 172, None).tobytes()


def test_retrieval_shows_the_right_video_beside_the_best_other_one(tmp_path, drawn):
    data.write_toy_msrvtt(tmp_path / "toy", train=8, test=8)
    arguments = ["--task", "msrvtt_retrieval", "--data", tmp_path / "toy", "--out", tmp_path, "--batch_size", 2,
                 "--max_steps", 1, "--test_clips", 1]  # fmt: skip
    clipbert.main(finetune.run_training, finetune.parse_arguments([str(a) for a in arguments]))
    *rows, _ = drawn[0][2]
    assert 4 <= len(rows) <= 8
    for row in rows:
        (_, own, _), _, (_, other, _), _ = row.pictures
        right = row.lines[0].startswith("right")
        assert [name for name, *_ in row.bars] == [own, other]
        assert (row.bars[0][0] == "its own: number 1") == right and other == f"other: number {2 if right else 1}"
