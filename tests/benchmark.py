"""What is fast and by how much: ratios, each measured in one run.

    python tests/benchmark.py                 every part that this machine can run
    python tests/benchmark.py decode step     only these

A table a part: the median of several runs, their spread, the ratio to the first row, and the target where there is one.
A missed target says so. What cannot run here (no GPU, a peer that is not installed) is named and left out.
"""

import argparse
import functools
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import imageio_ffmpeg
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data


def optional(module):
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):  # torchcodec without FFmpeg's libraries
        print(f"{module} is not here: left out")


av, torchcodec, decord = map(optional, ("av", "torchcodec.decoders", "decord"))


def measure(jobs, repeats=5):
    """{name: function} -> {name: seconds of each run}. The jobs take turns, so that a busy moment hits them all."""
    for job in jobs.values():
        job()  # caches fill, kernels compile
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def table(title, seconds, target=None, ours=None):
    """Print a part's rows; the first is what the others are compared with.

    target: at least how many times as fast `ours` (default: the last row) should be.
    """
    base, ours = median(next(iter(seconds.values()))), ours or list(seconds)[-1]
    print(f"\n{title}\n{'':44}{'median ms':>11}{'spread':>9}{'speed':>9}")
    for name, runs in seconds.items():
        spread = (max(runs) - min(runs)) / median(runs)
        print(f"{name:44}{1000 * median(runs):11.1f}{spread:9.0%}{base / median(runs):8.2f}x")
    if target:
        ratio = base / median(seconds[ours])
        print(f"target for {ours!r}: {target}x, {'reached' if ratio >= target else 'MISSED'} ({ratio:.2f}x)")


# ----------------------------------------------------------------------------------------------------------------------
# Decoding: random clips of T = 2 frames at 2 fps, 448 pixels; videos are drawn once, into the temporary folder

L, T, FPS = 448, 2, 2
SOURCES = {  # name: (size, rate, seconds, encoder)
    "15 s.mp4": ("320x240", 30, 15, "-b:v 300k"),
    "180 s.mp4": ("320x240", 30, 180, "-b:v 300k"),
    "3 s.mp4": ("320x240", 30, 3, "-b:v 300k"),
    "720p 30 s.mp4": ("1280x720", 30, 30, "-b:v 2M -preset veryfast"),
    "720p 180 s.mp4": ("1280x720", 30, 180, ""),  # the 30 s, six times
    "TGIF.gif": ("320x240", 12, 3, ""),
}


def video(name):
    """A test pattern that moves under noise, key frames 250 frames apart; -> its path."""
    size, rate, seconds, encoder = SOURCES[name]
    path = Path(tempfile.gettempdir()) / "clipbert-benchmark" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_name("part " + name)
        drawn = ["-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds},noise=alls=12:allf=t"]
        if name.endswith(".mp4"):
            drawn += ["-c:v", "libx264", "-g", "250", "-pix_fmt", "yuv420p", *encoder.split()]
        if name == "720p 180 s.mp4":
            drawn = ["-stream_loop", "5", "-i", video("720p 30 s.mp4"), "-c", "copy"]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, drawn), str(part)], check=True)
        part.rename(path)
    return str(path)


def clips_of(path, n, train, generator):
    media = data.probe(path)
    return data.sample_clips(media.num_frames, media.fps, n, T, FPS, train, generator), media.fps


def reference_clips(path, n, train, generator, all_to_rgb=True):
    """The reference's way, in our words: for each clip open the file, seek back to a key frame, decode to the clip's
    end, turn its frames to RGB, take T of them, resize and pad in float. In testing the whole video is decoded first.
    """
    clips, fps = clips_of(path, n, train, generator)
    if not train:
        with av.open(path) as container:
            for _ in container.decode(video=0):
                pass
    batch = []
    for clip in clips.tolist():
        with av.open(path) as container:
            stream, frames = container.streams.video[0], []
            if clip[0]:
                container.seek(int(clip[0] / fps / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                i = round(float(frame.pts * stream.time_base) * fps)
                if i in clip or all_to_rgb and i >= clip[0]:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if i >= clip[-1]:
                    break
        chosen = [frames[i] for i in torch.linspace(0, len(frames) - 1, T).long()]
        batch.append(data.resize_and_pad(torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).float(), L))
    return torch.stack(batch)


def torchcodec_clips(path, n, train, generator):
    decoder = torchcodec.VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
    frames = decoder.get_frames_at(clips_of(path, n, train, generator)[0].flatten().tolist()).data
    return data.resize_and_pad(frames, L)


def decord_clips(path, n, train, generator):
    media = data.probe(path)
    h, w = data.resized_shape(media.height, media.width, L)
    reader = decord.VideoReader(path, width=w, height=h, num_threads=1)
    frames = reader.get_batch(clips_of(path, n, train, generator)[0].flatten().tolist()).asnumpy()
    return data.resize_and_pad(torch.from_numpy(frames).permute(0, 3, 1, 2), L)


def our_clips(path, n, train, generator, cache=False):
    return data.read_clips(path, n, T, FPS, L, train, generator, cache)


def readers():
    """{name: (path, n_clips, train, generator) -> clips}, the reference first; peers that are missing are named."""
    ways = {"reference's way (PyAV)": (av, reference_clips),
            "... only T frames to RGB": (av, functools.partial(reference_clips, all_to_rgb=False)),
            "torchcodec, 1 thread": (torchcodec, torchcodec_clips), "decord, 1 thread": (decord, decord_clips),
            "ours": (data, our_clips)}  # fmt: skip
    return {name: read for name, (package, read) in ways.items() if package}


def job(read, *arguments, **options):
    """Read other clips in each round; every reader the same."""
    generator = torch.Generator().manual_seed(0)
    return lambda: read(*arguments, generator, **options)


def decode(title, name, n, target, train=True, peer=None, skip=()):
    """One table. peer: how many times torchcodec's time is allowed."""
    path = video(name)
    seconds = measure({way: job(read, path, n, train) for way, read in readers().items() if way not in skip})
    if not av:
        target = None  # nothing to compare with
    table(f"{title}, N = {n}", seconds, target, "ours")
    if peer and torchcodec:
        ratio = median(seconds["ours"]) / median(seconds["torchcodec, 1 thread"])
        print(f"target: at most {peer}x torchcodec's time, {'reached' if ratio <= peer else 'MISSED'} ({ratio:.2f}x)")


def decoding():
    decode("15 s, 320x240", "15 s.mp4", 8, 3, peer=1.5)
    decode("15 s, 320x240", "15 s.mp4", 16, 4, peer=1.5)
    decode("180 s, 320x240", "180 s.mp4", 8, 1.7)
    decode("30 s, 720p", "720p 30 s.mp4", 8, 2, peer=1)
    decode("180 s, 720p", "720p 180 s.mp4", 8, 1.5, peer=1)
    decode("15 s, 320x240, uniform test clips", "15 s.mp4", 8, 3, train=False)
    decode("15 s, 320x240, uniform test clips", "15 s.mp4", 16, 3, train=False)
    decode("GIF, 3 s", "TGIF.gif", 1, 1, skip=("torchcodec, 1 thread", "decord, 1 thread"))
    decode("3 s MP4, one clip: starting a process dominates", "3 s.mp4", 1, None)
    path = video("3 s.mp4")
    seconds = measure({"the same with the header not yet known": lambda: (data._probe.cache_clear(), our_clips(
        path, 1, True, torch.Generator().manual_seed(0)))})  # fmt: skip
    table("3 s MP4, first time", seconds)


class Videos(torch.utils.data.Dataset):
    def __init__(self, read, path, count):
        self.read, self.path, self.count = read, path, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.read(self.path, 8, True, torch.Generator().manual_seed(i))


def loader():
    path, count = video("15 s.mp4"), 16

    def epoch(read):
        batches = torch.utils.data.DataLoader(Videos(read, path, count), batch_size=4, num_workers=2,
                                              persistent_workers=True)  # fmt: skip
        return lambda: [None for _ in batches]

    seconds = measure({name: epoch(read) for name, read in readers().items()}, repeats=3)
    table(f"DataLoader, 2 workers: {count} videos, 15 s, N = 8", seconds, 2 if av else None, "ours")
    rates = (f"{name} {count / median(runs):.1f}" for name, runs in seconds.items())
    print(f"videos/s: {', '.join(rates)}")


def cached():
    for name, target in (("15 s.mp4", 10), ("180 s.mp4", 20)):
        path = video(name)
        began = time.perf_counter()
        size, error = data.write_cached(path, L, 4.0)
        size = size or data.cached_file_of(path, L).stat().st_size
        print(f"\n{name}: {size / 1e6:.1f} MB at 4 frames a second, the video itself "
              f"{Path(path).stat().st_size / 1e6:.1f} MB; written in {time.perf_counter() - began:.1f} s{error}")
        for n in (1, 8):
            jobs = {"reference's way (PyAV)": job(reference_clips, path, n, True)} if av else {}
            jobs["ours, from the cache"] = job(our_clips, path, n, True, cache=True)
            table(f"{name}, N = {n}", measure(jobs), target if av else None)
    far = [abs(i / 30 - round(i / 30 * 4) / 4) for i in range(450)]
    print(f"at 4 frames a second a frame is {sum(far) / len(far):.3f} s off on average, {max(far):.3f} s at most")


def pixels():
    """Is it the right frame, and how far are ffmpeg's scaler and the cache's JPEGs from the reference's resize?"""
    for name in ("15 s.mp4", "180 s.mp4", "720p 30 s.mp4"):
        path, seeks, equal, count = video(name), 0, 0, 0
        media = data.probe(path)
        for seed in range(5):
            wanted = sorted(set(clips_of(path, 8, True, torch.Generator().manual_seed(seed))[0].flatten().tolist()))
            seeks += len(data._plan(media, wanted))
            frames = data.read_frames(path, wanted, L)
            full = data._decode(path, media, [(0, wanted)], L)  # from the first frame on
            equal += (frames == full).flatten(1).all(1).sum().item()
            count += len(wanted)
        side = max(media.width, media.height)
        whole = data.read_frames(path, wanted, side)[..., : media.height, : media.width]  # not scaled
        h, _ = data.resized_shape(media.height, media.width, L)
        away = (data.resize_and_pad(whole.float(), L) - frames.float())[:, :, :h].abs()
        print(f"\n{name}: {equal} of {count} frames equal a full decode's, bit for bit "
              f"(8 clips, {seeks / 5:.1f} inputs)\nscaled by ffmpeg, they differ from "
              f"resize_and_pad's by {away.mean():.2f} grey levels on average, "
              f"{away.max():.0f} at most; {(away > 8).float().mean():.1%} of the pixels by more than 8")


# ----------------------------------------------------------------------------------------------------------------------
# The model: the training step, retrieval


# ----------------------------------------------------------------------------------------------------------------------

PARTS = {
    # decoding
    "decode": decoding, "loader": loader, "cache": cached, "pixels": pixels,
    # the model
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}, "
          f"torch {torch.__version__}")  # fmt: skip
    for part in args.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
