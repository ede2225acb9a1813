"""The project as an assignment: a copy for students, in which some functions have lost their bodies, and its grading.

    python tests/assignment.py OUT            write the student's copy to OUT, with ASSIGNMENT.md and the tests
    python tests/assignment.py OUT --grade    test what has become of it, and print a table of points

To add an exercise, copy a block of EXERCISES and change it; write its tests, `test_exercise14_...`, in
test_exercises.py, another solution in other_solutions.py, and mistakes that the tests must find in test_assignment.py.

Functions are found by name, so the sources carry no marks. Each exercise is graded with everything else of its file as
the student wrote it, but the other exercises' functions solved, by our own copy of the tests, in a process of its own.
"""

import argparse
import ast
import contextlib
import functools
import io
import multiprocessing
import re
import shutil
import sys
import textwrap
import traceback
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

HERE = Path(__file__).resolve().parent
SOURCES = {"clipbert": HERE.parent / "clipbert.py", "data": HERE.parent / "data.py",
           "finetune": HERE.parent / "finetune.py", "exercises": HERE / "exercises.py"}  # fmt: skip
COPIED = ("pretrain.py", "README.md", "LICENSE", "requirements.txt", "tests/conftest.py", "tests/test_exercises.py",
          "tests/golden_clipbert.json", "tests/golden_pretrain.json", "tests/golden_retrieval.json",
          "tests/golden_tensors.safetensors.gz")  # fmt: skip
LIMIT = 60  # seconds that an exercise's tests may take (they take one or two)


class Exercise(NamedTuple):
    title: str
    points: int
    module: str  # a key of SOURCES
    functions: tuple  # those that lose their bodies: "function" or "Class.method"
    place: str  # in the paper
    text: str


EXERCISES = {
    1: Exercise(
        "Clip sampling", 10, "data", ("sample_clips",), "section 3, sparse sampling",
        """A video has N clips, a clip has T frames, and training looks at a few clips at random places. In frames, a
        clip is T / target_fps * fps long (not rounded); the rest of the video is the free range of its start. Training
        draws each start uniformly from that range, each clip for itself. Testing takes clip i of n at i/n of the range,
        and a single clip from its middle. The first frame of a clip is the first one that begins no earlier than its
        start: round up. From it, the T frames are spread evenly from the first to the last frame of the clip (a clip
        of 30 frames ends 29 after its first); here, round down. A clip shorter than a frame is that frame. Beyond the
        end of the video its last frame is repeated.""",
    ),
    2: Exercise(
        "Resize and pad", 6, "data", ("resized_shape", "resize_and_pad"), "section 4, implementation",
        """All frames become squares of L x L pixels without being distorted: the long side is resized to L (bilinear,
        half-pixel centres, no antialiasing), small frames grow, the short side follows, cut down to whole pixels; zeros
        fill the right and the bottom. Two things to keep apart: what happens to numbers of one byte (resize as floats,
        then round), and any number of leading axes, since frames come as (N, T, 3, H, W).""",
    ),
    3: Exercise(
        "Visual tokens", 8, "clipbert", ("VisualEmbedding.forward",), "section 3, model architecture",
        """A transformer knows no places: they must be in its tokens. Average the T frames of the clip, add to each cell
        of the grid the embedding of its row and that of its column, unroll the grid row by row, add the one embedding
        that says "I am visual", then LayerNorm and dropout. In pretraining a random sample of `keep` tokens is enough
        (the same places for all images of the batch): draw it where tokens know their places already. A grid with more
        rows or columns than there are embeddings is a ValueError that says how many rows or columns the grid has.""",
    ),
    4: Exercise(
        "Text and grid in one sequence", 10, "clipbert", ("VideoTextEncoder.fuse",), "section 3, model architecture",
        """Early fusion: BERT's own layers read words and grid cells as one sequence [text; visual]. Embed both (BERT's
        embeddings for the text, `self.visual_embeddings(grid, keep)` for the grid), give each video's tokens to all of
        its n texts, which stand one after the other, and run `self.bert.encoder` and `self.bert.pooler`. The mask is
        the point: padded words must not be seen by anyone, and every grid cell must be seen, black ones too. Texts that
        do not divide among the videos are a ValueError that gives both numbers.""",
    ),
    5: Exercise(
        "From clips to a video", 6, "clipbert", ("aggregate_clips",), "section 3, sparse sampling (G)",
        """Three ways to turn the predictions of N clips into one of the video: their mean, their maximum, and
        LogSumExp, which lets one confident clip decide without silencing the others. All of them work on logits, before
        any softmax, and logits may be as large as 1000. Any other name is a ValueError.""",
    ),
    6: Exercise(
        "The losses of a video", 10, "clipbert", ("video_loss", "rank_loss"), "sections 3 and 4, NLL(p, q) by task",
        """One loss for each kind of answer in section 4's tasks. In multiple choice, scores of the n options of a
        question stand below each other and compete with each other. With soft targets (VQA) p may have more outputs
        than there are answers; those are never right, and the loss is summed over p's outputs and averaged over
        questions. Retrieval is either a two-way classification or a ranking: the video's own caption should get a
        higher probability than each wrong one, by a margin of .2, averaged over all wrong ones. An unknown kind is a
        ValueError.""",
    ),
    7: Exercise(
        "Which words to mask", 8, "data", ("mask_tokens",), "section 3, pretraining (MLM)",
        """Choose 15% of the words, each with this probability whatever happens to the others. Of the chosen ones 80%
        become [MASK], 10% a random token of the vocabulary, 10% stay. Labels are the words that were there, and -100
        everywhere else. Special tokens are never chosen. All random numbers come from the generator.""",
    ),
    8: Exercise(
        "The loss of masked words", 6, "clipbert", ("mlm_loss",), "section 3, pretraining (MLM)",
        """Cross entropy over the vocabulary, averaged over the masked words of the whole batch, computed in float32
        whatever the scores are. The authors' code divides by the number of all positions instead, which makes the loss
        some sixteen times smaller: over="all". Other averages are a ValueError; a batch may have no masked word.""",
    ),
    9: Exercise(
        "Right and wrong captions", 10, "data", ("draw_mismatch", "CaptionDataset.draw_captions"),
        "section 3, pretraining (ITM)",
        """Image-text matching needs wrong captions. `draw_mismatch` draws one of `count` captions until it finds one
        that is not said of this image (`own` is in lower case), and gives up after a hundred tries. `draw_captions`
        returns n captions of an image with n labels: right and wrong ones take turns, and a coin decides which comes
        first; right ones are drawn in random order and are only repeated where there are too few. Where no wrong one
        can be found (`self.draw_mismatch(image, generator)` is None), a right one takes its place, labelled so, and may
        be there twice. Captions and labels are two lists; caption_of takes a Python int.""",
    ),
    10: Exercise(
        "Gradient accumulation", 8, "exercises", ("accumulate_gradients",), "section 4, implementation",
        """A batch that does not fit into memory can be seen in parts: gradients add up in `.grad` until the optimizer
        steps. Make k batches worth one large one. The project's training loops do the same in passing (the authors'
        code adds the gradients up where we average them).""",
    ),
    11: Exercise(
        "The learning rate", 6, "clipbert", ("learning_rate",), "section 4, implementation",
        """From 0 up to the peak in a straight line during warm-up, then down to 0 in another. Warm-up takes
        warmup_ratio of all steps, cut down to a whole number (which may be none); its last step has the peak itself.
        Where this would give exactly 0, and after the last step, it is 1e-8.""",
    ),
    12: Exercise(
        "Retrieval metrics", 8, "finetune", ("retrieval_metrics", "ranks_of"), "section 4, retrieval",
        """Recall, median and mean rank of texts that look for their video and videos that look for their text. A rank
        is 1 + how many score higher + half of how many others score the same, so that a model with one score for all
        gains nothing. From video to text there may be several right answers: the best one counts, and the others are no
        rivals to it. A video that no caption describes looks for nothing. `ranks_of` returns a tensor, which `recalls`
        turns into numbers.""",
    ),
    13: Exercise(
        "FrozenBatchNorm", 4, "exercises", ("FrozenBatchNorm.__init__", "FrozenBatchNorm.forward"),
        "section 4, implementation",
        """A few clips per step are no sample to take statistics from, so every BatchNorm of the CNN keeps the numbers
        of its pretraining, in training, too. The model uses torchvision's (`FrozenBatchNorm2d` in
        clipbert.GridFeatures); write your own.""",
    ),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Functions in a source text


parse = functools.lru_cache(maxsize=4)(ast.parse)  # the same few texts again and again


def find(source, name):
    """The lines of a function, decorators included, as a slice, and its node; LookupError if it isn't there."""
    node = parse(source)
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        node = next((n for n in reversed(node.body) if isinstance(n, kinds) and n.name == part), None)  # last one wins
        if node is None:
            raise LookupError(f"there is no {name}")
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return slice(first - 1, node.end_lineno), node


def extract(source, name):
    return "\n".join(source.split("\n")[find(source, name)[0]])


def splice(source, name, text):
    """The source with another text for one of its functions."""
    lines = source.split("\n")
    lines[find(source, name)[0]] = text.split("\n")
    return "\n".join(lines)


def blank(source, name, message):
    """The source without the body of a function. What stays: decorators, signature, docstring, and comments on shapes
    ("# (B, h, w, d)" behind "x = ..." becomes "# x: (B, h, w, d)")."""
    where, node = find(source, name)
    lines = source.split("\n")
    documented = ast.get_docstring(node) is not None
    start = node.body[0].end_lineno if documented else node.body[0].lineno - 1
    indent = " " * (node.col_offset + 4)
    shapes = (re.match(r"\s*([\w, ]+?) [-+*/]?= .*#\s(\(.*)", line) for line in lines[start : where.stop])
    shapes = [f"{indent}# {match[1]}: {match[2]}" for match in shapes if match]
    lines[start : where.stop] = [*shapes, f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def solved(source, reference, but):
    """A student's source with the reference's functions in all exercises but one."""
    for number, exercise in EXERCISES.items():
        if number != but:
            for name in exercise.functions:
                with contextlib.suppress(LookupError):  # neither the reference nor the student need have it
                    source = splice(source, name, extract(reference, name))
    return source


# ----------------------------------------------------------------------------------------------------------------------
# The student's copy


def write_copy(out):
    """Write the student's copy to a folder that is new or empty."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: not empty; choose a new folder")
    (out / "tests").mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(HERE.parent / name, out / name)
    for module, path in SOURCES.items():
        source = path.read_text(encoding="utf-8")
        for number, exercise in EXERCISES.items():
            for name in exercise.functions if exercise.module == module else ():
                source = blank(source, name, f"Exercise {number}: {exercise.title}")
        (out / path.name).write_text(source, encoding="utf-8")
    (out / "ASSIGNMENT.md").write_text(assignment_text(), encoding="utf-8")


def assignment_text():
    total = sum(exercise.points for exercise in EXERCISES.values())
    parts = [f"""# ClipBERT: an assignment

Some functions of this project have lost their bodies: {len(EXERCISES)} exercises, {total} points. Read the paper
(arXiv 2102.06183) beside `clipbert.py`, top to bottom; docstrings and comments say what goes in and what must come
out. Then

    pip install -r requirements.txt pytest
    python -m pytest                     # all exercises
    python -m pytest -k exercise3_       # one of them (mind the underscore)

An exercise's points are given if all of its tests pass. They do not depend on each other: begin where you like.
You may write helper functions and import what requirements.txt brings. Keep names, parameters and everything else as
it is; the tests that count are our own copy. What a function creates lies on the device of its inputs. README.md is the
whole project's: its line counts and most of its tests and tools are not in this copy. When all is done, `python
finetune.py --task tgif_qa` trains again."""]
    for number, exercise in EXERCISES.items():
        names = ", ".join(f"`{name}`" for name in exercise.functions)
        parts.append(f"## Exercise {number}: {exercise.title} ({exercise.points} points)\n\n"
                     f"{names} in `{SOURCES[exercise.module].name}`. Paper: {exercise.place}.\n\n"
                     f"{textwrap.fill(' '.join(exercise.text.split()), 120)}")  # fmt: skip
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Tests and grades


def load(module, source):
    """A source text as a module that nobody else sees."""
    patched = types.ModuleType(f"assignment_{module}")
    patched.__file__ = str(SOURCES[module])
    exec(compile(source, f"{module}.py", "exec"), vars(patched))  # noqa: S102 - a student's own code, which `grade` runs elsewhere
    return patched


def run_tests(number, module, all_of_them=True):
    """Run an exercise's tests with `module` in place of the one that it is about -> {test: None, or what is wrong}."""
    import test_exercises
    import torch

    tests = [name for name in vars(test_exercises) if name.startswith(f"test_exercise{number}_")]
    results = {}
    with mock.patch.object(test_exercises, EXERCISES[number].module, module):
        for name in tests:
            torch.manual_seed(0)
            try:
                results[name] = getattr(test_exercises, name)()
            except BaseException as error:  # noqa: BLE001 - a student's code may raise anything, SystemExit too
                results[name] = f"{name}: {one_line(error)}"
                if not all_of_them:
                    break
    return results


def one_line(error):
    text = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {text}"[:200]


def grade_one(number, out, answer):
    """In a process of its own: send the results of an exercise's tests, or one line that says why there are none."""
    try:
        exercise, path = EXERCISES[number], out / SOURCES[EXERCISES[number].module].name
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            source = path.read_text(encoding="utf-8-sig")
            for name in exercise.functions:
                find(source, name)
            reference = SOURCES[exercise.module].read_text(encoding="utf-8")
            results = run_tests(number, load(exercise.module, solved(source, reference, but=number)))
    except BaseException as error:  # noqa: BLE001
        results = f"{path.name}: {one_line(error)}"
    answer.send(results)


def grade(out):
    """Print the table of points; -> all points."""
    # Each process begins as a copy of one that has imported the libraries (where the system can't do that: anew).
    kinds = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:
        context.set_forkserver_preload(["torch", "torchvision", "transformers.models.bert.modeling_bert", "pytest"])
    print(f"{'exercise':36}{'points':>9}{'tests':>10}")
    sum_of_points = 0
    for number, exercise in EXERCISES.items():
        results = isolated(context, number, out)
        points, tests = 0, "-"
        if isinstance(results, dict):
            wrong = [reason for reason in results.values() if reason]
            points, tests = exercise.points * (not wrong), f"{len(results) - len(wrong)} of {len(results)}"
            results = wrong[0] if wrong else ""
        sum_of_points += points
        line = f"{number:2} {exercise.title:33}{points:3} of {exercise.points:2}{tests:>10}  {results}"
        print(line.rstrip(), flush=True)
    print(f"{'all':36}{sum_of_points:3} of {sum(exercise.points for exercise in EXERCISES.values())}")
    return sum_of_points


def isolated(context, number, out):
    """`grade_one` in a process that is stopped after LIMIT seconds."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=grade_one, args=(number, out, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LIMIT) else f"stopped after {LIMIT} seconds"
    except EOFError:
        return "the process ended without an answer"
    finally:
        process.kill()
        process.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grade", action="store_true", help="test the copy in OUT and print a table of points")
    args = parser.parse_args()
    try:
        if args.grade and not args.out.is_dir():
            raise FileNotFoundError(f"{args.out}: no such folder; python tests/assignment.py {args.out} writes one")
        if args.grade:
            grade(args.out)
        else:
            write_copy(args.out)
            print(f"{args.out}: {len(EXERCISES)} exercises; begin with {args.out / 'ASSIGNMENT.md'}")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# The process that grades imports this file anew and needs the project beside it, wherever it was started.
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

if __name__ == "__main__":
    main()
