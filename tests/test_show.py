"""`python data.py show`: clips stand where the sampler puts them, frames are as the model receives them."""

import numpy as np
import pytest
from PIL import Image, ImageColor

import data

COLORS = [ImageColor.getrgb(color) for color in data.SHEET_COLORS]
SECOND = (data.WIDTH - 80) / 8  # pixels, on the time line of eight


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
