"""The project as an assignment: a copy for students, in which functions have lost their bodies.

    python tests/assignment.py OUT              write the copy to OUT, with ASSIGNMENT.md and the tests
    python tests/assignment.py OUT --grade      test what has become of it, print a table of points
    python tests/assignment.py --mutants [5 7]  can the tests find slips? (all of them: a minute)

ASSIGNMENT.md has the texts for students, ANSWERS.md the answers to its questions, for teachers;
test_exercises.py has the points, a test a property. To add an exercise: a line of EXERCISES, a
section of ASSIGNMENT.md, tests, another solution in other_solutions.py, and mistakes that the tests
must find in test_assignment.py.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
LIMIT = 300  # seconds that an exercise's tests may take: one or two, but a busy machine is slow
SOURCES = {
    "clipbert": HERE.parent / "clipbert.py", "data": HERE.parent / "data.py",
    "finetune": HERE.parent / "finetune.py", "exercises": HERE / "exercises.py",
}  # fmt: skip
COPIED = (  # besides SOURCES
    "pretrain.py", "LICENSE", "requirements.txt", "tests/conftest.py", "tests/test_exercises.py",
    "tests/golden_pretrain.json", "tests/golden_retrieval.json", "tests/ablations.py",
)  # fmt: skip
EXERCISES = {  # what loses its body, "module.function" or "module.Class.method"; a helper before what calls it
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
    12: ("finetune.ranks_of", "finetune.retrieval_metrics"),
}


def tests_of(number):
    """{name: test} of an exercise; each test has its `points`."""
    import test_exercises

    start = f"test_exercise{number}_"
    return {name: test for name, test in vars(test_exercises).items() if name.startswith(start)}


def titles():
    """{exercise: its title in ASSIGNMENT.md}, without the points."""
    text = (HERE / "ASSIGNMENT.md").read_text(encoding="utf-8")
    return {int(number): title for number, title in re.findall(r"^## Exercise (\d+): (.*) \(", text, re.MULTILINE)}


# ------------------------------------------------ The student's copy


def blank(source, name, message):
    """The source without the body of a function: its signature and docstring stay."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    lines = source.split("\n")
    docstring = node.body[0]
    indent = " " * docstring.col_offset
    lines[docstring.end_lineno : node.end_lineno] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def write_copy(out):
    """Write the student's copy to a folder that is new or empty."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: not empty; choose a new folder")
    (out / "tests").mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(HERE.parent / name, out / name)
    shutil.copyfile(HERE / "ASSIGNMENT.md", out / "ASSIGNMENT.md")
    sources = {module: path.read_text(encoding="utf-8") for module, path in SOURCES.items()}
    for number, functions in EXERCISES.items():
        for module, name in (function.split(".", 1) for function in functions):
            sources[module] = blank(sources[module], name, f"Exercise {number}: {titles()[number]}")
    for module, source in sources.items():
        (out / SOURCES[module].name).write_text(source, encoding="utf-8")


# ------------------------------------------------ Grading

# The student's files, copied to a desk, with our own tests. Each exercise is tested by a process of
# its own, so what hangs or crashes costs no other exercise its points. The processes are forks of
# this one, which has imported torch already (Windows has no fork: there each imports it).
PROCESSES = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


def sit(number, desk, log):
    """What such a process does: to write a line for each test that ends, its name and what is wrong."""
    os.chdir(desk)
    sys.path.insert(0, str(desk))
    for module in (*SOURCES, "test_exercises"):
        sys.modules.pop(module, None)
    with log.open("w", encoding="utf-8") as file, open(os.devnull, "w") as nothing:
        sys.stdout = sys.stderr = nothing  # students' prints do not belong in the table
        try:
            for name, wrong in zip(tests_of(number), run_tests(number, {}), strict=True):
                print(name, " ".join((wrong or "").split()), file=file, flush=True)
        except BaseException as error:  # noqa: BLE001 - a student's file that cannot be imported, for whatever reason
            print(f"* {type(error).__name__}: {error}", file=file)


def wrong_with(number, desk):
    """{test: what is wrong} of an exercise's tests that the functions on the desk do not pass."""
    log = desk / f"exercise{number}"
    process = PROCESSES.Process(target=sit, args=(number, desk, log))
    process.start()
    process.join(LIMIT)
    why = f"stopped after {LIMIT} seconds" if process.is_alive() else "the process ended before this test did"
    process.kill()
    process.join()
    ended = dict(line.partition(" ")[::2] for line in log.read_text("utf-8").splitlines()) if log.exists() else {}
    results = {name: ended.get(name, ended.get("*", why)) for name in tests_of(number)}
    return {name: wrong for name, wrong in results.items() if wrong}


def grade(student, numbers=tuple(EXERCISES)):
    """Print the table of points and what is wrong; -> all points."""
    if not student.is_dir():
        raise FileNotFoundError(f"{student}: no such folder; python tests/assignment.py {student} writes one")
    total = whole = 0
    with tempfile.TemporaryDirectory() as folder:
        for path in SOURCES.values():
            shutil.copyfile(student / path.name, Path(folder) / path.name)
        for number in numbers:
            wrong = wrong_with(number, Path(folder))
            worth = {name: test.points for name, test in tests_of(number).items()}
            points = sum(n for name, n in worth.items() if name not in wrong)
            print(f"{number:2} {titles()[number]:34}{points:3} of {sum(worth.values()):2}")
            lines = [f"-{worth[name]} {name.split('_', 2)[2]}: {reason}" for name, reason in wrong.items()]
            if points == 0 and len(set(wrong.values())) == 1:  # the same everywhere: say it once
                lines = [wrong.popitem()[1]]
            print("".join(f"     {line}\n" for line in lines), end="", flush=True)
            total, whole = total + points, whole + sum(worth.values())
    print(f"   {'all':34}{total:3} of {whole}")
    return total


# ------------------------------------------------ Other solutions, and slips of the pen


@contextlib.contextmanager
def in_place(functions):
    """{"module.function": its text} in place of what the modules have."""
    import other_solutions

    with contextlib.ExitStack() as stack:
        for name, text in functions.items():
            module, *classes, function = name.split(".")
            module = importlib.import_module(module)
            seen = vars(other_solutions) | vars(module)  # the names that the function may use
            exec(text, seen)  # noqa: S102 - a text of ours
            owner = functools.reduce(getattr, classes, module)
            stack.enter_context(mock.patch.object(owner, function, seen[function]))
        yield


def run_tests(number, functions):
    """An exercise's tests with these functions, one by one: None or what is wrong."""
    with in_place(functions):
        for test in tests_of(number).values():
            try:
                yield test()
            except (AssertionError, NotImplementedError) as error:
                yield f"{type(error).__name__}: {error}".removeprefix("Hurt: ")


def other_solution(number):
    import other_solutions

    functions = {name: functools.reduce(getattr, name.split(".")[1:], other_solutions) for name in EXERCISES[number]}
    return {name: textwrap.dedent(inspect.getsource(function)) for name, function in functions.items()}


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


def nodes(node):
    """The nodes of a syntax tree but those of messages and signatures."""
    if not isinstance(node, ast.Raise | ast.arguments):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from nodes(child)


def mutants(text):
    """(where, what is changed, the changed text) for each slip in a function."""
    begins = [0, *itertools.accumulate(len(line) for line in text.splitlines(keepends=True))]
    for node in nodes(ast.parse(text)):
        for i, slip in enumerate(slips(node)):
            begin, end = begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset
            new = ast.unparse(slip) if isinstance(slip, ast.stmt) else f"({ast.unparse(slip)})"
            where = f"{node.lineno}:{node.col_offset}-{node.end_col_offset}/{i}"
            yield where, f"{text[begin:end]}  ->  {new}", text[:begin] + new + text[end:]


def all_mutants(number):
    """(where and what is changed, {function: text}) of an exercise's other solution, but EQUIVALENT ones."""
    from other_solutions import EQUIVALENT

    solution = other_solution(number)
    for name, text in solution.items():
        for where, what, changed in mutants(text):
            where = f"{name.split('.')[-1]} {where}"
            if where not in EQUIVALENT:
                yield f"{where}  {what}", solution | {name: changed}


def try_mutants(numbers):
    """Print which slips the tests do not find."""
    line = "{:37}{:>6}{:>8}".format
    print(line("exercise", "slips", "found"))
    slips = found = 0
    for number in numbers:
        tried = {slip: any(run_tests(number, changed)) for slip, changed in all_mutants(number)}
        missed = [f"       {slip}" for slip, is_found in tried.items() if not is_found]
        print(line(f"{number:2} {titles()[number]}", len(tried), sum(tried.values())), *missed, sep="\n", flush=True)
        slips, found = slips + len(tried), found + sum(tried.values())
    print(line("   all", slips, found))


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
        elif args.grade:
            grade(args.out)
        else:
            write_copy(args.out)
            print(f"{args.out}: {len(EXERCISES)} exercises; begin with {args.out / 'ASSIGNMENT.md'}")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# The project and its tests are imported from here, wherever this was started.
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

if __name__ == "__main__":
    main()
