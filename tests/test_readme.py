"""README.md and RESULTS.md keep their word: the names, flags and files that they name exist."""

import re
from pathlib import Path

import pytest

import clipbert
import data
import finetune
import pretrain

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README + (ROOT / "tests/RESULTS.md").read_text(encoding="utf-8")
MODULES = {"clipbert": clipbert, "data": data, "finetune": finetune, "pretrain": pretrain}
# Flags of other programs: pip, wget's and git's long ones, torchrun, Docker.
OTHERS = {"upgrade", "index-url", "depth", "nproc_per_node", "shm-size", "ipc"}


def test_readme_is_short():
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:clipbert|data|finetune|pretrain)\.(?!py\b)[\w.]+)`", TEXT))))
def test_names_exist(name):
    module, *path = name.split(".")
    thing = MODULES[module]
    for part in path:
        thing = getattr(thing, part)


def test_flags_exist():
    sources = [*ROOT.glob("*.py"), *(ROOT / "tests" / f"{name}.py" for name in ("ablations", "assignment", "stress"))]
    known = set(re.findall(r'"--([\w-]+)"', "".join(path.read_text(encoding="utf-8") for path in sources)))
    for settings in (finetune.Settings, pretrain.Settings):  # a field is a flag
        known |= set(settings.__dataclass_fields__)
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z_-]*)", TEXT)) <= known | OTHERS


def test_files_and_tasks_exist():
    for path in set(re.findall(r"(?<![\w/.])((?:tests/)?\w+\.py)\b", TEXT)) | set(re.findall(r"\((tests/[\w.]+)\)", TEXT)):
        assert (ROOT / path).is_file(), path
    assert set(data.LAYOUTS) == {*finetune.TASKS, "pretrain"}  # a task is in both tables
    for task in re.findall(r"--task ([a-z_]+)", TEXT):
        assert task in finetune.TASKS or task in data.ALIASES, task
