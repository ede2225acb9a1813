"""The README keeps its word: what it names exists, and the files are as long as it says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import clipbert
import data
import finetune
import pretrain

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:clipbert|data|finetune|pretrain)\.[\w.]+)`", README)) - {
    f"{module}.py" for module in ("clipbert", "data", "finetune", "pretrain")})  # fmt: skip
MODULES = {"clipbert": clipbert, "data": data, "finetune": finetune, "pretrain": pretrain}


@pytest.mark.parametrize("name", NAMES)
def test_readme_names_what_exists(name):
    module, *path = name.split(".")
    thing = MODULES[module]
    for part in path:
        thing = getattr(thing, part)


def test_readme_flags_exist():
    files = [ROOT / "data.py", *(ROOT / "tests").glob("[!t]*.py")]  # the scripts there, not the tests
    known = set(re.findall(r'"--(\w+)"', "".join(path.read_text(encoding="utf-8") for path in files)))
    known |= {field.name for script in (finetune, pretrain) for field in fields(script.Settings)}
    others = {"upgrade", "help", "nproc_per_node"}  # of pip, argparse, torchrun
    flags = set(re.findall(r"(?<![\w-])--([a-z_]+)", README)) - others
    assert flags and flags <= known, flags - known


@pytest.mark.parametrize("module", MODULES)
def test_readme_states_true_line_counts(module):
    lines = (ROOT / f"{module}.py").read_text(encoding="utf-8").splitlines()
    ends = [i for i, line in enumerate(lines) if line == "#" * 120]  # a line above the words "here it ends", one below
    paper = ends[0] if ends else len(lines)
    assert re.search(rf"^\| `{module}.py` \| ([\d,]+) \| ([\d,]+) \|", README, re.MULTILINE).groups() == (
        f"{len(lines):,}", f"{paper:,}")  # fmt: skip
