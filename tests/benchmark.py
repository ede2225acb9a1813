"""What is fast and by how much: ratios, each measured in one run.

    python tests/benchmark.py                 every part that this machine can run
    python tests/benchmark.py decode step     only these
    CHECKPOINT=runs/msrvtt_retrieval/best.pt PAIRS=200 python tests/benchmark.py retrieval     with a trained model

A table a part: the median of several runs, their spread, the ratio to the first row, and the target where there is one.
A missed target says so. What cannot run here (no GPU, a peer that is not installed) is named and left out.
"""

import argparse
import functools
import gc
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import imageio_ffmpeg
import numpy as np
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clipbert
import data
import finetune

GPU = clipbert.Device("cuda", torch.bfloat16, 0)


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
            table(f"{name}, N = {n}", measure(jobs, 15), target if av else None)
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
            full = torch.empty_like(frames)
            data._decode(path, media, [(0, wanted)], full)  # from the first frame on
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
#
# The plain version does what the fast one does with none of its care: clip after clip, float16 (on a CPU: float32),
# NCHW, the norms by themselves, eager attention, an optimizer that is not fused.

# Random examples of a row of finetune.TASKS: the batch is the task's, K the model's outputs, `texts` come with a video.
WORK = {
    "TGIF-QA 1x1": ("tgif_qa_action", {"texts": 5, "K": 1, "target": lambda B: torch.zeros(B, dtype=torch.long)}),
    "MSRVTT 8x2": ("msrvtt_retrieval", {"texts": 2, "K": 2, "target": lambda B: torch.tensor([1, 0]).repeat(B)}),
}


def example_batch(task, texts, target, batch_size, size, vocab):
    """One batch as the loader hands it over, of random pixels and words; pinned where there is a GPU."""
    ids = torch.randint(5, vocab, (batch_size * texts, task.text_length))
    batch = {
        "frames": torch.randint(0, 256, (batch_size, task.train_clips, task.frames, 3, size, size), dtype=torch.uint8),
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "target": target(batch_size),
    }  # fmt: skip
    return {k: v.pin_memory() for k, v in batch.items()} if torch.cuda.is_available() else batch


def plain_features(cnn, frames):
    x = cnn.normalize(frames)
    r = cnn.resnet
    x = r.layer4(r.layer3(r.layer2(r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(x))))))))
    return cnn.grid_encoder(x).permute(0, 2, 3, 1)


def plain_logits(model, frames, input_ids, attention_mask):
    return torch.stack([model(frames[:, i], input_ids, attention_mask) for i in range(frames.shape[1])])


def training_step(model, task, device, plain=False, lr=1e-4, plain_dtype=None):
    """-> a function that does one update with a batch, as finetune.train does, and returns its loss."""
    optimizer = clipbert.build_optimizer(model.train())
    logits_of = plain_logits if plain else clipbert.clip_logits
    if plain:
        plain_dtype = plain_dtype or (torch.float16 if device.name == "cuda" else torch.float32)
        device = device._replace(dtype=plain_dtype)
        optimizer = torch.optim.AdamW(clipbert.optimizer_groups(model, 1e-3), betas=(0.9, 0.98), eps=1e-6, fused=False)
        model.cnn.features = partial(plain_features, model.cnn)
        model.bert.set_attn_implementation("eager")
    scaler = torch.amp.GradScaler(device.name, enabled=device.dtype == torch.float16)

    def step(batch):
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = device.move(batch)
        with device.autocast():
            logits = logits_of(model, batch["frames"], batch["input_ids"], batch["attention_mask"])
            p = clipbert.aggregate_clips(logits.float(), task.agg)
            loss = clipbert.video_loss(p, batch["target"], task.kind)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def model_for(cfg, K, device):
    torch.manual_seed(0)
    return device.place(clipbert.ClipBert(cfg, K))


def convolutions_only(frames, device):
    """The ceiling: a ResNet-50's convolutions and nothing else, forward and backward, compiled -> a function."""
    resnet = torchvision.models.resnet50(norm_layer=lambda channels: torch.nn.Identity())
    resnet.avgpool = resnet.fc = torch.nn.Identity()
    for module in (resnet.conv1, resnet.layer1):
        module.requires_grad_(False)
    for conv in (module for module in resnet.modules() if isinstance(module, torch.nn.Conv2d)):
        conv.weight.data.mul_(0.1)  # without norms, so that nothing overflows
    resnet = resnet.to(device.name, device.dtype, memory_format=torch.channels_last)
    frames = frames.flatten(0, 2).to(device.name, device.dtype).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(resnet)
    return lambda: compiled(frames).sum().backward()


def no_gpu(part):
    if not torch.cuda.is_available():
        print(f"\n{part}: left out, no GPU")
    return not torch.cuda.is_available()


def step_part(device=None, cfg=None, size=448, batch_size=None, compiled=True):
    """Training throughput. The arguments are for a trial on a small machine."""
    if device is None and no_gpu("step"):
        return
    device, cfg = device or GPU, cfg or clipbert.ClipBertConfig.base()
    for name, (key, work) in WORK.items():
        task = finetune.TASKS[key]
        B, K = batch_size or task.batch_size, work["K"]
        batch = example_batch(task, work["texts"], work["target"], B, size, cfg.vocab_size)
        jobs = {"plain": partial(training_step(model_for(cfg, K, device), task, device, plain=True), batch),
                "fast": partial(training_step(model_for(cfg, K, device), task, device), batch)}  # fmt: skip
        if compiled:
            fast = device._replace(compile=True)
            jobs["fast, --compile"] = partial(training_step(model_for(cfg, K, fast), task, fast), batch)
            jobs["ceiling: the ResNet's convolutions, compiled"] = convolutions_only(batch["frames"], device)
        seconds = measure(jobs)
        table(f"{name}: a training step of {B} videos at {size} px", seconds, target=2, ours="fast")
        for job, runs in seconds.items():
            line = f"{job:44}{B / median(runs):9.1f} videos/s"
            if device.name == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                jobs[job]()
                line += f"{(torch.cuda.max_memory_allocated() - before) / 2**30:9.1f} GiB for activations and gradients"
            if compiled:
                line += f"{median(list(seconds.values())[-1]) / median(runs):9.0%} of the ceiling"
            print(line)


def memory_part():
    """Which batch x accumulation fits, tried within that much of this GPU."""
    if no_gpu("memory"):
        return
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    for name, (key, work) in WORK.items():
        task = finetune.TASKS[key]
        whole = task.batch_size * task.grad_accum
        print(f"\n{name}, 448 px: --batch_size x --grad_accum that fits, of one update of {whole} videos")
        for gigabytes in (8, 16, 24, 80):
            if gigabytes > total + 2:
                print(f"{gigabytes:4} GB: left out, this GPU has {total:.0f}")
                continue
            torch.cuda.set_per_process_memory_fraction(min(1.0, (gigabytes - 1) / total))  # 1: what CUDA itself takes
            row = []
            for chunk in (None, 16, 4):
                fits = next((B for B in (32, 16, 8, 4, 2, 1) if whole % B == 0 and step_fits(task, work, B, chunk)), 0)
                row.append(f"{f'--chunk {chunk}' if chunk else 'as it is'}: "
                           + (f"{fits} x {whole // fits}" if fits else "nothing"))  # fmt: skip
            print(f"{gigabytes:4} GB: " + ", ".join(row))
        torch.cuda.set_per_process_memory_fraction(1.0)


def step_fits(*what):
    try:
        two_steps(*what)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def two_steps(task, work, batch_size, chunk):
    device, cfg = GPU._replace(chunk=chunk), clipbert.ClipBertConfig.base()
    step = training_step(model_for(cfg, work["K"], device), task, device)
    batch = example_batch(task, work["texts"], work["target"], batch_size, 448, cfg.vocab_size)
    for _ in range(2):  # the second holds the optimizer's state, too
        step(batch)


def agree_part(steps=100, batch_size=None):
    """Losses of the fast and the plain version, from the same weights on the same batches.

    Roundings add up over the steps. What bf16 itself makes of that is the yardstick: the plain version in bf16.
    """
    gpu = torch.cuda.is_available()
    device = GPU if gpu else clipbert.Device("cpu", torch.bfloat16, 0)
    cfg = replace(clipbert.ClipBertConfig.base(), dropout=0.0) if gpu else clipbert.ClipBertConfig.tiny(200)
    for name, (key, work) in WORK.items():
        task = finetune.TASKS[key]
        B = batch_size or (task.batch_size if gpu else 4)
        versions = [(False, None), (True, None), (True, torch.bfloat16)]
        versions = [training_step(model_for(cfg, work["K"], device), task, device, p, 3e-5, d) for p, d in versions]
        losses, size = [], 448 if gpu else 64
        for _ in range(steps):
            batch = example_batch(task, work["texts"], work["target"], B, size, cfg.vocab_size)
            losses.append([version(batch).item() for version in versions])
        a, b, rounded = torch.tensor(losses, dtype=torch.float64).T
        apart, yardstick = (a - b).abs() / b, ((rounded - b).abs() / b).mean()
        print(f"\n{name}: the {'base' if gpu else 'tiny'} model, {steps} steps of {B} videos at {size} px, "
              f"{device.dtype} against {'float16' if gpu else 'float32'}\nlosses: first {a[0]:.5f} {b[0]:.5f}, last "
              f"{a[-1]:.5f} {b[-1]:.5f}; apart by {apart.mean():.2%} on average, {apart.max():.2%} at most; "
              f"the plain version in bf16 {yardstick:.2%}: "
              f"{'agreed' if apart.mean() <= 2 * yardstick + 2**-8 else 'NOT AGREED'}")  # fmt: skip


def feed_part(size=448, videos=8, repeats=3):
    """Videos/s that the data loader alone delivers, by workers, and that a training step takes."""
    takes = {}
    if torch.cuda.is_available():
        for name, (key, work) in WORK.items():
            task, cfg = finetune.TASKS[key], clipbert.ClipBertConfig.base()
            batch = example_batch(task, work["texts"], work["target"], task.batch_size, size, cfg.vocab_size)
            step = training_step(model_for(cfg, work["K"], GPU), task, GPU)
            takes[name] = task.batch_size / median(measure({"": partial(step, batch)})[""])
    with tempfile.TemporaryDirectory() as folder:
        for i in range(videos):
            write_noise_video(Path(folder) / f"video{i}.mp4")
        examples = [data.Example(str(i), f"video{i}", "a cat") for i in range(videos)] * 4
        for name, (key, _) in WORK.items():
            task = finetune.TASKS[key]
            dataset = data.ClipDataset(examples, Path(folder), n_clips=task.train_clips, n_frames=task.frames,
                                       fps=task.fps, size=size, train=True)  # fmt: skip
            need = f"the step takes {takes[name]:.1f}" if takes else "what the step takes: not measured, no GPU"
            print(f"\n{name}: videos/s from 15 s of 320x240 at {size} px; {need}")
            for workers in sorted({0, 1, 2, os.cpu_count() // 2, os.cpu_count()}):
                rates = [loader_rate(dataset, workers) for _ in range(repeats)]
                spread = (max(rates) - min(rates)) / median(rates)
                enough = ("  enough" if median(rates) >= takes[name] else "  not enough") if takes else ""
                print(f"{workers:4} workers{median(rates):9.1f}{spread:9.0%}{enough}")


def loader_rate(dataset, workers, batch_size=2):
    order = [[(0, i) for i in range(b, b + batch_size)] for b in range(0, len(dataset), batch_size)]
    loader = iter(data.data_loader(dataset, order, lambda items: [item["frames"] for item in items], workers))
    for _ in range(max(1, workers)):
        next(loader)  # processes start, headers are read
    began = time.perf_counter()
    return batch_size * sum(1 for _ in loader) / (time.perf_counter() - began)


def write_noise_video(path, seconds=15, fps=25, width=320, height=240):
    """A moving gradient with noise: compresses like a video, not like a drawing."""
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=1)
    writer.send(None)
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * (1, 2, 3)
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3))
    for t in range(seconds * fps):
        writer.send(((ramp + 3 * t + np.roll(noise, 7 * t, 1)) % 256).astype(np.uint8).tobytes())
    writer.close()


# ------------------------------------------------------------------------------------------------ retrieval


def retrieval_run(folder):
    """The tiny model (CHECKPOINT's, or with random weights) and 200 toy videos, each with a caption."""
    data.write_toy_msrvtt(folder, train=100, test=100, seed=1)  # there are not 200 test videos that all differ
    examples = [e for split in ("test", "train") for e in data.read_examples("msrvtt_retrieval", folder, split)]
    examples = list({e.video: e for e in examples}.values())
    path = os.environ.get("CHECKPOINT")
    args = finetune.parse_arguments(["--task", "msrvtt_retrieval", "--data", str(folder), "--eval", path or "none"])
    if path:
        return *finetune.load_for_use(args), examples
    torch.manual_seed(0)
    vocabulary = data.vocabulary_from_text([e.text for e in examples])
    task, device = finetune.task_row(args, None), clipbert.choose_device(args)
    settings, tokenizer = finetune.settings_for(args, clipbert.ClipBertConfig.tiny()), data.build_tokenizer(vocabulary)
    run = finetune.Run(task, folder, settings, device, tokenizer, None, 0, False)
    return run, device.place(clipbert.ClipBert(clipbert.ClipBertConfig.tiny(len(vocabulary)), 2)), examples


@torch.no_grad()
def reference_order(run, model, texts, videos, n_clips, batch_size):
    """For each video, for each mini-batch of captions: all clips, one after the other, CNN and transformer."""
    tokens = run.tokenizer(texts, padding=True, return_tensors="pt")
    scores = torch.zeros(len(texts), len(videos), dtype=torch.float64)
    for column, batch in enumerate(run.loader(videos, n_clips, False, [[(0, i)] for i in range(len(videos))])):
        frames = batch["frames"].to(run.device.name)
        for b in range(0, len(texts), batch_size):
            rows = slice(b, b + batch_size)
            text = (tokens[k][rows].to(run.device.name) for k in ("input_ids", "attention_mask"))
            with run.device.autocast():
                p = clipbert.aggregate_clips(plain_logits(model, frames, *text).float(), run.settings["agg"])
            scores[rows, column] = clipbert.match_score(p).cpu().double()
    return scores


def our_order(run, model, texts, videos, n_clips):
    return finetune.score_pairs(run, model, texts, finetune.encode_videos(run, model, videos, n_clips)[0])


def retrieval_part(pairs=None, timed=1, n_clips=16):
    """Every caption against every video. The reference's order is linear in the videos: timed on the first of them."""
    pairs = pairs or int(os.environ.get("PAIRS") or (200 if torch.cuda.is_available() else 48))
    with tempfile.TemporaryDirectory() as folder:
        run, model, examples = retrieval_run(Path(folder))
        model.eval()
        texts = [e.text for e in examples]
        work = run, model, texts, examples[:timed], n_clips
        jobs = {f"reference's order, {size:2} captions a pass": partial(reference_order, *work, size)
                for size in (16, 4, 64)}  # 16: the batch size of this task  # fmt: skip
        seconds = measure(jobs | {"ours: the CNN once": partial(our_order, *work)}, repeats=3)
        what = "trained weights" if os.environ.get("CHECKPOINT") else "random weights"
        table(f"Retrieval, {what}: {len(texts)} captions x {timed} of the videos x {n_clips} clips", seconds, target=8)
        print("The transformer sees every pair on every clip either way; only the two stages below spare it that.")
        same_ranks(run, model, examples[:24], n_clips)
        two_stages(run, model, examples[:pairs], n_clips)
        grid = finetune.encode_videos(run, model, examples[:1], n_clips)[0][0]
        print(f"grids of 1,000 videos x {n_clips} clips: {1000 * grid.nbytes / 1e6:,.0f} MB as {grid.dtype} here; the "
              f"base model's at 448 px in half precision {1000 * n_clips * 49 * 768 * 2 / 1e6:,.0f} MB")  # fmt: skip


def same_ranks(run, model, examples, n_clips):
    """Does every caption find its video, and every video its caption, at the same rank in both orders of work?"""
    texts = [e.text for e in examples]
    theirs = reference_order(run, model, texts, examples, n_clips, 16)
    ours = our_order(run, model, texts, examples, n_clips)
    ranks = [finetune.ranks_of(s.diagonal()[:, None], s) for s in (theirs, ours, theirs.T, ours.T)]
    same = torch.equal(ranks[0], ranks[1]) and torch.equal(ranks[2], ranks[3])
    print(f"{len(texts)} captions x {len(texts)} videos: ranks {'identical' if same else 'DIFFER'}, scores apart by "
          f"{(theirs - ours).abs().max():.0e} at most")  # fmt: skip


def two_stages(run, model, examples, n_clips):
    """All pairs on all clips against: all pairs on one clip, a share of them on all clips."""
    texts, columns, rows = [e.text for e in examples], range(len(examples)), {}
    began = time.perf_counter()
    grids, _ = finetune.encode_videos(run, model, examples, n_clips)
    encoding = time.perf_counter() - began
    for share in (1, 0.3, 0.2, 0.1):
        K = round(share * len(examples))
        began = time.perf_counter()
        scores = finetune.score_pairs(run, model, texts, grids, K)
        seconds, metrics = time.perf_counter() - began, finetune.retrieval_metrics(scores, columns)
        rows[K] = seconds, metrics["text_to_video"]["r1"], metrics["video_to_text"]["r1"]
    everything, r1, _ = rows[len(examples)]
    print(f"\nTwo stages: {len(texts)} captions x {len(texts)} videos x {n_clips} clips, one run each; before them all "
          f"videos are encoded, once, in {encoding:.1f} s\n"
          f"{'':28}{'scoring, s':>11}{'speed':>8}{'... with encoding':>19}{'R@1 t2v':>9}{'R@1 v2t':>9}")  # fmt: skip
    good = [0.0]
    for K, (seconds, *both) in rows.items():
        name = f"--rerank {K}" if K < len(texts) else "exhaustive"
        speeds = everything / seconds, (everything + encoding) / (seconds + encoding)
        print(f"{name:28}{seconds:11.1f}{speeds[0]:7.1f}x{speeds[1]:18.1f}x" + "".join(f"{r:9.1f}" for r in both))
        good += [speeds[1]] if abs(both[0] - r1) <= 0.5 else []
    print(f"target: 4x with encoding and R@1 (text to video) within 0.5, {'reached' if max(good) >= 4 else 'MISSED'} "
          f"({max(good):.1f}x)")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------

PARTS = {
    # decoding
    "decode": decoding, "loader": loader, "cache": cached, "pixels": pixels,
    # the model
    "step": step_part,
    "memory": memory_part,
    "agree": agree_part,
    "feed": feed_part,
    "retrieval": retrieval_part,
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
