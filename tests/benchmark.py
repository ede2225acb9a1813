"""What is fast and by how much: ratios, each measured in one run.

    python tests/benchmark.py                 every part that this machine can run: 15 minutes on two cores
    python tests/benchmark.py decode feed     only these
    CHECKPOINT=runs/msrvtt_retrieval/best.pt PAIRS=200 python tests/benchmark.py retrieval     with a trained model

    decode     clips of videos and of a GIF at 448 pixels, beside the reference's way and torchcodec
    loader     the same in a data loader with two workers; and clips from the cache
    feed       videos/s that a data loader alone delivers, by workers: compare with what `step` takes
    step       the training step and its memory, beside a plain one (GPU)
    memory     what a GPU has to hold, estimated on a CPU: what autograd keeps of one video, times the batch
    agree      are the losses of the two steps the same, as far as bf16 lets them be?
    retrieval  every caption against every video, beside the reference's order; --rerank

A table a part: median, spread, the ratio to the first row, and the target where there is one; a missed one says so. What
cannot run here (no GPU, torchcodec or PyAV not installed) is named and left out.
"""

import argparse
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clipbert
import data
import finetune

GPU = torch.cuda.is_available()


def measure(jobs, repeats=5):
    """{name: function} -> {name: seconds of each run}. The jobs take turns, so that a busy moment hits them all."""
    for job in jobs.values():
        job()  # caches fill, kernels compile
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if GPU:
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
    if target and "ours" not in next(iter(seconds)):  # else there is nothing to compare with
        ratio = base / median(seconds[ours])
        print(f"target for {ours!r}: {target}x, {'reached' if ratio >= target else 'MISSED'} ({ratio:.2f}x)")


# ----------------------------------------------------------------------------------------------------------------------
# Decoding: clips of T = 2 frames at 2 fps, 448 pixels; videos are drawn once, into the temporary folder

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


def reference_clips(av, path, n, train, generator):
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
                if i >= clip[0]:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if i >= clip[-1]:
                    break
        chosen = [frames[i] for i in torch.linspace(0, len(frames) - 1, T).long()]
        batch.append(data.resize_and_pad(torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).float(), L))
    return torch.stack(batch)


def torchcodec_clips(decoders, path, n, train, generator):
    decoder = decoders.VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
    frames = decoder.get_frames_at(clips_of(path, n, train, generator)[0].flatten().tolist()).data
    return data.resize_and_pad(frames, L)


def our_clips(path, n, train, generator, cache=False):
    return data.read_clips(path, n, T, FPS, L, train, generator, cache)


def readers():
    """{name: (path, n_clips, train, generator) -> clips} of those that can read a video here, the reference first.

    torchcodec may be installed without FFmpeg's libraries, which only its first decoder finds out: hence the trial.
    """
    found, path = {}, video("3 s.mp4")
    for name, package, read in (("reference's way (PyAV)", "av", reference_clips),
                                ("torchcodec, 1 thread", "torchcodec.decoders", torchcodec_clips)):  # fmt: skip
        try:
            read = partial(read, importlib.import_module(package))
            read(path, 1, True, torch.Generator())
            found[name] = read
        except Exception as error:  # noqa: BLE001 - whatever a peer that can't load its libraries raises
            print(f"{name}: left out, {type(error).__name__}: {' '.join(str(error).split())[:100]}")
    return found | {"ours": our_clips}


def job(read, *arguments, **options):
    """Read other clips in each round; every reader the same."""
    generator = torch.Generator().manual_seed(0)
    return lambda: read(*arguments, generator, **options)


def decode_part():
    ways = readers()
    for title, name, n, train, target in (
        ("15 s, 320x240", "15 s.mp4", 8, True, 2.5),
        ("15 s, 320x240", "15 s.mp4", 16, True, 4),
        ("180 s, 320x240", "180 s.mp4", 8, True, 1.5),
        ("30 s, 720p", "720p 30 s.mp4", 8, True, 1.5),
        ("180 s, 720p", "720p 180 s.mp4", 8, True, 1.5),
        ("15 s, 320x240, uniform test clips", "15 s.mp4", 8, False, 3),
        ("15 s, 320x240, uniform test clips", "15 s.mp4", 16, False, 3),
        ("GIF, 3 s", "TGIF.gif", 1, True, 1),
        ("3 s MP4, one clip: starting a process dominates", "3 s.mp4", 1, True, None),
    ):
        able = [way for way in ways if name != "TGIF.gif" or "torchcodec" not in way]
        seconds = measure({way: job(ways[way], video(name), n, train) for way in able})
        table(f"{title}, N = {n}", seconds, target, "ours")


def epoch(read, count, workers):
    """-> a function that reads `count` videos, by fours; the workers stay from one call to the next."""

    def batch(seeds):
        return torch.stack([read(generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    batches = torch.utils.data.DataLoader(range(count), batch_size=4, num_workers=workers, collate_fn=batch,
                                          persistent_workers=workers > 0)  # fmt: skip
    return lambda: [None for _ in batches]


def loader_part(count=16):
    """count: videos in an epoch."""
    ways, cached = readers(), partial(our_clips, cache=True)
    for name in ("15 s.mp4", "180 s.mp4"):
        data.write_cached(video(name), L, 4.0)
    jobs = {way: epoch(partial(read, video("15 s.mp4"), 8, True), count, 2)
            for way, read in (ways | {"cached": cached}).items()}  # fmt: skip
    seconds = measure(jobs, repeats=3)
    table(f"DataLoader, 2 workers: {count} videos, 15 s, N = 8", seconds, 2, "ours")
    print("videos/s: " + ", ".join(f"{name} {count / median(runs):.1f}" for name, runs in seconds.items()))
    reference = next(iter(ways))
    for name, n in (("15 s.mp4", 1), ("15 s.mp4", 8), ("180 s.mp4", 1), ("180 s.mp4", 8)):
        jobs = {reference: job(ways[reference], video(name), n, True), "cached": job(cached, video(name), n, True)}
        table(f"From the cache, {name}, N = {n}", measure(jobs, 15), 10)


def feed_part(size=448, count=32):
    """By the task's own sampling, from a video of 15 s and 320x240."""
    for name, work in WORK.items():
        read = partial(data.read_clips, video("15 s.mp4"), work.train_clips, work.frames, work.fps, size, True)
        workers = sorted({0, 1, 2, os.cpu_count() // 2, os.cpu_count()})
        seconds = measure({f"{n} workers": epoch(read, count, n) for n in workers}, repeats=3)
        table(f"{name} at {size} px: {count} videos", seconds)
        print("videos/s: " + ", ".join(f"{way} {count / median(runs):.1f}" for way, runs in seconds.items()))


# ----------------------------------------------------------------------------------------------------------------------
# The model: the training step, retrieval
#
# The plain version does what the fast one does with none of its care: clip after clip, float16 (on a CPU: float32),
# NCHW, the norms by themselves, eager attention, an optimizer that is not fused.

class Work(NamedTuple):
    """A row of the paper's settings, and what random examples of it look like."""

    kind: str  # of answer
    texts: int  # that come with a video
    K: int  # outputs of the model
    targets: list  # of a video
    train_clips: int = 1
    frames: int = 1
    fps: float = 1.0
    agg: str = "mean"
    batch_size: int = 16
    text_length: int = 25

    def batch(self, batch_size, size, vocab):
        """As the loader hands it over, of random pixels and words; pinned where there is a GPU."""
        ids = torch.randint(5, vocab, (batch_size * self.texts, self.text_length))
        shape = batch_size, self.train_clips, self.frames, 3, size, size
        frames, target = torch.randint(0, 256, shape, dtype=torch.uint8), torch.tensor(self.targets * batch_size)
        return [x.pin_memory() if GPU else x for x in (frames, ids, torch.ones_like(ids), target)]


WORK = {"TGIF-QA 1x1": Work("choice", 5, 1, [0]),
        "MSRVTT 8x2": Work("match", 2, 2, [1, 0], 8, 2, 2.0, "lse", text_length=20)}  # fmt: skip


def plain_grid(cnn, frames):
    """In place of the CNN's forward: its modules one after the other."""
    x = cnn.normalize(frames.flatten(0, 1))
    for module in (*cnn.resnet.children(), cnn.grid_encoder):
        x = module(x)
    return x.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def plain_logits(model, frames, input_ids, attention_mask):
    return torch.stack([model(frames[:, i], input_ids, attention_mask) for i in range(frames.shape[1])])


def training_step(cfg, work, device, plain=False, dtype=torch.bfloat16, lr=1e-4):
    """-> a function that does one update with a batch, as finetune.train does, and returns its loss."""
    torch.manual_seed(0)
    model = clipbert.ClipBert(cfg, work.K).to(device).train()
    optimizer, logits_of = clipbert.build_optimizer(model), clipbert.clip_logits
    if plain:
        optimizer = torch.optim.AdamW(clipbert.optimizer_groups(model, 1e-3), betas=(0.9, 0.98), eps=1e-6, fused=False)
        logits_of, model.cnn.forward = plain_logits, partial(plain_grid, model.cnn)
        model.bert.set_attn_implementation("eager")
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step(batch):
        *inputs, target = (x.to(device, non_blocking=True) for x in batch)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            p = clipbert.aggregate_clips(logits_of(model, *inputs).float(), work.agg)
            loss = clipbert.video_loss(p, target, work.kind)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # the norm that both rows are clipped to
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def step_part(cfg=None, size=448, batch_size=None):
    """Training throughput. The arguments are for a trial on a small machine."""
    if not GPU and cfg is None:
        return print("\nstep: left out, no GPU")
    device, cfg = "cuda" if GPU else "cpu", cfg or clipbert.ClipBertConfig.base()
    for name, work in WORK.items():
        B = batch_size or work.batch_size
        batch, step = work.batch(B, size, cfg.vocab_size), partial(training_step, cfg, work, device)
        jobs = {"plain": partial(step(plain=True, dtype=torch.float16 if GPU else torch.float32), batch),
                "fast": partial(step(), batch)}  # fmt: skip
        seconds = measure(jobs)
        table(f"{name}: a training step of {B} videos at {size} px", seconds, 2)
        for way, runs in seconds.items():
            print(f"{way:44}{B / median(runs):9.1f} videos/s" + (f"{peak(jobs[way]):9.1f} GiB" if GPU else ""))


def peak(job):
    """GiB of activations and gradients; the weights and the optimizer's state are there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def memory_part(cfg=None, size=448):
    """An estimate where there is no GPU: what is kept for the backward pass in bf16, and 16 bytes a weight beside it.

    The second video's share counts: with the first come the weights' copies in bf16.
    """
    cfg = cfg or clipbert.ClipBertConfig.base()
    for name, work in WORK.items():
        model = clipbert.ClipBert(cfg, work.K).train()
        one, two = (kept(model, work.batch(B, size, cfg.vocab_size)[:3]) for B in (1, 2))
        always = 16 * sum(p.numel() for p in model.parameters()) / 2**30 + 2 * one - two
        print(f"\n{name} at {size} px: {two - one:.2f} GiB a video, {always:.1f} GiB for weights, their copies, gradients "
              f"and AdamW; at batch {work.batch_size} {always + work.batch_size * (two - one):.0f} GiB")  # fmt: skip


def kept(model, inputs):
    """GiB that autograd keeps of a forward pass, each storage once, without the parameters'."""
    storages, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in weights)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        p = model(*inputs)  # noqa: F841 - while it lives, so do the storages, and no address is used twice
    return sum(storages.values()) / 2**30


def agree_part(steps=100, batch_size=None):
    """Losses of the fast and the plain version, from the same weights on the same batches; without a GPU of a tiny model.

    Roundings add up over the steps. What bf16 itself makes of that is the yardstick: the plain version in bf16.
    """
    device, exact, size = ("cuda", torch.float16, 448) if GPU else ("cpu", torch.float32, 64)
    cfg = replace(clipbert.ClipBertConfig.base(), dropout=0.0) if GPU else clipbert.ClipBertConfig.tiny(200)
    for name, work in WORK.items():
        B = batch_size or (work.batch_size if GPU else 4)
        step = partial(training_step, cfg, work, device, lr=3e-5)
        versions, losses = [step(), step(plain=True, dtype=exact), step(plain=True)], []
        for _ in range(steps):
            batch = work.batch(B, size, cfg.vocab_size)
            losses.append([version(batch).item() for version in versions])
        a, b, rounded = torch.tensor(losses, dtype=torch.float64).T
        apart, yardstick = (a - b).abs() / b, ((rounded - b).abs() / b).mean()
        print(f"\n{name}: {steps} steps of {B} videos at {size} px, bf16 against {exact}\nlosses: first {a[0]:.5f} "
              f"{b[0]:.5f}, last {a[-1]:.5f} {b[-1]:.5f}; apart by {apart.mean():.2%} on average, {apart.max():.2%} at "
              f"most; the plain version in bf16 {yardstick:.2%}: "
              f"{'agreed' if apart.mean() <= 2 * yardstick + 2**-8 else 'NOT AGREED'}")  # fmt: skip


# -------------------------------------------------- retrieval
def retrieval_model(folder):
    """A tiny model (CHECKPOINT's, or one that has learned for a step) and 200 toy videos, each with a caption."""
    data.write_toy_msrvtt(folder, train=100, test=100, seed=1)  # there are not 200 test videos that all differ
    given = ["--task", "msrvtt_retrieval", "--data", str(folder)]
    checkpoint = os.environ.get("CHECKPOINT")
    if not checkpoint:
        small = ["--out", str(folder / "run"), "--max_steps", "1", "--test_clips", "1", "--batch_size", "2"]
        with redirect_stdout(StringIO()):
            finetune.run_training(finetune.parse_arguments([*given, *small]))
        checkpoint = str(folder / "run" / "best.pt")
    s, model, collate, _ = finetune.load_for_use(finetune.parse_arguments([*given, "--eval", checkpoint]))
    examples = [e for split in ("test", "train") for e in data.read_examples(s.task, folder, split)]
    return s, model.eval(), collate, list({e.video: e for e in examples}.values())


@torch.no_grad()
def reference_order(s, model, collate, texts, videos, n_clips, batch_size):
    """For each video, for each mini-batch of captions: all clips, one after the other, CNN and transformer."""
    tokens = collate.tokenizer(texts, padding=True, return_tensors="pt")
    scores = torch.zeros(len(texts), len(videos), dtype=torch.float64)
    for column, example in enumerate(videos):
        frames = data.read_clips(example.path, n_clips, s.frames, s.fps, s.size, False)[None].to(clipbert.DEVICE)
        for b in range(0, len(texts), batch_size):
            rows = slice(b, b + batch_size)
            text = (tokens[k][rows].to(clipbert.DEVICE) for k in ("input_ids", "attention_mask"))
            with clipbert.autocast(s):
                p = clipbert.aggregate_clips(plain_logits(model, frames, *text).double(), s.agg)
            scores[rows, column] = clipbert.match_score(p).cpu()
    return scores


def our_order(s, model, collate, texts, videos, n_clips, rerank=None):
    grids, _ = finetune.encode_videos(s, model, collate, videos, n_clips)
    return finetune.score_pairs(s, model, collate, texts, grids, rerank)


def retrieval_part(n_clips=16):
    """Every caption against every video. The reference's order is linear in the videos: timed on a single one."""
    with tempfile.TemporaryDirectory() as folder:
        *ready, examples = retrieval_model(Path(folder))
        texts = [e.text for e in examples]
        work = *ready, texts, examples[:1], n_clips
        jobs = {f"reference's order, {size:2} captions a pass": partial(reference_order, *work, size)
                for size in (16, 4, 64)}  # 16: the batch size of this task  # fmt: skip
        seconds = measure(jobs | {"ours: the CNN once": partial(our_order, *work)}, repeats=3)
        table(f"Retrieval: {len(texts)} captions x 1 of the videos x {n_clips} clips", seconds, 8)
        # Two stages: all pairs on one clip, then a share of them on all.
        pairs, seconds = int(os.environ.get("PAIRS") or (200 if GPU else 48)), {}
        for K in (pairs, pairs * 3 // 10, pairs // 5, pairs // 10):
            began = time.perf_counter()
            scores = our_order(*ready, texts[:pairs], examples[:pairs], n_clips, K)
            runs, metrics = [time.perf_counter() - began], finetune.retrieval_metrics(scores, range(pairs))
            recalls = " and ".join(f"{metrics[way]['r1']:.1f}" for way in ("text_to_video", "video_to_text"))
            seconds[f"--rerank {K}: R@1 {recalls}"] = runs
        table(f"{pairs} captions x {pairs} videos x {n_clips} clips, one run each; aim: 4x, R@1 within 0.5", seconds)


PARTS = {"decode": decode_part, "loader": loader_part, "feed": feed_part, "step": step_part, "memory": memory_part,
         "agree": agree_part, "retrieval": retrieval_part}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    gpu = torch.cuda.get_device_name() if GPU else "no GPU"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}, "
          f"torch {torch.__version__}")  # fmt: skip
    for part in args.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
