"""The project as an assignment: a copy for students, in which functions have lost their bodies.

    python tests/assignment.py OUT              write the copy to OUT, with ASSIGNMENT.md and the tests
    python tests/assignment.py OUT --grade      test what has become of it, print a table of points
    python tests/assignment.py --mutants [5 7]  can the tests find slips? (all of them: some minutes)

ASSIGNMENT.md has the texts for students, ANSWERS.md the answers to its questions, for teachers;
test_exercises.py has the points, a test a property. To add an exercise: a line of EXERCISES, a
section of ASSIGNMENT.md, tests, another solution in other_solutions.py, and six mistakes that the
tests must find in test_assignment.py.

Each exercise is graded by pytest, in a process of its own that is stopped after LIMIT seconds, with
the student's files as they are, but the other exercises' functions solved, by our own tests.
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
LIMIT = 60  # seconds that an exercise's tests may take (they take one or two)
SOURCES = {
    "clipbert": HERE.parent / "clipbert.py", "data": HERE.parent / "data.py",
    "finetune": HERE.parent / "finetune.py", "exercises": HERE / "exercises.py",
}  # fmt: skip
COPIED = (  # besides SOURCES
    "pretrain.py", "LICENSE", "requirements.txt", "tests/conftest.py", "tests/runs.py", "tests/test_exercises.py",
    "tests/golden_clipbert.json", "tests/golden_pretrain.json", "tests/golden_retrieval.json",
    "tests/golden_tensors.safetensors.gz", "tests/ablations.py",
)  # fmt: skip
EXERCISES = {  # what loses its body, "module.function" or "module.Class.method"
    1: ("data.sample_clips",),
    2: ("clipbert.GridFeatures.normalize", "clipbert.GridFeatures.forward"),
    3: ("clipbert.VisualEmbedding.forward",),
    4: ("clipbert.VideoTextEncoder.fuse",),
    5: ("clipbert.clip_logits",),
    6: ("clipbert.aggregate_clips",),
    7: ("clipbert.video_loss",),
    8: ("exercises.evaluate",),
    9: ("data.mask_tokens",),
    10: ("clipbert.mlm_loss", "clipbert.itm_loss"),
    11: ("exercises.match_captions",),
    12: ("finetune.retrieval_metrics", "finetune.ranks_of"),
}


@functools.cache
def properties():
    """{exercise: {test: (points, sentence)}}, as @worth(points, sentence) says in the tests."""
    found = {number: {} for number in EXERCISES}
    for node in ast.parse((HERE / "test_exercises.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_exercise"):
            number = int(node.name.split("_")[1].removeprefix("exercise"))
            worth = node.decorator_list[0]
            found[number][node.name] = tuple(ast.literal_eval(argument) for argument in worth.args)
    return found


def titles():
    """{exercise: its title in ASSIGNMENT.md}, without the points."""
    lines = (HERE / "ASSIGNMENT.md").read_text(encoding="utf-8").splitlines()
    heads = [line.removeprefix("## Exercise ").split(": ") for line in lines if "# Exercise " in line]
    return {int(number): title.split(" (")[0] for number, title in heads}


# --------------------------------------------------------------------------------------------------
# Functions in a source text, found by name: the sources carry no marks


def find(source, name):
    """The lines of a function, with its decorators, as a slice, and its node of the syntax tree."""
    node = ast.parse(source)
    for part in name.split("."):
        same = [n for n in node.body if getattr(n, "name", None) == part]
        if not same:
            raise LookupError(f"there is no {name}")
        node = same[-1]  # the last one wins, as in Python
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
    """The source without the body of a function: its signature and docstring stay."""
    where, node = find(source, name)
    lines = source.split("\n")
    start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    indent = " " * (node.col_offset + 4)
    lines[start : where.stop] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def of_module(module, but=None):
    """(exercise, function) of one source file."""
    for number, functions in EXERCISES.items():
        for name in functions:
            if number != but and name.startswith(f"{module}."):
                yield number, name.removeprefix(f"{module}.")


# --------------------------------------------------------------------------------------------------
# The student's copy


def write_copy(out):
    """Write the student's copy to a folder that is new or empty."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: not empty; choose a new folder")
    (out / "tests").mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(HERE.parent / name, out / name)
    shutil.copyfile(HERE / "ASSIGNMENT.md", out / "ASSIGNMENT.md")
    for module, path in SOURCES.items():
        source = path.read_text(encoding="utf-8")
        for number, name in of_module(module):
            source = blank(source, name, f"Exercise {number}: {titles()[number]}")
        (out / path.name).write_text(source, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Grading


def write_solved(student, desk, but):
    """The student's files, with our functions in all exercises but one, to the folder `desk`."""
    for module, path in SOURCES.items():
        source = (student / path.name).read_text(encoding="utf-8-sig")
        reference = path.read_text(encoding="utf-8")
        for _, name in of_module(module, but):
            try:
                source = splice(source, name, extract(reference, name))
            except LookupError:  # removed
                source += f"\n\n{textwrap.dedent(extract(reference, name))}\n" if "." not in name else ""
        (desk / path.name).write_text(source, encoding="utf-8")


class Report:
    """A plugin of pytest that sends (test, what is wrong or None) as soon as it is known."""

    def __init__(self, pipe):
        self.pipe = pipe

    def pytest_runtest_makereport(self, item, call):
        import pytest

        if call.when == "call":
            error = call.excinfo and call.excinfo.value
            cause = error and error.__cause__  # what failed, behind a property's sentence
            if cause and not isinstance(cause, AssertionError | pytest.fail.Exception):
                error = cause  # no comparison: it crashed
            self.pipe.send((item.name, error and one_line(error)))

    def pytest_collectreport(self, report):
        if report.failed:
            self.pipe.send((None, str(report.longrepr).strip().splitlines()[-1]))


def one_line(error):
    text = " ".join(str(error).split())[:200]
    return text if type(error).__name__ == "Hurt" else f"{type(error).__name__}: {text}"


def run_pytest(number, desk, pipe):
    """In a process of its own."""
    import pytest

    os.chdir(desk)
    sys.path[:] = [str(desk), str(desk / "tests"), *(p for p in sys.path if not p.startswith(str(HERE.parent)))]
    arguments = ["-q", "-p", "no:cacheprovider", "-k", f"exercise{number}_", "tests/test_exercises.py"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(arguments, plugins=[Report(pipe)])


def untouched(student, name):
    """Whether a function is as write_copy left it."""
    module, name = name.split(".", 1)
    source = (student / SOURCES[module].name).read_text(encoding="utf-8-sig")
    return 'raise NotImplementedError("Exercise ' in extract(source, name)


def run_exercise(context, number, student, desk):
    """{test: None or what is wrong}, and why there are no more of them."""
    try:
        if all(untouched(student, name) for name in EXERCISES[number]):
            return {}, "not begun"
        write_solved(student, desk, but=number)
    except (OSError, SyntaxError, ValueError, LookupError) as error:
        return {}, one_line(error)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_pytest, args=(number, desk, theirs))
    process.start()
    theirs.close()
    results, end, why = {}, time.time() + LIMIT, ""
    try:
        while ours.poll(max(0, end - time.time())):
            name, wrong = ours.recv()
            if name is None:
                return {}, wrong
            results[name] = wrong
        why = f"stopped after {LIMIT} seconds"
    except EOFError:
        why = "the process ended before this test did"
    finally:
        process.kill()
        process.join()
    return results, why


def grade(student, numbers=tuple(EXERCISES)):
    """Print the table of points and what is wrong; -> all points."""
    # Each process begins as a copy of one that has the libraries (where the system can: else anew).
    kinds = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:
        libraries = ["torch", "torchvision", "transformers.models.bert.modeling_bert", "pytest"]
        context.set_forkserver_preload(libraries)
    points, worth = {}, properties()
    with tempfile.TemporaryDirectory() as folder:
        desk = Path(folder).resolve() / "desk"
        write_copy(desk)
        for number in numbers:
            results, why = run_exercise(context, number, student, desk)
            lost = {name: (n, results.get(name, why), sentence)
                    for name, (n, sentence) in worth[number].items() if results.get(name, why)}  # fmt: skip
            whole = sum(n for n, _ in worth[number].values())
            points[number] = whole - sum(n for n, *_ in lost.values())
            print(f"{number:2} {titles()[number]:34}{points[number]:3} of {whole:2}", flush=True)
            reasons = {reason for _, reason, _ in lost.values()}
            if len(reasons) == 1 and len(lost) == len(worth[number]):  # the same everywhere: say it once
                lost = {"": (whole, *reasons, "")}
            for name, (n, reason, _) in lost.items():
                print(f"     -{n} {name.removeprefix(f'test_exercise{number}_')}: {reason}", flush=True)
    total = sum(n for number in numbers for n, _ in worth[number].values())
    print(f"   {'all':34}{sum(points.values()):3} of {total}")
    return sum(points.values())


# --------------------------------------------------------------------------------------------------
# Functions in place of ours, in this process: other solutions, and slips of the pen


@contextlib.contextmanager
def in_place(functions):
    """{"module.function": its text} in place of what the modules have."""
    import other_solutions

    names = {}  # module -> what its functions see: our module's names, other_solutions' imports, each other
    with contextlib.ExitStack() as stack:
        for name, text in functions.items():
            module, *path = name.split(".")
            owner = importlib.import_module(module)
            seen = names.setdefault(module, vars(other_solutions) | vars(owner))
            for part in path[:-1]:
                owner = getattr(owner, part)
            exec(textwrap.dedent(text), seen)  # noqa: S102 - a text of ours
            stack.enter_context(mock.patch.object(owner, path[-1], seen[path[-1]]))
        yield


def run_tests(number, functions, until_one_fails=False):
    """An exercise's tests with these functions -> {test: None, or what is wrong}."""
    import test_exercises

    def stop(*_):
        raise TimeoutError("stopped after 10 seconds")

    results, before = {}, signal.signal(signal.SIGVTALRM, stop)
    with in_place(functions):
        for name in properties()[number]:
            signal.setitimer(signal.ITIMER_VIRTUAL, 10)  # of computing: a busy machine may take longer
            try:
                results[name] = getattr(test_exercises, name)()
            except Exception as error:  # noqa: BLE001 - a wrong solution may raise anything
                results[name] = one_line(error)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if results[name] and until_one_fails:
                break
    signal.signal(signal.SIGVTALRM, before)
    return results


def other_solution(number):
    source = (HERE / "other_solutions.py").read_text(encoding="utf-8")
    return {name: extract(source, name.split(".", 1)[1]) for name in EXERCISES[number]}


OPPOSITES = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


def slips(node):
    """What a slip makes of a node: plus or minus one, < for <=, another axis, a call left out, ..."""
    match node:
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
        case ast.Compare(ops=[op]) if type(op) in OPPOSITES:
            yield ast.Compare(node.left, [OPPOSITES[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in OPPOSITES:
            yield ast.BinOp(node.left, OPPOSITES[type(op)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(OPPOSITES[type(node.op)](), node.values)
        case ast.UnaryOp():
            yield node.operand
        case ast.IfExp():
            yield from (node.body, node.orelse)
        case ast.If() if len(node.body) == 1 and isinstance(node.body[0], ast.Raise):
            yield ast.Pass()  # a check left out
        case ast.Call():
            libraries = ("torch", "F", "np", "math", "clipbert", "self", "nn")
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in libraries:
                yield node.func.value  # x.f(...) -> x
            elif node.args:
                yield node.args[0]  # f(x, ...) -> x
            for i in range(len(node.keywords)):
                yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield ast.Pass()


class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def mutants(text):
    """(where, what is changed, the changed text) for each slip in a function; messages stay."""
    tree = ast.parse(textwrap.dedent(text))
    whole = ast.unparse(tree)
    quiet = {id(n) for r in ast.walk(tree) if isinstance(r, ast.Raise | ast.arguments) for n in ast.walk(r)}
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in quiet:
            continue
        for i in range(len(list(slips(node)))):
            changed = copy.deepcopy(tree)
            old = list(ast.walk(changed))[place]
            new = list(slips(old))[i]
            before, after = ast.unparse(old).split("\n")[0], ast.unparse(new)
            changed = ast.unparse(ast.fix_missing_locations(Replace(old, new).visit(changed)))
            if changed != whole:
                yield f"{node.lineno}:{node.col_offset}-{node.end_col_offset}/{i}", f"{before}  ->  {after}", changed


def all_mutants(number):
    """(where, what is changed, {function: text}) of an exercise's other solution."""
    solution = other_solution(number)
    for name, text in solution.items():
        for where, what, changed in mutants(text):
            yield f"{name.split('.')[-1]} {where}", what, solution | {name: changed}


def found(number, functions):
    """Whether the tests refuse these functions."""
    return any(run_tests(number, functions, until_one_fails=True).values())


def try_mutants(numbers):
    """Which slips do the tests not find? EQUIVALENT ones change nothing."""
    from test_assignment import EQUIVALENT

    print(f"{'exercise':37}{'slips':>6}{'that change something':>24}{'found':>8}")
    sums = [0, 0, 0]
    for number in numbers:
        every = list(all_mutants(number))
        chosen = [slip for slip in every if slip[0] not in EQUIVALENT]
        missed = [f"{where}  {what}" for where, what, functions in chosen if not found(number, functions)]
        row = len(every), len(chosen), len(chosen) - len(missed)
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        print(f"{number:2} {titles()[number]:34}{row[0]:6}{row[1]:24}{row[2]:8}")
        print("".join(f"       {what}\n" for what in missed), end="", flush=True)
    print(f"   {'all':34}{sums[0]:6}{sums[1]:24}{sums[2]:8}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--grade", action="store_true", help="test the copy in OUT, print its points")
    parser.add_argument("--mutants", type=int, nargs="*", metavar="EXERCISE", choices=EXERCISES)
    args = parser.parse_args()
    if (args.out is None) == (args.mutants is None):
        parser.error("give a folder OUT, or --mutants")
    try:
        if args.mutants is not None:
            try_mutants(args.mutants or EXERCISES)
        elif args.grade and not args.out.is_dir():
            raise FileNotFoundError(f"{args.out}: no such folder; python tests/assignment.py {args.out} writes one")
        elif args.grade:
            grade(args.out.resolve())
        else:
            write_copy(args.out)
            print(f"{args.out}: {len(EXERCISES)} exercises; begin with {args.out / 'ASSIGNMENT.md'}")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# --mutants imports the project and its tests, wherever it was started.
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

if __name__ == "__main__":
    main()
