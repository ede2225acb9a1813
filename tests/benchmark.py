"""What is fast and by how much: ratios, each measured in one run.

    python tests/benchmark.py                 every part that this machine can run: 15 minutes on two cores
    python tests/benchmark.py decode step     only these
    CHECKPOINT=runs/msrvtt_retrieval/best.pt PAIRS=200 python tests/benchmark.py retrieval     with a trained model

    decode     clips of videos and of a GIF at 448 pixels, beside the reference's way (with PyAV, if that is installed)
    loader     the same in a data loader with two workers; and clips from the cache
    step       the training step and its memory, beside a plain one (on a GPU)
    memory     what a GPU has to hold, estimated on a CPU: what autograd keeps of one video, times the batch
    agree      are the losses of the two steps the same, as far as bf16 lets them be?
    retrieval  every caption against every video, beside the reference's order; --rerank
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clipbert
import data
import finetune

GPU = torch.cuda.is_available()


def compare(title, jobs, repeats=5, aim=None, videos=None):
    """Time {name: function}, print a row each: median, spread, how many times as fast as the first one.

    repeats: 0 for a single run. aim: how much faster "ours" should be. videos: that a job reads, for videos/s.
    """
    seconds = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():  # in turn, so that a busy moment hits them all
            began = time.perf_counter()
            job()
            if GPU:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    seconds = {name: runs[1:] or runs for name, runs in seconds.items()}  # in the first caches fill, kernels compile
    base = median(next(iter(seconds.values())))
    print(f"\n{title}{f'; aim: {aim}x' if aim else ''}\n{'':36}{'median ms':>11}{'spread':>9}{'speed':>9}{'videos/s' if videos else '':>11}")
    for name, runs in seconds.items():
        middle = median(runs)
        spread, rate = (max(runs) - min(runs)) / middle, f"{videos / middle:11.1f}" if videos else ""
        print(f"{name:36}{1000 * middle:11.1f}{spread:9.0%}{base / middle:8.2f}x{rate}")


# ----------------------------------------------------------------------------------------------------------------------
# Decoding: clips of T = 2 frames at 2 fps, 448 pixels; videos are drawn once, into the temporary folder

L, T, FPS = 448, 2, 2
SOURCES = {  # name: (size, rate, seconds, encoder)
    "15 s.mp4": ("320x240", 30, 15, "-b:v 300k"),
    "180 s.mp4": ("320x240", 30, 180, "-b:v 300k"),
    "3 s.mp4": ("320x240", 30, 3, "-b:v 300k"),
    "720p 30 s.mp4": ("1280x720", 30, 30, "-b:v 2M -preset veryfast"),
    "720p 180 s.mp4": ("1280x720", 30, 180, "-b:v 2M -preset veryfast"),
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
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *drawn, part], check=True)
        part.rename(path)
    return str(path)


def reference_clips(av, path, n, train, generator):
    """The reference's way, in our words: for each clip open the file, seek back to a key frame, decode to the clip's
    end, turn its frames to RGB, take T of them, resize and pad in float. In testing the whole video is decoded first.
    """
    num_frames, fps = data.probe(path)[:2]
    if not train:
        with av.open(path) as container:
            for _ in container.decode(video=0):
                pass
    batch = []
    for clip in data.sample_clips(num_frames, fps, n, T, FPS, train, generator).tolist():
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


def our_clips(path, n, train, generator, cache=False):
    return data.read_clips(path, n, T, FPS, L, train, generator, cache)


def readers():
    """{name: (path, n_clips, train, generator) -> clips}; the reference's way only where PyAV is installed."""
    try:
        import av
    except ImportError as error:  # it is not installed, or can't load its libraries
        print(f"the reference's way: left out, {error}")
        return {"ours": our_clips}
    return {"reference's way (PyAV)": partial(reference_clips, av), "ours": our_clips}


def job(read, *arguments):
    """Read other clips in each round; every reader the same."""
    generator = torch.Generator().manual_seed(0)
    return lambda: read(*arguments, generator)


def decode():
    ways = readers()
    for title, name, n, train, aim in (
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
        jobs = {way: job(read, video(name), n, train) for way, read in ways.items()}
        compare(f"{title}, N = {n}", jobs, aim=aim)


def epoch(read, count):
    """-> a function that reads `count` videos, by fours; two workers stay from one call to the next."""

    def batch(seeds):
        return torch.stack([read(generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    loader = partial(torch.utils.data.DataLoader, num_workers=2, persistent_workers=True)
    return partial(list, loader(range(count), batch_size=4, collate_fn=batch))


def loader(count=16):
    """count: videos in an epoch."""
    ways, cached = readers(), partial(our_clips, cache=True)
    for name in ("15 s.mp4", "180 s.mp4"):
        data.write_cached(video(name), L, 4.0)
    reads = {way: partial(read, video("15 s.mp4"), 8, True) for way, read in (ways | {"cached": cached}).items()}
    jobs = {way: epoch(read, count) for way, read in reads.items()}
    compare(f"DataLoader, 2 workers: {count} videos, 15 s, N = 8", jobs, 3, 2, videos=count)
    way, first = next(iter(ways.items()))
    for name, n in (("15 s.mp4", 1), ("15 s.mp4", 8), ("180 s.mp4", 1), ("180 s.mp4", 8)):
        jobs = {f"{way}, decoded": job(first, video(name), n, True), "ours": job(cached, video(name), n, True)}
        compare(f"From the cache, {name}, N = {n}", jobs, 15, 10)


# ----------------------------------------------------------------------------------------------------------------------
# The model: the training step, retrieval
#
# The plain version does what ours does with none of its care: clip after clip, float16 (on a CPU: float32), NCHW, eager
# attention, an optimizer that is not fused.

BATCH = 16  # the paper's of both tasks
WORK = {  # two rows of the paper's settings: N clips of T frames; what comes with a video: texts, their targets
    "TGIF-QA 1x1": SimpleNamespace(clips=1, frames=1, fps=1.0, agg="mean", kind="choice", K=1, texts=5, length=25,
                                   targets=[0]),
    "MSRVTT 8x2": SimpleNamespace(clips=8, frames=2, fps=2.0, agg="lse", kind="match", K=2, texts=2, length=20,
                                  targets=[1, 0]),
}  # fmt: skip


def random_batch(work, videos, size, vocab):
    """Pixels, words, mask, targets as the loader hands them over; pinned where there is a GPU."""
    ids = torch.randint(5, vocab, (videos * work.texts, work.length))
    frames = torch.randint(0, 256, (videos, work.clips, work.frames, 3, size, size), dtype=torch.uint8)
    batch = frames, ids, torch.ones_like(ids), torch.tensor(work.targets * videos)
    return [x.pin_memory() if GPU else x for x in batch]


def plain_grid(cnn, frames):
    """In place of the CNN's forward: its modules one after the other."""
    x = cnn.grid_encoder(cnn.resnet(cnn.normalize(frames.flatten(0, 1))))
    return x.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def plain_logits(model, frames, input_ids, attention_mask):
    return torch.stack([model(frames[:, i], input_ids, attention_mask) for i in range(frames.shape[1])])


def training_step(cfg, work, device, plain=False, dtype=torch.bfloat16):
    """-> a function that does one update with a batch, as finetune.train does, and returns its loss."""
    torch.manual_seed(0)
    model = clipbert.ClipBert(cfg, work.K).to(device).train()
    if not plain:  # as clipbert.use_machine
        model.cnn.to(memory_format=torch.channels_last)
    optimizer, logits_of = clipbert.build_optimizer(model), clipbert.clip_logits
    if plain:
        optimizer = torch.optim.AdamW(clipbert.optimizer_groups(model, 1e-3), betas=(0.9, 0.98), foreach=True)
        logits_of, model.cnn.forward = plain_logits, partial(plain_grid, model.cnn)
        model.bert.set_attn_implementation("eager")
    clipbert.set_step(optimizer, 1, 3e-5)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step(batch):
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = not plain, dtype != torch.float32
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


def step(cfg=None, size=448, videos=BATCH):
    """Training throughput. The arguments are for a trial on a small machine."""
    if not GPU and cfg is None:
        return print("\nstep: left out, no GPU")
    cfg = cfg or clipbert.ClipBertConfig.base()
    for name, work in WORK.items():
        batch = random_batch(work, videos, size, cfg.vocab_size)
        version = partial(training_step, cfg, work, clipbert.DEVICE)
        jobs = {"plain": partial(version(plain=True, dtype=torch.float16 if GPU else torch.float32), batch),
                "ours": partial(version(), batch)}  # fmt: skip
        compare(f"{name}: a training step of {videos} videos at {size} px", jobs, 5, 2, videos)
        for way, run in jobs.items() if GPU else ():  # the weights and the optimizer's state are there before
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            print(f"{way}: {(torch.cuda.max_memory_allocated() - before) / 2**30:.1f} GiB of activations and gradients")


def memory(cfg=None, size=448):
    """An estimate where there is no GPU: what is kept for the backward pass in bf16, and 16 bytes a weight beside it.

    The second video's share counts: with the first come the weights' copies in bf16.
    """
    cfg = cfg or clipbert.ClipBertConfig.base()
    for name, work in WORK.items():
        model = clipbert.ClipBert(cfg, work.K).train()
        one, two = (kept(model, random_batch(work, n, size, cfg.vocab_size)[:3]) for n in (1, 2))
        always = 16 * sum(p.numel() for p in model.parameters()) / 2**30 + 2 * one - two
        print(f"\n{name} at {size} px: {two - one:.2f} GiB a video, {always:.1f} GiB for weights, their copies, "
              f"gradients and AdamW; at batch {BATCH} {always + BATCH * (two - one):.0f} GiB")  # fmt: skip


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


def agree(steps=100, videos=4):
    """Losses of our and the plain version, of a tiny model, from the same weights on the same batches.

    Roundings add up over the steps. What bf16 itself makes of that is the yardstick: the plain version in bf16.
    """
    cfg = clipbert.ClipBertConfig.tiny(200)  # without dropout
    for name, work in WORK.items():
        version, losses = partial(training_step, cfg, work, clipbert.DEVICE), []
        versions = [version(), version(plain=True, dtype=torch.float32), version(plain=True)]
        for _ in range(steps):
            batch = random_batch(work, videos, 64, cfg.vocab_size)
            losses.append([step(batch).item() for step in versions])
        ours, plain, rounded = torch.tensor(losses, dtype=torch.float64).T
        apart, yardstick = ((x - plain).abs().div(plain).mean() for x in (ours, rounded))
        verdict = "agreed" if apart <= 2 * yardstick + 2**-8 else "NOT AGREED"
        print(f"\n{name}: losses of {steps} steps in bf16 {apart:.2%} apart from the plain version's in float32, which "
              f"in bf16 is {yardstick:.2%} apart: {verdict}")  # fmt: skip


# -------------------------------------------------- retrieval
def retrieval_model(folder):
    """A tiny model (CHECKPOINT's, or one that has learned for a step) and 200 toy videos, each with a caption."""
    data.write_toy_videos(folder, train=140, test=100)  # there are not 200 test videos that all differ
    given, checkpoint = ["--task", "msrvtt_retrieval", "--data", str(folder)], os.environ.get("CHECKPOINT")
    if not checkpoint:
        small = ["--out", str(folder / "run"), "--max_steps", "1", "--test_clips", "1", "--batch_size", "2"]
        finetune.run_training(finetune.parse_arguments([*given, *small]))
        checkpoint = str(folder / "run" / "best.pt")
    s, model, collate, _ = finetune.load_for_use(finetune.parse_arguments([*given, "--eval", checkpoint]))
    examples = [e for split in ("test", "train") for e in data.read_examples(s.task, folder, split)]
    s.workers = 0  # as in the reference's order: only the computing is compared
    return s, model.eval(), collate, list({e.video: e for e in examples}.values())[:200]


@torch.no_grad()
def reference_order(s, model, collate, texts, videos, n_clips, batch_size):
    """For each video, for each mini-batch of captions: all clips, one after the other, CNN and transformer."""
    tokens = collate.tokenizer(texts, padding=True, return_tensors="pt").to(clipbert.DEVICE)
    for example in videos:
        frames = data.read_clips(example.path, n_clips, s.frames, s.fps, s.size, False)[None].to(clipbert.DEVICE)
        for rows in torch.arange(len(texts)).split(batch_size):
            with clipbert.autocast(s):
                p = plain_logits(model, frames, tokens["input_ids"][rows], tokens["attention_mask"][rows])
            clipbert.match_score(clipbert.aggregate_clips(p.double(), s.agg)).cpu()


def our_order(s, model, collate, texts, videos, n_clips, rerank=None):
    grids, _ = finetune.encode_videos(s, model, collate, videos, n_clips)
    return finetune.score_pairs(s, model, collate, texts, grids, rerank)


def retrieval(n_clips=16):
    """Every caption against every video. The reference's order is linear in the videos: timed on a single one."""
    with tempfile.TemporaryDirectory() as folder:
        *ready, examples = retrieval_model(Path(folder))
        texts = [e.text for e in examples]
        one = *ready, texts, examples[:1], n_clips
        jobs = {f"reference's order, {size:2} captions": partial(reference_order, *one, size) for size in (16, 4)}
        compare(f"Retrieval: {len(texts)} captions x 1 of the videos x {n_clips} clips",
                jobs | {"ours": partial(our_order, *one)}, 3, 8)  # fmt: skip
        # Two stages: all pairs on one clip, then a share of them on all.
        pairs, recalls = int(os.environ.get("PAIRS") or (200 if GPU else 48)), {}

        def two_stages(K):
            scores = our_order(*ready, texts[:pairs], examples[:pairs], n_clips, K)
            found = finetune.retrieval_metrics(scores, range(pairs))
            recalls[K] = " and ".join(f"{found[way]['r1']:.1f}" for way in ("text_to_video", "video_to_text"))

        jobs = {f"--rerank {K}": partial(two_stages, K) for K in (pairs, pairs * 3 // 10, pairs // 5, pairs // 10)}
        compare(f"{pairs} captions x {pairs} videos x {n_clips} clips, one run each", jobs, 0)
        print(f"R@1, by --rerank: {recalls}; aim: 4x, R@1 within 0.5")


PARTS = {part.__name__: part for part in (decode, loader, step, memory, agree, retrieval)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if GPU else "no GPU"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}, "
          f"torch {torch.__version__}")  # fmt: skip
    for part in args.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
