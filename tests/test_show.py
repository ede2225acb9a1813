"""The contact sheet shows the sampler's clips where they lie, and the frames as the model receives them."""

import numpy as np
import pytest
from PIL import Image, ImageColor

import data

COLORS = [ImageColor.getrgb(color) for color in data.SHEET_COLORS]


@pytest.fixture
def video(tmp_path):
    """Eight seconds, 80 x 40 pixels: frame i is of one grey, 3 * i + 60, and four to a second."""
    frames = [Image.new("L", (80, 40), 3 * i + 60) for i in range(32)]
    frames[0].save(tmp_path / "grey.gif", save_all=True, append_images=frames[1:], duration=250)
    return tmp_path / "grey.gif"


def bars(sheet):
    """(left, right) ends of every clip's bar on the time line, in seconds."""
    found = {}
    for y in range(101, 101 + 26 * 8, 26):
        for clip, color in enumerate(COLORS):
            x = np.flatnonzero((np.asarray(sheet)[y] == color).all(-1))
            if len(x) > 60:  # longer than the letters of a label
                found[clip] = ((x[0] - 40) / 190, (x[-1] + 3 - 40) / 190)
    return [found[clip] for clip in sorted(found)]


def test_uniform_clips_stand_at_their_times(video):
    sheet = data.contact_sheet(video, 4, 2, 2.0, 64, train=False)
    assert sheet.width == 1600
    starts = data.sample_clips(32, 4.0, 4, 2, 2.0, False)[:, 0] / 4
    expected = [(start, start + 1) for start in starts.tolist()]
    assert np.allclose(bars(sheet), expected, atol=0.02)


def test_overlapping_and_random_clips_are_all_there_in_the_order_of_time(video):
    sheet = data.contact_sheet(video, 5, 4, 1.0, 64, train=True, seed=3)  # 5 clips of 4 seconds out of 8: they overlap
    ends = bars(sheet)
    assert len(ends) == 5 and ends == sorted(ends)
    assert sheet.tobytes() == data.contact_sheet(video, 5, 4, 1.0, 64, train=True, seed=3).tobytes()
    assert sheet.tobytes() != data.contact_sheet(video, 5, 4, 1.0, 64, train=True, seed=4).tobytes()


def test_frames_are_the_models_with_their_padding(video):
    sheet = np.asarray(data.contact_sheet(video, 1, 1, 1.0, 64, train=False))
    frame = np.asarray(data.read_clips(video, 1, 1, 1.0, 64, False)[0, 0].permute(1, 2, 0))
    square = sheet[-(54 + 360) : -54, 40:400]  # the last thing on the sheet, but for its time
    assert (abs(square[20:160:20, 20:340:20].astype(int) - frame[10, 10]) <= 1).all()
    assert (square[205:245, 20:340] == 0).all() and (square[300:350, 20:340] == 0).all()  # black; "padding" is between


@pytest.mark.parametrize("arguments, line", [
    (["missing.gif"], "missing.gif"), (["{video}", "--clips", "0"], "1 to 64"),
    (["{video}", "--out", "sheet.nonsense"], "nonsense"),
])  # fmt: skip
def test_mistakes_end_in_one_line(video, tmp_path, arguments, line, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", "show", *(a.format(video=video) for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        data.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and line in error
