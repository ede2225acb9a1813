"""Files from strangers: names that are options or addresses, files that point to other files, and bombs.

What is refused must be refused before it costs memory or time; what only looks odd must be read.
"""

import io
import multiprocessing
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image

import data

SIZE = 32


def clips(path):
    return data.read_clips(path, 2, 2, 2.0, SIZE, False)


def refused(path):
    with pytest.raises(data.DataError) as caught:
        clips(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A real video, white: whoever is led to it shows white frames."""
    path = tmp_path_factory.mktemp("video") / "secret.mp4"
    data.write_gif([Image.new("RGB", (32, 24), (255, 255, 250 + i)) for i in range(4)], path.with_suffix(".gif"))
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path.with_suffix(".gif")]
    subprocess.run([*ffmpeg, "-pix_fmt", "yuv420p", path], check=True, timeout=60)
    return path


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["-x.mp4", "-i.mp4", "-version.mp4", "a|b.mp4", "x.mp4", "%d.mp4", "sub/-x.mp4",
                                  "'q'.mp4", "a;b,c[0].mp4", "pipe.mp4", "$HOME.mp4"])
def test_odd_names_are_just_names(name, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(video.read_bytes())
    found = data.find_media(tmp_path, name)
    assert found == place and clips(found).shape == (2, 2, 3, SIZE, SIZE)


@pytest.fixture
def server():
    """A web server on this machine that notes who asks."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_addresses_and_protocols_are_no_files(video, tmp_path, server):
    address, asked = server
    for name in (f"{address}/x.mp4", f"concat:{video}|{video}", "pipe:0", f"file:{video}", "data:video/mp4;base64,AAAA",
                 f"subfile,,start,0,end,0,,:{video}", "lavfi:color"):
        try:
            assert data.find_media(tmp_path, name) is None
        except data.DataError as error:
            assert "must stay inside" in str(error)
        assert "no such file" in refused(name)
    assert not asked


def playlists(video, address):
    """Text files that name others, by absolute path, by a path beside them, and over the network."""
    for target in (str(video), video.name, f"file:{video}", f"{address}/x.mp4", f"concat:{video}|{video}"):
        yield f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"
        yield f"ffconcat version 1.0\nfile '{target}'\n"
        yield f'<?xml version="1.0"?><MPD><Period><BaseURL>{target}</BaseURL></Period></MPD>'
        yield f'<smil><body><video src="{target}"/></body></smil>'
        yield f"[playlist]\nFile1={target}\n"
        yield f"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=control:{target}\n"


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".mov", ".mkv", ".avi", ".mpg"])
def test_a_playlist_under_another_name_opens_nothing(suffix, video, tmp_path, server):
    address, asked = server
    (tmp_path / video.name).write_bytes(video.read_bytes())
    for i, text in enumerate(playlists(video, address)):
        path = tmp_path / f"{i}{suffix}"
        path.write_text(text)
        assert str(path) in refused(path)
    assert not asked


def test_a_mov_that_refers_to_another_file_shows_nothing_of_it(video, tmp_path):
    """QuickTime's data references (`dref` of kind `alis`, `url `) may name other files."""
    content = video.read_bytes()
    place = content.index(b"url \0\0\0\1")
    (tmp_path / "secret.mp4").write_bytes(content)
    for kind in (b"url ", b"alis"):
        changed = bytearray(content)
        changed[place : place + 8] = kind + b"\0\0\0\0"  # not "in this file" any more
        changed[changed.index(b"mdat") + 4 : changed.index(b"mdat") + 24] = bytes(20)
        path = tmp_path / f"{kind.decode().strip()}.mov"
        path.write_bytes(changed)
        try:
            clips(path)
        except data.DataError as error:
            assert str(path) in str(error)


# ---------------------------------------------------------------- bombs


def png(width, height, rows=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def gif(width, height, frames=1, frame=None):
    """A GIF of many frames, each of the whole screen, of which all but a pixel is missing; or of `frame`."""
    size = struct.pack("<HH", *(frame or (width, height)))
    image = b"\x2c\0\0\0\0" + size + b"\0\x02\x02\x44\x01\0"  # LZW: clear, a pixel, end
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0\0\0\0\xff\xff\xff" + image * frames + b"\x3b"


def gif_bomb(side, frames):
    """Whole frames: some 10 kB of file to 16 million pixels."""
    whole = io.BytesIO()
    Image.new("P", (side, side)).save(whole, "GIF")
    content = whole.getvalue()
    place = content.index(b"\x2c\0\0\0\0")
    return content[:place] + content[place:-1] * frames + b"\x3b"


def mp4(video, side):
    content = bytearray(video.read_bytes())
    place = content.index(b"avc1")
    content[place + 28 : place + 32] = struct.pack(">HH", side, side)
    track = content.index(b"tkhd")
    content[track + 80 : track + 88] = struct.pack(">II", side << 16, side << 16)
    return bytes(content)


BOMBS = {
    "a PNG of 100,000 x 100,000": (lambda video: png(100_000, 100_000), "too many|not a readable"),
    "a PNG whose pixels unpack to 300 MB": (lambda video: png(10_000, 10_000, bytes(3 * 10**8)), "too many"),
    "a GIF of 65,535 x 65,535": (lambda video: gif(65_535, 65_535), "too many|no readable"),
    "a GIF whose frames are larger than it": (lambda video: gif(16, 16, 3, (65_535, 65_535)), None),
    "a GIF of 8,000 broken frames of 5,000 x 5,000": (lambda video: gif(5000, 5000, 8000), None),
    "a GIF of 900 frames of 4,000 x 4,000": (lambda video: gif_bomb(4000, 900), "over 2 s"),
    "a BMP of 60,000 x 60,000": (lambda video: b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0), "too many|not a readable"),
    "an MP4 of 60,000 x 60,000": (lambda video: mp4(video, 60_000), None),
}  # fmt: skip

def read_all(paths, connection):
    """With 1.5 GB of address space beyond what the imports take: more is a MemoryError, not a slow machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29, resource.RLIM_INFINITY))
    data.TIME_LIMIT = 2.0
    for path in paths:
        began = time.monotonic()
        try:
            verdict = f"read {tuple(clips(path).shape)}"
        except data.DataError as error:
            verdict = f"DataError: {error}"
        except BaseException as error:  # noqa: BLE001 - that is what we are looking for
            verdict = f"{type(error).__name__}: {error}"
        connection.send((time.monotonic() - began, verdict))


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as Linux does it")
def test_bombs_end_in_an_error_or_a_small_picture_not_in_memory_or_time(video, tmp_path):
    paths = []
    for i, (build, _) in enumerate(BOMBS.values()):
        paths.append(tmp_path / f"{i}.gif")
        paths[-1].write_bytes(build(video))
        assert paths[-1].stat().st_size < 2**24
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(paths, sender))
    process.start()
    for name, (_, expected) in BOMBS.items():
        assert receiver.poll(30), name
        seconds, verdict = receiver.recv()
        assert seconds < 20, (name, verdict)  # of five, on a machine that does other things, too
        assert verdict.startswith("DataError: ") if expected else verdict == "read (2, 2, 3, 32, 32)", (name, verdict)
        assert not expected or any(words in verdict for words in expected.split("|")), (name, verdict)
    process.join()


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
