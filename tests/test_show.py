"""`python data.py show`: clips stand where the sampler puts them, frames are as the model receives them."""

import numpy as np
import pytest
from PIL import Image, ImageColor

import data

COLORS = [ImageColor.getrgb(color) for color in data.SHEET_COLORS]
SECONDS = (data.WIDTH - 2 * data.MARGIN) / 8  # pixels of one, on the time line of eight


@pytest.fixture
def video(tmp_path):
    """Eight seconds, 80 x 40 pixels: frame i is of one grey, 3 * i + 60, and four to a second."""
    frames = [Image.new("L", (80, 40), 3 * i + 60) for i in range(32)]
    frames[0].save(tmp_path / "grey.gif", save_all=True, append_images=frames[1:], duration=250)
    return tmp_path / "grey.gif"


def line(video, clips, length, uniform=True):
    """The time line as an array, and each clip's (first, last) second on it."""
    strip = np.asarray(data.time_line(data.probe(video), clips, length, data.SHEET_COLORS[: len(clips)], uniform))
    columns = [np.flatnonzero((strip == color).all(-1).sum(0) > 7) for color in COLORS[: len(clips)]]  # no letters
    return strip, [((x[0] - data.MARGIN) / SECONDS, (x[-1] + 3 - data.MARGIN) / SECONDS) for x in columns]


def test_uniform_clips_stand_at_their_times_and_what_is_never_looked_at_is_grey(video):
    clips = data.sample_clips(32, 4.0, 4, 2, 2.0, False)
    strip, found = line(video, clips, 1.0)
    assert np.allclose(found, [(start, start + 1) for start in (clips[:, 0] / 4).tolist()], atol=0.02)
    grey = np.flatnonzero((strip[40] == ImageColor.getrgb("#eeeeee")).all(-1))
    assert np.allclose((grey[[0, -1]] - data.MARGIN) / SECONDS, (found[-1][1], 8), atol=0.02)
    assert len(line(video, clips, 1.0, uniform=False)[0]) < len(strip)  # random clips may lie anywhere: no remark


def test_clips_that_overlap_get_lanes(video):
    clips = data.sample_clips(32, 4.0, 5, 4, 1.0, False)  # 5 clips of 4 seconds out of 8
    _, found = line(video, clips, 4.0)
    assert np.allclose(found, [(start, start + 4) for start in (clips[:, 0] / 4).tolist()], atol=0.02)


def test_frames_are_the_models_with_their_padding(video):
    frame = data.read_clips(video, 1, 1, 1.0, 64, False)[0, 0]
    image = np.asarray(data.picture(frame, 320, data.probe(video))).astype(int)
    assert (abs(image[20:140, 20:300] - frame[:, 10, 10].numpy()) <= 1).all()
    assert (image[180:220] == 0).all() and (image[260:] == 0).all() and image[220:260].any()  # "padding" between
    assert not np.asarray(data.picture(frame * 0, 320, data.Media(1, 1.0, 40, 40))).any()  # a square has none
    sheet = np.asarray(data.contact_sheet(video, 1, 1, 1.0, 64))
    assert sheet.shape[1] == data.WIDTH
    large = np.asarray(data.picture(frame, 360, data.probe(video)))[2:-2, 2:-2]  # within its border
    places = [y for y in range(len(sheet) - 360) if np.array_equal(sheet[y + 2 : y + 358, 42:398], large)]
    assert len(places) == 1


def test_random_clips_are_those_of_the_seed_in_the_order_of_time(video, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "time_line", lambda media, clips, *_: drawn.append(clips) or Image.new("RGB", (9, 9)))
    sheets = [data.contact_sheet(video, 5, 4, 1.0, 64, seed).tobytes() for seed in (3, 3, 4)]
    assert sheets[0] == sheets[1] != sheets[2]
    assert all(clips[:, 0].diff().ge(0).all() for clips in drawn)


@pytest.mark.parametrize("text", ["", "word", "a few words " * 40, "l" * 300, "W" * 300, "two\nlines"])
def test_text_is_wrapped_and_never_cut(text):
    lines = data.wrap(text, 18, 300)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert data.widest(lines, 18, 10**6) <= 300 and len(lines) <= 40


def test_a_row_is_as_high_as_its_highest_column():
    black = Image.new("RGB", (50, 50))
    for row in (data.SheetRow([(black, "below", "red")]), data.SheetRow([(black, "", "red")], ["word " * 99]),
                data.SheetRow([(black, "", "red")], (), [("long name " * 9, 1.0, "100%", "red")] * 9)):  # fmt: skip
        sheet = np.asarray(data.draw_sheet("title", "about", [row, row]))
        assert (sheet[-data.MARGIN :] == 255).all() and (sheet[:, -data.MARGIN + 1 :] == 255).all()
        tops = np.flatnonzero((sheet[:, 60] == 0).all(-1))
        assert len(tops) == 2 * 46  # the pictures of both rows, whole but for their borders


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
    assert data.toy_notes(gif) == []
    (tmp_path / "toy" / f"complete-{data.TOY_VERSION}").touch()
    assert "moons" in data.toy_notes(gif)[0]
