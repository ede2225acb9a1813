"""Videos and images to clips, text to tokens, public annotation files to examples, and the toy data.

The first part is the paper's, and all that most readers need:

    videos            ->  N clips of T frames, (N, T, 3, L, L) uint8     `sample_clips`, `read_clips` (section 3)
    text              ->  WordPiece ids, (n, Lt)                         `build_tokenizer`
    examples          ->  batches                                        `ClipDataset`, `Collator`
    captioned images  ->  batches with wrong captions, masked words      `CaptionDataset`, `mask_tokens` (section 3)

The second part knows files:

    videos, images    ->  frames, also from a cache                      `probe`, `read_frames`, `write_cache`
    annotation files  ->  Example(video, text, options, answer)          `read_examples`; `LAYOUTS`
    nothing           ->  the toy data, in the same layouts              `toy_data`
    clips, attention  ->  pictures of what the model sees                `contact_sheet`, `attention_sheet`
    a data set        ->  what is wrong with it                          `check`

    python data.py toy DIR                      write the toy data to DIR
    python data.py check --task T --data DIR    what is missing, broken, doubled, cut: before hours are spent on it
    python data.py cache --data DIR             decode each video there once, into small files for --cache
    python data.py show VIDEO --clips 4         draw the frames that a model would look at

A frame index is a point on a regular grid: frame i is what the file shows at i / fps seconds. For a constant-rate
video that is simply its i-th frame, and variable rates need no special care.
"""

import argparse
import bisect
import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm
from transformers import BertTokenizer
from transformers.utils import cached_file

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS, below, is stricter
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader's workers are parallel enough
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class DataError(ValueError):
    """Bad input: one line that names the file and what to do."""


class NoAnnotations(DataError):
    """A split that has no annotation file."""


# ----------------------------------------------------------------------------------------------------------------------
# Videos to clips (paper, section 3: sparse sampling)

# -------------------------------------------------- which frames
def sample_clips(
    num_frames: int, fps: float, n_clips: int, n_frames: int, target_fps: float, train: bool,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Sparse sampling: choose n_clips short clips of n_frames frames; returns int64 (n_clips, n_frames) frame indices.

        clip i starts, with f = length - clip, at    random in [0, f]             in training
                                                     f i / N, i = 0 .. N - 1      in testing (N = 1: f / 2)

    A clip spans n_frames / target_fps seconds. Two or more frames include both of its ends: at 30 fps, two frames "at
    2 fps" are 29 frames apart. A single frame is the clip's first.
    - one test clip sits in the middle, as in the paper (its first frame thus half a clip before the video's middle);
      the reference code takes the start of the video.
    - a clip longer than the video (f = 0) repeats the last frame, as the reference does.
    """
    clip = n_frames / target_fps * fps  # frames that a clip spans
    delta = max(num_frames - clip, 0.0)  # free range of a clip's start
    if train:
        starts = (delta * torch.rand(n_clips, generator=generator, dtype=torch.float64)).tolist()
    elif n_clips == 1:
        starts = [delta / 2]
    else:
        starts = [delta * i / n_clips for i in range(n_clips)]
    span = max(clip - 1, 0.0)  # from the first to the last frame of a clip
    offsets = [int(span * t / max(n_frames - 1, 1)) for t in range(n_frames)]
    # ceil: a clip's first frame is the first one that begins within it
    return torch.tensor([[min(math.ceil(s) + o, num_frames - 1) for o in offsets] for s in starts])


def select_clips(read, num_frames, fps, n_clips, n_frames, target_fps, candidates=4):
    """Clips for testing by their content, of which the paper speaks as future work: those that differ most.

    Among `candidates` times as many uniform clips, start with the middle one, then take again and again the one that is
    farthest from all taken so far (farthest-point sampling). -> int64 (n_clips, n_frames), in order of time.
    Distance is that of the clips' first frames as small grey pictures. Costs the decoding of all candidates' first
    frames, read(indices) -> uint8 (len, 3, H, W); the model still sees only n_clips.
    """
    clips = sample_clips(num_frames, fps, candidates * n_clips, n_frames, target_fps, False)  # (M, T)
    small = F.interpolate(read(clips[:, 0].tolist()), (16, 16), mode="bilinear", antialias=True)
    grey = small.float().mean(1).flatten(1)  # (M, 256)
    taken, nearest = [len(clips) // 2], torch.full((len(clips),), torch.inf)  # each one's distance to those taken
    while len(taken) < n_clips:
        nearest = nearest.minimum((grey - grey[taken[-1]]).norm(dim=1))
        nearest[taken] = -1  # never twice, though all may look alike
        taken.append(nearest.argmax().item())
    return clips[sorted(taken)]


def choose_clips(read, num_frames, fps, n_clips, n_frames, target_fps, train, generator=None, select="uniform"):
    """`sample_clips`, or, in testing with select="difference", `select_clips`. -> int64 (n_clips, n_frames)."""
    if select == "difference" and not train:
        return select_clips(read, num_frames, fps, n_clips, n_frames, target_fps)
    return sample_clips(num_frames, fps, n_clips, n_frames, target_fps, train, generator)


# -------------------------------------------------- which pixels
def resized_shape(height, width, size):
    """(h, w) with the long side equal to `size`; the short side is truncated, never below one pixel."""
    long = max(height, width)
    return max(int(height * size / long), 1), max(int(width * size / long), 1)


def resize_and_pad(frames, size):
    """(..., 3, H, W) -> (..., 3, size, size): long side to `size` (small frames grow too), zeros right and bottom.

    Float in, float out: the reference's numbers (bilinear, no antialiasing). uint8 in, uint8 out: the same, rounded.
    """
    *lead, C, H, W = frames.shape  # any leading axes, channels, height, width
    h, w = resized_shape(H, W, size)
    pixels = frames.reshape(-1, C, H, W)
    if (h, w) != (H, W):
        real = pixels if frames.is_floating_point() else pixels.float()
        real = F.interpolate(real, size=(h, w), mode="bilinear", align_corners=False)
        pixels = real if frames.is_floating_point() else real.round().to(frames.dtype)
    return F.pad(pixels, (0, size - w, 0, size - h)).reshape(*lead, C, size, size)


# -------------------------------------------------- a file's clips: its frames come from `read_frames`, far below
def read_clips(path, n_clips, n_frames, target_fps, size, train, generator=None, cache=False, select="uniform"):
    """uint8 (n_clips, n_frames, 3, size, size) RGB, sampled as `sample_clips` describes. Raises DataError.

    cache: take the nearest frames that `python data.py cache` kept, where it did; the clips are the same.
    select: "uniform", or, in testing, "difference": see `select_clips`.
    """
    kept = cache and open_cached(path, size)
    num_frames, fps = (kept["num_frames"], kept["fps"]) if kept else probe(path)[:2]
    read = functools.partial(read_cached, path, kept) if kept else functools.partial(read_frames, path)
    read = functools.partial(read, size=size)
    clips = choose_clips(read, num_frames, fps, n_clips, n_frames, target_fps, train, generator, select)
    return read(clips.flatten().tolist()).view(n_clips, n_frames, 3, size, size)


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens (paper, section 3: F_l): WordPiece


def build_tokenizer(vocabulary):
    """A lower-casing WordPiece tokenizer over a list of tokens; the position in the list is the id."""
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})


def read_vocabulary(folder=None, offline=False):
    """The 30,522 tokens of bert-base-uncased: vocab.txt of a local folder, or, with None, the hub's.

    offline: only a copy of the hub's that an earlier run has left on this machine.
    """
    try:
        hub = functools.partial(cached_file, "bert-base-uncased", "vocab.txt", local_files_only=offline)
        path = Path(folder) / "vocab.txt" if folder else hub()
        vocabulary = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = str(error).splitlines()[0][:150]
        raise DataError(f"no vocabulary ({reason}): give --bert DIR, a folder with BERT's vocab.txt") from None
    if missing := set(SPECIAL_TOKENS) - set(vocabulary):
        raise DataError(f"{path}: {', '.join(sorted(missing))} missing; this is not a BERT vocabulary")
    return vocabulary


def vocabulary_from_text(texts, size=10_000):
    """A vocabulary without any download: BERT's special tokens, single characters, then the most frequent words.

    With every character as a first piece ("a") and as a continuation ("##a"), WordPiece can spell any new word.
    """
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted({c for word in words for c in word} | set("abcdefghijklmnopqrstuvwxyz0123456789"))
    common = sorted((w for w in words if len(w) > 1), key=lambda w: (-words[w], w))
    return SPECIAL_TOKENS + characters + ["##" + c for c in characters] + common[:size]


# ----------------------------------------------------------------------------------------------------------------------
# Examples to batches


class Example(NamedTuple):
    """One row of an annotation file: a video (or image), its text, the answer."""
    id: str  # as the file has it, else its place there; only for a reader of predictions, and perhaps not unique
    video: str  # name as the annotation gives it
    text: str  # question or caption; "" in MSRVTT-MC, where the options are the captions
    options: tuple = ()  # answer options of multiple choice
    answer: object = None  # int index into options | str | int count | {answer: soft score} (VQA) | None (captions)
    kind: str = ""  # FrameQA/VQA question type, for per-type accuracies
    people: tuple = ()  # VQA: what each of the ten people said, verbatim, for vqa_accuracy()
    path: str | None = None  # the file of the video, found when the annotations are read; None: it is missing


class ClipDataset(torch.utils.data.Dataset):
    """Examples with their sampled clips. Items are asked for as (epoch, index): see `training_order`.

    The random clips of an item depend on (seed, epoch, index) alone, not on which worker reads it or when: two runs,
    with any number of workers, stopped and resumed or not, see the same frames.
    """

    def __init__(self, examples, folder, *, n_clips, n_frames, fps, size, train, seed=0, blind=False, cache=False,
                 select="uniform"):  # fmt: skip
        self.examples, self.folder = examples, folder
        self.sampling, self.shape = (n_clips, n_frames, fps, size, train), (n_clips, n_frames, 3, size, size)
        self.train, self.seed, self.blind, self.cache, self.select = train, seed, blind, cache, select

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        generator, unreadable, index = self.generator(key), [], key[1]
        for attempt in range(20):  # an unreadable video is replaced by the next example in training ...
            example = self.examples[(index + attempt) % len(self)]
            try:
                frames = self.read(example, generator)
                break
            except DataError as error:
                unreadable.append(str(error))
                if not self.train:  # ... and answered blindly, that is, counted as wrong, in evaluation
                    frames = torch.zeros(self.shape, dtype=torch.uint8)
                    break
        else:
            raise DataError(f"20 unreadable videos in a row, the last: {unreadable[-1]}")
        return {"example": example, "frames": frames, "unreadable": unreadable}

    def generator(self, key, stream=0):
        """Of what is random about an item. stream 1, for captions and masks: other numbers than chose its clips."""
        epoch, index = key
        return torch.Generator().manual_seed(self.seed + stream + 1_000_003 * (epoch * len(self) + index))

    def read(self, example, generator):
        path = find_media(self.folder, example.video)
        if path is None:
            raise DataError(f"{example.video}: no such video under {self.folder}")
        frames = read_clips(path, *self.sampling, generator, self.cache, self.select)
        return torch.zeros_like(frames) if self.blind else frames


def training_order(n_examples, batch_size, n_batches, seed, start=0):
    """Yield batch number start, start + 1, ..., n_batches - 1, as lists of (epoch, index): shuffled anew each epoch.

    Known in advance from the seed, so a resumed run goes on with the very batch that the stopped one would have seen.
    The last, smaller batch of an epoch is kept.
    """
    per_epoch = -(-n_examples // batch_size)
    for number in range(start, n_batches):
        epoch, i = divmod(number, per_epoch)
        if number == start or i == 0:
            order = torch.randperm(n_examples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        yield [(epoch, j) for j in order[i * batch_size : (i + 1) * batch_size]]


class Collator:
    """A list of items to tensors. n texts per example: 1; in multiple choice, its options; of a MatchDataset, 2.

    frames (B, N, T, 3, L, L) uint8; input_ids, attention_mask (B*n, Lt), 1 keep, 0 pad; target (B,), with soft scores
    (B, K), of a MatchDataset (B*n,); and plain lists.
    """

    def __init__(self, tokenizer, text_length, answers=None):
        self.tokenizer, self.text_length = tokenizer, text_length
        self.labels = {answer: i for i, answer in enumerate(answers or [])}

    def __call__(self, items):
        examples = [item["example"] for item in items]
        tokens = self.tokenizer(
            [text for item in items for text in item.get("captions") or input_texts(item["example"])],
            padding=True, truncation=True, max_length=self.text_length, return_tensors="pt",
        )  # fmt: skip
        return {
            "frames": torch.stack([item["frames"] for item in items]),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "target": torch.tensor([t for item in items for t in item.get("matches", [self.target(item["example"])])]),
            "examples": examples,
            "unreadable": [item["unreadable"] for item in items],
        }

    def target(self, example):
        """What the loss wants: an option's index, an answer's label (-1: not in the list), all soft scores, a count."""
        if isinstance(example.answer, dict):
            return [float(example.answer.get(answer, 0)) for answer in self.labels]
        return self.labels.get(example.answer, -1) if isinstance(example.answer, str) else example.answer or 0


def input_texts(example):
    """Multiple choice: "question option" as one sequence per option, as the reference; else the text alone."""
    return [f"{example.text} {option}".strip() for option in example.options] or [example.text]


def draw_mismatch(caption_of, count, own, generator):
    """A random one of caption_of(0 .. count - 1) that is not among `own`; None if all seem to be."""
    for _ in range(100):
        caption = caption_of(torch.randint(count, (), generator=generator).item())
        if caption.lower() not in own:
            return caption
    return None


class MatchDataset(ClipDataset):
    """Captioned videos for retrieval: with every video its caption and one of another video."""

    def __init__(self, examples, folder, **sampling):
        super().__init__(examples, folder, **sampling)
        self.own = {}  # {video: everything said about it}: a caption of two videos is no negative for either
        for example in examples:
            self.own.setdefault(example.video, set()).add(example.text.lower())

    def __getitem__(self, key):
        item = super().__getitem__(key)
        own = self.own[item["example"].video]
        wrong = draw_mismatch(lambda i: self.examples[i].text, len(self), own, self.generator(key, 1))
        if wrong is None:
            raise DataError(f"{self.folder}: every caption is said of every video; there is nothing to tell apart")
        return item | {"captions": [item["example"].text, wrong], "matches": [1, 0]}  # its own first: see rank_loss


def outlive_signals(worker):
    """Ctrl-C and SIGTERM may reach every process at once, and the main one wants to finish its step: its workers ignore
    the one and outlive the other by ten seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def data_loader(dataset, batches, collate, workers, pin_memory=False):
    """Batches in the given order, read ahead by `workers` processes that stay alive throughout."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # or each loader would draw on the random state that a resumed run restores
    )  # fmt: skip


# -------------------------------------------------- pretraining: captions, some of them wrong, with words masked
class CaptionedImage(NamedTuple):
    """An image (or a video) and everything that is said about it."""

    video: str
    captions: tuple


def captioned_images(examples):
    """One per image, in the order of the file; a caption that stands twice under an image counts once."""
    captions = {}
    for example in examples:
        captions.setdefault(example.video, {})[example.text] = None
    return [CaptionedImage(video, tuple(texts)) for video, texts in captions.items()]


class CaptionDataset(ClipDataset):
    """Captioned images: one clip, and n captions, by turns one of the image's own and one of another image.

    All that is random here depends on (seed, epoch, index) alone, as the clips do: fixed masks in evaluation.
    """

    def __init__(self, images, folder, *, captions, **sampling):
        super().__init__(images, folder, n_clips=1, **sampling)
        self.captions = captions

    def __getitem__(self, key):
        item, generator = super().__getitem__(key), self.generator(key, 1)  # the collator goes on with it: the masks
        texts, matches = self.draw_captions(item["example"], generator)
        return item | {"captions": texts, "matches": matches, "generator": generator}

    def draw_captions(self, image, generator):
        """-> n captions and n labels: 1 if it is the image's own, 0 if another's. Own ones repeat if there are too few.

        Each is a mismatch with probability 1/2, as in the reference, but they take turns after one toss of a coin: as
        many right as wrong ones per image. Otherwise ITM begins by learning which pictures had luck with their coins.
        """
        order = torch.randperm(len(image.captions), generator=generator).tolist()
        texts = [image.captions[order[i // 2 % len(order)]] for i in range(self.captions)]
        # Each own caption stands there twice: one of the two is about to be replaced.
        coin = torch.randint(2, (), generator=generator).item()
        matches = [(i + coin) % 2 for i in range(self.captions)]
        for i, match in enumerate(matches):
            wrong = None if match else self.draw_mismatch(image, generator)
            matches[i], texts[i] = (0, wrong) if wrong else (1, texts[i])
        return texts, matches

    def draw_mismatch(self, image, generator):
        """A caption of another image; never one that is also said about this image."""
        own = {caption.lower() for caption in image.captions}

        def draw(i):
            captions = self.examples[i].captions
            return captions[torch.randint(len(captions), (), generator=generator)]

        return draw_mismatch(draw, len(self), own, generator)


class Mix(torch.utils.data.Dataset):
    """Several data sets as one, whose items are asked for as (data set, epoch, index)."""

    def __init__(self, parts):
        self.parts = parts

    def __getitem__(self, key):
        return self.parts[key[0]][key[1:]]


def mixed_order(sizes, ratio, batch_size, n_batches, seed, start=0):
    """`training_order` for a Mix: each batch comes from one data set, drawn in proportion to `ratio`."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.multinomial(torch.tensor(ratio).double(), n_batches, True, generator=generator).tolist()
    orders = [training_order(size, batch_size, n_batches, seed, choices[:start].count(i))
              for i, size in enumerate(sizes)]  # fmt: skip
    for i in choices[start:]:
        yield [(i, *key) for key in next(orders[i])]


def mask_tokens(input_ids, tokenizer, generator, rate=0.15):
    """BERT's masking: of 15% of the tokens, 80% become [MASK], 10% a random token, and 10% stay what they are.

    -> (input_ids with these changes, labels: the token at those 15%, -100 elsewhere). The random and the unchanged ones
    are there because no text has a [MASK] after pretraining: any word may turn out to be the one to predict.
    """
    special = torch.isin(input_ids, torch.tensor(tokenizer.all_special_ids))  # [CLS] [SEP] [PAD] [UNK]: never
    chance = torch.rand(input_ids.shape, generator=generator).masked_fill(special, 1.0)
    tokens = torch.randint(len(tokenizer), input_ids.shape, generator=generator)
    masked = torch.where(chance < 0.9 * rate, tokens, input_ids)
    masked = masked.masked_fill(chance < 0.8 * rate, tokenizer.mask_token_id)
    return masked, input_ids.masked_fill(chance >= rate, -100)


class CaptionCollator(Collator):
    """Captioned images to tensors, n captions per image one after the other, so that they share its CNN pass.

    frames (B, 1, T, 3, L, L) uint8; input_ids, attention_mask, mlm_labels (B*n, Lt); itm_labels (B*n,), 1: a match.
    """

    def __init__(self, tokenizer, text_length, mask_rate=0.15):
        super().__init__(tokenizer, text_length)
        self.mask_rate = mask_rate

    def __call__(self, items):
        rows = []
        for item in items:
            tokens = self.tokenizer(item["captions"], truncation=True, max_length=self.text_length)
            for ids in tokens["input_ids"]:
                rows.append(mask_tokens(torch.tensor(ids), self.tokenizer, item["generator"], self.mask_rate))
        ids, labels = zip(*rows, strict=True)  # (length of its text,) each
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "frames": torch.stack([item["frames"] for item in items]),
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids]),
            "mlm_labels": pad(labels, padding_value=-100),
            "itm_labels": torch.tensor([match for item in items for match in item["matches"]]),
            "unreadable": [item["unreadable"] for item in items],
        }


########################################################################################################################
# Here the paper's part ends. What follows knows files: how frames come out of videos, what the public annotation
# files look like, how the toy data are drawn, how pictures of it all are made, and what may be wrong with a data set.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Files to frames: Pillow reads images and GIFs, the bundled ffmpeg everything else

TIME_LIMIT = 60.0  # seconds; a hostile or broken file must not hang a training run
MAX_SIDE, MAX_PIXELS = 8192, 2**25  # per frame (8K video fits); more is a decompression bomb or a mistake
SEEK_COST = 10  # frames that are decoded in the time of one more seek (opening the file again, parsing its header)
PROCESS_COST = 50  # frames that are decoded in the time of starting one more process
SEEK_LEAD = 8  # frames; MP4 seeks by decoding time, which with B-frames is a few frames ahead of what is shown
SEEKS = 16  # in one ffmpeg process: each needs a decoder of its own
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# Only containers that hold their own pixels: playlists, concat scripts and image patterns could open other files.
VIDEO_FORMATS = ("asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mp3,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,"
                 "rm,wav,yuv4mpegpipe")  # fmt: skip
SEEKABLE = ("mov", "matroska")  # these carry an index; a seek in e.g. MPEG-TS may land after the frame we want
TIMED = (*SEEKABLE, "avi")  # headers that tell the duration; elsewhere ffmpeg would guess it from the bit rate


class Media(NamedTuple):
    """What a file's header says."""

    num_frames: int  # at the nominal rate: round(duration * fps), at least 1
    fps: float  # nominal (average) rate; 1.0 for still images
    width: int  # as displayed, rotation applied
    height: int
    start: float = 0.0  # seconds between the start of the file (perhaps its sound) and the first frame
    reader: str = "pillow"  # or "ffmpeg"
    keys: tuple = ()  # key frames, at which decoding can start; none for a container that seeks inexactly


def _tolerance(fps):
    """Seconds by which a frame may begin late and still count: containers round times to milliseconds."""
    return min(0.002, 0.25 / fps)


def _check_dimensions(path, width, height):
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(f"{path}: {width}x{height} pixels are too many; scale it down or remove it")


# -------------------------------------------------- images and animations: Pillow
def _image_frames(image, path):
    """Yield (seconds at which the frame disappears, the image positioned at the frame), from the first frame on."""
    end, count, deadline = 0, 0, time.monotonic() + TIME_LIMIT
    while count == 0 or image.format in ("GIF", "PNG", "WEBP"):  # a second picture inside a JPEG is no animation
        if time.monotonic() > deadline:
            raise DataError(f"{path}: decoding takes over {TIME_LIMIT:.0f} s; shorten or remove it")
        try:
            image.seek(count)
            image.load()
        except Exception:  # the end, or damage, for which Pillow raises almost anything: keep what decoded so far
            if count == 0:
                raise
            return
        end += image.info.get("duration") or 100  # milliseconds; browsers, too, read a delay of 0 as 100
        yield end / 1000, image
        count += 1


def _probe_image(image, path):
    width, height = image.size
    _check_dimensions(path, width, height)
    ends = [end for end, _ in _image_frames(image, path)]  # decodes all: delays are only known frame by frame
    if len(ends) > 1:
        return Media(len(ends), len(ends) / ends[-1], width, height)
    turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
    return Media(1, 1.0, *((height, width) if turned else (width, height)))


def _to_rgb(image):
    """uint8 (3, H, W). Transparent areas become white: what most viewers, and ffmpeg for GIFs, show."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255 instead of scaling
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _read_image(path, media, wanted, size):
    """The frames at the ascending indices `wanted`: uint8 (len(wanted), 3, size, size)."""
    frames = []
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        for end, frame in _image_frames(image, path):
            if media.num_frames == 1:
                frame = ImageOps.exif_transpose(frame)  # photos only: it would copy every frame of a GIF
            while len(frames) < len(wanted) and wanted[len(frames)] / media.fps + _tolerance(media.fps) < end:
                frames.append(resize_and_pad(_to_rgb(frame), size))
            if len(frames) == len(wanted):
                break  # a GIF must be decoded from its start, but not to its end
    return torch.stack(frames)


# -------------------------------------------------- videos: ffmpeg
def _ffmpeg(path, arguments):
    """Run the bundled ffmpeg; returns (stdout, stderr). It is killed after TIME_LIMIT and never outlives this call."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True}
    try:  # in a process group of its own: a terminal's Ctrl-C stops our step when it is done, not ffmpeg before
        done = subprocess.run(command, **pipes, timeout=TIME_LIMIT, check=False, process_group=0)
        killed = done.returncode < 0
    except subprocess.TimeoutExpired:
        killed = True
    if killed:
        raise DataError(f"{path}: ffmpeg was killed (over {TIME_LIMIT:.0f} s or out of memory); shorten or remove it")
    return done.stdout, done.stderr.decode("utf-8", "replace")  # titles in old files are often not UTF-8


def _cores():
    """How many to decode one video with: in a data loader's worker one, as other workers keep the others busy."""
    return 1 if multiprocessing.parent_process() else min(2, os.cpu_count())


def _input(path, *options):
    # "file:" and the absolute path keep a name like "-y" or "http:x" from being an option or an address.
    return ["-protocol_whitelist", "file", "-format_whitelist", VIDEO_FORMATS, "-max_pixels", str(MAX_PIXELS),
            "-threads", str(_cores()), *options, "-i", "file:" + path]  # fmt: skip


def _find(pattern, text):
    match = re.search(pattern, text, re.MULTILINE)
    return match and match[1]


def _probe_video(path):
    """Parse the header as ffmpeg prints it (no ffprobe is bundled) and list the key frames; about 25 ms.

    The key frames come for nothing in MP4, whose header has them; a Matroska file is read, not decoded, to its end.
    """
    listing = ["-map", "0:V:0?", "-c", "copy", "-f", "framecrc", "pipe:1"]  # a line a packet
    packets, log = _ffmpeg(path, ["-nostats", *_input(path, "-discard", "nokey"), *listing])
    if "\nInput #0" not in "\n" + log:
        reason = (log.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{path}: not a readable image or video ({reason}); replace or remove it")
    blocks = re.split(r"^(?=  Stream #)", log, flags=re.MULTILINE)  # a stream's line with the details below it
    videos = [b for b in blocks if re.match(r"  Stream #0:.*?: Video: ", b) and "(attached pic)" not in b]
    line = videos[0].splitlines()[0] if videos else ""  # the first one, as the reference; cover art is no video
    pixels = re.search(r", (\d+)x(\d+)", line)
    if not pixels:
        raise DataError(f"{path}: no readable video stream inside; replace or remove it")
    width, height = int(pixels[1]), int(pixels[2])
    _check_dimensions(path, width, height)
    if round(float(_find(r"Display Matrix: rotation of (-?[\d.]+)", videos[0]) or 0)) % 180 == 90:
        width, height = height, width  # ffmpeg itself turns the frames when decoding
    file_start = float(_find(r"^  Duration: .*start: (-?[\d.]+)", log) or 0)
    start = max(float(_find(r", start (-?[\d.]+)", line) or 0) - file_start, 0.0)
    clock = _find(r"^  Duration: (\d+:\d+:[\d.]+)", log)
    duration = sum(float(x) * unit for x, unit in zip(clock.split(":"), (3600, 60, 1), strict=True)) if clock else 0.0
    fps = float(_find(r", ([\d.]+) fps", line) or 0)
    container = _find(r"^Input #0, (\w+)", log)
    if fps % 1 and round(math.ceil(fps) * 1000 / 1001, 2) == fps:
        fps = math.ceil(fps) * 1000 / 1001  # NTSC: "29.97" is 30000/1001, which matters after some minutes
    absurd = duration * fps > os.path.getsize(path)  # a damaged header: more frames than bytes
    if container not in TIMED or duration == 0 or not 0 < fps <= 1000 or absurd:
        fps, duration = _count_packets(path, fps)
    num_frames = max(round((duration - start) * fps), 1)
    keys = _key_times(packets.decode()) if container in SEEKABLE else []
    return Media(num_frames, fps, width, height, start, "ffmpeg", tuple(round((t - start) * fps) for t in keys))


def _key_times(packets):
    """Seconds at which key frames begin, from ffmpeg's list of packets: `stream, dts, pts, ...`, F=flags if no key."""
    num, den = map(int, (_find(r"^#tb 0: (\d+/\d+)", packets) or "0/1").split("/"))
    return sorted(int(pts) * num / den for pts in re.findall(r"^0, *-?\d+, *(-?\d+),(?!.*F=)", packets, re.MULTILINE))


def _count_packets(path, fps):
    """(fps, seconds) of a file whose header lacks one of them, by walking its packets without decoding."""
    arguments = [*_input(path), "-map", "0:V:0", "-c", "copy", "-f", "null", "-progress", "pipe:1", "-"]
    report = _ffmpeg(path, ["-v", "fatal", "-nostats", *arguments])[0].decode()
    frames, microseconds = (int(_find(rf"(?s:.*)^{key}=(\d+)", report) or 0) for key in ("frame", "out_time_us"))
    seconds = microseconds / 1e6  # both are running totals, of which the greedy pattern finds the last
    if frames == 0:
        raise DataError(f"{path}: the video stream is empty; replace or remove it")
    if not 0 < fps <= 1000:
        fps = min(frames / seconds, 1000.0) if seconds > 0 else 1.0
    return fps, max(seconds, frames / fps)  # packets are timed by decoding order, up to two frames early


def _read_video(path, media, wanted, size):
    """The frames at the ascending indices `wanted`: uint8 (len(wanted), 3, size, size)."""
    frames = torch.empty(len(wanted), 3, size, size, dtype=torch.uint8)
    shares = _share(media, wanted) if _cores() > 1 else [wanted]
    segments = [_plan(media, share) for share in shares]
    groups = [part[k : k + SEEKS] for part in segments for k in range(0, len(part), SEEKS)]
    targets = frames.split([sum(len(indices) for _, indices in group) for group in groups])
    with ThreadPoolExecutor(len(shares)) as pool:  # threads, each of which waits for a process
        whole = all(pool.map(functools.partial(_decode, path, media), groups, targets))
    # In a truncated file a seek beyond the end finds nothing; one pass finds the last frame there is.
    if not whole and not _decode(path, media, [(0, wanted)], frames):
        raise DataError(f"{path}: no frame could be decoded; replace or remove it")
    return frames


def _plan(media, wanted):
    """[(index at which decoding starts, wanted indices)]: seek only where that spares more than it costs.

    A seek lands on a key frame. Clips with none between them share one: the second would decode the first's frames
    again. Short videos thus mostly need no seek at all, long ones about one a clip.
    """
    segments, decoded = [(0, [])], 0
    for i in wanted:
        if _landing(media, i) > decoded + SEEK_COST:
            segments.append((i - SEEK_LEAD, []))
        segments[-1][1].append(i)
        decoded = i
    return [segment for segment in segments if segment[1]]


def _landing(media, i):
    """The key frame at which decoding starts after a seek for frame i; 0, the video's start, if there is none."""
    before = bisect.bisect(media.keys, i - SEEK_LEAD - 0.14 * media.fps)  # ffmpeg itself steps back by 3/23 s
    return media.keys[before - 1] if before else 0


def _share(media, wanted):
    """The wanted indices for two processes on two cores: cut where both have about as many frames to decode; uncut
    where a second process would hardly help, as in a short video, which has its only key frame at the start."""

    def work(i, decoded):  # frames to decode until i is there
        return i - max(decoded, _landing(media, i) - SEEK_COST)

    steps = [work(i, decoded) for decoded, i in zip([0, *wanted], wanted, strict=False)]
    done = list(accumulate(steps))
    longer = {k: max(done[k - 1], work(wanted[k], 0) + done[-1] - done[k]) for k in range(1, len(wanted))}
    cut = min(longer, key=longer.get, default=0)
    if cut and longer[cut] + PROCESS_COST < done[-1]:
        return [wanted[:cut], wanted[cut:]]
    return [wanted]


def _decode(path, media, segments, frames):
    """One ffmpeg process reads every segment, each through an input of its own, into frames, uint8 (n, 3, size, size).

    -> whether all n came.

    The filters, in order: shift the clock so that the segment starts at 0; `fps` lays the frames on the regular grid
    (slot n holds the last frame that began by n / fps; "up" means no frame is shown early); `tpad` repeats the last
    frame where the file is shorter than its header says; `trim` ends the decoding, `select` keeps the wanted slots;
    `shuffleplanes` makes gbrp's order (green, blue, red) ours.
    """
    size = frames.shape[-1]
    h, w = resized_shape(media.height, media.width, size)
    late = round(1e6 * _tolerance(media.fps))
    inputs, chains = [], []
    for k, (origin, wanted) in enumerate(segments):
        # Not "accurate": that would drop the frame that began before the seek time and is still on the screen.
        seek = ["-noaccurate_seek", "-ss", f"{media.start + origin / media.fps:.6f}"] if origin else []
        inputs += _input(path, *seek)
        zero = "0" if origin else "STARTPTS"  # microseconds; B-frames delay the first frame of an AVI file
        slots = [f"eq(n,{i - origin})" for i in wanted]
        slots = "+".join(f"({'+'.join(slots[j : j + 50])})" for j in range(0, len(slots), 50))  # ffmpeg nests 100 deep
        chains.append(
            f"[{k}:V:0]settb=1/1000000,setpts=PTS-{zero}-{late},fps={media.fps:.6f}:start_time=0:round=up,"
            f"tpad=stop=-1:stop_mode=clone,trim=end_frame={wanted[-1] - origin + 1},select='{slots}',"
            f"scale={w}:{h}:flags=bilinear,format=gbrp,pad={size}:{size}:0:0:black,"
            f"shuffleplanes=2:0:1,format=gbrp[v{k}]"
        )
    labels = "".join(f"[v{k}]" for k in range(len(segments)))
    graph = ";".join([*chains, f"{labels}concat=n={len(segments)}[out]"])
    output = ["-filter_complex", graph, "-map", "[out]", "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1"]
    raw = _ffmpeg(path, ["-v", "fatal", *inputs, *output])[0][: frames.nbytes]  # a broken file can give too many
    frames.flatten().numpy()[: len(raw)] = np.frombuffer(raw, np.uint8)  # flatten: a view, as frames are contiguous
    return len(raw) == frames.nbytes


# -------------------------------------------------- either
def probe(path):
    """Facts of the file's header; remembered, as long as the file does not change. Raises DataError."""
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; check the path")
    stat = os.stat(path)
    if stat.st_size == 0:
        raise DataError(f"{path}: the file is empty; download it again or remove it")
    return _probe(path, stat.st_mtime_ns, stat.st_size)


@functools.cache  # a few hundred bytes per file
def _probe(path, mtime, size):
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:  # decides by the first bytes, not by the name
            return _probe_image(image, path)
    except DataError:
        raise
    except Exception:  # noqa: BLE001 - no image, or one that Pillow can't decode; ffmpeg forgives some damaged GIFs
        return _probe_video(path)


def read_frames(path, indices, size):
    """uint8 (len(indices), 3, size, size) RGB: what the file shows at indices / fps seconds, in any order.

    Indices outside the video mean its first or last frame. Raises DataError.
    - any aspect ratio is read; the reference skips videos whose sides differ by more than a factor of five.
    - videos are resized by ffmpeg, which saves time but differs from `resize_and_pad` by about two grey levels.
    """
    media, path = probe(path), os.path.abspath(path)
    indices = [min(max(int(i), 0), media.num_frames - 1) for i in indices]
    wanted = sorted(set(indices))
    if not wanted:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    read = _read_image if media.reader == "pillow" else _read_video
    frames = read(path, media, wanted, size)
    return frames if indices == wanted else frames[[wanted.index(i) for i in indices]]


# -------------------------------------------------- the cache: a few frames a second of each video, as small JPEGs
def cached_file_of(path, size):
    """videos/video7.mp4 -> videos/cached/video7.mp4.448: a line of JSON, then the JPEGs that it lists."""
    return Path(path).parent / "cached" / f"{Path(path).name}.{size}"


def open_cached(path, size):
    """What the first line of a video's cached file says; None if it is not there or the video has changed since.

    num_frames, fps: the video's own, on whose grid clips are sampled. rate: frames a second kept. ends: of the JPEGs.
    """
    try:
        with open(cached_file_of(path, size), "rb") as file:
            kept, stat = json.loads(file.readline()), os.stat(path)
            kept["begin"] = file.tell()
        return kept if kept["source"] == [stat.st_mtime_ns, stat.st_size] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{cached_file_of(path, size)}: damaged; remove it and write it again") from None


def read_cached(path, kept, indices, size):
    """uint8 (len(indices), 3, size, size): of the frames kept, those nearest to indices on the video's own grid."""
    starts, frames = [0, *kept["ends"]], torch.zeros(len(indices), 3, size, size, dtype=torch.uint8)
    with open(cached_file_of(path, size), "rb") as file:
        for frame, i in zip(frames, indices, strict=True):
            k = min(round(i / kept["fps"] * kept["rate"]), len(kept["ends"]) - 1)
            file.seek(kept["begin"] + starts[k])
            jpeg = io.BytesIO(file.read(starts[k + 1] - starts[k]))
            try:
                with Image.open(jpeg, formats=("JPEG",)) as image:
                    for plane, channel in zip(frame, image.split(), strict=True):
                        plane[: image.height, : image.width] = torch.from_numpy(np.array(channel))
            except (OSError, RuntimeError, ValueError):
                raise DataError(f"{file.name}: damaged; remove it and write it again") from None
    return frames


def write_cached(path, size, rate):
    """Decode a video once and keep `rate` frames a second; -> (bytes written, what is wrong with the video or "").

    Written under another name first: a file that is there is whole.
    """
    try:
        media, stat, target = probe(path), os.stat(path), cached_file_of(path, size)
        rate = min(rate, media.fps)
        old = open_cached(path, size)
        if old and old["rate"] == rate:
            return 0, ""
        count = math.ceil(media.num_frames / media.fps * rate)
        wanted = [round(k / rate * media.fps) for k in range(count)]
        h, w = resized_shape(media.height, media.width, size)
        jpegs, ends = io.BytesIO(), []
        for k in range(0, count, 64):  # at 448 pixels 64 frames are 39 MB
            for frame in read_frames(path, wanted[k : k + 64], size)[:, :, :h, :w].permute(0, 2, 3, 1).numpy():
                Image.fromarray(frame).save(jpegs, "JPEG", quality=85)
                ends.append(jpegs.tell())
    except DataError as error:
        return 0, str(error)
    first = {"source": [stat.st_mtime_ns, stat.st_size], "num_frames": media.num_frames, "fps": media.fps,
             "rate": rate, "ends": ends}  # fmt: skip
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    temporary.write_bytes(json.dumps(first).encode() + b"\n" + jpegs.getvalue())
    os.replace(temporary, target)
    return target.stat().st_size, ""


def write_cache(folder, size, rate, workers):
    """`write_cached` for all videos under `folder`, several at once."""
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS and path.is_file())
    if not videos:
        raise DataError(f"{folder}: no videos in it")
    write = functools.partial(write_cached, size=size, rate=rate)
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = list(tqdm(pool.map(write, videos), total=len(videos), unit=" videos"))
    written, errors = [size for size, _ in results if size], [error for _, error in results if error]
    print("".join(f"left out: {error}\n" for error in errors), end="", file=sys.stderr)
    print(f"{folder}: {len(written):,} of {len(videos):,} videos written, {sum(written) / 1e6:,.1f} MB; "
          f"{len(videos) - len(written) - len(errors):,} were there, {len(errors):,} cannot be read")


def check_cached(folder, examples, size):
    """Say how many of the examples' videos are cached; none is an error."""
    paths = [find_media(folder, name, VIDEOS) for name in sorted({example.video for example in examples})]
    paths = [path for path in paths if path]
    count = sum(open_cached(path, size) is not None for path in paths)
    remedy = f"python data.py cache --data {folder} --size {size}"
    if not count:
        raise DataError(f"{folder}: no video is cached at {size} pixels; write the cache first: {remedy}")
    rest = f"; the other {len(paths) - count:,} will be decoded ({remedy} caches them)" if count < len(paths) else ""
    print(f"cache: {count:,} of {len(paths):,} videos{rest}")


# ----------------------------------------------------------------------------------------------------------------------
# Annotation files to examples. `LAYOUTS`, at the end, is a table: a row says which files a task
# has, which of their columns is the text, and what is asked. All layouts go one way:
#
#     folder -> find_files -> read_rows: a dict per question or caption -> make_examples -> Example
#
# A label is exact or the run stops: an answer that was guessed, or that slipped by a row, would
# train and test well enough to go unnoticed. `complain` is the one place where whatever goes wrong
# becomes a DataError, `file:line: what`.

OPTIONS = 5  # TGIF-QA action and transition, MSRVTT-MC: all five-way
PEOPLE = 10  # who answered each question of VQA
MAX_COUNT = 999  # TGIF-QA counts to some 30; a larger number is an id in the wrong column
MAX_TEXT = 20_000  # characters; far above any real field, far below what hurts
TABLES = (".csv", ".tsv", ".jsonl", ".json")
VIDEOS = (".gif", ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".3gp", ".3g2", ".mpg", ".mpeg",
          ".wmv", ".flv", ".mts")  # fmt: skip
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PLACES = ("", "gifs", "videos", "videos/all", "images", "TrainValVideo", "TestVideo",
          "train2014", "val2014", "train2017", "val2017", "VG_100K", "VG_100K_2")  # of media


# -------------------------------------------------- folders to files
def find_files(folder, patterns, many=False):
    """The annotation files of a folder or, if it has none, of one in it: `dataset/`, `annotations/`.

    The first pattern that fits any file counts; without its stars, as the public name, it is tried
    before. "a|b" takes what fits either. many: several files are welcome, no reason to stop.
    """
    forms = patterns if many else [f for given in patterns for f in (given.replace("*", ""), given)]
    for depth in ("[!.]*", "[!.]*/[!.]*"):  # [!.]: nothing hidden
        files = sorted(path for path in Path(folder).glob(depth) if path.suffix in TABLES)
        for pattern in forms:
            found = [path for path in files if any(map(path.match, pattern.split("|")))]
            if len(found) > 1 and not many or len({path.parent for path in found}) > 1:
                names = " and ".join(str(path.relative_to(folder)) for path in found[:4])
                raise DataError(f"{folder}: {names} all fit {pattern}; keep one of them there")
            if found:
                return found
    raise NoAnnotations(f"{folder}: no annotation file; looked for {', '.join(patterns)}")


class Place:
    """Where reading stands: a file, and a line of it or an index in its JSON.

    The generators below keep it up to date, row by row, so every complaint can begin with it.
    """

    def __init__(self, path):
        self.path, self.row = path, 1

    def __str__(self):
        return f"{self.path}:{self.row}"


@contextlib.contextmanager
def complain(place):
    """Whatever goes wrong in here becomes one line, which begins with where reading had come to."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, OSError, RecursionError, csv.Error) as error:
        raise DataError(f"{place}: {error}") from None


# -------------------------------------------------- files to rows
def read_rows(place, path):
    """Yield the rows of an annotation file as dicts, each complete in itself; `place` goes along."""
    place.path, place.row = path, 1
    if path.suffix == ".json":
        yield from json_rows(place, read_json(path))
        return
    # Lines of bytes: text would also be cut at U+2028, which stands inside some captions. CRLF and
    # LF mix in TGIF-QA's tables, and some editors put a byte order mark first.
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").splitlines() or [b""]
    if path.suffix == ".jsonl":
        for place.row, line in enumerate(lines, 1):
            yield json.loads(line.decode())
        return
    # A table. One line is one row, so that no stray quote swallows the rows that follow it.
    tabs = b"\t" in lines[0]
    header = [name.strip() for name in split_line(lines[0], tabs)]
    if len(set(header)) < len(header):  # a dict would quietly keep the last of two
        raise ValueError(f"two columns of one name; the header reads {' '.join(header)[:200]!r}")
    for place.row, line in enumerate(lines[1:], 2):
        fields = split_line(line, tabs)
        if len(fields) != len(header):  # a blank line, too: it may be where a row was lost
            raise ValueError(f"{len(fields)} columns where the header has {len(header)}")
        yield dict(zip(header, fields, strict=True))


def split_line(line, tabs):
    """Between TABs a quote is plain text; between commas it may hold commas, and ends in its line."""
    text = line.decode()
    return text.split("\t") if tabs else next(csv.reader([text], strict=True))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8-sig"))  # sig: a byte order mark may come first


def json_rows(place, content):
    """The rows of a public JSON file, whose keys give its layout away.

    What is nested, or split over two lists, is put together: then one row is one question or
    caption here, too, and nothing that follows needs to know the layout.
    """
    if isinstance(content, list):  # MSRVTT-QA, DiDeMo, one's own; with regions, Visual Genome
        for row in listed(place, content):
            yield from region_rows(place, row) if "regions" in row else [row]
    elif "images" in content:  # COCO: a photo has several captions
        images = index_by(place, content, "images", "id")
        yield from joined(place, content, "annotations", "image_id", images)
    elif "videos" in content:  # MSRVTT: so has a video
        videos = index_by(place, content, "videos", "video_id")
        yield from joined(place, content, "sentences", "video_id", videos)
    elif "annotations" in content:  # VQA: the questions stand in v2_OpenEnded_..._questions.json
        answers = index_by(place, content, "annotations", "question_id")
        name = place.path.stem.removeprefix("v2_").replace("annotations", "questions")
        place.path, = find_files(place.path.parent, [f"*{name}*.json"])
        asked = read_json(place.path)
        yield from joined(place, asked, "questions", "question_id", answers, once=True)
    else:  # ActivityNet: {video: {sentences}}
        for video, about in content.items():
            place.row = repr(video[:80])
            for sentence in column(about, "sentences", kind=list):
                yield {"video_id": video, "caption": sentence}


def region_rows(place, image):
    """Visual Genome: {id, regions: [{region_id, image_id, phrase}]}, a caption a region."""
    for region in listed(place, image["regions"], f"{place.row}.regions"):
        yield {"vg_id": column({**image, **region}, "image_id", "id"), **region}


def listed(place, values, label=""):
    """The entries of a JSON list; their places read label[i]."""
    if not isinstance(values, list):  # text, too, could be walked through: letter by letter
        raise TypeError(f"{label or 'the file'} should be a list, is {type(values).__name__}")
    for i, row in enumerate(values):
        place.row = f"{label}[{i}]"
        yield row


def index_by(place, content, label, key):
    """{id: row} of a list, each id once: of two rows one would be the wrong one."""
    found = {}
    for row in listed(place, column(content, label), label):
        if found.setdefault(name := name_of(row, key), row) is not row:
            raise ValueError(f"{key} {name[:80]!r} is there twice")
    return found


def joined(place, content, label, key, others, once=False):
    """Each row of a list, completed by that one of `others` to which its key points.

    once: they belong together two by two, and none may be left over.
    """
    for row in listed(place, column(content, label), label):
        name = name_of(row, key)
        other = others.pop(name, None) if once else others.get(name)
        # What both tell, VQA's image, has to agree. But each kind of row counts its own "id".
        if other is None or any(row[k] != other[k] for k in row.keys() & other.keys() - {"id"}):
            raise ValueError(f"{key} {name[:80]!r} has no match in the other list")
        yield {**other, **row}
    if once and others:
        raise ValueError(f"{len(others):,} annotations have no question")


def msrvtt_rows(place, listing):
    """The sentences of the videos in MSRVTT_train.9k.csv; the json files beside it hold them."""
    names, heard = {name_of(row, "video_id") for row in read_rows(place, listing)}, set()
    patterns = ["MSRVTT_data*.json", "*_videodatainfo*.json"]  # the second: train_val_ and test_
    for path in reversed(find_files(listing.parent, patterns, many=True)):
        for row in read_rows(place, path):
            if (name := name_of(row, "video_id")) in names:
                heard.add(name)
                yield row
    if silent := sorted(names - heard):
        print(f"note: {listing}: {len(silent):,} of its {len(names):,} videos have no caption in "
              f"the json ({', '.join(silent[:3])} …)", file=sys.stderr)  # fmt: skip


# -------------------------------------------------- columns to values: exact, or an error
def column(row, *names, kind=object):
    """The first of these columns that the row has: layouts call the same thing by several names."""
    if not isinstance(row, dict):  # JSON can put anything anywhere
        raise TypeError(f"expected {{key: value}}, found {type(row).__name__}")
    for name in names:
        if row.get(name) is not None:
            if not isinstance(row[name], kind):
                raise TypeError(f"{name} should be a {kind.__name__}, is {row[name]!r:.40}")
            return row[name]
    raise ValueError(f"{' or '.join(names)} is missing")


def clean(value, name, blank=False):
    """Text on one line. blank: there may be none."""
    if not isinstance(value, str):
        raise TypeError(f"{name} should be text, is {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{name} has {len(value):,} characters, more than {MAX_TEXT:,}")
    if re.search("[\0\ud800-\udfff]", value):  # JSON can spell NUL and half a surrogate pair
        raise ValueError(f"{name} holds characters that are not text")
    line = " ".join(value.split())
    if not (line or blank):
        raise ValueError(f"{name} is blank")
    return line


def name_of(row, *names):
    """An id or the name of a file: text or a whole number."""
    value = column(row, *names)
    return str(value) if type(value) is int else clean(value, names[0])


def whole(row, name, highest):
    """A whole number from 0 on. int() would also take True, 3.7 and '1_0': labels must be exact."""
    value = number = column(row, name)
    if isinstance(value, str) and re.fullmatch(" *[0-9]{1,9} *", value):
        number = int(value)
    if type(number) is not int or not 0 <= number <= highest:
        raise ValueError(f"{name} should be a whole number from 0 to {highest}, is {value!r:.40}")
    return number


# -------------------------------------------------- what is asked: a row to fields of an Example
def choice(row):
    """The index of one of five options: columns a1 .. a5, or a list, `caption` in some MC files."""
    if "a1" in row:  # TGIF-QA
        options = [column(row, f"a{i}") for i in range(1, OPTIONS + 1)]
    else:
        options = column(row, "options", "caption", kind=list)
    if len(options) != OPTIONS:
        raise ValueError(f"expected {OPTIONS} options, found {len(options)}")
    options = tuple(clean(option, f"option {i}") for i, option in enumerate(options, 1))
    return {"options": options, "answer": whole(row, "answer", OPTIONS - 1)}


def count(row):
    return {"answer": whole(row, "answer", MAX_COUNT)}


def open_answer(row):
    """An answer in words. Its kind, for accuracies by kind: FrameQA's type, which the public files
    give as a number; where there is none, the question's first word (who, what, how, ...)."""
    kind = name_of({"type": row["question"].split()[0].lower(), **row}, "answer_type", "type")
    kind = {"0": "object", "1": "number", "2": "color", "3": "location"}.get(kind, kind)
    return {"answer": clean(column(row, "answer"), "answer"), "kind": kind}


def soft_answer(row):
    """VQA: the soft score min(count / 3, 1) of each answer among ten people's, in official spelling.

    The reference's jsonl brings the scores, in `labels`, and not what people said.
    """
    kind = clean(row.get("answer_type") or "", "answer_type", blank=True)
    if "labels" in row:
        labels = column(row, "labels", kind=dict)
        if not all(type(n) in (int, float) and 0 <= n <= 1 for n in labels.values()):
            raise ValueError("labels should be {answer: score from 0 to 1}")
        return {"answer": {clean(said, "an answer"): n for said, n in labels.items()}, "kind": kind}
    given = column(row, "answers", kind=list)
    if len(given) != PEOPLE:
        raise ValueError(f"expected the answers of {PEOPLE} people, found {len(given)}")
    # intern: most are "yes" or "no", and four million copies of them would take space
    people = tuple(sys.intern(clean(column(one, "answer"), "answer", blank=True)) for one in given)
    counts = Counter(map(normalize_answer, people))
    scores = {answer: min(n / 3, 1) for answer, n in counts.items() if answer}
    return {"answer": scores, "kind": kind, "people": people}


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in re.findall(r"\S+", CONTRACTIONS)}


@functools.lru_cache(maxsize=100_000)
def normalize_answer(answer):
    """The official spelling: lower case, no punctuation or articles, digits for numbers, apostrophes restored.

    A mark that touches a blank is dropped (as all are beside a number like 1,000); elsewhere it becomes a blank.
    """
    text = answer
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        drop = f"{mark} " in answer or f" {mark}" in answer or re.search(r"\d,\d", answer)
        text = text.replace(mark, "" if drop else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction, example):
    """Official: the mean over the ten people of min(1, how many of the other nine said the same / 3).

    Hence `people`: the soft score does not tell three from four (.9 and 1). Where all ten agree, spelling counts.
    """
    people = example.people
    if not people:  # labels from a jsonl are accuracies already
        return float(example.answer.get(prediction, 0))
    if len(set(people)) > 1:
        prediction, people = normalize_answer(prediction), [normalize_answer(answer) for answer in people]
    count = people.count(prediction)
    return sum(min(1, (count - (answer == prediction)) / 3) for answer in people) / len(people)


def answer_list(examples, size):
    """The `size` most frequent answers (ties alphabetical) of the TRAINING examples; place in the list = label."""
    counts = Counter()
    for example in examples:
        scores = example.answer if isinstance(example.answer, dict) else {example.answer: 1}
        counts.update({answer: round(3 * score) for answer, score in scores.items()})  # whole numbers: exact ties
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:size]


def read_answer_list(folder):
    """The answers of ans2label.json ({answer: label}, as the official checkpoints have it) by label, or None."""
    try:
        path, = find_files(folder, ["*ans2label*.json"])
    except NoAnnotations:
        return None
    with complain(Place(path)):
        labels = read_json(path)
        if not labels or {(type(i), i) for i in labels.values()} != {(int, i) for i in range(len(labels))}:
            raise ValueError(f"the labels of its {len(labels):,} answers should count up from 0, each used once")
    return sorted(labels, key=labels.get)


# -------------------------------------------------- names to files
COCO_PREFIX = r"^COCO_\w+_(?=\d{12}$)"  # in the photos' names of 2014, gone in 2017


@functools.lru_cache(maxsize=64)  # each directory is listed once: 165,000 names cost a dict look-up each
def media_index(folder, parent, suffixes):
    """{name, stem or COCO number: (path, is it outside the folder?)} of the media in `parent` below all PLACES."""
    index, root = {}, os.path.realpath(folder)
    for place in (os.path.join(folder, place, parent) for place in PLACES):
        linked = not Path(os.path.realpath(place)).is_relative_to(root)
        entries = os.scandir(place) if os.path.isdir(place) else ()
        found = [(*os.path.splitext(entry.name), entry) for entry in entries if entry.is_file()]
        found = [(suffixes.index(end.lower()), stem, entry) for stem, end, entry in found if end.lower() in suffixes]
        for _, stem, entry in sorted(found, key=lambda item: item[:2]):
            outside = linked or entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root)
            for key in (entry.name, stem, re.sub(COCO_PREFIX, "", stem)):
                index.setdefault(key, (entry.path, outside))  # the first place and suffix win
    return index


def find_media(folder, name, suffixes=VIDEOS + IMAGES):
    """The file that an annotation means by `name`, or None. Its suffix may be absent or, re-encoded, another one.

    Names come from strangers' files: one that leads out of the folder (.., absolute, a drive, a link) is an error.
    """
    if re.search(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0", name):
        raise DataError(f"{name[:200]!r}: a media name must stay inside the data folder {folder}")
    parent, base = os.path.split(name)
    stem, end = os.path.splitext(base)
    family = next((family for family in (IMAGES, VIDEOS) if end.lower() in family), None)
    if family:  # 4.jpg may be 4.png, but never 4.mp4
        suffixes = tuple(suffix for suffix in suffixes if suffix in family)
    index = media_index(os.path.abspath(folder), parent, suffixes)
    names = (base, stem if family else base, re.sub(COCO_PREFIX, "", stem))
    path, outside = next((index[key] for key in names if key in index), (None, False))
    if outside:
        raise DataError(f"{path}: a link out of the data folder {folder}; copy the file, or give its real folder")
    return path and Path(path)


# -------------------------------------------------- rows to examples
# What the layouts call the name of the video or image, and what a bare number there stands for.
MEDIA = dict.fromkeys(("path", "gif_name", "clip_name", "video", "image", "file_name"), "{}")
MEDIA |= {"video_id": "video{}", "vg_id": "{}.jpg", "image_id": "{:0>12}", "coco_id": "{:0>12}"}
IDS = ("vid_id", "question_id", "sen_id", "region_id", "key", "id")
CAPTION, QUESTION = ("caption", "sentence", "description", "phrase"), ("question",)


class Layout(NamedTuple):
    """How a task's data lies on the disk; the rest of it stands in finetune.TASKS or pretrain.py."""

    files: tuple  # patterns for `find_files`, public names first; {split}: train, {Split}: Train
    toy: str  # which part of the toy data has this layout
    text_length: int  # Lt at most, [CLS] and [SEP] included
    text: tuple = CAPTION  # columns that may hold it; none: MSRVTT-MC asks nothing
    asked: object = None  # row -> options, answer, kind of its Example; None: the text is a caption
    top_answers: int | None = None  # open-ended: only the most frequent of training (None: all)
    stills: bool = False  # are images, without motion, what belongs there?
    paragraphs: bool = False  # are all sentences about a video one text?
    one_caption: bool = False  # a test video has one: R@1 among 20 of them is another figure
    all_files: bool = False  # pretraining: captions come from all files that fit
    instead: dict | None = None  # {split: whose files serve for it}: some test answers are secret
    training: str | None = None  # the task whose training files serve for this one

    def read(self, folder, split):
        """The examples of a split. Pretraining can do without val and test."""
        if self.training and split != "test":
            return LAYOUTS[self.training].read(folder, split)
        media_index.cache_clear()  # files may have come or gone since the last reading
        names = (self.instead or {}).get(split, [split])
        patterns = [pattern.format(split=name, Split=name.title())
                    for name in names for pattern in self.files]  # fmt: skip
        paths = find_files(folder, patterns, self.all_files)
        examples = [example for path in paths for example in read_file(self, folder, path, split)]
        if not examples and not (self.all_files and split != "train"):
            raise DataError(f"{paths[0]}: no examples in it")
        return examples


def read_examples(task, folders, split):
    """The examples of a task's split, from one folder or several, each with its media's path."""
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    layout = LAYOUTS[ALIASES.get(task, task)]
    return [example for folder in folders for example in layout.read(folder, split)]


def read_captions(folder, split="train", required=True):
    """Captioned images or videos for pretraining. required: is it an error that there are none?"""
    examples = read_examples("pretrain", folder, split)
    if required and not examples:
        raise DataError(f"{folder}: no {split} captions")
    return examples


def read_file(layout, folder, path, split):
    """The examples of one annotation file, and of what stands beside it (VQA's questions, ...)."""
    place, found, one = Place(path), {}, layout.one_caption and split == "test"
    # Media lie in the data folder, whether the annotations do or have a folder in it, or with them.
    find = functools.cache(lambda name: find_media(folder, name) or find_media(path.parent, name))
    read = msrvtt_rows if path.match("MSRVTT_*.[79]k*.csv") else read_rows
    with complain(place):
        for row in read(place, path):
            if layout.all_files and split not in splits_of(row, path):
                continue
            for example in make_examples(row, layout, place, find):
                # Examples stand under a key: those that share a video share one, or collide.
                key = example.video if one or layout.paragraphs else len(found)
                if key in found and one:
                    raise ValueError(f"a second caption of {key[:80]!r}; in testing it has one")
                if key in found:
                    text = clean(f"{found[key].text} {example.text}", "the paragraph", blank=True)
                    example = example._replace(text=text)
                found[key] = example
    examples = [example for example in found.values() if example.text or example.options]
    if blank := len(found) - len(examples):  # one caption in millions: no reason to stop
        print(f"note: {path}: left out {blank:,} of {len(found):,} captions, which are blank",
              file=sys.stderr)  # fmt: skip
    return examples


def splits_of(row, path):
    """The split of a caption: what its row says (in MSRVTT's json), else its file's name, else train."""
    if "split" in row:
        return ["val"] if row["split"] == "validate" else [row["split"]]
    return re.findall("train|val|test", path.stem.lower()) or ["train"]


def make_examples(row, layout, place, find):
    """The example of a row; in pretraining, of a row with a list of captions, one for each.

    find: the name of a video or image -> its file, or None. This is where an example gets its path.
    """
    said = column(row, *layout.text) if layout.text else ""
    named = next((name for name in MEDIA if row.get(name) is not None), None)
    if named is None:
        raise ValueError(f"no column names the video; it has {', '.join(row)[:200]!r}")
    video = name_of(row, named)
    video = MEDIA[named].format(video) if video.isdigit() else video
    path = find(video)
    name = str(place.row) if row.keys().isdisjoint(IDS) else name_of(row, *IDS)
    if layout.all_files:  # ids repeat from one file to the next
        name = f"{place.path.stem}/{name}"
    name = video if layout.paragraphs else name
    for text in said if layout.all_files and isinstance(said, list) else [said]:
        # A blank caption is left out later, and counted; a blank question is an error.
        text = clean(text, " or ".join(layout.text), blank=not (layout.asked and layout.text))
        asked = layout.asked(row) if layout.asked else {}
        yield Example(name, video, text, path=path and str(path), **asked)


# -------------------------------------------------- the table: tasks to layouts
OWN = ("{split}.csv", "{split}.tsv", "*{split}*.jsonl")  # one's own files, or the reference's
LAYOUTS = {
    # Answer counts are the reference's: 3,129 for VQA, 1,500 for MSRVTT-QA.
    **{f"tgif_qa_{kind}": Layout(
        (f"{{Split}}_{kind}_question*.csv", f"*{kind}*{{split}}*.jsonl",
         f"*{{split}}*{kind}*.jsonl", f"{kind}/*{{split}}*.jsonl"), "tgif_qa", 25, QUESTION, asked)
       for kind, asked in (("action", choice), ("transition", choice), ("frameqa", open_answer),
                           ("count", count))},
    # 1k-A: train on the 9k (or 7k) listed videos, 20 captions each; test on 1,000 videos with ONE
    # caption each. The json's own `test` split (2,990 videos, 20 captions each) is another protocol:
    # its R@1 does not compare.
    "msrvtt_retrieval": Layout(
        ("MSRVTT_JSFUSION_{split}*.csv", "MSRVTT_{split}.9k*.csv", "MSRVTT_{split}.7k*.csv",
         "*ret*{split}*.jsonl", *OWN), "msrvtt", 20, one_caption=True),
    "didemo_retrieval": Layout(("{split}_data*.json", *OWN), "msrvtt", 100, paragraphs=True),
    "activitynet_retrieval": Layout(
        ("{split}.*json", "{split}*.csv", *OWN), "msrvtt", 100, paragraphs=True,
        instead={"val": ("val_1", "val1", "val"), "test": ("val_1", "val1", "test", "val")}),
    "msrvtt_qa": Layout(
        ("{split}_qa*.json", "*qa*{split}*.jsonl", *OWN), "msrvtt", 100, QUESTION, open_answer,
        top_answers=1500),
    # Which of five captions belongs to the video? No training: a retrieval model scores them.
    "msrvtt_mc": Layout(
        ("*mc*{split}*.jsonl", "*mc*{split}*.json", "*{split}*.jsonl"), "msrvtt", 20, (), choice,
        training="msrvtt_retrieval"),
    "vqa": Layout(
        ("*{split}*annotations*.json", "*annotations*{split}*.json", "*{split}*.jsonl"), "vqa", 20,
        QUESTION, soft_answer, top_answers=3129, stills=True, instead={"test": ("test", "val")}),
    # COCO, MSRVTT and Visual Genome by their public names; where there are none, all tables.
    "pretrain": Layout(
        ("*caption[s_]*.json|MSRVTT_data*.json|*videodatainfo*.json|*region_descriptions*.json",
         "*.csv|*.tsv|*.jsonl"),
        "coco_captions", 30, stills=True, all_files=True),
}  # fmt: skip
# One's own questions are read, and cut, as MSRVTT-QA's. A limit of 100 tokens costs short ones
# nothing, as a batch is only as long as its longest text.
LAYOUTS["qa"] = LAYOUTS["msrvtt_qa"]
ALIASES = {"tgif_qa": "tgif_qa_action"}


# ----------------------------------------------------------------------------------------------------------------------
# The toy data: small enough for a laptop CPU, in the public layouts, so that toy and real data share every reader
#
# Each GIF shows one object of some colour, shape and place. It does one action several times, later another one once,
# and in between it idles. Every action can be told from a single frame, but most single frames show idling or the
# other action: one clip is often not enough, a few always are. Each repetition leaves a mark at the bottom (counting).

TOY_VERSION = 4  # a new number rewrites the toy data
TOY_SIZE, TOY_FPS, TOY_FRAMES = 64, 4, 32  # pixels, frames per second, frames: 8-second GIFs
TOY_BUSY, TOY_LAST = 16, 9  # frames of the repeated action, in all; frames of the other one
TOY_COLORS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (60, 90, 240), "yellow": (240, 220, 50),
    "purple": (160, 60, 200), "orange": (250, 140, 30), "white": (240, 240, 240), "pink": (250, 130, 190),
}  # fmt: skip
TOY_SHAPES = {  # corners around (0, 0)
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "bar": [(-1.3, -0.4), (1.3, -0.4), (1.3, 0.4), (-1.3, 0.4)],
    "triangle": [(0, -1.2), (1.1, 1), (-1.1, 1)],
    "cross": [(-0.35, -1.2), (0.35, -1.2), (0.35, -0.35), (1.2, -0.35), (1.2, 0.35), (0.35, 0.35),
              (0.35, 1.2), (-0.35, 1.2), (-0.35, 0.35), (-1.2, 0.35), (-1.2, -0.35), (-0.35, -0.35)],
}  # fmt: skip
TOY_ACTIONS = ["jump", "spin", "grow", "shrink", "blink", "split", "shine", "wave"]
TOY_PLACES = {"left": (16, 30), "right": (48, 30), "top": (32, 22), "bottom": (32, 42)}
TOY_NUMBERS = ["one", "two", "three", "four"]


class ToyVideo(NamedTuple):
    """What happens in one toy GIF."""

    name: str
    color: str
    shape: str
    place: str
    moons: int  # 1..4 small dots in the top corner
    action: str  # done `times` times, ...
    times: int  # 2..5
    last: str  # ... and then this, once
    timeline: list  # for each frame (action or None, repetitions so far)

    @property
    def subject(self):
        return f"the {self.color} {self.shape}"


def toy_video(name, rng):
    """Draw what happens in a video: idle, action, idle, action, ..., last, idle; then turned, since a GIF is a loop."""
    action, last = rng.sample(TOY_ACTIONS, 2)
    times = rng.randint(2, 5)
    acts = [(action, TOY_BUSY * (i + 1) // times - TOY_BUSY * i // times) for i in range(times)] + [(last, TOY_LAST)]
    idle = [1] * (len(acts) + 1)  # frames of rest before, between and after the acts; the spare ones fall at random
    for _ in range(TOY_FRAMES - TOY_BUSY - TOY_LAST - len(idle)):
        idle[rng.randrange(len(idle))] += 1
    timeline = [(None, times)] * idle[0]  # the marks of the last round stay until the next one begins
    for i, (act, length) in enumerate(acts, 1):
        timeline += [(act, min(i, times))] * length + [(None, min(i, times))] * idle[i]
    start = rng.randrange(TOY_FRAMES)  # GIFs loop: one may start anywhere, so no place in it is special
    timeline = timeline[start:] + timeline[:start]
    color, shape, place = (rng.choice(list(things)) for things in (TOY_COLORS, TOY_SHAPES, TOY_PLACES))
    return ToyVideo(name, color, shape, place, rng.randint(1, 4), action, times, last, timeline)


def toy_polygon(shape, x, y, r):
    """The corners of a shape of radius r around (x, y)."""
    return [(x + r * dx, y + r * dy) for dx, dy in TOY_SHAPES[shape]]


def draw_toy_object(draw, color, shape, x, y, action, r=10):
    """One object in one of nine states: idle (None), or doing one of TOY_ACTIONS."""
    if action == "split":
        for side in (-r, r):
            draw.polygon(toy_polygon(shape, x + side, y, 0.6 * r), fill=color)
        return
    if action == "jump":
        draw.ellipse((x - r, y + r - 1, x + r, y + r + 3), fill=(110, 110, 110))  # its shadow stays on the ground
        y -= 12
    if action == "shine":
        for a in (math.pi / 4 * i for i in range(8)):
            ray = [(x + k * r * math.cos(a), y + k * r * math.sin(a)) for k in (1.3, 1.9)]
            draw.line(ray, fill=(255, 255, 160), width=2)
    if action == "spin":
        for start in (0, 180):
            draw.arc((x - 16, y - 16, x + 16, y + 16), start, start + 110, fill=(150, 255, 255), width=2)
    if action == "wave":
        for side in (-1, 1):
            draw.line((x + side * 7, y, x + side * 18, y - 16), fill=(255, 200, 255), width=3)
    corners = toy_polygon(shape, x, y, {"grow": 1.6, "shrink": 0.5}.get(action, 1) * r)
    draw.polygon(corners, fill=None if action == "blink" else color, outline=color, width=2)


def draw_toy_video(video, rng):
    """The frames of a toy video, as Pillow images."""
    background = tuple(rng.randint(0, 70) for _ in range(3))
    x, y = (c + rng.uniform(-3, 3) for c in TOY_PLACES[video.place])
    drift = rng.uniform(-5, 5)
    frames = []
    for t, (action, marks) in enumerate(video.timeline):
        image = Image.new("RGB", (TOY_SIZE, TOY_SIZE), background)
        draw = ImageDraw.Draw(image)
        for i in range(video.moons):
            draw.ellipse((3 + 6 * i, 2, 6 + 6 * i, 5), fill=(230, 230, 120))
        for i in range(marks):
            draw.rectangle((4 + 9 * i, 58, 9 + 9 * i, 62), fill=(200, 200, 200))
        place = (x + drift * t / TOY_FRAMES, y + t % 2)  # never still: a GIF writer would merge equal frames
        draw_toy_object(draw, TOY_COLORS[video.color], video.shape, *place, action)
        frames.append(image)
    return frames


def toy_questions(video, kind, rng):
    """One question about a toy video, as a dict of the public file's columns."""
    if kind in ("action", "transition"):
        after = rng.random() < 0.5
        answer = video.last if kind == "transition" and after else video.action
        # The other action of this video is no option: a frame that shows it would speak for a wrong answer.
        options = rng.sample([a for a in TOY_ACTIONS if a not in (video.action, video.last)], 4)
        options.insert(rng.randrange(5), answer)
        when = f"after {video.action}" if after else f"before {video.last}"
        question = f"what does {video.subject} do {f'{video.times} times' if kind == 'action' else when} ?"
        return {"question": question, **{f"a{i}": o for i, o in enumerate(options, 1)}, "answer": options.index(answer)}
    if kind == "count":
        return {"question": f"how many times does {video.subject} {video.action} ?", "answer": video.times}
    # FrameQA's types: 1 number, 2 color, 3 location. None asks for a shape (type 0, object): 64 pixels and a few
    # minutes from scratch are too little to learn it.
    number = rng.randint(1, 3)
    question, answer = [
        ("how many moons are in the sky ?", TOY_NUMBERS[video.moons - 1]),
        (f"what is the color of the {video.shape} ?", video.color),
        (f"where is {video.subject} ?", video.place),
    ][number - 1]
    return {"question": question, "answer": answer, "type": number}


def write_toy_tgif_qa(folder, train=1000, test=200, seed=0):
    """TGIF-QA's layout: gifs/<gif_name>.gif and TAB-separated {Train,Test}_<kind>_question.csv for all four tasks."""
    (folder / "gifs").mkdir(parents=True, exist_ok=True)
    for split, count in (("Train", train), ("Test", test)):
        rng = random.Random(f"{split} {seed}")
        videos = [toy_video(f"toy_{split.lower()}_{i:04d}", rng) for i in range(count)]
        for video in videos:
            write_gif(draw_toy_video(video, rng), folder / "gifs" / f"{video.name}.gif")
        for kind in ("action", "transition", "frameqa", "count"):
            asked = [(video, toy_questions(video, kind, rng)) for video in videos]
            if (kind, split) == ("transition", "Train"):  # the hardest of the four: twice as many to learn from
                more = random.Random(f"more {seed}")
                asked += [(video, toy_questions(video, kind, more)) for video in videos]
            rows = [{"gif_name": video.name, **question, "vid_id": f"{kind.upper()}{i}", "key": i}
                    for i, (video, question) in enumerate(asked)]  # fmt: skip
            lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
            (folder / f"{split}_{kind}_question.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")


def toy_captions(photo):
    """All that is ever said about a toy photo. It is a closed list, so that what is not on it is wrong of the photo.

    Several name nothing but the action: where every caption names all, the color alone tells a mismatch.
    """
    does, verb = photo.action or "nothing", "is" if photo.moons == 1 else "are"
    return [
        f"it does {does}",
        f"the thing does {does}",
        f"the {photo.shape} does {does}",
        f"{photo.subject} does {does}",
        f"{photo.subject} is on the {photo.place}",
        f"there {verb} {TOY_NUMBERS[photo.moons - 1]} moon{'s' * (photo.moons > 1)} in the sky",
    ]


def write_toy_photos(folder, name, numbers, rng):
    """Write photos and yield (number, photo): each is one frame of a toy video, with or without an action.

    numbers: others in each split, since annotations name a photo by its number alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        action = rng.choice([None, *TOY_ACTIONS])
        photo = toy_video("", rng)._replace(action=action, timeline=[(action, rng.randint(0, 5))])
        draw_toy_video(photo, rng)[0].save(folder / name.format(number))
        yield number, photo


def write_toy_coco(folder, train=2000, val=200, seed=0):
    """COCO's layout: captions_{train,val}2017.json, {train,val}2017/<12 digits>.png; a photo is one frame of a GIF."""
    for split, numbers in (("train", range(1, train + 1)), ("val", range(train + 1, train + val + 1))):
        rng = random.Random(f"photos {split} {seed}")
        images, annotations = [], []
        for i, photo in write_toy_photos(folder / f"{split}2017", "{:012d}.png", numbers, rng):
            images.append({"id": i, "file_name": f"{i:012d}.png", "width": TOY_SIZE, "height": TOY_SIZE})
            annotations += [{"id": len(annotations) + k, "image_id": i, "caption": caption}
                            for k, caption in enumerate(toy_captions(photo))]  # fmt: skip
        write_json(folder / f"captions_{split}2017.json", {"images": images, "annotations": annotations})


def write_gif(frames, path):
    first, *rest = frames
    first.save(path, save_all=True, append_images=rest, duration=1000 // TOY_FPS, loop=0, optimize=False)


def toy_sentences(video):
    """Captions of a toy video. They leave out the colour: alike but for what happens, so that clips must be seen."""
    return [
        f"the {video.shape} does {video.action} before {video.last}",
        f"the {video.shape} does {video.last} after {video.action}",
        f"the {video.shape} does {video.action} {video.times} times before {video.last}",
    ]


def write_toy_msrvtt(folder, train=1000, test=100, seed=0):
    """MSRVTT's layout, for retrieval (1k-A), question answering and multiple choice: videos 0 .. test-1 are the test.

    The same videos stand there in DiDeMo's and ActivityNet's layouts, too: two sentences make a paragraph. No two test
    videos show the same shape with the same two actions. (GIFs, not MP4s: they decode in a millisecond.)
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rng, seen, videos = random.Random(f"msrvtt {seed}"), set(), []
    while len(videos) < test + train:
        video = toy_video(f"video{len(videos)}", rng)
        content = (video.shape, *sorted((video.action, video.last)))
        if len(videos) >= test or content not in seen:
            seen.add(content)
            videos.append(video)
            write_gif(draw_toy_video(video, rng), folder / "videos" / f"{video.name}.gif")
    tests, trains = videos[:test], videos[test:]
    sentences = [{"sen_id": 3 * i + k, "video_id": video.name, "caption": caption}
                 for i, video in enumerate(videos) for k, caption in enumerate(toy_sentences(video))]  # fmt: skip
    parts = [{"video_id": v.name, "split": "test" if i < test else "train"} for i, v in enumerate(videos)]
    write_json(folder / "MSRVTT_data.json", {"videos": parts, "sentences": sentences})
    (folder / "MSRVTT_train.9k.csv").write_text("\n".join(["video_id", *(v.name for v in trains)]) + "\n")
    rows = [f"ret{i},msr{i},{video.name},{toy_sentences(video)[0]}" for i, video in enumerate(tests)]
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *rows]) + "\n")
    for split, name, part in (("train", "train", trains), ("test", "val_1", tests)):
        questions = [toy_open_question(v, rng) | {"video_id": int(v.name[5:])} for v in part for _ in range(3)]
        write_json(folder / f"{split}_qa.json", [{"id": i} | question for i, question in enumerate(questions)])
        said = {video.name: [f"the {video.shape} does {act}" for act in (video.action, video.last)] for video in part}
        moments = [(video, sentence) for video in said for sentence in said[video]]
        write_json(folder / f"{split}_data.json", [{"annotation_id": i, "video": video, "description": sentence}
                                                   for i, (video, sentence) in enumerate(moments)])  # fmt: skip
        write_json(folder / f"{name}.json", {video: {"duration": 8.0, "timestamps": [[0, 8], [0, 8]], "sentences": both}
                                             for video, both in said.items()})  # fmt: skip
    choices = []
    for video in tests:
        options = [toy_sentences(other)[0] for other in rng.sample([v for v in tests if v is not video], 4)]
        answer = rng.randrange(5)
        options.insert(answer, toy_sentences(video)[0])
        choices.append(json.dumps({"clip_name": video.name, "options": options, "answer": answer}))
    (folder / "msrvtt_mc_test.jsonl").write_text("\n".join(choices) + "\n")


def toy_open_question(video, rng):
    """A question to be answered in a word: what an object does before something else, or what it is."""
    if rng.random() < 0.5:
        return {"question": f"what does {video.subject} do before {video.last} ?", "answer": video.action}
    question = toy_questions(video, "frameqa", rng)
    return {"question": question["question"], "answer": question["answer"]}


def write_toy_vqa(folder, train=1500, test=200, seed=0):
    """VQA v2's layout: official questions and annotations, two questions a photo, each answered by ten people."""
    for split, numbers in (("train2014", range(1, train + 1)), ("val2014", range(train + 1, train + test + 1))):
        rng = random.Random(f"vqa {split} {seed}")
        questions, annotations = [], []
        for image, photo in write_toy_photos(folder / split, f"COCO_{split}_{{:012d}}.png", numbers, rng):
            for _ in range(2):
                question, answer, kind = toy_vqa_question(photo, rng)
                ids = {"question_id": len(questions), "image_id": image}
                people = [answer] * 9 + [rng.choice([*TOY_COLORS, *TOY_SHAPES, "yes", "no"])]  # one has not looked
                said = [{"answer": given, "answer_id": i} for i, given in enumerate(people, 1)]
                questions.append(ids | {"question": question})
                annotations.append(ids | {"answers": said, "answer_type": kind, "multiple_choice_answer": answer})
        write_json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        write_json(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})


def toy_vqa_question(photo, rng):
    """(question, answer, answer type)"""
    if rng.random() < 0.3:
        color = rng.choice([photo.color, rng.choice(list(TOY_COLORS))])
        return f"is the {photo.shape} {color} ?", "yes" if color == photo.color else "no", "yes/no"
    if photo.action and rng.random() < 0.3:
        return f"what does {photo.subject} do ?", photo.action, "other"
    question = toy_questions(photo, "frameqa", rng)
    answer = question["answer"]
    return question["question"], answer, "number" if answer in TOY_NUMBERS else "other"


def write_json(path, contents):
    path.write_text(json.dumps(contents), encoding="utf-8")


def toy_texts(folder):
    """Questions and answers of the toy tasks: a vocabulary from captions and these serves fine-tuning, too."""
    kinds = ("action", "transition", "frameqa", "count")
    tasks = (*(f"tgif_qa_{kind}" for kind in kinds), "msrvtt_retrieval", "msrvtt_qa", "vqa")
    examples = [example for task in tasks for example in read_examples(task, folder / LAYOUTS[task].toy, "train")]
    answers = [e.answer if isinstance(e.answer, dict) else [str(e.answer or "")] for e in examples]
    return [text for e, words in zip(examples, answers, strict=True) for text in (*input_texts(e), *words)]


def toy_data(*parts, folder="toy_data"):
    """Write these parts of the toy data (all, if none is named), once; -> the folder.

    A marker file in each part, written last, tells whether an earlier writing was completed.
    """
    writers = {"tgif_qa": write_toy_tgif_qa, "msrvtt": write_toy_msrvtt, "vqa": write_toy_vqa,
               "coco_captions": write_toy_coco}  # fmt: skip
    for part in parts or writers:
        marker = Path(folder) / part / f"complete-{TOY_VERSION}"
        if not marker.exists():
            print(f"writing toy data to {marker.parent}/ (once, some ten seconds)", flush=True)
            writers[part](marker.parent)
            marker.touch()
    return Path(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Seeing what sampling and resizing make of a video

SHEET_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # by Okabe and Ito: all can tell them


def contact_sheet(path, n_clips, n_frames, target_fps, size, train, seed=0):
    """A picture 1600 pixels wide: a video's clips on its time line, and their frames as the model receives them."""
    media, generator = probe(path), torch.Generator().manual_seed(seed)
    clips = sample_clips(media.num_frames, media.fps, n_clips, n_frames, target_fps, train, generator)
    clips = clips[clips[:, 0].argsort(stable=True)]  # random ones in the order of time, too
    times = (clips / media.fps).tolist()
    columns = max(1, min(n_clips, 8 // n_frames))  # clips in a row
    side = min(360, (1544 - columns * (24 + 6 * n_frames)) // (columns * n_frames))  # of a frame
    sheet = Image.new("RGB", (1600, 200 + 26 * n_clips + -(-n_clips // columns) * (side + 84)), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (40, 24), Path(path).name[:50], 28)
    how = f"at random (seed {seed})" if train else "uniform" if n_clips > 1 else "in the middle"
    write(draw, (1560, 30), f"N = {n_clips} {how}, T = {n_frames}, {media.width} x {media.height} pixels to "
          f"{size} x {size}", 20, "#555555", "ra")  # fmt: skip
    top = draw_time_line(draw, media, times, n_frames / target_fps) + 30
    h, w = (side * n // size for n in resized_shape(media.height, media.width, size))
    for i, pixels in enumerate(read_frames(path, clips.flatten().tolist(), size)):
        clip, t = divmod(i, n_frames)
        color = SHEET_COLORS[clip % len(SHEET_COLORS)]
        x = 40 + clip % columns * (n_frames * (side + 6) + 24) + t * (side + 6)
        y = top + 30 + clip // columns * (side + 84)
        sheet.paste(picture(pixels, side), (x, y))
        draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=color, width=2)
        if side - h > 20 or side - w > 70:
            middle = ((w + side * (w < h)) // 2, (h + side * (h < w)) // 2)  # of what is right of the picture, or below
            write(draw, (x + middle[0], y + middle[1]), "padding", 15, "#999999", "mm")
        write(draw, (x, y - 30), f"clip {clip + 1}" if t == 0 else "", 20, color)
        write(draw, (x + side // 2, y + side + 8), f"{times[clip][t]:.2f} s", 18, "#333333", "ma")
    return sheet.crop((0, 0, 1600, y + side + 54))


def draw_time_line(draw, media, times, length):
    """Seconds on an axis, below it a numbered bar for each clip, with a dot for each frame. -> the lowest bar's end."""
    seconds, ends = media.num_frames / media.fps, []  # ends: when each lane is free again; clips may overlap
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300) if seconds / s <= 12), seconds / 10)
    draw.line((40, 92, 1560, 92), fill="#333333", width=2)
    for i in range(int(seconds / step + 1e-6) + 1):
        x = 40 + 1520 * i * step / seconds
        draw.line((x, 86, x, 92), fill="#333333", width=2)
        write(draw, (x, 82), f"{i * step:g} s", 16, "#333333", "ms")
    for i, row in enumerate(times):
        lane = next((lane for lane, end in enumerate(ends) if end <= row[0] + 1e-6), len(ends))
        ends[lane : lane + 1] = [row[0] + length]
        left, right = (40 + 1520 * min(t / seconds, 1) for t in (row[0], row[0] + length))
        box = (left, 100 + 26 * lane, max(right - 2, left + 8), 122 + 26 * lane)
        draw.rectangle(box, fill=SHEET_COLORS[i % len(SHEET_COLORS)])
        for t in row:
            x = min(40 + 1520 * t / seconds + 5, box[2] - 3)
            draw.ellipse((x - 2, box[3] - 6, x + 2, box[3] - 2), fill="white")
        write(draw, ((box[0] + box[2]) / 2, box[1] + 10), str(i + 1), 16, "white", "mm")
    return 122 + 26 * (len(ends) - 1)


def write(draw, place, text, size, color="black", anchor="la"):
    draw.text(place, text, fill=color, font=ImageFont.load_default(size), anchor=anchor)


class Seen(NamedTuple):
    """What a model looked at in one video, and what it made of it; all of it on the CPU."""

    text: str
    frames: Tensor  # (N, T, 3, L, L) uint8: the clips
    words: list  # of the text, from "[CLS]" on; in multiple choice, of the winning option's
    attention: Tensor  # (N, words, h, w): from each word to each cell of the grid
    names: list  # of the options or answers
    scores: Tensor  # (N, names): what each clip says alone, as probabilities; in counting, the number
    weights: Tensor  # (N,): of each clip in G
    ranking: Tensor  # (names,): what all clips say together
    full: float  # the score of the longest bar: 1, or a high count


HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis: brightness alone tells it


def attention_sheet(path, clips, length, how, seen, each_word=False):
    """A picture 1600 pixels wide of how an answer came about: a row for each clip, below them what G makes of all.

    clips (N, T) frame indices; length: a clip's seconds; how: G. Colours are the attention from [CLS] to the grid and,
    with each_word, from every word, all on one scale; what does not go to the grid goes to the text.
    """
    media, (N, T) = probe(path), clips.shape
    side, rows = min(180, 690 // (T + 1) - 6), -(-(len(seen.words) - 1) // 12) if each_word else 0  # rows of words
    height, x = max(side + 50, 170) + 150 * rows, 130 + (T + 1) * (side + 6)  # of a clip; right of its pictures
    sheet = Image.new("RGB", (1600, 420 + N * (height + 52)), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (40, 24), shorten(seen.text, 80), 28)
    write(draw, (1560, 30), f"{shorten(Path(path).name, 40)}, N = {N}, T = {T}", 20, "#555555", "ra")
    y = draw_time_line(draw, media, (clips / media.fps).tolist(), length) + 30
    heads = {130: "frames", x - side - 6: "[CLS] looks at", x + 30: "this clip alone", 1430: "weight in G"}
    for left, head in heads.items():
        write(draw, (left, y), head, 20, "#555555")
    top = seen.attention[:, : None if each_word else 1].max().item()
    for i in range(N):
        draw_clip(sheet, y + 38 + i * (height + 26), i, f"{clips[i, 0] / media.fps:.2f} s", side, top, seen, rows)
    y += 38 + N * (height + 26)
    draw.line((40, y - 14, 1560, y - 14), fill="#333333", width=2)
    write(draw, (40, y), f"All clips, G = {how}", 24)
    draw_bars(draw, (x + 30, y), 1370 - x, seen, seen.ranking, best_first(seen.ranking), "#333333")
    sheet.paste(colors(torch.linspace(0, top, 200).expand(16, -1), top), (130, y + 60))
    write(draw, (130, y + 80), f"0 to {top:.1%} of the attention, in one cell", 16, "#555555")
    return sheet.crop((0, 0, 1600, y + max(120, 30 * min(5, len(seen.names))) + 20))


def draw_clip(sheet, y, i, time, side, top, seen, rows):
    """Clip i's row, from y: frames, attention, scores, weight; then rows of words."""
    draw, color, T = ImageDraw.Draw(sheet), SHEET_COLORS[i % len(SHEET_COLORS)], len(seen.frames[i])
    write(draw, (40, y), f"clip {i + 1}", 20, color)
    write(draw, (40, y + 28), time, 18, "#333333")
    for t, pixels in enumerate(seen.frames[i]):
        sheet.paste(picture(pixels, side), (130 + t * (side + 6), y))
    x, middle = 130 + T * (side + 6), seen.frames[i, T // 2]
    sheet.paste(overlay(middle, seen.attention[i, 0], top, side), (x, y))
    write(draw, (x + side // 2, y + side + 6), f"{seen.attention[i, 0].sum():.0%} on the grid", 16, "#555555", "ma")
    order = best_first(seen.ranking)  # the same for each clip, but its own favourite is always there
    if (own := seen.scores[i].argmax().item()) not in order:
        order[-1] = own
    x += side + 36
    draw_bars(draw, (x, y), 1400 - x, seen, seen.scores[i], order, color)
    draw.rectangle((1430, y + 2, 1431 + 70 * seen.weights[i].item(), y + 20), fill=color)
    write(draw, (1560, y), f"{seen.weights[i]:.0%}", 18, "#333333", "ra")
    for k, word in enumerate(seen.words[1:] if rows else ()):
        place = 130 + k % 12 * 120, y + max(side + 50, 170) + k // 12 * 150
        write(draw, (place[0] + 56, place[1]), shorten(word, 13), 16, "#333333", "ma")
        sheet.paste(overlay(middle, seen.attention[i, k + 1], top, 112), (place[0], place[1] + 24))


def draw_bars(draw, place, width, seen, scores, order, color):
    """A line each for the names in `order`: the name, a bar, the number; the highest one's in `color`."""
    letters = max(8, *(min(25, len(seen.names[j])) for j in best_first(seen.ranking)))
    x = place[0] + 30 + 10 * letters
    for k, j in enumerate(order):
        y, score = place[1] + 30 * k, scores[j].item()
        end = x + max(1, (width - 90 - 10 * letters) * min(score / seen.full, 1))
        write(draw, (place[0], y), shorten(seen.names[j], letters), 18, "#333333")
        draw.rectangle((x, y + 2, end, y + 20), fill=color if score == scores.max() else "#bbbbbb")
        write(draw, (end + 8, y), f"{score:.0%}" if seen.full == 1 else f"{score:.2f}", 18, "#333333")


def best_first(scores, most=5):
    return scores.topk(min(most, len(scores))).indices.tolist()


def picture(pixels, side):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.LANCZOS)


def overlay(pixels, attention, top, side):
    """A frame (3, L, L) in grey under its attention (h, w), made smooth: violet is 0, yellow is `top`."""
    attention = F.interpolate(attention[None, None], size=(side, side), mode="bilinear")[0, 0]
    return Image.blend(picture(pixels, side).convert("L").convert("RGB"), colors(attention, top), 0.7)


def colors(values, top):
    """(h, w) from 0 to `top` as a picture in the colours of HEAT."""
    stops = np.linspace(0, top, len(HEAT))
    rgb = [np.interp(values.numpy(), stops, channel) for channel in zip(*HEAT, strict=True)]
    return Image.fromarray(np.stack(rgb, -1).astype(np.uint8))


def shorten(text, length):
    return text if len(text) <= length else f"{text[: length - 3]}..."


def example_sheet(title, right, wrong):
    """A picture 1600 pixels wide: two columns of cards (pictures, lines of text), what a model got right and wrong."""
    sheet = Image.new("RGB", (1600, 140 + 210 * max(len(right), len(wrong), 1)), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (40, 24), title, 28)
    for x, head, cards, color in ((40, "right", right, "#009e73"), (820, "wrong", wrong, "#d55e00")):
        write(draw, (x, 76), head if cards else f"none {head}", 22, color)
        for i, (pictures, lines) in enumerate(cards):
            y, side = 116 + 210 * i, min(180, 440 // len(pictures) - 6)
            draw.line((x, y - 6, x + 740, y - 6), fill=color, width=2)
            for k, image in enumerate(pictures):
                sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x + k * (side + 6), y + 6))
            left = x + len(pictures) * (side + 6) + 14
            lines = [part for line in lines for part in textwrap.wrap(line, (x + 740 - left) * 2 // 17)]
            write(draw, (left, y + 4), "\n".join(lines[:7]), 18, "#333333")
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# Is the data whole? `python data.py check`


FINDINGS = {  # all that `check` looks for, and what to do about it; "!": it stops a run
    "annotations unreadable": "! mend the file that is named, or put it there",
    "videos missing": "! put them there; or --allow_missing: left out in training, wrong in testing",
    "videos refused": "! media must lie inside the data folder",
    "videos unreadable": "download them again; training replaces them by others, testing counts them as wrong",
    "videos without motion": "a single frame, often a placeholder for a deleted video: download them again",
    "videos also in train": "a model may remember them: the results would be too good",
    "same row twice": "same video and text: counts double in testing; do the answers agree?",
    "same id twice": "matters only where predictions are looked up by their id",
    "answer not in list": "left out in training, wrong in testing",
    "text cut": "a longer --text_length keeps the whole text",
    "option cut": "a longer --text_length keeps the whole option",
    "option lost": "nothing is left of the options, so the answer is a guess: a longer --text_length",
}


class Finding(NamedTuple):
    what: str  # one of FINDINGS
    split: str
    name: str  # of the video, or the example's id
    detail: str = ""


def check_video(name, folder, stills, deep):
    """-> a Finding, of no split yet, if a video is not as it should be; None if it is.

    deep: decode what 16 test clips would look at, and not only the header.
    """
    try:
        path = find_media(folder, name)
    except DataError as error:
        return Finding("videos refused", "", name, str(error))
    if not path:
        return Finding("videos missing", "", name)
    try:
        media = probe(path)
        if deep:
            read_clips(path, 16, 1, 1.0, 32, train=False)
    except DataError as error:
        return Finding("videos unreadable", "", name, str(error))
    if media.num_frames == 1 and not (stills and path.suffix.lower() in IMAGES):
        return Finding("videos without motion", "", name, str(path))


def check_texts(split, examples, tokenizer, text_length):
    """Yield a Finding for each example whose text, or whose option behind the question, does not fit."""
    texts = list({text: None for e in examples for text in (e.text, *e.options)})
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths = dict(zip(texts, map(len, tokens), strict=True))
    for e in examples:
        length = lengths[e.text] + max((lengths[option] for option in e.options), default=0) + 2  # [CLS] and [SEP]
        if length > text_length:
            lost = e.options and lengths[e.text] + 2 >= text_length
            what = "option lost" if lost else "option cut" if e.options else "text cut"
            yield Finding(what, split, e.id, f"{length} tokens: {e.text or e.options[0]}")


def check_rows(split, examples, train_videos, answers):
    """Yield a Finding for what stands twice, is in training, too, or can't be answered."""
    rows, ids = set(), set()
    if split != "train":
        yield from (Finding("videos also in train", split, video)
                    for video in sorted({e.video for e in examples} & train_videos))  # fmt: skip
    for e in examples:
        if (row := (e.video, e.text, e.options)) in rows:
            yield Finding("same row twice", split, e.id, f"{e.video}: {e.text} {'' if e.answer is None else e.answer}")
        if e.id in ids:
            yield Finding("same id twice", split, e.id, f"{e.video}: {e.text}")
        known = {e.answer} if isinstance(e.answer, str) else e.answer
        if isinstance(known, (set, dict)) and answers.isdisjoint(known):
            yield Finding("answer not in list", split, e.id, str(e.answer))
        rows.add(row)
        ids.add(e.id)


def check(layout, folder, args):
    """-> {split: examples}, all Findings, and whose vocabulary has counted the tokens. args: the flags of `check`."""
    splits, found = {}, []
    for split in ("train", "val", "test"):
        try:
            splits[split] = layout.read(folder, split=split)
        except DataError as error:
            if split != "val" or not isinstance(error, NoAnnotations):  # not every data set has a validation split
                found.append(Finding("annotations unreadable", split, "", str(error)))
    if splits.get("val") == splits.get("test"):
        splits.pop("val", None)  # VQA, ActivityNet: the test answers are secret, so val is the test
    splits = {split: examples for split, examples in splits.items() if examples}
    train, everything = splits.get("train", []), [e for examples in splits.values() for e in examples]
    videos = list({e.video: None for e in everything})
    check_one = functools.partial(check_video, folder=folder, stills=layout.stills, deep=args.deep)
    with ProcessPoolExecutor(args.workers) as pool:
        results = tqdm(pool.map(check_one, videos, chunksize=8), total=len(videos), unit="file", disable=None)
        wrong = {finding.name: finding for finding in results if finding}
    open_ended = [e for e in train if isinstance(e.answer, (str, dict))]
    answers = read_answer_list(folder) or answer_list(open_ended, layout.top_answers)
    tokenizer, whose = check_tokenizer(args.bert, everything)
    for split, examples in splits.items():
        names = {e.video: None for e in examples if e.video in wrong}  # in their order, each once
        found += [wrong[name]._replace(split=split) for name in names]
        found += check_rows(split, examples, {e.video for e in train}, set(answers))
        found += check_texts(split, examples, tokenizer, args.text_length)
    return splits, found, whose


def check_tokenizer(bert, examples):
    """-> a tokenizer to count with, and whose it is."""
    try:
        return build_tokenizer(read_vocabulary(bert, offline=True)), "bert-base-uncased"
    except DataError:
        if bert:
            raise
    texts = (text for example in examples for text in input_texts(example))
    return build_tokenizer(vocabulary_from_text(texts)), "the words of these texts (BERT's own count more: --bert DIR)"


def print_check(splits, found):
    """A column for each split, a line for each kind of finding; then the first of each kind, and what to do."""
    counts = Counter((finding.what, finding.split) for finding in found)
    columns = [s for s in ("train", "val", "test") if s in splits or any(finding.split == s for finding in found)]
    for s, examples in splits.items():
        counts["examples", s], counts["videos", s] = len(examples), len({e.video for e in examples})
        counts["videos found", s] = counts["videos", s] - counts["videos missing", s] - counts["videos refused", s]
    print(f"{'':24}" + "".join(f"{split:>12}" for split in columns))
    for what in ("examples", "videos", "videos found", *FINDINGS):
        numbers = (f"{counts[what, s]:,}" if counts[what, s] else "-" for s in columns)
        print(f"{what:24}" + "".join(f"{number:>12}" for number in numbers))
    for what, remedy in FINDINGS.items():
        if of_kind := [finding for finding in found if finding.what == what]:
            print(f"\n{what}: {len(of_kind):,} ({remedy.removeprefix('! ')})")
            for finding in of_kind[:3]:
                print(f"  {finding.split:6} {finding.name}  {finding.detail}"[:200].rstrip())


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def folder(text):
    """The type of a flag that names an existing folder."""
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: no such folder; give the one that holds the data set")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes end in one line, without the list of all flags."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (--help lists all flags)\n")

    def numbers(self, *flags, kind=int, low=1, high=10**9, **options):
        """Flags that take a number from low to high, which nan never is."""

        def number(text):
            try:
                value = kind(text)
            except ValueError:
                value = math.nan
            if not low <= value <= high:
                what = "whole number" if kind is int else "number"
                raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {low:,} to {high:,}")
            return value

        for flag in flags:
            self.add_argument(flag, type=number, **options)


def run_check(args):
    """-> exit code: 1 if something would stop a run."""
    task = ALIASES.get(args.task, args.task)
    layout = LAYOUTS[task]
    where = args.data or toy_data(layout.toy) / layout.toy
    args.text_length = args.text_length or layout.text_length
    splits, found, whose = check(layout, where, args)
    print(f"{task} in {where}; tokens, at most {args.text_length}, counted with {whose}\n")
    print_check(splits, found)
    if args.report:
        with open(args.report, "w", encoding="utf-8") as file:
            for row in (Finding._fields, *found):
                print(*(" ".join(cell.split()) for cell in row), sep="\t", file=file)
    stops = sorted({finding.what for finding in found if FINDINGS[finding.what][0] == "!"})
    print(f"\na run would stop: {', '.join(stops)}" if stops else "\nnothing here would stop a run")
    return bool(stops)


def run_show(args):
    contact_sheet(args.video, args.clips, args.frames, args.fps, args.size, args.train, args.seed).save(args.out)
    print(f"{args.out}: {args.clips} clips of {args.frames} frames")


def main(arguments=None):
    """The four commands. A mistake ends in one line and exit code 2, as in clipbert.main, which this can't import."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy data")
    toy.add_argument("folder", type=Path)
    toy.set_defaults(run=lambda args: toy_data(folder=args.folder) and None)
    checking = commands.add_parser("check", help="read all annotations and media headers, list what is wrong")
    names = [*ALIASES, *LAYOUTS]
    checking.add_argument("--task", default="tgif_qa", choices=names, metavar="TASK", help=", ".join(names))
    checking.add_argument("--data", type=folder, help="the data set's folder (default: the toy data)")
    checking.add_argument("--deep", action="store_true", help="decode 16 frames of each video, not only headers")
    checking.add_argument("--report", type=Path, metavar="FILE", help="write all findings, TAB-separated")
    checking.add_argument("--bert", type=Path, metavar="DIR", help="count tokens with the vocab.txt of this folder")
    checking.numbers("--text_length", low=3, high=512, help="tokens of a text (default: the task's)")
    checking.numbers("--workers", high=256, default=min(8, os.cpu_count()), help="files at a time")
    checking.set_defaults(run=run_check)
    small = commands.add_parser("cache", help="decode each video once, into small files for --cache")
    small.add_argument("--data", type=folder, required=True, help="the data set's folder")
    small.numbers("--fps", kind=float, low=0.01, high=1000, default=4.0, help="frames kept of each second (default: 4)")
    small.numbers("--size", low=16, high=6400, default=448, help="as in training (default: 448)")
    small.numbers("--workers", high=256, default=os.cpu_count(), help="videos at once (default: one a core)")
    small.set_defaults(run=lambda args: write_cache(args.data, args.size, args.fps, args.workers))
    showing = commands.add_parser("show", help="draw a video's clips and frames")
    showing.add_argument("video", type=Path)
    showing.numbers("--clips", high=64, default=4)
    showing.numbers("--frames", high=64, default=2)
    showing.numbers("--size", low=16, high=2048, default=448)
    showing.numbers("--fps", kind=float, low=0.001, high=1000, default=2.0, help="a clip of T frames spans T / fps s")
    showing.add_argument("--train", action="store_true", help="random clips, as in training")
    showing.numbers("--seed", low=0, default=0, help="... which ones")
    showing.add_argument("--out", type=Path, default="sheet.png")
    showing.set_defaults(run=run_show)
    args = parser.parse_args(arguments)
    try:
        sys.exit(args.run(args))
    except ValueError as error:  # DataErrors, and --out with an ending that no picture has
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; choose another place" if error.filename else str(error)
    except BrokenExecutor:
        message = "a process that read the files was killed, perhaps for memory: try fewer --workers"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
