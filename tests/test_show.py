"""`python data.py show`: clips stand where the sampler puts them, frames are as the model receives them."""

import numpy as np
import pytest
from PIL import Image, ImageColor

import data

COLORS = [ImageColor.getrgb(color) for color in data.SHEET_COLORS]
SECOND = data.WIDTH / 8  # pixels, on the time line of eight


@pytest.fixture
def video(tmp_path):
    """Eight seconds, 80 x 40 pixels: frame i is of one grey, 3 * i + 60, and four to a second."""
    frames = [Image.new("L", (80, 40), 3 * i + 60) for i in range(32)]
    frames[0].save(tmp_path / "grey.gif", save_all=True, append_images=frames[1:], duration=250)
    return tmp_path / "grey.gif"


def line(video, clips, length):
    """Each clip's (first, last) second on the time line."""
    strip = np.asarray(data.time_line(data.probe(video), clips, length, data.SHEET_COLORS[: len(clips)]))
    columns = [np.flatnonzero((strip == color).all(-1).sum(0) > 7) for color in COLORS[: len(clips)]]  # no letters
    return [(x[0] / SECOND, (x[-1] + 3) / SECOND) for x in columns]


def test_uniform_clips_stand_at_their_times_and_the_reason_is_said(video, monkeypatch):
    clips = data.sample_clips(32, 4.0, 4, 2, 2.0, False)
    assert np.allclose(line(video, clips, 1.0), [(start, start + 1) for start in (clips[:, 0] / 4).tolist()], atol=0.02)
    said = []
    monkeypatch.setattr(data, "draw_sheet", lambda title, about, *_: said.append(about))
    for seed in (None, 3):
        data.contact_sheet(video, 4, 2, 2.0, 64, seed)
    assert "clip i starts at f i / N" in said[0] and "at random, as in training (seed 3)" in said[1]


def test_clips_that_overlap_get_lanes(video):
    clips = data.sample_clips(32, 4.0, 5, 4, 1.0, False)  # 5 clips of 4 seconds out of 8
    assert np.allclose(line(video, clips, 4.0), [(start, start + 4) for start in (clips[:, 0] / 4).tolist()], atol=0.02)


def test_frames_are_the_models_with_their_padding(video):
    frame, side = data.read_clips(video, 1, 1, 1.0, 64, False)[0, 0], data.SIDE - 4
    image = np.asarray(data.picture(frame, data.probe(video))).astype(int)
    assert image.shape == (side, side, 3)
    assert (abs(image[4 : side // 2 - 8] - frame[:, 10, 10].numpy()) <= 1).all()
    assert (image[side // 2 + 8 : -30] == 0).all() and image[-30:].any()  # "padding", in a corner of it
    assert not np.asarray(data.picture(frame * 0, data.Media(1, 1.0, 40, 40))).any()  # a square has none
    assert np.asarray(data.picture(frame * 0, None)).any()  # "unreadable"
    sheet = np.asarray(data.contact_sheet(video, 1, 1, 1.0, 64))
    assert sheet.shape[1] == data.WIDTH + 2 * data.MARGIN
    left = data.MARGIN + 2  # behind the border
    places = [y for y in range(len(sheet) - side) if np.array_equal(sheet[y : y + side, left : left + side], image)]
    assert len(places) == 1


def test_random_clips_are_those_of_the_seed_in_the_order_of_time(video, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "time_line", lambda media, clips, *_: drawn.append(clips) or Image.new("RGB", (9, 9)))
    sheets = [data.contact_sheet(video, 5, 4, 1.0, 64, seed).tobytes() for seed in (3, 3, 4)]
    assert sheets[0] == sheets[1] != sheets[2]
    assert all(clips[:, 0].diff().ge(0).all() for clips in drawn)


@pytest.mark.parametrize("text", ["", "word", "a few words " * 40, "l" * 300, "W" * 300, "two\nlines"])
def test_text_is_wrapped_and_never_cut(text, monkeypatch):
    """All of it is written, and no line is as wide as its strip."""
    written = []
    monkeypatch.setattr(data.ImageDraw.ImageDraw, "text", lambda self, place, line, **_: written.append((place, line)))
    strip, font = data.text_strip(text, 9, width=300), data.ImageFont.load_default(9)
    assert "".join("".join(line for _, line in written).split()) == "".join(text.split())
    assert all(font.getlength(line) <= 300 and place[1] + 9 <= strip.height for place, line in written)


def test_a_row_is_as_high_as_its_highest_column_and_keeps_its_pictures_whole():
    black = Image.new("RGB", (50, 50))
    for title, below, bars in (("", "below", []), ("word " * 99, "", []), ("", "", [("a long name " * 9, 1.0, "red")] * 9)):
        row = data.row_strip(title, [(black, below, "red")], bars)
        sheet = np.asarray(data.draw_sheet("title", "about", [row, row], "video.mp4"))
        assert (sheet[-data.MARGIN :] == 255).all() and (sheet[:, -data.MARGIN + 1 :] == 255).all()
        middle = np.flatnonzero((sheet[:, data.MARGIN + 27] == 0).all(-1))
        assert len(middle) == 2 * 50


@pytest.mark.parametrize("arguments, words", [
    (["missing.gif"], "missing.gif"), (["{video}", "--clips", "0"], "1 to 64"),
    (["{video}", "--out", "sheet.nonsense"], "nonsense"), (["{video}", "--out", "none/a.png"], "none/a.png"),
    (["{video}", "--clip", "2"], "did you mean --clips?"),
])  # fmt: skip
def test_mistakes_end_in_one_line(video, tmp_path, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.main(["show", *(a.format(video=video) for a in arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error


def test_toy_videos_are_explained_and_others_are_not(tmp_path):
    data.write_toy_tgif_qa(tmp_path / "toy", train=1, test=1)
    gif = tmp_path / "toy" / "gifs" / "toy_test_0000.gif"
    plain = data.contact_sheet(gif, 1, 1, 1.0, 64)
    (tmp_path / "toy" / f"complete-{data.TOY_VERSION}").touch()
    assert data.contact_sheet(gif, 1, 1, 1.0, 64).height > plain.height and "moons" in data.TOY_NOTE
