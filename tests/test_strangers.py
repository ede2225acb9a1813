"""Files from strangers: names that are options or addresses, files that point to other files, and bombs.

What is refused must be refused before it costs memory or time; what only looks odd must be read.
"""

import io
import re
import resource
import socket
import struct
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import refused
from PIL import Image
from test_media import ffmpeg

import data

SIZE = 32


def clips(path):
    return data.read_clips(path, 2, 2, 2.0, SIZE, False)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A real video, white: whoever is led to it shows white frames."""
    path = tmp_path_factory.mktemp("video") / "secret.mp4"
    ffmpeg("-f", "lavfi", "-i", "color=white:s=32x24:r=4:d=1", "-pix_fmt", "yuv420p", path)
    return path


# ---------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["-x.mp4", "-i.mp4", "-version.mp4", "a|b.mp4", "x.mp4", "100%03d.mp4", "ab:c.mp4",
                                  "sub/-x.mp4", "'q'.mp4", "a;b,c[0].mp4", "pipe.mp4", "$HOME.mp4", "it's é.gif"])
def test_odd_names_are_just_names(name, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(video.read_bytes())
    assert data.find_media(tmp_path, name) == place
    assert clips(name).shape == (2, 2, 3, SIZE, SIZE)


@pytest.fixture
def address():
    """A server on this machine, at which nobody may knock."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_addresses_and_protocols_are_no_files(video, tmp_path, address):
    for name in (f"{address}/x.mp4", f"concat:{video}|{video}", "pipe:0", f"file:{video}", "data:video/mp4;base64,AAAA",
                 f"subfile,,start,0,end,0,,:{video}", "lavfi:color"):
        try:
            assert data.find_media(tmp_path, name) is None
        except data.DataError as error:
            assert "must stay inside" in str(error)
        assert "no such file" in refused(clips, name)


def playlists(video, address):
    """Text files that name others, by absolute path, by a path beside them, and over the network."""
    for target in (str(video), video.name, f"file:{video}", f"{address}/x.mp4", f"concat:{video}|{video}"):
        yield f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"
        yield f"ffconcat version 1.0\nfile '{target}'\n"
        yield f'<?xml version="1.0"?><MPD><Period><BaseURL>{target}</BaseURL></Period></MPD>'
        yield f"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=control:{target}\n"


def test_a_playlist_under_another_name_opens_nothing(video, tmp_path, address):
    (tmp_path / video.name).write_bytes(video.read_bytes())
    suffixes = [".mp4", ".gif", ".mov", ".mkv", ".avi"]  # by turns: four kinds of lists, five targets, as many suffixes
    for i, text in enumerate(playlists(video, address)):
        path = tmp_path / f"{i}{suffixes[i % 5]}"
        path.write_text(text)
        assert str(path) in refused(clips, path)


@pytest.mark.parametrize("kind", [b"url ", b"alis"])
def test_a_mov_that_refers_to_another_file_shows_nothing_of_it(kind, video, tmp_path):
    """QuickTime's data references (`dref` of kind `alis`, `url `) may name other files."""
    content = bytearray(video.read_bytes())
    (tmp_path / "secret.mp4").write_bytes(content)
    place = content.index(b"url \0\0\0\1")
    content[place : place + 8] = kind + b"\0\0\0\0"  # not "in this file" any more
    pixels = slice(content.index(b"mdat") + 4, content.index(b"moov") - 4)
    content[pixels] = bytes(len(content[pixels]))  # so that nothing white is left here
    (tmp_path / "reference.mov").write_bytes(content)
    with suppress(data.DataError):
        assert clips(tmp_path / "reference.mov").max() < 200


# ---------------------------------------------------------------- bombs
def saved(format, side):
    file = io.BytesIO()
    Image.new("P", (side, side)).save(file, format)
    return bytearray(file.getvalue())


def png(side):
    """A header that promises so many pixels."""
    content = saved("PNG", 8)
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return content


def gif(side, frames=1, frame=None):
    """A GIF of many frames, each of the whole screen, of which all but a pixel is missing; or of `frame`."""
    size, whole = struct.pack("<HH", side, side), struct.pack("<HH", frame or side, frame or side)
    image = b"\x2c\0\0\0\0" + whole + b"\0\x02\x02\x44\x01\0"  # LZW: clear, a pixel, end
    return b"GIF89a" + size + b"\x80\0\0\0\0\0\xff\xff\xff" + image * frames + b"\x3b"


def gif_bomb(side, frames):
    """Whole frames: some 10 kB of file to 16 million pixels."""
    content = saved("GIF", side)
    place = content.index(b"\x2c\0\0\0\0")
    return content[:place] + content[place:-1] * frames + b"\x3b"


def mp4(video, side):
    content = bytearray(video.read_bytes())
    picture, track = content.index(b"avc1") + 28, content.index(b"tkhd") + 80
    content[picture : picture + 4] = struct.pack(">HH", side, side)
    content[track : track + 8] = struct.pack(">II", side << 16, side << 16)
    return content


READ = r"^read \(2, 2, 3, 32, 32\)"
BOMBS = {  # name: (how it is made, what becomes of it)
    "a PNG of 10,000 x 10,000": (lambda video: png(10_000), "DataError.*too many"),
    "a GIF of 65,535 x 65,535": (lambda video: gif(65_535), "DataError.*no readable"),
    "a GIF whose frames are larger than it": (lambda video: gif(16, 3, 65_535), READ),
    "a GIF of 8,000 broken frames of 5,000 x 5,000": (lambda video: gif(5000, 8000), READ),
    "a GIF of 900 frames of 4,000 x 4,000": (lambda video: gif_bomb(4000, 900), "DataError.*over 2 s"),
    "an MP4 of 60,000 x 60,000": (lambda video: mp4(video, 60_000), READ),
}  # fmt: skip


@pytest.fixture
def little_memory(monkeypatch):
    """1.5 GB of address space beyond what is in use: more is a MemoryError, not a slow machine. And little time."""
    if sys.platform != "linux":
        pytest.skip("address space is limited as Linux does it")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29, limits[1]))
    monkeypatch.setattr(data, "TIME_LIMIT", 2.0)
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_an_error_or_a_small_picture_not_in_memory_or_time(name, video, tmp_path, little_memory):
    make, expected = BOMBS[name]
    (tmp_path / "bomb.gif").write_bytes(make(video))
    began = time.monotonic()
    try:
        verdict = f"read {tuple(clips(tmp_path / 'bomb.gif').shape)}"
    except data.DataError as error:
        verdict = f"DataError: {error}"
    assert re.search(expected, verdict), verdict
    assert time.monotonic() - began < 20  # of five, on a machine that does other things, too


# ---------------------------------------------------------------- annotations
def test_a_field_of_a_million_lines_is_an_error_at_once(tmp_path):
    head, began = "key,vid_key,video_id,sentence\nret0,msr0,video0,", time.monotonic()
    for field in ('"' + "a line\n" * 1_000_000, '"' + "\n" * 1_000_000 + '"\n', "x" * 20_000_000):
        (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text(head + field)
        with pytest.raises(data.DataError, match=r"MSRVTT_JSFUSION_test.csv:\d+: "):
            data.read_examples("msrvtt_retrieval", tmp_path, "test")
    (tmp_path / "msrvtt_mc_test.jsonl").write_text('{"clip_name": "' + "\\n" * 1_000_000 + '"}')
    with pytest.raises(data.DataError, match="msrvtt_mc_test.jsonl:1: clip_name has"):
        data.read_examples("msrvtt_mc", tmp_path, "test")
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 4 * 2**30
