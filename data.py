"""Videos and images to clips, text to tokens, public annotation files to examples, and the toy
data.

The first part is the paper's, and all that most readers need:

    videos            ->  N clips, (N, T, 3, L, L) uint8               `sample_clips`, `read_clips`
    text              ->  WordPiece ids, (n, Lt)                       `build_tokenizer`
    examples          ->  batches                                      `ClipDataset`, `Collator`
    captioned images  ->  batches with wrong captions, masked words    `CaptionDraw`, `mask_tokens`

The second part knows files:

    videos, images    ->  frames, also from a cache                    `read_frames`, `write_cache`
    annotation files  ->  Example(video, text, options, answer)        `read_examples`; `LAYOUTS`
    nothing           ->  the toy data, in the same layouts            `toy_data`
    clips, attention  ->  pictures of what the model sees              `draw_sheet`
    a data set        ->  what is wrong with it                        `check`

    python data.py toy DIR                      write the toy data to DIR
    python data.py check --task T --data DIR    what is missing, broken, doubled, too long
    python data.py cache --data DIR             decode each video once, into small files for --cache
    python data.py show VIDEO --clips 4         draw the frames that a model would look at

A frame index is a point on a regular grid: frame i is what the file shows at i / fps seconds. For a
constant-rate video that is simply its i-th frame, and variable rates need no special care.
"""

import argparse
import bisect
import contextlib
import csv
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import BrokenExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm.contrib.concurrent import process_map
from transformers import BertTokenizer
from transformers.utils import cached_file

# Pillow's warning of large images; MAX_PIXELS, below, is stricter.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# The tokenizer's own threads are not needed: the data loader's workers are parallel enough.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
    """Sparse sampling: n_clips short clips of n_frames frames -> int64 (n_clips, n_frames) indices.

        clip i starts, with f = length - clip, at    random in [0, f]           in training
                                                     f i / N, i = 0 .. N - 1    in testing
                                                     (N = 1: f / 2)

    A clip spans n_frames / target_fps seconds. Two or more frames include both of its ends: at 30
    fps, two frames "at 2 fps" are 29 frames apart. A single frame is the clip's first.
    - one test clip sits in the middle, as in the paper (its first frame thus half a clip before the
      video's middle); the reference code takes the start of the video.
    - a clip longer than the video (f = 0) repeats the last frame, as the reference does.
    """
    clip = n_frames / target_fps * fps  # frames that a clip spans
    f = max(num_frames - clip, 0.0)  # where a clip may start: 0 .. f
    if train:
        starts = (f * torch.rand(n_clips, generator=generator, dtype=torch.float64)).tolist()
    elif n_clips == 1:
        starts = [f / 2]
    else:
        starts = [f * i / n_clips for i in range(n_clips)]
    span = max(clip - 1, 0.0)  # from the first to the last frame of a clip
    offsets = [int(span * t / max(n_frames - 1, 1)) for t in range(n_frames)]
    # ceil: a clip's first frame is the first one that begins within it
    return torch.tensor([[min(math.ceil(s) + o, num_frames - 1) for o in offsets] for s in starts])


# -------------------------------------------------- which pixels
def resized_shape(height, width, size):
    """(h, w): the long side becomes `size`, the short one is truncated, to a pixel at least."""
    long = max(height, width)
    return max(int(height * size / long), 1), max(int(width * size / long), 1)


def resize_and_pad(frames, size):
    """(..., 3, H, W) -> (..., 3, size, size): the long side to `size`, zeros right and bottom.

    Small frames grow, too. Float in, float out: the reference's numbers (bilinear, no
    antialiasing). uint8 in, uint8 out: the same, rounded.
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
def read_clips(path, n_clips, n_frames, target_fps, size, train, generator=None, cache=False):
    """uint8 (n_clips, n_frames, 3, size, size) RGB, sampled as `sample_clips` describes.

    Raises DataError. cache: take the nearest frames that `python data.py cache` kept, where it did;
    the clips are the same.
    """
    kept = open_cached(path, size) if cache else None
    num_frames, fps = (kept or probe(path))[:2]
    clips = sample_clips(num_frames, fps, n_clips, n_frames, target_fps, train, generator)  # (N, T)
    indices = clips.flatten().tolist()
    frames = read_cached(path, kept, indices, size) if kept else read_frames(path, indices, size)
    return frames.view(n_clips, n_frames, 3, size, size)


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens (paper, section 3: F_l): WordPiece


def build_tokenizer(vocabulary):
    """A lower-casing WordPiece tokenizer over a list of tokens; a token's place in it is its id."""
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})


def read_vocabulary(bert=None):
    """A BERT's tokens (bert-base-uncased: 30,522): vocab.txt of a folder, or of the hub's."""
    try:
        path = cached_file(str(bert or "bert-base-uncased"), "vocab.txt")
        vocabulary = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = str(error).splitlines()[0][:150]
        remedy = "give --bert DIR, a folder with BERT's vocab.txt"
        raise DataError(f"no vocabulary ({reason}): {remedy}") from None
    if missing := sorted(set(SPECIAL_TOKENS) - set(vocabulary)):
        raise DataError(f"{path}: {', '.join(missing)} missing; this is not a BERT vocabulary")
    return vocabulary


def words_of(text):
    """Words and marks in lower case, as BERT's tokenizer first cuts a text, before WordPiece."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def vocabulary_from_text(texts, size=10_000):
    """A vocabulary without a download: BERT's special tokens, characters, the most frequent words.

    With every character as a first piece ("a") and as a continuation ("##a"), WordPiece can spell
    any new word.
    """
    words = Counter(word for text in texts for word in words_of(text))
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789", *(c for w in words for c in w)})
    common = sorted((w for w in words if len(w) > 1), key=lambda w: (-words[w], w))
    return SPECIAL_TOKENS + characters + ["##" + c for c in characters] + common[:size]


# ----------------------------------------------------------------------------------------------------------------------
# Examples to batches: one data set and one collator for all tasks and for pretraining


class Example(NamedTuple):
    """One row of an annotation file: a video (or image), its text, the answer."""

    id: str  # as the file has it, else its place there; perhaps not unique: for readers alone
    video: str  # name as the annotation gives it; of a bare number, what MEDIA makes of it
    text: str  # question or caption; "" in MSRVTT-MC, where the options are the captions
    options: tuple = ()  # answer options of multiple choice
    # int index into options | str | int count | {answer: soft score} (VQA) | None (captions)
    answer: object = None
    question_type: str = ""  # of an open question, for accuracies by type
    people: tuple = ()  # VQA: what each of the ten people said, verbatim, for vqa_accuracy()
    path: str | None = None  # of the video; None: it is missing
    captions: tuple = ()  # pretraining: those of which CaptionDraw chooses, see caption_groups()

    @property
    def source(self):
        """What tells its video from all others: two folders may each have a video1.mp4."""
        return self.path or self.video


def generator_of(*key):
    """A random generator of its own for each key, such as (seed, "clips", epoch, index).

    Sums like seed + epoch would not do: epoch 1 of seed 0 would be epoch 0 of seed 1, and what is
    measured with several seeds would not be independent. A hash mixes the parts of the key, the
    same on every machine.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class ClipDataset(torch.utils.data.Dataset):
    """Examples with their sampled clips; items are asked for as (epoch, index): `training_order`.

    The random clips of an item depend on (seed, epoch, index) alone, not on which worker reads it
    or when: two runs, with any number of workers, stopped and resumed or not, see the same frames.
    """

    def __init__(self, examples, s, *, n_clips, train, draw=None):
        """s: settings (frames, fps, size, seed, blind, cache). n_clips: N. draw: CaptionDraw."""
        self.examples, self.s, self.n_clips = examples, s, n_clips
        self.train, self.draw = train, draw

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        """-> {"example", "frames" (N, T, 3, L, L) uint8, "texts", "unreadable": error lines}.

        With draw also "target", the captions' labels, and "generator", for the words to mask.
        """
        epoch, index = key
        generator = generator_of(self.s.seed, "clips", epoch, index)
        unreadable = []
        # In training an unreadable video is replaced by the next example's. Twenty in a row are no
        # accident: the data are not where they should be.
        for attempt in range(20 if self.train else 1):
            example = self.examples[(index + attempt) % len(self)]
            try:
                frames = self.read(example, generator)
                break
            except DataError as error:
                unreadable.append(str(error))
        else:
            if self.train:
                raise DataError(f"20 unreadable videos in a row, the last: {unreadable[-1]}")
            frames = self.black()  # in evaluation, where an answer to it counts as wrong
        item = {"example": example, "frames": frames, "unreadable": unreadable}
        if self.draw:  # the generator's later numbers choose the words to mask
            item["generator"] = generator_of(self.s.seed, "texts", epoch, index)
            item["texts"], item["target"] = self.draw(example, item["generator"])
        else:
            item["texts"] = input_texts(example)
        return item

    def read(self, example, generator):
        """Its clips (N, T, 3, L, L); with --blind none is even opened."""
        s = self.s
        if s.blind:
            return self.black()
        if example.path is None:
            raise DataError(f"{example.video}: no such video")
        return read_clips(example.path, self.n_clips, s.frames, s.fps, s.size, self.train,
                          generator, s.cache)  # fmt: skip

    def black(self):
        """What is seen of a video that is not: zeros, as the padding of frames."""
        shape = self.n_clips, self.s.frames, 3, self.s.size, self.s.size
        return torch.zeros(shape, dtype=torch.uint8)


def training_order(n_examples, batch_size, n_batches, seed, start=0):
    """Yield batches start, start + 1, ..., n_batches - 1: lists of batch_size keys (epoch, index).

    One endless stream of examples, every epoch shuffled anew, is cut into batches: one may span the
    end of an epoch, none is short. So two batches of 16 are the same examples as one of 32,
    everywhere in the run. The stream is known in advance from the seed: a resumed run goes on with
    the very batch that the stopped one would have seen.
    """
    first_epoch, first = divmod(start * batch_size, n_examples)

    def stream():
        for epoch in itertools.count(first_epoch):
            generator = generator_of(seed, "order", epoch)
            for i in torch.randperm(n_examples, generator=generator).tolist():
                yield epoch, i

    keys = islice(stream(), first, None)
    for _ in range(start, n_batches):
        yield list(islice(keys, batch_size))


def ordered_batches(n_examples, batch_size):
    """All examples once, in their order, in batches of keys (0, index)."""
    keys = [(0, i) for i in range(n_examples)]
    return [keys[b : b + batch_size] for b in range(0, n_examples, batch_size)]


class Collator:
    """A list of items to tensors; n texts an example: its options, the drawn captions, else one.

    frames (B, N, T, 3, L, L) uint8; input_ids, attention_mask (B*n, Lt), 1 keep, 0 pad; target
    (B,), with soft scores (B, K), of drawn captions (B*n,); with a mask_rate mlm_labels (B*n, Lt);
    and plain lists.
    """

    def __init__(self, tokenizer, text_length, answers=None, mask_rate=0.0):
        self.tokenizer, self.text_length, self.mask_rate = tokenizer, text_length, mask_rate
        self.answers = answers  # of an open-ended task; an answer's place in the list is its label
        self.labels = {answer: i for i, answer in enumerate(answers or [])}

    def __call__(self, items):
        ids, mlm_labels, target = [], [], []
        for item in items:
            tokens = self.tokenizer(item["texts"], truncation=True, max_length=self.text_length)
            for row in map(torch.tensor, tokens["input_ids"]):  # (length of its text,)
                if self.mask_rate:  # before padding: masks must not depend on a batch's other texts
                    row, label = mask_tokens(row, self.tokenizer, item["generator"], self.mask_rate)
                    mlm_labels.append(label)
                ids.append(row)
            # drawn captions have a label each, other examples one answer
            target += item["target"] if "target" in item else [self.label_of(item["example"])]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        batch = {
            "frames": torch.stack([item["frames"] for item in items]),
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids]),
            "target": torch.tensor(target),
            "examples": [item["example"] for item in items],
            "unreadable": [item["unreadable"] for item in items],
        }
        if mlm_labels:
            batch["mlm_labels"] = pad(mlm_labels, padding_value=-100)
        return batch

    def label_of(self, example):
        """What the loss wants: an option's index, an answer's label, all soft scores, a count."""
        if isinstance(example.answer, dict):
            return [float(example.answer.get(answer, 0)) for answer in self.labels]
        if isinstance(example.answer, str):
            return self.labels.get(example.answer, -1)  # -1: not in the list; only in testing
        return example.answer or 0  # 0 of a caption, which has no answer


def input_texts(example):
    """Multiple choice: "question option" for each option, as the reference; else the text alone."""
    return [f"{example.text} {option}".strip() for option in example.options] or [example.text]


def data_loader(dataset, batches, collate, workers):
    """Batches in the given order, read ahead by `workers` processes, which live for one pass."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # or loaders would draw on the state that --resume restores
    )  # fmt: skip


def outlive_signals(worker):
    """Ctrl-C and SIGTERM may reach every process, but the main one wants to finish its step.

    So its workers ignore the one, and outlive the other by a minute.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


# -------------------------------------------------- captions: some of them wrong (ITM, retrieval), words masked (MLM)
def caption_groups(examples, n):
    """Puts n captions of an image together, as the reference does: one pass through the CNN.

    An epoch goes once through all groups, so to an image of 5 captions 3 times with n = 2. Of a
    group's n texts half are mismatches (CaptionDraw): of its 2 captions an epoch shows 1, the next
    one perhaps the other. A caption that stands twice under an image counts once.
    """
    images = {}
    for example in examples:
        images.setdefault(example.source, []).append(example)
    groups = []
    for same in images.values():
        captions = tuple(dict.fromkeys(example.text for example in same))  # each once, in order
        groups += [same[0]._replace(captions=captions[i : i + n])
                   for i in range(0, len(captions), n)]  # fmt: skip
    return groups


def captions_of(example):
    """Those of which CaptionDraw chooses; in retrieval the one that is its text."""
    return example.captions or (example.text,)


class CaptionDraw:
    """Draws n captions for a video, by turns one of its own, a match, and another's, a mismatch.

    One toss of a coin decides whether the first is a match, then they take turns. So each is a
    mismatch with probability 1/2, as in the reference, which tosses for each, but with an even n
    half of a video's are: otherwise some pictures had more matches than others, and ITM would begin
    by learning which.
    """

    def __init__(self, examples, n):
        self.examples, self.n = examples, n
        # {source: everything said about it}: a caption of two videos is no mismatch for either
        self.own = {}
        for example in examples:
            said = {text.lower() for text in captions_of(example)}
            self.own.setdefault(example.source, set()).update(said)

    def __call__(self, example, generator):
        """-> n captions, n labels: 1 the video's own, 0 another's. Too few own ones repeat."""
        own = captions_of(example)
        order = torch.randperm(len(own), generator=generator).tolist()
        coin = torch.randint(2, (), generator=generator).item()
        labels = [(i + coin) % 2 for i in range(self.n)]
        texts = [own[order[i % len(own)]] if match else self.mismatch(example, generator)
                 for i, match in enumerate(labels)]  # fmt: skip
        return texts, labels

    def mismatch(self, example, generator):
        """A caption of another video, drawn at random until it is none that is said of this one."""
        for _ in range(100):  # there are none left only if all captions are alike
            other = self.examples[torch.randint(len(self.examples), (), generator=generator)]
            captions = captions_of(other)
            caption = captions[torch.randint(len(captions), (), generator=generator)]
            if caption.lower() not in self.own[example.source]:
                return caption
        raise DataError(f"{example.video}: no other video has another caption; there is nothing to "
                        "tell apart: put more captioned videos there")  # fmt: skip


def mask_tokens(input_ids, tokenizer, generator, rate=0.15):
    """BERT's masking: of a share of the tokens 80% become [MASK], 10% a random one, 10% stay.

    -> (input_ids with these changes, labels: the tokens at the chosen places, -100 elsewhere). The
    random and the unchanged ones are there because no text has a [MASK] after pretraining: any word
    may turn out to be the one to predict.
    """
    # [CLS], [SEP] and their like stand for no word: never masked
    special = torch.isin(input_ids, torch.tensor(tokenizer.all_special_ids))
    chance = torch.rand(input_ids.shape, generator=generator).masked_fill(special, 1.0)
    tokens = torch.randint(len(tokenizer), input_ids.shape, generator=generator)
    masked = torch.where(chance < 0.9 * rate, tokens, input_ids)
    masked = masked.masked_fill(chance < 0.8 * rate, tokenizer.mask_token_id)
    return masked, input_ids.masked_fill(chance >= rate, -100)


########################################################################################################################
# Here the paper's part ends. What follows knows files: how frames come out of videos, what the
# public annotation files look like, how the toy data are drawn, how pictures of it all are made,
# and what may be wrong with a data set.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Files to frames: Pillow reads images and GIFs, the bundled ffmpeg everything else

TIME_LIMIT = 60.0  # seconds; a hostile or broken file must not hang a training run
MAX_PIXELS = 2**25  # of a frame (8192 x 4096); more is a mistake, or a bomb
SEEK_COST = 10  # frames that are decoded in the time of one more seek (open, parse the header)
SEEK_LEAD = 8  # frames; MP4 seeks by decoding time, a few frames ahead of what B-frames show
SEEKS = 32  # a file is opened so often at a time: each opening has a decoder and its memory
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# Containers that hold their own pixels: playlists, concat scripts and image patterns could open
# other files.
VIDEO_FORMATS = ("asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mp3,mpeg,mpegts,"
                 "mpegvideo,mxf,nut,obu,ogg,rm,wav,yuv4mpegpipe")  # fmt: skip


class Media(NamedTuple):
    """What a file holds."""

    num_frames: int
    fps: float  # the average rate; 1.0 for a single picture
    width: int  # as displayed, rotation applied
    height: int
    start: float = 0.0  # seconds from the start of the file (perhaps its sound) to the first frame
    reader: str = "pillow"  # or "ffmpeg"
    keys: tuple = ()  # the indices at which decoding can start; none where seeking is not exact


def _tolerance(fps):
    """Seconds by which a frame may begin late and still count: containers round to milliseconds."""
    return min(0.002, 0.25 / fps)


# -------------------------------------------------- images and animations: Pillow
def _image_frames(path):
    """Yield (seconds at which a frame disappears, the frame), from the first on.

    Ends where the file does, or at damage, for which Pillow raises almost anything: what came
    before is kept. Only a file without a first frame is an error.
    """
    end, deadline = 0, time.monotonic() + TIME_LIMIT
    with Image.open(path, formats=IMAGE_FORMATS) as image:  # by its first bytes, not by its name
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width}x{image.height} pixels are too many; scale it down")
        for i in itertools.count():
            if time.monotonic() > deadline:
                raise DataError(f"{path}: decoding takes over {TIME_LIMIT:.0f} s; shorten it")
            try:
                image.seek(i)
                frame = ImageOps.exif_transpose(image)  # a copy; a photo may lie on its side
            except Exception:
                if i == 0:
                    raise
                return
            end += image.info.get("duration") or 100  # milliseconds; browsers, too, read 0 as 100
            yield end / 1000, frame
            if image.format == "MPO":  # a second picture inside a JPEG is no animation
                return


def _probe_image(path):
    """Media of an image or animation; raises anything at all where Pillow reads neither."""
    # Delays are only known frame by frame, so this decodes them all.
    frames = [(end, frame.size) for end, frame in _image_frames(path)]
    end, size = frames[-1]
    return Media(len(frames), len(frames) / end if len(frames) > 1 else 1.0, *size)


def _to_rgb(image):
    """uint8 (3, H, W). Transparency becomes white: as in most viewers, and as ffmpeg's GIFs."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255 instead of scaling
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _read_image(path, media, wanted, size):
    """The frames at the ascending indices `wanted`: uint8 (len(wanted), 3, size, size)."""
    # A frame is on the screen until it disappears: it is the answer to all indices before that.
    frames, times = [], [i / media.fps + _tolerance(media.fps) for i in wanted]
    for end, frame in _image_frames(path):
        while len(frames) < len(times) and times[len(frames)] < end:
            frames.append(resize_and_pad(_to_rgb(frame), size))
        if len(frames) == len(times):
            break  # a GIF must be decoded from its start, but not to its end
    return torch.stack(frames)


# -------------------------------------------------- videos: ffmpeg
# One call lists a video's packets, one more decodes what is wanted of it, each with one thread: a
# data loader's workers keep the other cores busy with other videos.
def _ffmpeg(path, arguments):
    """Run the bundled ffmpeg, at most for TIME_LIMIT; returns (stdout, stderr)."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", *arguments]
    try:  # in a process group of its own: Ctrl-C lets our step end before it ends anything
        done = subprocess.run(command, check=False, capture_output=True, timeout=TIME_LIMIT, process_group=0)
        killed = done.returncode < 0
    except subprocess.TimeoutExpired:
        killed = True
    if killed:
        raise DataError(f"{path}: ffmpeg was killed (over {TIME_LIMIT:.0f} s or out of memory); "
                        "shorten or remove it")  # fmt: skip
    return done.stdout, done.stderr.decode("utf-8", "replace")  # old titles are often not UTF-8


def _input(path, *options):
    # "file:" and the absolute path keep a name like "-y" or "http:x" from being an option or an
    # address.
    return ["-protocol_whitelist", "file", "-format_whitelist", VIDEO_FORMATS, "-max_pixels",
            str(MAX_PIXELS), "-threads", "1", *options, "-i", f"file:{os.path.abspath(path)}"]  # fmt: skip


def _probe_video(path):
    """List the packets of the first video stream (cover art is none), without decoding them.

    A packet is a frame, so this knows what headers get wrong: how many frames there are, also in
    a file that was cut off, when they begin, and which of them are key frames. The price is to
    read the file once; decoding a few clips of it costs more.
    """
    listing = ["-map", "0:V:0?", "-c", "copy", "-f", "framecrc", "pipe:1"]
    packets, log = _ffmpeg(path, ["-nostats", *_input(path), *listing])
    container = re.search(r"^Input #0, (\w+)", log, re.MULTILINE)
    if not container:
        reason = log.strip().split("\n")[-1]
        raise DataError(f"{path}: not a readable image or video ({reason}); replace or remove it")
    packets = packets.decode()
    shape = re.search(r"#dimensions 0: ([1-9]\d*)x([1-9]\d*)\n", packets)
    times, keys = _packet_times(packets)
    if not shape or not times:
        raise DataError(f"{path}: no readable video stream inside; replace or remove it")
    width, height = int(shape[1]), int(shape[2])
    if re.search(r"(?s)\nOutput #0.*rotation of -?90\.", log):
        width, height = height, width  # ffmpeg itself turns the frames when decoding
    # The grid has its first point at the first frame and its last at the last: frame i of a
    # constant-rate video is its i-th. Six decimals, as ffmpeg will be told, make 25 of 24.999...
    # Beyond the limits no camera goes, but damaged clocks do.
    start, length = times[0], times[-1] - times[0]
    fps = round(min(max((len(times) - 1) / length, 0.001), 1000.0), 6) if length else 1.0
    if container[1] not in ("mov", "matroska"):  # a seek in e.g. MPEG-TS may land after the frame
        keys = []
    keys = tuple(round((t - start) * fps) for t in keys)
    return Media(len(times), fps, width, height, start, "ffmpeg", keys)


def _packet_times(packets):
    """When frames begin, and when key frames do: seconds, both ascending.

    A line a packet: `stream, decoding time, display time, duration, bytes, checksum`, then
    F=flags: 1, a key frame (only then F is left out); 4, hidden by an edit list.
    """
    line = r"^0, *(-?\d+), *(-?\d+),[^x]*0x\w+(?:, F=0x(\w+))?"
    rows = re.findall(line, packets, re.MULTILINE)
    # AVI and its like lack times of display, and ffmpeg writes -2**63; those of decoding will do.
    clock = 0 if str(-(2**63)) in packets else 1
    rows = sorted((int(row[clock]), int(row[2] or "1", 16)) for row in rows)
    tick = re.search(r"#tb 0: (\d+)/(\d+)", packets)
    rows = [(t * int(tick[1]) / int(tick[2]), flags) for t, flags in rows if not flags & 4]
    return [t for t, _ in rows], [t for t, flags in rows if flags & 1]


def _read_video(path, media, wanted, size):
    """The frames at the ascending indices `wanted`: uint8 (len(wanted), 3, size, size)."""
    shape = len(wanted), 3, size, size
    # Where a seek finds nothing, as in a damaged file, one pass finds the last frame there is.
    for segments in (_plan(media, wanted), [(0, wanted)]):
        raw = _decode(path, media, segments, size)
        if len(raw) >= math.prod(shape):  # a broken file can give too many
            raw = bytearray(raw[: math.prod(shape)])
            return torch.frombuffer(raw, dtype=torch.uint8).view(shape)
    raise DataError(f"{path}: no frame could be decoded; replace or remove it")


def _plan(media, wanted):
    """[(index at which decoding starts, wanted indices)]: seek where that spares time.

    A seek takes as long as decoding some frames, and it lands on a key frame. Clips with none
    between them share one: the second would decode the first's frames again. Short videos thus
    mostly need no seek, long ones about one a clip.
    """
    segments, decoded = [(0, [])], 0
    for i in wanted:
        start = i - SEEK_LEAD
        # ffmpeg itself steps back by 3/23 s before it looks for the key frame.
        landing = media.keys[: bisect.bisect(media.keys, start - 0.14 * media.fps)]
        if landing and landing[-1] > decoded + SEEK_COST and len(segments) < SEEKS:
            segments.append((start, []))
        segments[-1][1].append(i)
        decoded = i
    return [segment for segment in segments if segment[1]]


def _decode(path, media, segments, size):
    """The wanted frames' bytes, with one call of ffmpeg; each segment is read through an input of its own."""
    inputs, chains, labels = [], "", ""
    for k, (start, wanted) in enumerate(segments):
        # Not "accurate", which would drop the frame that began before the seek time and is still
        # on the screen.
        seconds = f"{media.start + start / media.fps:.6f}"
        inputs += _input(path, *(["-noaccurate_seek", "-ss", seconds] if start else []))
        chains += f"[{k}:V:0]{_filters(media, start, wanted, size)}[v{k}];"
        labels += f"[v{k}]"
    graph = f"{chains}{labels}concat=n={len(segments)}[out]"
    output = ["-map", "[out]", "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1"]
    return _ffmpeg(path, ["-v", "fatal", *inputs, "-filter_complex", graph, *output])[0]


def _filters(media, start, wanted, size):
    """ffmpeg's filters from a segment's frames, which begin at index `start`, to the wanted ones.

    In their order: microseconds, shifted so that the segment starts at 0; `fps` lays the frames on
    the regular grid (slot n holds the last frame that began by n / fps; "up": none is early);
    `tpad` repeats the last frame where others can't be decoded; `trim` ends the decoding; `select`
    keeps the wanted slots; the rest resizes, pads and makes gbrp's planes (green, blue, red) ours.
    """
    zero = "0" if start else "STARTPTS"  # B-frames delay the first frame of an AVI file
    slots = [f"eq(n,{i - start})" for i in wanted]
    # Brackets, as ffmpeg nests a sum of more than 100 terms too deep.
    slots = "+".join(f"({'+'.join(slots[k : k + 50])})" for k in range(0, len(slots), 50))
    h, w = resized_shape(media.height, media.width, size)
    return (
        f"settb=1/1000000,setpts=PTS-{zero}-{round(1e6 * _tolerance(media.fps))},"
        f"fps={media.fps:.6f}:start_time=0:round=up,tpad=stop=-1:stop_mode=clone,"
        f"trim=end_frame={wanted[-1] - start + 1},select='{slots}',scale={w}:{h}:flags=bilinear,"
        f"format=gbrp,pad={size}:{size}:0:0:black,shuffleplanes=2:0:1,format=gbrp"
    )


# -------------------------------------------------- either
def probe(path):
    """What a file holds; remembered, as long as the file does not change. Raises DataError."""
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; check the path")
    return _probe(path, *_version(path))


def _version(path):
    """By what a changed file is known: when it was written, and its size."""
    stat = os.stat(path)
    return [stat.st_mtime_ns, stat.st_size]


@functools.cache  # a few hundred bytes per file
def _probe(path, written, length):
    # Pillow first: it knows after a few bytes, and GIF delays better than ffmpeg's one rate.
    try:
        return _probe_image(path)
    except DataError:  # an image, but one that must not be read
        raise
    except Exception:  # noqa: BLE001 - no image, or damaged; ffmpeg forgives some damaged GIFs
        return _probe_video(path)


def read_frames(path, indices, size):
    """uint8 (len(indices), 3, size, size) RGB: what the file shows at indices / fps seconds.

    The indices stand in any order; outside the video they mean its first or last frame. Raises
    DataError.
    - any aspect ratio is read; the reference skips sides that differ by more than a factor of five.
    - ffmpeg resizes videos, which saves time but is about two grey levels off `resize_and_pad`.
    """
    media = probe(path)
    indices = torch.tensor(indices).clamp(0, media.num_frames - 1)
    # Each frame is read once, in the order of the file, however often it is asked for.
    wanted, places = indices.unique(return_inverse=True)
    read = _read_image if media.reader == "pillow" else _read_video
    return read(path, media, wanted.tolist(), size)[places]


# -------------------------------------------------- the cache: a few small JPEGs a second
# Decoding a clip means decoding all frames since the last key frame, some hundred; a JPEG stands
# for itself. So random clips come ten times as fast, at the price of disk (1.2 MB for 15 s at 448
# pixels and 4 frames a second) and of frames up to 1/8 s away from those asked for.
def cached_file_of(path, size):
    """videos/video7.mp4 -> videos/cached/video7.mp4.448.zip: about.json, 0.jpg, 1.jpg, ..."""
    return Path(path).parent / "cached" / f"{Path(path).name}.{size}.zip"


@contextlib.contextmanager
def _cached_zip(path, size):
    """A video's cached file, open; whatever can't be read of it is damaged."""
    target = cached_file_of(path, size)
    try:
        with zipfile.ZipFile(target) as file:
            yield file
    except Exception:  # noqa: BLE001 - zipfile, json and Pillow raise almost anything
        raise DataError(f"{target}: damaged; remove it and write it again") from None


class Cached(NamedTuple):
    """What about.json says."""

    num_frames: int  # the video's own, like fps: clips are sampled on its grid
    fps: float
    rate: float  # frames kept of each second
    count: int  # frames kept
    source: list  # the video's version, by which a change is noticed


def open_cached(path, size):
    """-> Cached, or None if there is no cached file or the video has changed since."""
    if not (os.path.exists(path) and cached_file_of(path, size).exists()):
        return None
    with _cached_zip(path, size) as file:
        kept = Cached(*json.loads(file.read("about.json")))
        return kept if kept.source == _version(path) else None


def read_cached(path, kept, indices, size):
    """uint8 (len(indices), 3, size, size): of the frames kept, those nearest to the indices."""
    frames = []
    with _cached_zip(path, size) as file:
        for i in indices:  # a point in time, i / fps; the frames kept stand at k / rate
            k = min(round(i / kept.fps * kept.rate), kept.count - 1)
            jpeg = io.BytesIO(file.read(f"{k}.jpg"))
            # JPEG alone: the file lies beside videos that anybody may have made.
            image = Image.open(jpeg, formats=("JPEG",))
            frames.append(resize_and_pad(_to_rgb(image), size))  # of that size already: pads only
    return torch.stack(frames)


def write_cached(path, size, rate):
    """Decode a video once and keep `rate` frames a second, or all if it has fewer; raises DataError.

    A video whose frames are all there already, and which has not changed since, is left alone.
    """
    media, content = probe(path), io.BytesIO()
    rate = min(rate, media.fps)
    indices = [round(k / rate * media.fps) for k in range(math.ceil(media.num_frames / media.fps * rate))]
    about = Cached(media.num_frames, media.fps, rate, len(indices), _version(path))
    if open_cached(path, size) == about:
        return
    h, w = resized_shape(media.height, media.width, size)
    with zipfile.ZipFile(content, "w") as file:  # without compression: JPEGs have theirs
        file.writestr("about.json", json.dumps(about))
        for first in range(0, len(indices), 64):  # at 448 pixels 64 frames are 39 MB
            frames = read_frames(path, indices[first : first + 64], size)[:, :, :h, :w]
            for k, frame in enumerate(frames.permute(0, 2, 3, 1).numpy(), first):
                with file.open(f"{k}.jpg", "w") as jpeg:  # 85: as cameras do, 1.2 MB for 15 s
                    Image.fromarray(frame).save(jpeg, "JPEG", quality=85)
    target = cached_file_of(path, size)
    target.parent.mkdir(exist_ok=True)
    # Under another name first: a file that is there is whole. Two processes never share a name.
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    part.write_bytes(content.getvalue())
    part.replace(target)


def caching_fault(path, size, rate):
    """`write_cached`, but an error is returned: one bad video must not end all the others."""
    torch.set_num_threads(1)  # a process a core decodes
    try:
        write_cached(path, size, rate)
    except DataError as error:
        return str(error)


def write_cache(folder, size, rate, workers):
    """`write_cached` for all videos under `folder`, several at once; unreadable ones are named."""
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS)
    if not videos:
        raise DataError(f"{folder}: no videos in it")
    write = functools.partial(caching_fault, size=size, rate=rate)
    faults = [fault for fault in process_map(write, videos, max_workers=workers, chunksize=1) if fault]
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    print(f"{folder}: {len(videos) - len(faults):,} of {len(videos):,} videos are cached at {size} pixels")


def check_cached(examples, s):
    """With --cache, say how many of the videos are cached, or raise DataError; without, mention the cache."""
    paths = sorted({example.path for example in examples if example.path})
    remedy = f"python data.py cache --data {os.path.dirname(paths[0])} --size {s.size}"
    if not s.cache:
        # GIFs: Pillow reads them in no time
        if not all(path.lower().endswith((".gif", *IMAGES)) for path in paths):
            print(f"note: `{remedy}` decodes these videos once; --cache then reads them much faster")
        return
    count = sum(open_cached(path, s.size) is not None for path in paths)
    if not count:
        raise DataError(f"no video is cached at {s.size} pixels; write them first: {remedy}")
    rest = f" (the rest is decoded; {remedy} adds it)" if count < len(paths) else ""
    print(f"cache: {count:,} of {len(paths):,} videos{rest}")


# ----------------------------------------------------------------------------------------------------------------------
# Annotation files to examples. `LAYOUTS`, at the end, is a table: a row says which files a task
# has, and what is asked in them. All layouts go one way:
#
#     folder -> find_files -> read_rows: a dict per question or caption -> make_example -> Example
#
# A label is exact or the run stops: an answer that was guessed, or that slipped by a row, would
# train and test well enough to go unnoticed. `reading` is the one place where whatever goes wrong
# becomes a DataError, `file:line: what`.

OPTIONS = 5  # TGIF-QA action and transition, MSRVTT-MC: all five-way
PEOPLE = 10  # who answered each question of VQA
MAX_COUNT = 999  # TGIF-QA counts to some 30; a larger number is an id in the wrong column
MAX_TEXT = 20_000  # characters; far above any real field, far below what hurts
VIDEOS = (".gif", ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".3gp", ".3g2", ".mpg", ".mpeg",
          ".wmv", ".flv", ".mts")  # fmt: skip
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEDIA_SUFFIXES = VIDEOS + IMAGES
MEDIA_FOLDERS = ("", "gifs", "videos", "videos/all", "images", "TrainValVideo", "TestVideo",
                 "train2014", "val2014", "train2017", "val2017", "VG_100K", "VG_100K_2")


# -------------------------------------------------- folders to files
def find_files(folder, patterns, many=False):
    """The annotation files of a folder or, if it has none, of one in it: `dataset/`, `annotations/`.

    The first pattern that fits any file counts; "a|b" takes what fits either. Two files of which
    one would do are an error: a guess might train on the wrong one. many: take all that fit.
    """
    for depth in ("", "[!.]*/"):  # [!.]: nothing hidden
        for pattern in patterns:
            paths = {path for either in pattern.split("|") for path in Path(folder).glob(depth + either)}
            found = sorted(path for path in paths if not path.name.startswith("."))
            if len(found) > 1 and not many:
                raise DataError(f"{found[0]} and {found[1]} both fit {pattern}; keep one of them there")
            if found:
                return found
    raise NoAnnotations(f"{folder}: no annotation file; looked for {', '.join(patterns)}")


@contextlib.contextmanager
def reading(path):
    """-> where reading stands: a file, and a line of it or an index in its JSON.

    The generators below keep it up to date, row by row, so that whatever goes wrong in here becomes
    one line that begins with it, and is no longer than can be read. The errors listed are those that
    broken files cause; any other is a mistake of ours, and keeps its traceback.
    """
    place = SimpleNamespace(path=path, row=1)
    try:
        yield place
    except UnicodeDecodeError:
        raise DataError(f"{place.path}:{place.row}: not UTF-8; save the file as that") from None
    except (ValueError, TypeError, AttributeError, OSError, RecursionError, csv.Error) as error:
        raise DataError(f"{place.path}:{place.row!s:.100}: {error!s:.400}") from None


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
        for place.row, line in enumerate(lines, 1):  # the loop itself keeps place.row up to date
            yield json.loads(line.decode())
        return
    # A table. One line is one row, so that no stray quote swallows the rows that follow it.
    tabs = b"\t" in lines[0]
    header = [name.strip() for name in split_line(lines[0], tabs)]
    if len(set(header)) < len(header):  # a dict would quietly keep the last of two
        raise ValueError("two columns have the same name")
    for place.row, line in enumerate(lines[1:], 2):
        fields = split_line(line, tabs)
        if len(fields) != len(header):  # a blank line, too: it may be where a row was lost
            hint = "" if tabs else "; a text with commas stands in quotes, on one line"
            raise ValueError(f"{len(fields)} columns where the header has {len(header)}{hint}")
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
    if isinstance(content, list):  # MSRVTT-QA, DiDeMo, one's own
        for i, row in enumerate(content):
            place.row = f"[{i}]"
            if "regions" in row:  # Visual Genome: the regions of a photo, each with its own caption
                for region in column(row, "regions", list):
                    yield {"vg_id": column(region, "image_id"), **region}
            else:
                yield row
    elif "images" in content:  # COCO: a photo has several captions
        yield from joined(place, content, "images", "id", "annotations", "image_id")
    elif "videos" in content:  # MSRVTT: so has a video
        yield from joined(place, content, "videos", "video_id", "sentences", "video_id")
    elif "annotations" in content:  # VQA: the questions stand in v2_OpenEnded_..._questions.json
        yield from joined(place, content, "annotations", "question_id", "questions", "question_id")
    else:  # ActivityNet: {video: {sentences}}
        for video, about in content.items():
            place.row = repr(video)
            for sentence in column(about, "sentences", list):
                yield {"video_id": video, "caption": sentence}


def listed(place, content, name):
    """The entries of a list in a JSON file; their places read name[i]."""
    for i, row in enumerate(column(content, name, list)):
        place.row = f"{name}[{i}]"
        yield row


def joined(place, content, single, own, many, key):
    """Each row of the list `many`, completed by that one of the list `single` to which its key points.

    Rows are joined by their ids and never by their order: one row too few in either list would give
    every later question its neighbour's answer.
    """
    others = {}
    for other in listed(place, content, single):
        name = name_of(other, own)
        if name in others:  # of the two one would be the wrong one
            raise ValueError(f"{own} {name!r} is there twice")
        others[name] = other
    two_files = many not in content  # VQA: they belong together one by one, and none may be left over
    if two_files:
        file = place.path.stem.removeprefix("v2_").replace(single, many)
        place.path, = find_files(place.path.parent, [f"*{file}*.json"])
        place.row, content = 1, read_json(place.path)
    for row in listed(place, content, many):
        name = name_of(row, key)
        other = others.pop(name, None) if two_files else others.get(name)
        # What both tell, VQA's image, has to agree. But each kind of row counts its own "id".
        if other is None or any(row[k] != other[k] for k in row.keys() & other.keys() - {"id"}):
            raise ValueError(f"{key} {name!r} has no match in the other list")
        yield {**other, **row}
    if two_files and others:
        raise ValueError(f"{len(others):,} {single} have no match in {many}")


def msrvtt_rows(place, listing):
    """The sentences of the videos in MSRVTT_train.9k.csv; the json files beside it hold them."""
    names = {name_of(row, "video_id") for row in read_rows(place, listing)}
    silent = set(names)
    # The second kind of name is the challenge's: train_val_ and test_. Both hold videos of the 9k.
    patterns = ["MSRVTT_data*.json", "*_videodatainfo*.json"]
    for path in reversed(find_files(listing.parent, patterns, many=True)):
        for row in read_rows(place, path):
            if (name := name_of(row, "video_id")) in names:
                silent.discard(name)
                yield row
    if silent:
        print(f"note: {listing}: {len(silent):,} of its {len(names):,} videos have no caption in "
              f"the json ({min(silent)}, ...)", file=sys.stderr)  # fmt: skip


# -------------------------------------------------- columns to values: exact, or an error
def present(row, *names):
    """The first of these columns that the row has: layouts call the same thing by several names."""
    if not isinstance(row, dict):  # JSON can put anything anywhere
        raise TypeError(f"expected {{key: value}}, found {type(row).__name__}")
    for name in names:
        if row.get(name) is not None:
            return name
    raise ValueError(f"{' or '.join(names)} is missing; there is {', '.join(row)!r:.100}")


def column(row, name, kind=object):
    """kind: the type it must have. Text, for one, could be walked through like a list, letter by letter."""
    value = row[present(row, name)]
    if not isinstance(value, kind):
        raise TypeError(f"{name} should be a {kind.__name__}, is {type(value).__name__}")
    return value


def clean(value, name, blank=False):
    """Text on one line, with single blanks. blank: there may be none.

    Some captions hold line ends, TABs or U+2028. WordPiece drops them all, but answers and options
    are compared letter by letter, and predictions are printed: there they would do harm.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} should be text, is {value!r}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{name} has more than {MAX_TEXT:,} characters")
    if re.search("[\0\ud800-\udfff]", value):  # JSON can spell NUL and half a surrogate pair
        raise ValueError(f"{name} holds characters that are not text")
    line = " ".join(value.split())
    if not (line or blank):
        raise ValueError(f"{name} is blank")
    return line


def text_of(row, *names, blank=False):
    """The first of these columns that the row has, as text. blank: see clean()."""
    name = present(row, *names)
    return clean(row[name], name, blank)


def name_of(row, *names):
    """An id or the name of a file: text or a whole number."""
    name = present(row, *names)
    return str(row[name]) if type(row[name]) is int else clean(row[name], name)


def whole(row, name, highest):
    """A whole number from 0 on. int() would also take True, 3.7 and '1_0': labels must be exact."""
    value = column(row, name)
    if not re.fullmatch(" *[0-9]{1,9} *", str(value)) or int(value) > highest:
        raise ValueError(f"{name} should be a whole number from 0 to {highest}, is {value!r}")
    return int(value)


# -------------------------------------------------- what is asked: a row to fields of an Example
CAPTION = ("caption", "sentence", "description", "phrase")


def caption(row):
    """Only text. Blank ones are left out later, and counted; a blank question is an error."""
    return {"text": text_of(row, *CAPTION, blank=True)}


def five_options(row):
    """Columns a1 .. a5 of TGIF-QA, or a list; the answer is the index of one."""
    if "a1" in row:
        options = [column(row, f"a{i}") for i in range(1, OPTIONS + 1)]
    else:
        options = column(row, "options", list)
    if len(options) != OPTIONS:
        raise ValueError(f"expected {OPTIONS} options, found {len(options)}")
    options = tuple(clean(option, f"option {i}") for i, option in enumerate(options, 1))
    return {"options": options, "answer": whole(row, "answer", OPTIONS - 1)}


def choice(row):
    """TGIF-QA's actions and transitions: five answers to a question."""
    return {**five_options(row), "text": text_of(row, "question")}


def caption_choice(row):
    """MSRVTT-MC's five captions, about which nothing is asked."""
    return {**five_options(row), "text": ""}


def count(row):
    """TGIF-QA's repetition count."""
    return {"text": text_of(row, "question"), "answer": whole(row, "answer", MAX_COUNT)}


def open_answer(row):
    """An answer in words. FrameQA's public files give the question's type as a number."""
    name = name_of(row, "answer_type", "type") if {"answer_type", "type"} & row.keys() else ""
    name = {"0": "object", "1": "number", "2": "color", "3": "location"}.get(name, name)
    return {"text": text_of(row, "question"), "answer": text_of(row, "answer"), "question_type": name}


def soft_answer(row):
    """VQA: the soft score min(count / 3, 1) of each answer among ten people's, in official spelling.

    The reference's jsonl brings the scores, in `labels`, and not what people said.
    """
    name = clean(row.get("answer_type") or "", "answer_type", blank=True)
    question = {"text": text_of(row, "question"), "question_type": name}
    if "labels" in row:
        labels = column(row, "labels", dict)
        if not all(type(n) in (int, float) and 0 <= n <= 1 for n in labels.values()):
            raise ValueError("labels should be {answer: score from 0 to 1}")
        return {**question, "answer": {clean(said, "an answer"): n for said, n in labels.items()}}
    given = column(row, "answers", list)
    if len(given) != PEOPLE:
        raise ValueError(f"expected the answers of {PEOPLE} people, found {len(given)}")
    # intern: most are "yes" or "no", and four million copies of them would take space
    people = tuple(sys.intern(text_of(one, "answer", blank=True)) for one in given)
    counts = Counter(map(normalize_answer, people))
    scores = {answer: min(n / 3, 1) for answer, n in counts.items() if answer}
    return {**question, "answer": scores, "people": people}


NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(i) for i, word in enumerate(NUMBERS.split())} | {"none": "0"}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTIONS.split()}


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
    with reading(path):
        labels = read_json(path)
        if not labels or sorted(labels.values()) != list(range(len(labels))):
            raise ValueError("the labels should count up from 0, each used once")
    return sorted(labels, key=labels.get)


# -------------------------------------------------- names to files
def media_key(name):
    """A file's name without its suffix and without what COCO's names of 2014, not of 2017, begin with."""
    stem, end = os.path.splitext(name)
    stem = stem if end.lower() in MEDIA_SUFFIXES else name  # the dot of v.1 begins no suffix
    return re.sub(r"^COCO_\w+_(?=\d{12}$)", "", stem)


@functools.cache  # a directory is listed once: VQA asks for 120,000 of its names
def media_index(folder, parent):
    """{media_key: paths} of the files in `parent`, below all MEDIA_FOLDERS and in their order."""
    index = {}
    for below in MEDIA_FOLDERS:
        directory = Path(folder, below, parent)
        for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            index.setdefault(media_key(name), []).append(directory / name)
    return index


@functools.cache  # a video has many captions
def find_media(folder, name):
    """The file that an annotation means by `name`, or None.

    Its suffix may be absent or another one, as videos are often encoded anew; but 4.jpg is never
    4.mp4. Names come from strangers' files: one that leads out of the folder (.., an absolute path,
    a drive, a link) is an error, or a page of answers could show what else is on this machine.
    """
    if re.search(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0", name):
        raise DataError(f"{name!r:.200}: a media name must stay inside the data folder {folder}")
    parent, base = os.path.split(name)
    suffixes = next((kind for kind in (IMAGES, VIDEOS) if base.lower().endswith(kind)), MEDIA_SUFFIXES)
    index = media_index(os.path.abspath(folder), parent)
    paths = index.get(media_key(base), []) + index.get(base, [])  # a.mov may be a.mov.mp4 now
    paths = [path for path in paths if path.name.lower().endswith(suffixes) and path.is_file()]
    # The very name, else a video before its thumbnail, else the first.
    path = min(paths, key=lambda path: (path.name != base, path.suffix.lower() in IMAGES), default=None)
    if path and not path.resolve().is_relative_to(Path(folder).resolve()):
        raise DataError(f"{path}: a link out of the data folder {folder}; copy the file, "
                        "or give its real folder")  # fmt: skip
    return path


# -------------------------------------------------- rows to examples
# What the layouts call the name of the video or image, and what a bare number there stands for.
MEDIA = {"path": "{}", "gif_name": "{}", "clip_name": "{}", "video": "{}", "image": "{}", "file_name": "{}",
         "video_id": "video{}", "vg_id": "{}.jpg", "image_id": "{:0>12}", "coco_id": "{:0>12}"}  # fmt: skip
IDS = ("vid_id", "question_id", "sen_id", "region_id", "key", "id", "place")  # place: for want of one


class Layout(NamedTuple):
    """How a task's data lies on the disk; the rest of it stands in finetune.TASKS or pretrain.py."""

    files: tuple  # patterns for `find_files`, public names first; {split}: train, {Split}: Train
    toy: str  # which part of the toy data has this layout
    text_length: int  # Lt at most, [CLS] and [SEP] included
    asked: object = caption  # row -> text, options, answer, ... of its Example
    # open-ended: so many of the most frequent of training, as in the reference (None: all)
    top_answers: int | None = None
    paragraphs: bool = False  # are all sentences about a video one text?
    one_caption: bool = False  # a test video has one: R@1 among 20 of them is another figure
    all_files: bool = False  # pretraining: captions come from all files that fit
    instead: dict | None = None  # {split: whose files serve for it}: some test answers are secret
    training: str | None = None  # the task whose training files serve for this one

    def read(self, folder, split):
        """The examples of a split. Pretraining can do without val and test."""
        if self.training and split != "test":
            return LAYOUTS[self.training].read(folder, split)
        if fault := no_folder(folder):
            raise DataError(f"--data {fault}")
        media_index.cache_clear()  # files may have come or gone since the last reading
        find_media.cache_clear()
        names = (self.instead or {}).get(split, [split])
        patterns = [pattern.format(split=name, Split=name.title())
                    for name in names for pattern in self.files]  # fmt: skip
        paths = find_files(folder, patterns, self.all_files)
        examples = [example for path in paths for example in read_file(self, folder, path, split)]
        if not examples and not (self.all_files and split != "train"):
            raise DataError(f"{paths[0]}: no examples in it")
        return examples


def no_folder(path):
    """What is wrong with a data set's folder, in a sentence; "" if it is one."""
    if os.path.exists(path):
        return "" if os.path.isdir(path) else f"{path}: not a folder; give the folder that holds it"
    return f"{path}: no such folder; give the one that holds the data set"


def read_examples(task, folders, split):
    """The examples of a task's split, from one folder or several, each with its media's path."""
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    layout = LAYOUTS[ALIASES.get(task, task)]
    return [example for folder in folders for example in layout.read(folder, split)]


def read_file(layout, folder, path, split):
    """The examples of one annotation file, and of what stands beside it (VQA's questions, ...)."""
    found, alone = {}, layout.one_caption and split == "test"
    read = msrvtt_rows if path.match("MSRVTT_*.[79]k*.csv") else read_rows
    with reading(path) as place:
        rows = read(place, path)
        for row in caption_rows(rows, path, split) if layout.all_files else rows:
            example = make_example(row, layout, place, folder)
            # Kept under the video's name where a video's captions are joined or it has only one,
            # else under a number.
            key = example.video if alone or layout.paragraphs else len(found)
            if key in found and alone:
                raise ValueError(f"a second caption of {key!r}; in testing it has one: remove the others")
            if key in found:
                example = example._replace(text=f"{found[key].text} {example.text}".strip())
            found[key] = example
    examples = [example for example in found.values() if example.text or example.options]
    if blank := len(found) - len(examples):  # one caption in millions: no reason to stop
        print(f"note: {path}: left out {blank:,} blank captions", file=sys.stderr)
    return examples


def caption_rows(rows, path, split):
    """For pretraining, which reads whole folders: a row for each caption of a split.

    The split is what the row says (in MSRVTT's json), else what the file's name does, else train.
    Some rows have a list of captions.
    """
    splits_of_file = re.findall("train|val|test", path.stem.lower()) or ["train"]
    for row in rows:
        splits = re.findall("train|val|test", row["split"]) if "split" in row else splits_of_file
        if split in splits:
            name = present(row, *CAPTION)
            texts = row[name] if isinstance(row[name], list) else [row[name]]
            yield from ({**row, name: text} for text in texts)


def make_example(row, layout, place, folder):
    """A row to an Example. Its video's path is found here; None: it is missing."""
    named = present(row, *MEDIA)  # the column
    video = name_of(row, named)
    video = MEDIA[named].format(video) if video.isdigit() else video
    name = name_of({"place": place.row, **row}, *IDS)
    if layout.all_files:  # ids repeat from one file to the next
        name = f"{place.path.stem}/{name}"
    # Media lie in the data folder, whether the annotations do or have a folder in it, or with them.
    path = find_media(folder, video) or find_media(place.path.parent, video)
    return Example(video if layout.paragraphs else name, video, path=path and str(path), **layout.asked(row))


# -------------------------------------------------- the table: tasks to layouts
OWN = ("{split}.csv", "{split}.tsv", "{split}.jsonl", "*{split}*.jsonl")  # or the reference's
LAYOUTS = {
    **{f"tgif_qa_{kind}": Layout(
        (f"{{Split}}_{kind}_question*.csv", f"*{kind}*{{split}}*.jsonl",
         f"*{{split}}*{kind}*.jsonl", f"{kind}/*{{split}}*.jsonl"), "videos", 25, asked)
       for kind, asked in (("action", choice), ("transition", choice), ("frameqa", open_answer),
                           ("count", count))},
    # 1k-A: train on the 9k (or 7k) listed videos, 20 captions each; test on 1,000 videos with ONE
    # caption each. The json's own `test` split (2,990 videos, 20 captions each) is another protocol:
    # its R@1 does not compare.
    "msrvtt_retrieval": Layout(
        ("MSRVTT_JSFUSION_{split}*.csv", "MSRVTT_{split}.9k*.csv", "MSRVTT_{split}.7k*.csv",
         "*ret*{split}*.jsonl", *OWN), "videos", 20, one_caption=True),
    "didemo_retrieval": Layout(("{split}_data*.json", *OWN), "videos", 100, paragraphs=True),
    "activitynet_retrieval": Layout(
        ("{split}.*json", "{split}*.csv", *OWN), "videos", 100, paragraphs=True,
        instead={"val": ("val_1", "val1", "val"), "test": ("val_1", "val1", "test", "val")}),
    "msrvtt_qa": Layout(
        ("{split}_qa*.json", "*qa*{split}*.jsonl", *OWN), "videos", 100, open_answer,
        top_answers=1500),
    # Which of five captions belongs to the video? No training: a retrieval model scores them.
    "msrvtt_mc": Layout(
        ("*mc*{split}*.jsonl", "*{split}*.jsonl"), "videos", 20, caption_choice, training="msrvtt_retrieval"),
    "vqa": Layout(
        ("*{split}*annotations*.json", "*annotations*{split}*.json", "*{split}*.jsonl"), "photos", 20,
        soft_answer, top_answers=3129, instead={"test": ("test", "val")}),
    # COCO, MSRVTT and Visual Genome by their public names; where there are none, all tables.
    "pretrain": Layout(
        ("*caption[s_]*.json|MSRVTT_data*.json|*videodatainfo*.json|*region_descriptions*.json",
         "*.csv|*.tsv|*.jsonl"),
        "photos", 30, all_files=True),
}  # fmt: skip
# One's own questions are read, and cut, as MSRVTT-QA's. A limit of 100 tokens costs short ones
# nothing, as a batch is only as long as its longest text.
LAYOUTS["qa"] = LAYOUTS["msrvtt_qa"]
ALIASES = {"tgif_qa": "tgif_qa_action"}


def without_missing(examples, split, where, allow):
    """The examples whose video is there (in testing all: a missing one counts as wrong); else the run stops, unless
    missing videos are allowed."""
    missing = {example.video for example in examples if example.path is None}
    if missing:
        videos = len({example.video for example in examples})
        what = f"{len(missing):,} of {videos:,} {split} videos are missing under {where} ({min(missing)}, ...)"
        if len(missing) == videos:
            raise DataError(f"{what}: put them there")
        if not allow:
            raise DataError(f"{what}: put them there, or go on without them (--allow_missing)")
        print(f"note: {what}", file=sys.stderr)
    return [example for example in examples if example.path or split != "train"]


# ----------------------------------------------------------------------------------------------------------------------
# The toy data: small enough for a laptop CPU
#
# It stands in layouts of real data (retrieval from MSRVTT: in the reference's jsonl), so that both
# go through the same readers.
# One world: each GIF shows one object of some colour, shape and place. It does one action several
# times, later another one once, and in between it idles. Every action can be told from a single
# frame, but half of the frames and more show idling or the other action: one clip is often not
# enough, a few always are. This is the paper's setting in small: N_train, N_test and G all matter.
# A photo shows such an object in one state. The order of the random draws below is part of the
# data: measured results were made with these very files, so a new order is a new TOY_VERSION.

TOY_VERSION = 5  # a new number rewrites the toy data
TOY_SIZE = 64  # pixels: the tiny model's L, which gives it a 4 x 4 grid
# 8-second GIFs. 16 clips of one frame (the largest N_test) lie at most 2 frames apart, and no action
# is shorter than 3: together they see every action that ends before the last part of a GIF, which
# uniform clips never see; one alone sees little.
TOY_FPS, TOY_FRAMES = 4, 32
# Frames of the repeated action, in all, and of the other one. Half of a GIF and more than a
# quarter, so that a few clips see both. What remains are 7 frames of rest: five repetitions and the
# last action, the most there are, have 7 gaps around them.
TOY_BUSY, TOY_LAST = 16, 9
# Far apart, and brighter than any background (70 of 255 at most).
TOY_COLORS = {
    "red": "#dc2828", "green": "#28b43c", "blue": "#3c5af0", "yellow": "#f0dc32",
    "purple": "#a03cc8", "orange": "#fa8c1e", "white": "#f0f0f0", "pink": "#fa82be",
}  # fmt: skip


def quarter_turns(corners):
    """These corners, and behind them the same, turned around (0, 0) by 90, 180 and 270 degrees."""
    turned = []
    for _ in range(4):
        turned += corners
        corners = [(-y, x) for x, y in corners]
    return turned


TOY_SHAPES = {  # corners around (0, 0), in units of the object's radius
    "square": quarter_turns([(-1, -1)]),
    "bar": [(-1.3, -0.4), (1.3, -0.4), (1.3, 0.4), (-1.3, 0.4)],
    "triangle": [(0, -1.2), (1.1, 1), (-1.1, 1)],
    "cross": quarter_turns([(-0.35, -1.2), (0.35, -1.2), (0.35, -0.35)]),
}
# More than six: a video shows two, and four others have to be its wrong options.
TOY_ACTIONS = ["jump", "spin", "grow", "shrink", "blink", "split", "shine", "wave"]
# Centres in pixels, between the moons (above 6) and the marks (below 57).
TOY_PLACES = {"left": (16, 30), "right": (48, 30), "top": (32, 22), "bottom": (32, 42)}
TOY_NUMBERS = ["one", "two", "three", "four"]  # of moons: as words, which are answers of FrameQA

# All that is asked: name -> (the question, the field of a ToyVideo that answers it).
TOY_QUESTIONS = {
    "action": ("what does the {color} {shape} do {times} times ?", "action"),
    "after": ("what does the {color} {shape} do after {action} ?", "last"),
    "before": ("what does the {color} {shape} do before {last} ?", "action"),
    "now": ("what does the {color} {shape} do ?", "action"),  # for photos, which have no before
    "count": ("how many times does the {color} {shape} {action} ?", "times"),
    "number": ("how many moons are in the sky ?", "moons"),
    "color": ("what is the color of the {shape} ?", "color"),
    "location": ("where is the {color} {shape} ?", "place"),
}
# What one frame answers: FrameQA's types 1, 2, 3 in the public files. None asks for a shape
# (type 0, object): 64 pixels and a few minutes from scratch are too little to learn it.
TOY_LOOKS = ["number", "color", "location"]

# Captions of a toy GIF. They leave out the colour: alike but for what happens, so that retrieval
# has to see several clips. The first already tells both actions and their order, so the test's
# single caption is this one.
GIF_CAPTIONS = [
    "the {shape} does {action} before {last}",
    "the {shape} does {last} after {action}",
    "the {shape} does {action} {times} times before {last}",
]

# All that is ever said about a toy photo. It is a closed list, so that what is not on it is wrong
# of the photo. The first two name nothing but the action: where every caption names all, the colour
# alone tells a mismatch, and pretraining need not look at anything else. Captions that name the
# colour alone are as bad: with "it is {color}" as the second one, 100 steps of fine-tuning ended at
# 56% in place of 98%.
PHOTO_CAPTIONS = [
    "it does {action}",
    "the thing does {action}",
    "the {shape} does {action}",
    "the {color} {shape} does {action}",
    "the {color} {shape} is on the {place}",
    "there are {moons} moons in the sky",
]

# What fine-tuning on toy data says, and PHOTO_CAPTIONS do not: a tiny model would have to spell it,
# if its words were those of pretraining alone. (The names in braces become words, too.)
TOY_WORDS = [*TOY_COLORS, *TOY_SHAPES, *TOY_ACTIONS, *TOY_PLACES, *TOY_NUMBERS, "yes", "no",
             *GIF_CAPTIONS, *(question for question, _ in TOY_QUESTIONS.values())]  # fmt: skip


class ToyVideo(NamedTuple):
    """What is seen in a toy GIF; or in a photo, whose one frame tells nothing of times and last."""

    name: str  # of the file, without suffix
    color: str
    shape: str
    place: str
    moons: str  # "one" .. "four" small dots in the top corner
    action: str  # done `times` times, ...
    times: int  # 2..5
    last: str  # ... and then this, once
    timeline: list  # for each frame (action or "nothing", marks in the picture)

    def say(self, text):
        """The text with its braces filled in, in correct English."""
        return text.format(**self._asdict()).replace("are one moons", "is one moon")

    def ask(self, name):
        text, field = TOY_QUESTIONS[name]
        return {"question": self.say(text), "answer": getattr(self, field)}


def toy_video(name, rng):
    """Draw what happens in a video: rest, action, rest, action, ..., the last action, rest."""
    action, last = rng.sample(TOY_ACTIONS, 2)
    times = rng.randint(2, 5)  # never once, as `last` is: the question could mean either
    rests = [1] * (times + 2)  # frames before, between and after; the spare ones fall at random
    for _ in range(TOY_FRAMES - TOY_BUSY - TOY_LAST - len(rests)):
        rests[rng.randrange(len(rests))] += 1
    # Each repetition leaves a mark in the picture, so that they can be counted in one frame of the
    # right moment; the last action leaves none. The marks stay until the next round begins.
    timeline = [("nothing", times)] * rests[0]
    for i in range(1, times + 1):  # TOY_BUSY frames, dealt out as evenly as they go
        timeline += [(action, i)] * ((TOY_BUSY + i - 1) // times) + [("nothing", i)] * rests[i]
    timeline += [(last, times)] * TOY_LAST + [("nothing", times)] * rests[-1]
    start = rng.randrange(TOY_FRAMES)  # GIFs loop: one may start anywhere, so no place is special
    timeline = timeline[start:] + timeline[:start]
    looks = [rng.choice(list(kinds)) for kinds in (TOY_COLORS, TOY_SHAPES, TOY_PLACES, TOY_NUMBERS)]
    return ToyVideo(name, *looks, action, times, last, timeline)


def draw_toy_object(draw, video, action, x, y):
    """The video's object in one of nine states, each to be told from one frame: idle, or TOY_ACTIONS."""
    if action == "jump":
        draw.ellipse((x - 10, y + 9, x + 10, y + 13), fill="#6e6e6e")  # the shadow stays
        y -= 12
    elif action == "spin":
        for start in (0, 180):
            draw.arc((x - 16, y - 16, x + 16, y + 16), start, start + 110, fill="#96ffff", width=2)
    elif action == "shine":
        for a in (math.pi / 4 * i for i in range(8)):
            ray = [(x + length * math.cos(a), y + length * math.sin(a)) for length in (13, 19)]
            draw.line(ray, fill="#ffffa0", width=2)
    elif action == "wave":
        for side in (-1, 1):
            draw.line((x + side * 7, y, x + side * 18, y - 16), fill="#ffc8ff", width=3)
    # Radius 10: somewhat wider than one of the grid's cells (16 pixels), with room for the action.
    r = 10 * {"grow": 1.6, "shrink": 0.5, "split": 0.6}.get(action, 1)
    color = TOY_COLORS[video.color]
    for middle in (x - 10, x + 10) if action == "split" else (x,):
        corners = [(middle + r * dx, y + r * dy) for dx, dy in TOY_SHAPES[video.shape]]
        draw.polygon(corners, fill=None if action == "blink" else color, outline=color, width=2)


def draw_toy_video(video, rng):
    """Yield the frames of a toy video, as Pillow images."""
    # Background, exact place and drift say nothing about any answer. They make each GIF another
    # picture, so that it can't be recognised as one of training.
    background = tuple(rng.randint(0, 70) for _ in range(3))  # dark: every colour is seen on it
    x, y = (c + rng.uniform(-3, 3) for c in TOY_PLACES[video.place])
    drift = rng.uniform(-5, 5)
    for t, (action, marks) in enumerate(video.timeline):
        image = Image.new("RGB", (TOY_SIZE, TOY_SIZE), background)
        draw = ImageDraw.Draw(image)
        for i in range(1 + TOY_NUMBERS.index(video.moons)):
            draw.ellipse((3 + 6 * i, 2, 6 + 6 * i, 5), fill="#e6e678")
        for i in range(marks):
            draw.rectangle((4 + 9 * i, 58, 9 + 9 * i, 62), fill="#c8c8c8")
        # Never still: a GIF writer would merge equal frames, and their number would change.
        draw_toy_object(draw, video, action, x + drift * t / TOY_FRAMES, y + t % 2)
        yield image


# -------------------------------------------------- writing: media, tables
def write_gif(frames, path):
    """Frames (Pillow images) as a GIF that repeats forever.

    Not optimized: it would take a sixth longer, for files that are 3% smaller.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = frames
    first.save(path, save_all=True, append_images=rest, duration=1000 // TOY_FPS, loop=0,
               optimize=False)  # fmt: skip


def write_toy_photo(path, rng):
    """Write a photo; -> what it shows."""
    action = rng.choice(["nothing", *TOY_ACTIONS])
    photo = toy_video(path.stem, rng)
    photo = photo._replace(action=action, timeline=[(action, rng.randint(0, 5))])  # any marks
    path.parent.mkdir(parents=True, exist_ok=True)
    next(draw_toy_video(photo, rng)).save(path)
    return photo


def write_table(path, rows):
    """Dictionaries with the same keys, as TGIF-QA publishes them: TABs, CRLF, a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], delimiter="\t")
        table.writeheader()
        table.writerows(rows)


def write_json(path, contents):
    path.write_text(json.dumps(contents), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def toy_options(answer, wrong, rng):
    """Five options, as in the public files: the answer anywhere among four wrong ones.

    -> (the options, which of them is right)
    """
    options, right = rng.sample(wrong, 4), rng.randrange(5)
    options.insert(right, answer)
    return options, right


# -------------------------------------------------- writing: videos, and all that is asked and said of them
# Sizes: all is drawn in some twenty seconds, and the README's accuracies were learned from so many.
# 200 test examples are half a point each, with a standard error of at most 3.5 points.
def write_toy_videos(folder, train=1000, test=200):
    """GIFs, with the files of TGIF-QA, MSRVTT-QA and of all retrieval tasks."""
    for split, count in (("train", train), ("test", test)):
        # A random state for each split: its size changes nothing in the other one. (The seeds'
        # spelling is history: another one would be other data.)
        rng = random.Random(f"{split.title()} 0")
        videos = [toy_video(f"toy_{split}_{i:04d}", rng) for i in range(count)]
        for video in videos:
            write_gif(draw_toy_video(video, rng), folder / "gifs" / f"{video.name}.gif")
        write_toy_questions(folder, split, videos, rng)
        write_toy_captions(folder, split, videos, rng)


def write_toy_questions(folder, split, videos, rng):
    """TGIF-QA's {Train,Test}_<kind>_question.csv, all four, and MSRVTT-QA's {train,test}_qa.json."""
    for kind in ("action", "transition", "frameqa", "count"):
        # Transition is the hardest of the four: twice as many questions to learn from. The others
        # have a random state of their own, so that all that follows stays as it was without them.
        more = [random.Random("more 0")] if (split, kind) == ("train", "transition") else []
        rows = [{"gif_name": video.name} | toy_columns(video, kind, state)
                for state in (rng, *more) for video in videos]  # fmt: skip
        write_table(folder / f"{split.title()}_{kind}_question.csv", rows)
    # Two a video, so that the question has to be read: the answer to one needs several clips, to the
    # other a single frame.
    asked = [{"video_id": video.name} | video.ask(name)
             for video in videos for name in ("before", rng.choice(TOY_LOOKS))]  # fmt: skip
    write_json(folder / f"{split}_qa.json", asked)


def toy_columns(video, kind, rng):
    """One question about a toy video, as a dict of the public file's columns."""
    if kind == "count":
        return video.ask("count")
    if kind == "frameqa":
        look = rng.choice(TOY_LOOKS)
        return video.ask(look) | {"type": 1 + TOY_LOOKS.index(look)}
    side = "after" if rng.random() < 0.5 else "before"
    question, answer = video.ask(side if kind == "transition" else "action").values()
    # The other action of this video is no option: a frame that shows it would speak for a wrong
    # answer, and one clip could not tell which of two that it sees is asked for.
    wrong = [action for action in TOY_ACTIONS if action not in (video.action, video.last)]
    options, right = toy_options(answer, wrong, rng)
    return {"question": question, **{f"a{i}": o for i, o in enumerate(options, 1)}, "answer": right}


def write_toy_captions(folder, split, videos, rng):
    """Retrieval's files: MSRVTT's, with multiple choice, in the reference's jsonl; DiDeMo; ActivityNet."""
    sentences = GIF_CAPTIONS
    if split == "test":
        # A caption has to fit one video alone. GIFs loop, so the order of the actions makes no
        # difference: of 4 shapes x 28 pairs of actions the 200 videos of the test show 97.
        videos = list({frozenset([v.shape, v.action, v.last]): v for v in videos}.values())
        sentences = sentences[:1]  # as in 1k-A
    said = [{"clip_name": v.name, "caption": v.say(text)} for v in videos for text in sentences]
    write_lines(folder / f"msrvtt_ret_{split}.jsonl", said)
    # Two sentences a video, without the public files' time stamps, which retrieval does not read.
    both = {v.name: [v.say("the {shape} does {action}"), v.say("the {shape} does {last}")] for v in videos}
    moments = [{"video": name, "description": text} for name, pair in both.items() for text in pair]
    write_json(folder / f"{split}_data.json", moments)
    # ActivityNet's test answers are secret: what the field calls its test is the file val_1.
    paragraphs = {name: {"sentences": pair} for name, pair in both.items()}
    write_json(folder / f"{'val_1' if split == 'test' else split}.json", paragraphs)
    if split == "test":  # multiple choice: the wrong options are the captions of four other videos
        texts = [row["caption"] for row in said]
        drawn = [toy_options(text, texts[:i] + texts[i + 1 :], rng) for i, text in enumerate(texts)]
        rows = [{"clip_name": video.name, "options": options, "answer": right}
                for video, (options, right) in zip(videos, drawn, strict=True)]  # fmt: skip
        write_lines(folder / "msrvtt_mc_test.jsonl", rows)


# -------------------------------------------------- writing: photos, with captions and questions
def write_toy_photos(folder, train=2000, val=200):
    """Photos {train,val}2017/<12 digits>.png, with the files of COCO's captions and of VQA v2."""
    # Pretraining has no test: its validation says how well a masked word and a match are guessed.
    # VQA names a photo by its number alone: those of the second split begin behind the first's.
    for split, first, count in (("train", 1, train), ("val", train + 1, val)):
        rng = random.Random(f"photos {split} 0")
        photos = [(number, write_toy_photo(folder / f"{split}2017" / f"{number:012d}.png", rng))
                  for number in range(first, first + count)]  # fmt: skip
        images = [{"id": number, "file_name": f"{photo.name}.png"} for number, photo in photos]
        said = [{"image_id": number, "caption": photo.say(text)}
                for number, photo in photos for text in PHOTO_CAPTIONS]  # fmt: skip
        write_json(folder / f"captions_{split}2017.json", {"images": images, "annotations": said})
        rows = [{"image_id": number} | columns
                for number, photo in photos for columns in toy_vqa_columns(photo, rng)]  # fmt: skip
        rows = [{"question_id": i} | row for i, row in enumerate(rows)]
        questions = [{k: row[k] for k in ("question_id", "image_id", "question")} for row in rows]
        write_json(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
        # one column more than published, the question
        write_json(folder / f"v2_mscoco_{split}2014_annotations.json", {"annotations": rows})


def toy_vqa_columns(photo, rng):
    """Two questions about a photo, one of them to be answered by yes or no, with what people answer."""
    # The true colour half of the time, else any of the eight: "yes" is right in 56%, so that it
    # can't be guessed.
    color = rng.choice([photo.color, rng.choice(list(TOY_COLORS))])
    answer = "yes" if color == photo.color else "no"
    # an idle object does nothing to be asked for
    name = rng.choice(TOY_LOOKS if photo.action == "nothing" else ["now", *TOY_LOOKS])
    for asked, kind in (
        ({"question": f"is the {photo.shape} {color} ?", "answer": answer}, "yes/no"),
        (photo.ask(name), "number" if name == "number" else "other"),
    ):
        # One of the ten has not looked: soft scores, as in the real data.
        people = [asked["answer"]] * 9 + [rng.choice([*TOY_COLORS, *TOY_SHAPES, "yes", "no"])]
        yield {"question": asked["question"], "answer_type": kind,
               "answers": [{"answer": said} for said in people]}  # fmt: skip


# -------------------------------------------------- the whole
TOY_PARTS = {"videos": write_toy_videos, "photos": write_toy_photos}


def toy_data(*parts, folder="toy_data"):
    """Write these parts of the toy data (all, if none is named), once; -> the folder.

    A marker file in each part tells whether an earlier writing was completed: it is written last,
    after the media and the annotations, so what an interrupted run left is written anew.
    """
    for part in parts or TOY_PARTS:
        marker = Path(folder).absolute() / part / f"complete-{TOY_VERSION}"
        try:
            if not marker.exists():
                print(f"writing toy data to {folder}/{part}/ (once, some ten seconds)", flush=True)
                TOY_PARTS[part](marker.parent)
                marker.touch()
        except OSError as error:  # a read-only or full disk, a file where a folder should be
            raise DataError(
                f"{marker.parent}: toy data cannot be written there ({error.strerror or error}); "
                f"choose another directory (python data.py toy DIR, then --data DIR/{part})"
            ) from None
    return Path(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: `python data.py show`, finetune.py's --sheet and the sheet that training leaves
#
# A sheet is a pile of strips: text, the time line, rows of pictures and bars. All of them are images, so `pile` and
# `row` are all the layout there is: nothing overlaps, and everything has the room it needs.

SIDE, GAP = 180, 10  # pixels of a picture, and between two: a frame of 448 can still be recognised,
WIDTH = 8 * (SIDE + GAP) - GAP  # and eight stand side by side, which is 4 clips of 2 frames, on a usual screen
BAR = 4 * (SIDE + GAP) - GAP  # the longest bar, beside four pictures
MARGIN = 40  # around the sheet
DARK, GREY, PALE = "#333333", "#666666", "#cccccc"
# By Okabe and Ito: all people can tell them. 11 times: one for each of the 64 clips that can be drawn.
SHEET_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9") * 11
TOY_NOTE = ("Toy data: the yellow dots at the top are moons, which a question counts; the grey squares at the bottom "
            "count the repetitions of the action, and stay until the next round begins.")


def draw_sheet(title, about, strips, path):
    """The whole picture, of strips at most WIDTH wide; path: a file that is shown, which may be toy data."""
    strips = [text_strip(title, 28), text_strip(about, color=GREY), *strips]
    if (Path(path).absolute().parent.parent / f"complete-{TOY_VERSION}").exists():  # see toy_data
        strips.append(text_strip(TOY_NOTE, color=GREY))
    return ImageOps.expand(pile(strips), MARGIN, "white")


def pile(images):
    """The images as one, each below the one before it."""
    size = max(image.width for image in images), sum(image.height for image in images)
    whole, top = Image.new("RGB", size, "white"), 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole


def row(images):
    """Images side by side, with room below them; all but the last are as wide as a picture."""
    whole = Image.new("RGB", (WIDTH, max(image.height for image in images) + GAP), "white")
    for i, image in enumerate(images):
        whole.paste(image, (i * (SIDE + GAP), 0))
    return whole


def text_strip(text, size=17, color=DARK, width=WIDTH):
    """Text in lines of at most `width` pixels, none of it cut off; size: of its letters."""
    font = ImageFont.load_default(size)
    for letters in range(3 * width // size, 0, -1):  # as many in a line as fit; most are wider than size / 3
        lines = textwrap.wrap(text, letters) or [""]
        if max(map(font.getlength, lines)) <= width:
            break
    # Half a line stays free above: it belongs to what is below it. 6: between lines, for the g and y of the last, too.
    strip = Image.new("RGB", (width, size // 2 + (size + 6) * len(lines)), "white")
    ImageDraw.Draw(strip).multiline_text((0, size // 2), "\n".join(lines), fill=color, font=font, spacing=6)
    return strip


def bar(text, length, color):
    """Text; below it, a bar, from length 0 to 1, BAR pixels; what is longer or below 0 (a count may be) is drawn as these."""
    # + 1: 0 is a line, not nothing; 7: thin, as the text above it already says how long
    width = 1 + round(BAR * min(max(length, 0), 1))
    return pile([text_strip(text, 16, width=BAR), Image.new("RGB", (width, 7), color)])


def picture(frame, media, text, color, attention=None):
    """A frame (3, L, L) of a file as the model receives it, in a border of this colour, with text below it.

    attention (h, w), 0..1, to each cell of the grid: its colour, over the frame in grey.
    """
    side = SIDE - 4  # two pixels of border on each side
    image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((side, side))
    draw = ImageDraw.Draw(image)
    # Black may be a night, too. 42: room for the word, at the bottom or at the right; 4:3 leaves 44.
    if min(resized_shape(media.height, media.width, side)) < side - 42:
        draw.text((side - 3, side - 4), "padding", fill=PALE, font_size=11, anchor="rs")
    if attention is not None:
        heat = colors(attention).resize((side, side), Image.Resampling.NEAREST)
        image.paste(Image.blend(image.convert("L").convert("RGB"), heat, 0.6))  # .6: both can be told
        for i in range(1, len(attention)):  # the borders: it is a grid, and no smooth cloud
            place = side * i // len(attention)
            draw.line((0, place, side, place), fill="white")
            draw.line((place, 0, place, side), fill="white")
    return pile([ImageOps.expand(image, 2, color), text_strip(text, 14, GREY, SIDE)])


def colors(values):
    """(h, w), 0..1, as a picture: from violet, 0, to yellow, 1, as viridis: brightness alone tells the value."""
    grey = Image.fromarray((255 * values).byte().numpy())
    return ImageOps.colorize(grey, black="#440154", mid="#21918c", white="#fde725")


def time_line(media, clips, length, colors):
    """A strip: the video's seconds, in eight parts; below them a numbered bar for each clip, with a dot for each frame.

    clips (N, T): frame indices, in order of time; length: a clip's seconds; colors: one a clip.
    """
    seconds = media.num_frames / media.fps
    scale = (WIDTH - 80) / seconds  # pixels of a second; 80: room for the last label
    places = clips / media.fps * scale
    starts, wide = places[:, 0].tolist(), max(length * scale - 2, 5)  # 2: a gap between neighbours
    # Clips may overlap: they take turns in as many lanes as start before one of them ends. 20: room for its number.
    lanes = max(bisect.bisect(starts, start + max(wide, 20)) - i for i, start in enumerate(starts))
    strip = Image.new("RGB", (WIDTH, 34 * (1 + lanes) + GAP), "white")
    draw = ImageDraw.Draw(strip)
    for i in range(9):
        x = (WIDTH - 80) * i / 8
        draw.line((x, 32, x, strip.height), fill=PALE)
        draw.text((x, 12), f"{seconds * i / 8:.2f} s", fill=DARK, font_size=15)
    for i, (start, color) in enumerate(zip(starts, colors, strict=True)):
        top = 34 * (1 + i % lanes)
        draw.rectangle((start, top, start + wide, top + 12), fill=color)
        for x in (places[i] + 2).clamp(max=start + wide - 6).tolist():  # the last frame may be at the clip's end
            draw.ellipse((x, top + 4, x + 4, top + 8), fill="white")
        draw.text((start, top + 15), str(i + 1), fill=DARK, font_size=14)
    return strip


def contact_sheet(path, n_clips, n_frames, target_fps, size, seed=None):
    """A video's clips on its time line, and their frames as the model receives them.

    seed: random clips, as in training; None: uniform ones, as in testing.
    """
    media, generator = probe(path), torch.Generator().manual_seed(seed or 0)
    clips = sample_clips(media.num_frames, media.fps, n_clips, n_frames, target_fps, seed is not None, generator)
    clips = clips[clips[:, 0].argsort(stable=True)]  # random ones in the order of time, too
    indices, pictures = clips.flatten().tolist(), []
    for i, frame in enumerate(read_frames(path, indices, size)):
        text = f"clip {i // n_frames + 1}: {indices[i] / media.fps:.2f} s"
        pictures.append(picture(frame, media, text, SHEET_COLORS[i // n_frames]))
    how = f"at random, as in training (seed {seed})."
    if seed is None:  # those who wonder why the end is never looked at find the reason here
        how = ("uniform, as in testing: clip i starts at f i / N, i = 0 .. N - 1, with f = length - clip (N = 1: f / 2), "
               "so that the last part of a video is never seen.")  # fmt: skip
    about = (f"N = {n_clips} clips of T = {n_frames} frames, {how} Pixels: {media.width} x {media.height}, resized "
             f"and padded to {size} x {size}.")  # fmt: skip
    strips = [time_line(media, clips, n_frames / target_fps, SHEET_COLORS[:n_clips])]
    strips += [row(pictures[i : i + 8]) for i in range(0, len(pictures), 8)]
    return draw_sheet(Path(path).name, about, strips, path)


# ----------------------------------------------------------------------------------------------------------------------
# Is the data whole? `python data.py check`
#
# Broken data do not always stop a run: it may go on for hours, and end in a number that means nothing. So `check` reads
# before it all that a run would read: annotations in full, of videos and images what `probe` wants to know.

# What it looks for, and what to do about it. To be mended before a run, which would stop or be worth little:
FAULTS = {
    "annotations unreadable": "mend the file that is named, or put it there",
    "videos missing": "put them there; or, if some are, --allow_missing: left out in training, wrong in testing",
    "videos unreadable": "download them again, or remove them: training gives up at 20 in a row, testing counts them "
                         "as wrong",
}  # fmt: skip
# ... and to be known, as it may be meant:
REMARKS = {
    "videos without motion": "a single frame, often a placeholder for a deleted video: download them again",
    "videos also in train": "a model may remember them: the results would be too good",
    "same row twice": "same video and text: counts double in testing; do the answers agree?",
    "text cut": "the end is lost, perhaps a whole option: a longer --text_length keeps it",
}


def check(layout, folder, text_length):
    """What a data set has, and what is wrong with it.

    -> {split: examples}; {(finding, split): a line for each video or example}, with one of FAULTS or REMARKS as the
    finding. A split whose annotations cannot be read has no examples, but a finding.
    """
    splits, found = read_splits(layout, folder)
    # Each file once, whichever examples have it: opening them takes the time. Eight at once: more would only wait for
    # the disk. disable=None: a bar on a terminal, nothing in a file.
    paths = sorted({e.path for examples in splits.values() for e in examples if e.path})
    faults = process_map(check_file, paths, max_workers=8, chunksize=8, disable=None)
    faults = dict(zip(paths, faults, strict=True))
    # A split with a video of training tests the memory of a model, and not what it has understood.
    known = {e.video for e in splits.get("train", [])}
    for split, examples in splits.items():
        of_training = known if split != "train" else set()
        for what, line in check_split(examples, faults, of_training, text_length):
            found.setdefault((what, split), []).append(line)
    return splits, found


def read_splits(layout, folder):
    """-> the splits whose annotations can be read; what is wrong with the others, both as in `check`."""
    splits, found = {}, {}
    for split in ("train", "val", "test"):
        try:
            splits[split] = layout.read(folder, split)
        except DataError as error:
            if split != "val" or not isinstance(error, NoAnnotations):  # not every data set has a validation split
                found["annotations unreadable", split] = [str(error)]
    if splits.get("val") == splits.get("test"):
        splits.pop("val", None)  # VQA, ActivityNet: the test answers are secret, so val is the test
    return splits, found


def check_file(path):
    """-> (finding, line), if a video or image is not as it should be, else None.

    `probe` lists a video's frames without decoding them, so damage inside a frame shows in a run only.
    """
    try:
        if probe(path).num_frames == 1 and path.lower().endswith(VIDEOS):
            return "videos without motion", path
    except DataError as error:
        return "videos unreadable", str(error)
    return None


def check_split(examples, faults, known, text_length):
    """Yield (finding, line) of a split: of each video once, though it may have many questions; of each row.

    faults: {path: what `check_file` says}. known: the videos of training; for training itself, none.
    """
    for video, path in {e.video: e.path for e in examples}.items():
        if not path:
            yield "videos missing", video
        elif faults[path]:
            yield faults[path]
        if video in known:
            yield "videos also in train", video
    rows = set()
    for e in examples:
        row = e.video, e.text, e.options
        if row in rows:
            yield "same row twice", f"{e.id}  {e.video}: {e.text}"
        rows.add(row)
        # In multiple choice the text is the question and an option behind it: what is cut off is the option, so that
        # the model may be asked to choose between equals. A word counts as one token; BERT's own vocabulary splits
        # rare ones, so it cuts a little earlier.
        length = max(len(words_of(text)) for text in input_texts(e)) + 2  # with [CLS] and [SEP]
        if length > text_length:
            yield "text cut", f"{e.id}  {length} tokens: {input_texts(e)[0]}"


def print_check(splits, found):
    """How much each split has; the first three of each finding, and what to do about it.

    -> Is there a fault, so that something should be mended before a run?
    """
    for split, examples in splits.items():
        print(f"{split:6} {len(examples):,} examples, {len({e.video for e in examples}):,} videos")
    for (what, split), lines in found.items():
        print(f"\n{split}: {what}: {len(lines):,} ({(FAULTS | REMARKS)[what]})")
        for line in lines[:3]:
            print(f"  {line}"[:200])  # 200: two lines of a terminal
    faults = [what for what in FAULTS if any(what in key for key in found)]
    print(f"\nmend this before a run: {', '.join(faults)}" if faults else "\nnothing here would stop a run")
    return bool(faults)


# ----------------------------------------------------------------------------------------------------------------------
# The command line; `Parser` serves finetune.py and pretrain.py, too


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes end in one line.

    It has no list of all flags, which would hide what is wrong, but the word that was perhaps meant. A command's own
    parser (`parse_command`) is one of these, too: argparse sees to that.
    """

    def __init__(self, **options):
        # No abbreviations: a shortened flag would change its meaning with the next flag that begins alike.
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message):
        # argparse says what it did not understand, and behind a wrong choice what it would have; of flags, its usage
        # lists all. A message may quote what was typed, line ends included.
        message = " ".join(message.split())
        if wrong := re.search(r"(?:unrecognized arguments|invalid choice): '?([\w-]+)", message):
            known = message.partition("choose from")[2] or self.format_usage()
            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", known), n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message} (--help lists all flags)\n")

    def numbers(self, flag, kind=int, low=1, high=10**9, **options):
        """A flag that takes a number from low to high, or several.

        nan is in no range: each comparison with it is false. And inf is above all of them. So what the scripts compute
        with is a number, whatever was typed. The ranges are wide; they keep out what no machine can hold.

        kind: int or float. options: of argparse's add_argument; with nargs each of several numbers is looked at.
        """

        def number(text):
            with contextlib.suppress(ValueError):
                value = kind(text)
                if low <= value <= high:
                    return value
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {low:,} to {high:,}")

        self.add_argument(flag, type=number, **options)


def folder(text):
    """The type of a flag that names an existing folder."""
    if fault := no_folder(text):
        raise argparse.ArgumentTypeError(fault)
    return Path(text)


def parse_command(arguments):
    """-> The command and the values of its flags, by name; sys.argv's, if `arguments` is None.

    Each command has a parser of its own, so `toy --task` is an error and `check --help` says what `check` can be told.
    """
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    toy = commands.add_parser("toy", description="Write the toy data.")
    toy.add_argument("folder", type=Path)

    check = commands.add_parser("check", description=run_check.__doc__)
    check.add_argument("--task", required=True, choices=[*ALIASES, *LAYOUTS])
    check.add_argument("--data", type=folder, help="the data set's folder (default: the toy data)")
    check.numbers("--text_length", low=3, high=512, help="tokens of a text (default: the task's)")

    cache = commands.add_parser("cache", description="Decode each video once, into small files for --cache.")
    cache.add_argument("--data", type=folder, required=True, help="the data set's folder")
    # Four a second: a frame is then at most 1/8 s away from the one that a clip asks for. At most 6,400 pixels: the
    # largest grid of the base model.
    cache.numbers("--fps", float, 0.01, 1000, default=4.0, help="frames kept of each second (default: 4)")
    cache.numbers("--size", low=16, high=6400, default=448, help="as in training (default: 448)")
    cache.numbers("--workers", high=256, default=os.cpu_count(), help="videos at once (default: one a core)")

    show = commands.add_parser("show", description="Draw a video's clips and frames. By default as the paper's model "
                               "sees them: 448 pixels, clips of two frames, the first and the last of a second.")  # fmt: skip
    show.add_argument("video", type=Path)
    show.numbers("--clips", high=64, default=4)
    show.numbers("--frames", high=64, default=2)
    show.numbers("--size", low=16, high=2048, default=448)
    show.numbers("--fps", float, 0.001, 1000, default=2.0, help="a clip of T frames spans T / fps s")
    show.numbers("--seed", low=0, help="random clips, as in training, of this seed (default: uniform ones)")
    show.add_argument("--out", type=Path, help="(default: named after the video, in this folder)")

    # By parse_args, the outer parser would complain of what is unknown; the command's own knows which flag was meant.
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def run_check(task, folder, text_length):
    """Read all annotations and media headers, and list what is wrong.

    Exit code 1: something should be mended before a run.
    """
    task = ALIASES.get(task, task)
    layout = LAYOUTS[task]
    folder = folder or toy_data(layout.toy) / layout.toy
    text_length = text_length or layout.text_length
    print(f"{task} in {folder}; texts of at most {text_length} tokens")
    return print_check(*check(layout, folder, text_length))


def run_command(args):
    """Do what a command says, with what `parse_command` returns. -> The exit code."""
    if args.command == "check":
        return run_check(args.task, args.data, args.text_length)
    if args.command == "toy":
        toy_data(folder=args.folder)
    elif args.command == "cache":
        write_cache(args.data, args.size, args.fps, args.workers)
    elif args.command == "show":
        sheet = contact_sheet(args.video, args.clips, args.frames, args.fps, args.size, args.seed)
        out = args.out or Path(f"{args.video.stem}-clips.png")  # the video may be a PNG itself
        sheet.save(out)
        print(f"{out}: {args.clips} clips of {args.frames} frames")
    return 0


def main(arguments=None):
    """Run a command: the one place where an error becomes a line.

    A mistake ends in one line and exit code 2, as in clipbert.main; but this file is of use without that one. What is
    no mistake of the user's, but ours, keeps its traceback. Exit code 1 is `check`'s, 0 says that all is well.
    """
    args = parse_command(arguments)
    try:
        sys.exit(run_command(args))
    except (ValueError, OSError) as error:  # DataErrors, and --out where or in a format that no picture can be
        message = str(error)
    except BrokenExecutor:
        message = "a process that read the files was killed, perhaps for memory: try fewer --workers"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
