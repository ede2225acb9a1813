"""Media reading: resizing against the reference's numbers, and every frame against a full decode.

Sampling is exercise 1, so its tests stand in test_exercises.py.
"""

import json
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import SHARED, refused
from PIL import Image

import data as media

VIDEOS, GOLDEN = SHARED / "videos", SHARED / "golden"


# ---------------------------------------------------------------- resizing
def test_resize_and_pad_by_hand():
    # 2x4 -> 4x8: bilinear weights 1/4 and 3/4; the lower half is padding.
    frame = torch.tensor([[0.0, 40.0, 80.0, 120.0], [0.0, 40.0, 80.0, 120.0]]).expand(5, 3, 2, 4)
    row = [0.0, 10.0, 30.0, 50.0, 70.0, 90.0, 110.0, 120.0]
    result = media.resize_and_pad(frame, 8)
    assert result.shape == (5, 3, 8, 8)
    torch.testing.assert_close(result[4, 2, :4], torch.tensor([row] * 4))
    assert (result[:, :, 4:] == 0).all()
    as_bytes = media.resize_and_pad(frame.byte(), 8)
    assert as_bytes.dtype == torch.uint8 and as_bytes.equal(result.byte())
    assert media.resize_and_pad(frame[0].transpose(1, 2), 8)[:, :, 4:].eq(0).all()  # tall: padded on the right
    assert media.resized_shape(360, 640, 1000) == (562, 1000)  # rounded down,
    assert media.resized_shape(5000, 1, 16) == (16, 1)  # but not to nothing


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the reference's numbers are not here: {GOLDEN}")
def test_resizing_equals_the_reference():
    for h, w, size, expected in json.loads((GOLDEN / "sampling.json").read_text())["get_resize_size"]:
        assert media.resized_shape(h, w, size) == tuple(expected)
    tensors = pytest.importorskip("safetensors.torch").load_file(GOLDEN / "preprocess.safetensors")
    for name in ("wide_down", "tall_up", "square", "wide_odd"):
        expected = tensors[f"{name}/padded"]
        torch.testing.assert_close(media.resize_and_pad(tensors[f"{name}/in"], expected.shape[-1]), expected)


# ---------------------------------------------------------------- videos that carry their frame numbers
H, W, SIZE = 48, 64, 64  # 3 x 4 blocks of 16 pixels, each one bit of the frame's number


def numbered(i):
    bits = np.array([(i >> b) & 1 for b in range(12)], np.uint8).reshape(3, 4)
    return np.repeat(np.kron(bits * 200 + 20, np.ones((16, 16), np.uint8))[:, :, None], 3, axis=2)


def numbers(frames):
    """uint8 (N, 3, SIZE, SIZE) -> the numbers that the frames carry."""
    assert frames.dtype == torch.uint8 and frames.shape[1:] == (3, SIZE, SIZE)
    assert (frames[:, :, H:] == 0).all()  # the padding
    bits = frames[:, 0, 8:H:16, 8::16].flatten(1) > 110
    return (bits * 2 ** torch.arange(12)).sum(1).tolist()


def ffmpeg(*arguments, stdin=None):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=60).stdout


def make_video(path, n=100, *options, fps=25):
    frames = b"".join(numbered(i).tobytes() for i in range(n))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{W}x{H}", "-r", fps, "-i", "-"]
    ffmpeg(*source, "-pix_fmt", "yuv420p", *options, path, stdin=frames)
    return path


X264 = ["-c:v", "libx264", "-preset", "ultrafast", "-bf", "3", "-b_strategy", "0"]
MANY = [99, 0, 41, 41, 7, 98, 60, 1, 42]


def seek_always(monkeypatch):
    monkeypatch.setattr(media, "_plan", lambda _, wanted: [(max(i - media.SEEK_LEAD, 0), [i]) for i in wanted])


@pytest.fixture(params=["as planned", "a seek a frame"])
def both_ways(request, monkeypatch):
    """A test runs twice: as the plan has it, which seeks little in short videos, and with a seek for each frame."""
    if request.param != "as planned":
        seek_always(monkeypatch)


@pytest.mark.parametrize("gop", [5, 250])
@pytest.mark.parametrize("fps", ["25", "30000/1001"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".flv"])
def test_every_frame_of_a_constant_rate_video(tmp_path, monkeypatch, suffix, fps, gop):
    codec = ["-c:v", "mpeg4", "-q:v", 2, "-bf", 2] if suffix == ".avi" else X264
    path = make_video(tmp_path / f"video{suffix}", 120, *codec, "-g", gop, fps=fps)  # over 100: ffmpeg nests no deeper
    found = media.probe(path)
    assert found[:4] == (120, pytest.approx(eval(fps), rel=2e-4), W, H)  # some clocks tick in milliseconds
    assert numbers(media.read_frames(path, range(120), SIZE)) == list(range(120))
    assert numbers(media.read_frames(path, MANY, SIZE)) == MANY
    if found.keys:  # seeking is exact: it finds the same
        seek_always(monkeypatch)
        assert numbers(media.read_frames(path, MANY, SIZE)) == MANY


VFR = "settb=1/1000,setpts='(N*0.04+N*N*0.002)/TB'"  # frame i begins at .04 i + .002 i^2 seconds: ever slower


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_follows_the_clock(tmp_path, suffix, both_ways):
    options = ["-vf", VFR, "-fps_mode", "vfr", "-enc_time_base", "1/1000", *X264, "-g", 12]
    path = make_video(tmp_path / f"video{suffix}", 50, *options)
    found = media.probe(path)
    begins = [0.04 * i + 0.002 * i * i for i in range(50)]
    indices = range(0, found.num_frames, 3)
    shown = [max(j for j in range(50) if begins[j] <= i / found.fps + 0.002) for i in indices]
    assert numbers(media.read_frames(path, indices, SIZE)) == shown


PLANNED = {
    "sparse.mp4": ["-g", 90], "dense.mp4": ["-g", 12], "matroska.mkv": ["-g", 60],
    "fragments.mp4": ["-g", 60, "-movflags", "frag_keyframe+empty_moov"],
    "open.mp4": ["-g", 48, "-x264-params", "open-gop=1"],
    "variable.mp4": ["-vf", VFR.replace("N*N*0.002", "N*N*.0001"), "-fps_mode", "vfr", "-enc_time_base", "1/1000",
                     "-g", 40],
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_what_the_plan_seeks_equals_a_full_decode(tmp_path, name):
    path = make_video(tmp_path / name, 300, *X264, *PLANNED[name])
    found, seeks = media.probe(path), 0
    everything = numbers(media.read_frames(path, range(found.num_frames), SIZE))  # in one pass
    for seed in range(4):
        wanted = media.sample_clips(found.num_frames, found.fps, 4, 2, 2, True, torch.Generator().manual_seed(seed))
        wanted = wanted.flatten().tolist()
        seeks += len(media._plan(found, sorted(set(wanted))))
        assert numbers(media.read_frames(path, wanted, SIZE)) == [everything[i] for i in wanted]
    assert seeks > 4  # more than one pass each


def test_the_plan_seeks_only_across_key_frames(monkeypatch):
    video = media.Media(1000, 25.0, W, H, 0.0, "ffmpeg", (0, 250, 500, 750))
    for wanted in ([10, 35, 240],  # far apart, but nothing to spare
                   [245, 300],  # five frames are not worth a seek
                   [5, 252]):  # so close to a key frame a seek would land before it
        assert media._plan(video, wanted) == [(0, wanted)]
    assert media._plan(video, [10, 35, 300]) == [(0, [10, 35]), (292, [300])]
    assert media._plan(video, [900]) == [(892, [900])]
    assert media._plan(video._replace(keys=()), [10, 900]) == [(0, [10, 900])]
    monkeypatch.setattr(media, "SEEKS", 2)  # no more than memory has room for
    assert media._plan(video, [10, 300, 600, 900]) == [(0, [10]), (292, [300, 600, 900])]


@pytest.mark.parametrize("came", [1, 2, 5])
def test_frames_that_ffmpeg_gives_too_few_or_too_many_of(monkeypatch, came):
    monkeypatch.setattr(media, "probe", lambda _: media.Media(50, 25.0, W, H, reader="ffmpeg"))
    monkeypatch.setattr(media, "_ffmpeg", lambda *_: (bytes([7]) * (came * 3 * SIZE**2), ""))
    with nullcontext() if came >= 2 else pytest.raises(media.DataError, match="no frame could be decoded"):
        assert media.read_frames("video.mp4", [3, 9], SIZE).equal(torch.full((2, 3, SIZE, SIZE), 7, dtype=torch.uint8))


REMUXED = {  # name: (options before the input, those after it, indices, the frames that they show)
    "begins after its sound.mkv": (["-f", "lavfi", "-i", "sine=duration=2", "-itsoffset", 0.4], ["-map", 1, "-map", 0],
                                   [0, 1, 20, 99], [0, 1, 20, 99]),
    # at 1.48 s: the file keeps frame 25, on which decoding starts, and an edit list hides it
    "was cut.mp4": (["-ss", 1.48], [], [0, 1, 30, 60], [37, 38, 67, 97]),
    "has no length in its header.mkv": ([], ["-live", 1], [99, 0], [99, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", REMUXED)
def test_frames_and_times_of_a_video_that(name, tmp_path, both_ways):
    before, after, indices, shown = REMUXED[name]
    whole = make_video(tmp_path / "whole.mp4", 100, *X264, "-g", 25)
    ffmpeg(*before, "-i", whole, *after, "-c", "copy", tmp_path / name)
    assert media.probe(tmp_path / name).num_frames == (63 if "cut" in name else 100)
    assert numbers(media.read_frames(tmp_path / name, indices, SIZE)) == shown


def test_rotation(tmp_path):
    plain, turned = make_video(tmp_path / "plain.mp4", 5, *X264), tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", turned)  # counter-clockwise
    assert media.probe(turned)[2:4] == (H, W)
    frame = media.read_frames(turned, [3], SIZE)[0]
    assert (frame[:, :, H:] == 0).all()
    expected = torch.rot90(media.read_frames(plain, [3], SIZE)[0, :, :H], 1, (1, 2))
    assert (frame[:, :, :H].int() - expected.int()).abs().float().mean() < 3


def test_truncated_video_has_the_frames_that_are_there(tmp_path, both_ways, monkeypatch):
    path = make_video(tmp_path / "video.mp4", 100, *X264, "-bf", 0, "-g", 10, "-movflags", "faststart")
    promised, data = media.probe(path), path.read_bytes()
    path.write_bytes(data[: (data.index(b"mdat") + len(data)) // 2])  # half of its pictures, behind the whole header
    found = media.probe(path)
    assert 10 < found.num_frames < 90 and found.fps == 25
    assert numbers(media.read_frames(path, range(found.num_frames), SIZE))[:-1] == list(range(found.num_frames - 1))
    # What is not there, though the list of packets promised it, is shown by the last frame that decodes.
    monkeypatch.setattr(media, "probe", lambda _: promised)
    shown = numbers(media.read_frames(path, [5, 20, 95, 99], SIZE))
    assert shown[:2] == [5, 20] and found.num_frames - 3 < shown[2] == shown[3] < 95
    monkeypatch.undo()
    path.write_bytes(data[: data.index(b"mdat") + 8])  # the header alone
    assert "no readable video stream" in refused(media.probe, path)


def test_colours_and_scaling(tmp_path):
    left, right = (["-f", "lavfi", "-i", f"color={colour}:s=40x40:d=1"] for colour in ("0xDC1E28", "0x1428E6"))
    ffmpeg(*left, *right, "-filter_complex", "hstack", "-pix_fmt", "yuv444p", *X264, tmp_path / "colours.mp4")
    frame = media.read_frames(tmp_path / "colours.mp4", [0], 32)[0].int()
    assert frame.shape == (3, 32, 32) and (frame[:, 16:] == 0).all()
    for x, colour in ((4, (220, 30, 40)), (28, (20, 40, 230))):
        assert (frame[:, 8, x] - torch.tensor(colour)).abs().max() < 8


def test_read_clips_and_what_is_remembered(tmp_path, monkeypatch):
    path = make_video(tmp_path / "video.mp4", 100, *X264)
    clips = media.read_clips(path, 4, 2, 2, SIZE, train=False)
    assert clips.shape == (4, 2, 3, SIZE, SIZE) and clips.is_contiguous()
    assert [numbers(c) for c in clips] == media.sample_clips(100, 25.0, 4, 2, 2, False).tolist()
    monkeypatch.setattr(media, "_ffmpeg", None)
    assert media.probe(str(path)).num_frames == 100  # no second process
    monkeypatch.undo()
    make_video(path, 30, *X264)
    assert media.probe(path).num_frames == 30  # unless the file has changed


# ---------------------------------------------------------------- the cache
@pytest.mark.parametrize("suffix, rate, kept", [(".mp4", 5.0, range(0, 200, 5)), (".gif", 99.0, range(200))])
def test_cached_clips_are_the_nearest_frames_kept(tmp_path, monkeypatch, suffix, rate, kept):
    make = make_gif if suffix == ".gif" else make_video  # of a slow video every frame is kept
    path = make(tmp_path / f"video{suffix}", 200)
    fps = media.probe(path).fps
    media.write_cached(path, SIZE, rate)
    media.write_cached(path, 32, 1.0)  # another size beside it
    monkeypatch.setattr(media, "_probe", None)  # nothing is decoded, not even probed
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    clips = media.read_clips(path, 6, 2, 2, SIZE, True, generators[0], cache=True)
    wanted = media.sample_clips(200, fps, 6, 2, 2, True, generators[1]).flatten()
    assert clips.shape == (6, 2, 3, SIZE, SIZE) and clips.is_contiguous()
    assert numbers(clips.flatten(0, 1)) == [min(kept, key=lambda k: abs(k - i)) for i in wanted.tolist()]


def test_cached_files_are_written_once_until_the_video_changes(tmp_path):
    def is_written(rate=5.0):
        written = media.cached_file_of(path, SIZE)
        before = written.exists() and written.stat().st_ino
        media.write_cached(path, SIZE, rate)
        return written.stat().st_ino != before

    path = make_video(tmp_path / "video.mp4", 30, *X264)
    assert is_written() and not is_written() and is_written(rate=10.0)
    make_video(path, 40, *X264)
    assert media.open_cached(path, SIZE) is None  # stale: decoded until it is written again
    frames = media.read_clips(path, 1, 2, 2, SIZE, False, cache=True)
    assert frames.equal(media.read_clips(path, 1, 2, 2, SIZE, False))
    assert is_written() and media.open_cached(path, SIZE).num_frames == 40


@pytest.mark.parametrize("keep", [0, 40, 2000])
def test_damaged_cached_file(tmp_path, keep):
    path = make_video(tmp_path / "video.mp4", 30, *X264)
    media.write_cached(path, SIZE, 5.0)
    entry = media.cached_file_of(path, SIZE)
    entry.write_bytes(entry.read_bytes()[:keep])
    message = refused(media.read_clips, path, 8, 2, 2, SIZE, False, cache=True)
    assert "damaged; remove it" in message and str(entry) in message


def test_cache_command(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    paths = [str(make_video(tmp_path / "videos" / name, 10, *X264)) for name in ("b.mp4", "c.mp4")] + [None]
    examples = [media.Example(str(i), "", "", path=path) for i, path in enumerate(paths)]
    settings = SimpleNamespace(cache=True, size=SIZE)
    with pytest.raises(media.DataError, match="no video is cached at 64 pixels; write them first: python data.py"):
        media.check_cached(examples, settings)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"x")
    media.write_cache(tmp_path, SIZE, 4.0, 1)
    said = capsys.readouterr()
    assert "2 of 3 videos are cached" in said.out and "bad.mp4: not a readable" in said.err
    entries = sorted((tmp_path / "videos" / "cached").iterdir())
    assert [p.name for p in entries] == ["b.mp4.64.zip", "c.mp4.64.zip"]  # no parts
    entries[0].unlink()
    media.check_cached(examples, settings)
    assert "cache: 1 of 2 videos (the rest is decoded" in capsys.readouterr().out


# ---------------------------------------------------------------- images and animations
def make_gif(path, n=8, duration=50, format="GIF"):
    images = [Image.fromarray(numbered(i)) for i in range(n)]
    images[0].save(path, format, save_all=True, append_images=images[1:], duration=duration, loop=0, lossless=True)
    return path


@pytest.mark.parametrize("format, duration", [("GIF", 50), ("PNG", 50), ("WEBP", 50), ("WEBP", 1)])
def test_animations(tmp_path, format, duration):
    path = make_gif(tmp_path / "called.mp4", 8, duration, format)  # content decides, not the name
    assert media.probe(path) == (8, pytest.approx(1000 / duration), W, H, 0.0, "pillow", ())
    assert numbers(media.read_frames(path, [7, 0, 3, 3], SIZE)) == [7, 0, 3, 3]


def test_gif_delays(tmp_path):
    path = make_gif(tmp_path / "a.gif", 4, [300, 0, 100, 300])  # 0 counts as 100: frames begin at 0, .3, .4, .5 s
    assert media.probe(path)[:2] == (4, pytest.approx(5.0))
    assert numbers(media.read_frames(path, range(4), SIZE)) == [0, 0, 2, 3]  # at 0, .2, .4, .6 s


@pytest.mark.parametrize("kept", [0.6, 0.1])
def test_truncated_gif(tmp_path, kept):
    path = make_gif(tmp_path / "a.gif", 20)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    found = media.probe(path)
    assert 0 < found.num_frames < 20
    assert numbers(media.read_frames(path, range(found.num_frames), SIZE)) == list(range(found.num_frames))


RED = Image.new("RGB", (4, 2), (255, 0, 0))
STILLS = {
    "palette.png": (RED.convert("P"), (255, 0, 0)),
    "cmyk.jpg": (RED.convert("CMYK"), (254, 0, 0)),
    "grey.bmp": (Image.new("L", (4, 2), 77), (77, 77, 77)),
    "bilevel.png": (Image.new("1", (4, 2), 1), (255, 255, 255)),
    "grey16.png": (Image.fromarray(np.full((2, 4), 100 * 256 + 9, np.uint16)), (100, 100, 100)),
    "clear.png": (Image.new("RGBA", (4, 2), (9, 9, 9, 0)), (255, 255, 255)),
    "half.webp": (Image.new("RGBA", (4, 2), (0, 0, 0, 128)), (127, 127, 127)),
    "one.gif": (RED.convert("P"), (255, 0, 0)),
}


@pytest.mark.parametrize("name", STILLS)
def test_still_images(tmp_path, name):
    image, colour = STILLS[name]
    image.save(tmp_path / name, lossless=True)
    assert media.probe(tmp_path / name) == (1, 1.0, 4, 2, 0.0, "pillow", ())
    frame = media.read_clips(tmp_path / name, 1, 2, 2, 8, train=True)[0, 1].int()
    assert (frame[:, :4] - torch.tensor(colour)[:, None, None]).abs().max() <= 1
    assert (frame[:, 4:] == 0).all()


def test_exif_orientation(tmp_path):
    image = Image.fromarray(np.kron([[250, 0], [0, 0], [0, 0]], np.ones((16, 16))).astype(np.uint8))  # 32 x 48
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the white corner moves to the right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert media.probe(tmp_path / "a.jpg")[2:4] == (48, 32)
    frame = media.read_frames(tmp_path / "a.jpg", [0], 48)[0, 0]
    assert frame[8, 40] > 230 and frame[8, 8] < 20 and frame[24, 40] < 20


# ---------------------------------------------------------------- bad input: one line that names the file
BAD = [  # what it is, how it is made
    ("no such file", lambda path: None),
    ("no such file", lambda path: path.mkdir()),
    ("not a readable image or video", lambda path: path.write_text("hello\n" * 99)),
    ("not a readable image or video", lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(99))),
    ("no readable video stream", lambda path: ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-f", "wav", path)),
]


@pytest.mark.parametrize("message, save", BAD)
def test_bad_files(tmp_path, message, save):
    path = tmp_path / "bad.mp4"
    save(path)
    line = refused(media.read_clips, path, 2, 2, 2, SIZE, train=False)
    assert message in line and str(path) in line


def test_time_limit(tmp_path, monkeypatch):  # that of GIFs: test_strangers.py
    path = make_video(tmp_path / "video.mp4", 30, *X264)
    monkeypatch.setattr(media, "TIME_LIMIT", 0.0)
    assert "over 0 s" in refused(media._probe_video, path)


# ---------------------------------------------------------------- odd files met in the wild
REAL = json.loads((VIDEOS / "manifest.json").read_text())["files"] if VIDEOS.is_dir() else []


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"the odd real files are not here: {VIDEOS}")
@pytest.mark.parametrize("entry", REAL, ids=lambda entry: entry["file"])
def test_odd_real_files(entry):
    path = VIDEOS / entry["file"]
    if not entry["width"] and path.suffix != ".webp":
        pytest.raises(media.DataError, media.probe, path).match("no readable video stream|not a readable")
        return
    found = media.probe(path)
    if path.suffix != ".webp":
        size = (entry["width"], entry["height"])
        assert found[2:4] == (size[::-1] if abs(entry["rotation"][0]) == 90 else size)
        assert abs(found.num_frames - max(entry["frames_decoded"], entry["frames_header"])) <= 1
    clips = media.read_clips(path, 2, 2, 2, SIZE, train=False)
    assert clips.shape == (2, 2, 3, SIZE, SIZE) and clips.max() > 0
    assert len(media.read_frames(path, [found.num_frames - 1, 0], SIZE)) == 2
