"""The sheets show what the model looked at: its frames, its attention, its clips' scores and weights, no other ones.

Those of `python data.py show`: clips stand where the sampler puts them, frames are as the model receives them.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import flags, run
from PIL import Image, ImageColor

import clipbert
import data
import finetune

OPTIONS = ("jump", "spin", "grow")
WIDTH = data.WIDTH + 2 * data.MARGIN
COLORS = [ImageColor.getrgb(color) for color in data.SHEET_COLORS]
SECOND = (data.WIDTH - 80) / 8  # pixels, on the time line of eight


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheet") / "toy"
    data.write_toy_videos(folder, train=6, test=6)
    run(finetune, "--data", folder, "--out", folder.parent / "run", "--batch_size", 2, "--max_steps", 2, "--test_clips", 1, 3)
    return folder


def predict(toy, *more):
    run(finetune, "--eval", toy.parent / "run" / "best.pt", "--predict", toy / "gifs" / "toy_test_0000.gif",
        "--question", "what does it do ?", "--options", *OPTIONS, *more)  # fmt: skip


@pytest.fixture
def seen(toy):
    """(settings, model, collator, example, its clips as a batch, Seen) of three clips."""
    checkpoint = toy.parent / "run" / "best.pt"
    s, model, collate, _ = finetune.load_for_use(flags(finetune, "--eval", checkpoint, "--data", toy, "--agg", "lse"))
    example = data.read_examples("tgif_qa_action", toy, "test")[0]
    example = example._replace(options=("jump", "a very long thing that it does", "spin"))  # uneven: there is padding
    batch = collate([data.ClipDataset([example], s, n_clips=3, train=False)[0, 0]])
    return s, model, collate, example, batch, finetune.look(s, model, collate, example, 3)


def test_scores_are_the_models_own(seen):
    _, model, _, example, batch, what = seen
    assert model.bert.config._attn_implementation == "sdpa"  # as it was
    with torch.no_grad():
        logits = model(batch["frames"], batch["input_ids"], batch["attention_mask"])[:, :, 0]
    order = logits.logsumexp(0).argsort(descending=True)
    assert what.names == [example.options[i] for i in order]  # the best first
    assert torch.allclose(what.scores[:3], logits.softmax(1)[:, order], atol=1e-5)
    assert torch.allclose(what.scores[3], logits.logsumexp(0).softmax(0)[order], atol=1e-5)
    assert torch.allclose(what.points, logits[:, order[0]], atol=1e-5)
    assert what.frames.equal(batch["frames"][0])


@pytest.mark.parametrize("best", [0, 1, 2])
def test_attention_is_the_last_layers_from_cls_to_the_grid_with_the_winning_option(seen, best):
    s, model, collate, example, batch, _ = seen
    order = [best, *(i for i in range(3) if i != best)]
    example = example._replace(options=tuple(example.options[i] for i in order))
    batch = batch | {k: batch[k][order] for k in ("input_ids", "attention_mask")}
    what, kept = finetune.look(s, model, collate, example, 3), []
    last = model.bert.encoder.layer[-1].attention.self
    with last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0])), torch.no_grad():
        model(batch["frames"], batch["input_ids"], batch["attention_mask"])
    text, Lt = example.options.index(what.names[0]), batch["input_ids"].shape[1]
    hidden = kept[0].view(3, 3, Lt + 16, -1)[:, text]  # of each clip, with the winning option's text
    q, k = (f(hidden).unflatten(2, (4, 24)).transpose(1, 2) for f in (last.query, last.key))  # (N, heads, ...)
    visible = torch.cat([batch["attention_mask"][text], torch.ones(16)]) == 1
    weights = (q @ k.transpose(2, 3) / 24**0.5).masked_fill(~visible, -torch.inf).softmax(-1).mean(1)
    assert torch.allclose(what.attention, weights[:, 0, Lt:].view(3, 4, 4), atol=1e-5)


def test_outputs_without_an_answer_are_never_shown(seen):
    """A model of open questions may have more outputs than there are answers."""
    s, model, collate, example, _, _ = seen
    collate = data.Collator(collate.tokenizer, s.text_length, answers=["one"])
    what = finetune.look(s, clipbert.ClipBert(model.cfg, 7), collate, example._replace(options=()), 3)
    assert what.names == ["one"] and what.scores.shape == (4, 1)


@pytest.mark.parametrize("how, weights", [
    ("mean", [1 / 3] * 3), ("max", [0, 1, 0]), ("lse", np.exp([1.0, 2.0, -1.0]) / np.exp([1.0, 2.0, -1.0]).sum()),
])  # fmt: skip
def test_weights_are_shares_of_the_aggregate(how, weights):
    assert np.allclose(finetune.clip_weights(torch.tensor([1.0, 2.0, -1.0]), how), weights, atol=1e-6)


def test_the_grid_has_cells_with_borders_and_is_brightest_where_the_attention_is():
    attention, side, media = torch.zeros(4, 4), data.SIDE - 4, data.Media(1, 1.0, 40, 40)
    attention[1, 2] = 1
    grid = data.picture(torch.zeros(3, 64, 64).byte(), media, "", "black", attention)
    grey = np.asarray(grid.convert("L")).astype(int)[2 : side + 2, 2 : side + 2]
    cells = grey.reshape(4, side // 4, 4, side // 4)[:, 5:-5, :, 5:-5]
    assert (cells == cells[:, :1, :, :1]).all()  # one shade each: no smooth cloud
    assert np.unravel_index(cells[:, 0, :, 0].argmax(), (4, 4)) == (1, 2)
    borders = [side // 4, side // 2, 3 * side // 4]
    assert (grey[borders] == 255).all() and (grey[:, borders] == 255).all()
    shades = np.asarray(data.colors(torch.linspace(0, 1, 50)[None]).convert("L"))[0]
    assert (np.diff(shades.astype(int)) >= 0).all() and shades[-1] - shades[0] > 180  # readable without colour


@pytest.fixture
def drawn(monkeypatch):
    """What sheets are made of: the arguments of all calls, by the function's name."""
    calls = {name: [] for name in ("draw_sheet", "text_strip", "picture", "bar", "time_line")}

    def watched(function, made):
        return lambda *given, **more: made.append(given) or function(*given, **more)

    for name, made in calls.items():
        monkeypatch.setattr(data, name, watched(getattr(data, name), made))
    return calls


def titles(drawn, *words):
    return [text for text, *_ in drawn["text_strip"] if text.startswith(words)]


def test_predict_draws_each_clips_frames_scores_and_weight(toy, tmp_path, drawn):
    predict(toy, "--test_clips", 3, "--agg", "max", "--sheet", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == WIDTH
    frames = data.read_clips(toy / "gifs" / "toy_test_0000.gif", 3, 1, 1.0, 64, False)[:, 0]
    pictures = zip(drawn["picture"], frames.repeat_interleave(2, 0), strict=True)
    assert all(given[0].equal(frame) for given, frame in pictures)  # each frame, then the same below its grid
    said = [text.split("  ")[1] for text, *_ in drawn["bar"]]  # of each clip its scores, then its weight
    assert len(said) == 3 * 4 and all({*said[i : i + 3]} == {*OPTIONS} for i in (0, 4, 8))
    assert sorted(drawn["bar"][i][1] for i in (3, 7, 11)) == [0, 0, 1]  # G = max: one clip's weight is 1, the others' 0
    assert "in brackets, the best first: what G = max" in titles(drawn, "Bars")[0] and drawn["bar"][0][0].endswith(")")
    assert "not an explanation" in titles(drawn, "Bars")[0]


def test_at_most_six_clips_are_drawn_unless_asked(toy, tmp_path, drawn):
    for more in ((), ("--rows", 7)):
        predict(toy, "--test_clips", 8, "--sheet", tmp_path / "a.png", *more)
    numbers = [int(title.split()[1]) for title in titles(drawn, "Clip ")]
    assert len(numbers) == 6 + 7 and numbers[:6] == sorted(numbers[:6]) and numbers[6:] == sorted(numbers[6:])
    assert "at most 6 (--rows), those with the highest score" in drawn["draw_sheet"][0][1]
    grey = [i + 1 for i, color in enumerate(drawn["time_line"][0][3]) if color == data.PALE]
    assert {*grey} == {*range(1, 9)} - {*numbers[:6]}  # on the time line, which has all clips


def test_training_leaves_right_and_wrong_examples(toy, seen, drawn):
    assert Image.open(toy.parent / "run" / "sheet.png").width == WIDTH
    examples, words = data.read_examples("tgif_qa_action", toy, "test"), ("Right", "Wrong", "Right", "Wrong")
    (toy / "gifs" / f"{examples[3].video}.gif").write_bytes(b"")  # unreadable: that is said, with the reason
    examples[0] = examples[0]._replace(path=None)  # missing; with --blind it is not looked for before the sheet
    with pytest.raises(data.DataError, match="no such file"):
        finetune.look(replace(seen[0], blind=True), *seen[1:3], examples[0], 1)
    rows = [{"clips": 2, "accuracy": word == "Right"} for word in words]
    finetune.example_sheet(*seen[:3], examples[:4], rows)
    for title, word, e in zip(titles(drawn, *words), words, examples[:4], strict=True):
        assert title.startswith(f"{word}: {e.text} (answer: {e.options[e.answer]}). Shown: {e.video}")
        assert ("unreadable" in title) == (e in (examples[0], examples[3])) == ("clip " not in title)
    assert len(drawn["picture"]) == 2 * 2 and len(drawn["bar"]) == 2 * 6


def test_retrieval_shows_the_right_video_and_then_the_one_found_instead(tmp_path, drawn):
    data.write_toy_videos(tmp_path / "toy", train=8, test=8)
    run(finetune, "--task", "msrvtt_retrieval", "--data", tmp_path / "toy", "--out", tmp_path, "--batch_size", 2,
        "--max_steps", 1, "--test_clips", 1)  # fmt: skip
    wrong = [[title.split(word)[1].split(",")[0] for word in ("(answer: ", "Shown: ")] for title in titles(drawn, "Wrong")]
    assert len(wrong) == 4 and all((answer == shown) == (i % 2 == 0) for i, (answer, shown) in enumerate(wrong))


@pytest.fixture
def video(tmp_path):
    """Eight seconds, 80 x 40 pixels: frame i is of one grey, 3 * i + 60, and four to a second."""
    frames = [Image.new("L", (80, 40), 3 * i + 60) for i in range(32)]
    frames[0].save(tmp_path / "grey.gif", save_all=True, append_images=frames[1:], duration=250)
    return tmp_path / "grey.gif"


@pytest.mark.parametrize("n, T, fps", [(4, 2, 2.0), (5, 4, 1.0)])  # of a second each; of four seconds, which overlap
def test_uniform_clips_stand_at_their_times(video, n, T, fps):
    clips, media = data.sample_clips(32, 4.0, n, T, fps, False), data.probe(video)
    strip = np.asarray(data.time_line(media, clips, T / fps, data.SHEET_COLORS[:n]))
    columns = [np.flatnonzero((strip == color).all(-1).sum(0) > 7) for color in COLORS[:n]]  # no letters
    seen = [(x[0] / SECOND, (x[-1] + 3) / SECOND) for x in columns]
    assert np.allclose(seen, [(start, start + T / fps) for start in (clips[:, 0] / 4).tolist()], atol=0.02)


def test_random_clips_are_the_seeds_in_the_order_of_time_and_how_they_were_chosen_is_said(video, monkeypatch):
    drawn, said = [], []
    monkeypatch.setattr(data, "time_line", lambda media, clips, *_: drawn.append(clips))
    monkeypatch.setattr(data, "draw_sheet", lambda title, about, *_: said.append(about))
    for seed in (None, 3, 3, 4):
        data.contact_sheet(video, 5, 4, 1.0, 64, seed)
    assert drawn[1].equal(drawn[2]) and not drawn[1].equal(drawn[3])
    assert all(clips[:, 0].diff().ge(0).all() for clips in drawn)
    assert "clip i starts at f i / N" in said[0] and "at random, as in training (seed 3)" in said[1]


def test_frames_are_the_models_with_their_padding_and_whole_on_the_sheet(video):
    frame, side = data.read_clips(video, 1, 1, 1.0, 64, False)[0, 0], data.SIDE - 4
    whole = np.asarray(data.picture(frame, data.probe(video), "clip 1: 3.50 s", data.SHEET_COLORS[0])).astype(int)
    image = whole[2 : side + 2, 2 : side + 2]
    assert (abs(image[4 : side // 2 - 8] - frame[:, 10, 10].numpy()) <= 1).all()
    assert (image[side // 2 + 8 : -30] == 0).all() and image[-30:].any()  # "padding", in a corner of it
    square = np.asarray(data.picture(frame * 0, data.Media(1, 1.0, 40, 40), "", "black"))
    assert not square[: data.SIDE].any()  # a square has none
    sheet, left, high = np.asarray(data.contact_sheet(video, 1, 1, 1.0, 64)), data.MARGIN, len(whole)
    assert any((sheet[y : y + high, left : left + data.SIDE] == whole).all() for y in range(len(sheet) - high))


@pytest.mark.parametrize("text", ["", "word", "a few words " * 40, "l" * 300, "W" * 300, "two\nlines"])
def test_text_is_wrapped_and_never_cut(text, monkeypatch):
    """All of it is written, and no line is as wide as its strip."""
    written, font = [], data.ImageFont.load_default(9)
    monkeypatch.setattr(data.ImageDraw.ImageDraw, "multiline_text", lambda self, place, text, **_: written.append(text))
    strip, lines = data.text_strip(text, 9, width=300), written[0].split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= 300 for line in lines) and strip.height >= 15 * len(lines)


def test_pictures_and_bars_side_by_side_are_whole():
    columns = [*[Image.new("RGB", (data.SIDE, 50))] * 4, data.pile([data.bar("", 1.0, "black")] * 9)]
    row = np.asarray(data.row(columns))
    assert (row == 0).all(-1).sum() == 4 * 50 * data.SIDE + 9 * 7 * data.BAR and row.shape[1] == data.WIDTH


def test_toy_videos_are_explained_and_others_are_not(tmp_path):
    data.write_toy_videos(tmp_path / "toy", train=1, test=6)
    gif = tmp_path / "toy" / "gifs" / "toy_test_0000.gif"
    plain = data.contact_sheet(gif, 1, 1, 1.0, 64)
    (tmp_path / "toy" / f"complete-{data.TOY_VERSION}").touch()
    assert data.contact_sheet(gif, 1, 1, 1.0, 64).height > plain.height and "moons" in data.TOY_NOTE
