"""The assignment keeps its word: right solutions pass, wrong ones fail, no exercise needs another."""

import functools
import importlib
import inspect
import shutil
import subprocess
import sys

import assignment
import pytest
from assignment import EXERCISES, SOURCES, run_tests

# What students get wrong, five an exercise: what | a piece of the other solution | what stands there instead.
MISTAKES = r"""
1 | uniform in training | if train: | if train and n_clips == 1:
1 | one random start for all clips | rand(n_clips, 1, | rand(1, 1,
1 | random starts in order | generator=generator).double() | generator=generator).double().sort(0).values
1 | clips in the middle of their share | arange(n_clips).double() | arange(n_clips).double().add(0.5)
1 | around the end to the start | torch.minimum(frames, torch.tensor(num_frames - 1)) | (frames % num_frames)
2 | norm after the trunk | self.resnet(x) | self.normalize(self.resnet(frames.flatten(0, 1).float())[:, :3])
2 | colours turned, mean not | self.pixel_mean[order] | self.pixel_mean
2 | black stays zero | / self.pixel_std[order] | / self.pixel_std[order] * (frames > 0)
2 | frame by frame | x = self.resnet(x) | x = torch.cat([self.resnet(one[None]) for one in x])
2 | rows and columns confused | .movedim(1, -1) | .transpose(1, 3)
3 | column by column | grid.sum(dim=1) | grid.sum(dim=1).transpose(1, 2)
3 | LayerNorm before positions | / T + ( | / T\n    tokens = self.LayerNorm(tokens) + (
3 | places of its own | tokens.index_select(1, chosen) | torch.stack([t[torch.randperm(h * w)[:keep]] for t in tokens])
3 | neighbouring places | index_select(1, chosen) | index_select(1, (chosen[0] + cells[:keep]) % (h * w))
3 | drawn before positions | .index_select(1, chosen) | [:, chosen] + (rows + columns)[:keep] - (rows + columns)[chosen]
4 | 1 and 0 added to the scores | masked_fill(hide, -1e9) | add(~hide)
4 | a mask too weak for large scores | -1e9 | -10
4 | black is masked | visual.shape[1])) | visual.shape[1]))\n    hide[:, -visual.shape[1] :] |= (visual == 0).all(-1)
4 | mask of [grid; text] | (0, visual.shape[1]) | (visual.shape[1], 0)
4 | videos in turn | // (texts // videos) | % videos
5 | a CNN pass for each text | ids, mask = | [model.encode_frames(f) for f in frames]\n    ids, mask =
5 | clips of video 1, then of video 2 | frames.transpose(0, 1).flatten(0, 1) | frames.flatten(0, 1)
5 | texts shared out by clips | .repeat(clips, 1) | .repeat_interleave(clips, 0)
5 | the first text for all | .repeat(clips, 1) | [:videos].repeat_interleave(n, 0).repeat(clips, 1)
5 | grids without gradient | flatten(0, 1)) | flatten(0, 1)).detach()
6 | probabilities, not logits | torch.einsum("nbk->bk", logits) | logits.softmax(-1).sum(0)
6 | LogSumExp overflows | (logits - largest).exp().sum(0).log() + largest[0] | logits.exp().sum(0).log()
6 | one largest for all | logits.max(dim=0, keepdim=True).values.detach() | logits.amax() + logits[:1] * 0
6 | log of the mean | .exp().sum(0) | .exp().mean(0)
6 | over answers | logits.max(dim=0).values | logits.max(dim=2).values
7 | options not brought together | p.reshape(target.shape[0], -1) | p.reshape(-1, target.shape[0]).T
7 | softmax twice | F.log_softmax(p, dim=-1) | F.log_softmax(p.softmax(-1), dim=-1)
7 | count of all pairs | p[:, 0] - target | p - target
7 | soft averaged over answers | loss.sum(1).mean() | loss.mean() * target.shape[1]
7 | unlisted answers left out | return loss.sum(1) | return loss[:, : target.shape[1]].sum(1)
8 | votes | torch.stack(p) | torch.stack([(scores == scores.max()).float() for scores in p])
8 | G by part | torch.stack(p) | torch.stack([clipbert.aggregate_clips(x, how) for x in torch.stack(p).split(at_once)])
8 | all clips at once | range(0, len(clips), at_once) | [0]
8 | with a graph | torch.inference_mode() | torch.enable_grad()
8 | dropout, or left in testing | model.train(mode) | model.train()
9 | exactly 15% | ) < rate) | ).argsort(-1).argsort(-1) < rate * input_ids.shape[-1])
9 | one fate for all | fate = torch.rand(input_ids.shape | fate = torch.rand((1,) * input_ids.dim()
9 | special tokens too | & ~special | & True
9 | labels after masking | labels = torch.where(chosen, input_ids, -100) | labels = input_ids
9 | the text itself changed | input_ids.clone() | input_ids
10 | texts alike | None]).sum() | None]).div(masked.sum(1)[masked.nonzero()[:, :1]]).sum() * masked.sum() / len(labels)
10 | 0 / 0 | max(int(masked.sum()), 1) | int(masked.sum())
10 | padded length of the batch | labels.shape[0] * text_length | labels.numel()
10 | word 0 is no word | labels != -100 | labels > 0
10 | in half precision | scores[masked].float() | scores[masked]
11 | capital letters are others | t.lower() not in said | t not in said
11 | only its own caption is its own | t.lower() not in said[image] | t.lower() != text.lower()
11 | its caption's words are its own | t.lower() not in said[image] | not any(t.lower() in own for own in said[image])
11 | every second one | int(torch.randint(2, (1,), generator=generator)) == 1 | len(texts) % 2 == 0
11 | the next caption | place.item() | 0 * place.item()
12 | ties are luck | (lucky + unlucky) / 2 | lucky * 1.0
12 | own captions compete | if i not in own or i == best | if True
12 | the first caption counts | max(own, key=lambda i: column[i].item()) | own[0]
12 | every video has a caption | if not own:\n            continue | own = own or [0]
12 | nearly equal is equal | (scores >= own) | (scores >= own - 1e-6)
"""


def mistakes(number):
    rows = (row.replace(r"\n", "\n").split(" | ") for row in MISTAKES.strip().splitlines())
    return [row[1:] for row in rows if int(row[0]) == number]


def undone(number):
    """Exercise functions without their bodies."""
    body = f"(*_, **__):\n    raise NotImplementedError('Exercise {number}')"
    return {name: f"def {name.split('.')[-1]}{body}" for name in EXERCISES[number]}


@pytest.mark.parametrize("number", EXERCISES)
def test_right_solutions_pass_and_an_undone_one_fails_everywhere(number):
    others = {name: text for i in EXERCISES if i != number for name, text in undone(i).items()}
    assert not any(run_tests(number, others))  # no exercise needs another
    assert not any(run_tests(number, assignment.other_solution(number)))
    assert set(run_tests(number, undone(number))) == {f"NotImplementedError: Exercise {number}"}
    assert len(assignment.tests_of(number)) >= 2


@pytest.mark.parametrize("number", EXERCISES)
def test_mistakes_and_a_sample_of_slips_are_found(number):
    solution = assignment.other_solution(number)
    for what, old, new in mistakes(number):
        changed = {name: text.replace(old, new) for name, text in solution.items()}
        assert changed != solution, f"{what}: {old!r} does not stand in the solution"
        assert any(run_tests(number, changed)), what
    slips = list(assignment.all_mutants(number))
    for what, changed in slips[number :: len(slips) // 4]:
        assert any(run_tests(number, changed)), what


# ------------------------------------------------ The copy and its grading


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "out"
    assignment.write_copy(out)
    return out


def test_the_copy_has_no_solution_and_says_what_its_tests_count(copy):
    text, points = (copy / "ASSIGNMENT.md").read_text(encoding="utf-8"), 0
    for number, functions in EXERCISES.items():
        for module, *path in (name.split(".") for name in functions):
            function = functools.reduce(getattr, path, importlib.import_module(module))
            signature, docstring, body = inspect.getsource(function).split('"""')
            source = (copy / SOURCES[module].name).read_text(encoding="utf-8")
            assert f'{signature}"""{docstring}"""\n' in source and body not in source
            assert f'    raise NotImplementedError("Exercise {number}: {assignment.titles()[number]}")\n' in source
            assert f"`{'.'.join(path)}`" in text
        worth = sum(test.points for test in assignment.tests_of(number).values())
        assert f"## Exercise {number}: {assignment.titles()[number]} ({worth} points)" in text
        points += worth
    assert points == 100
    assert not (copy / "tests" / "ANSWERS.md").exists()


def test_slips_are_one_change_each():
    slips = assignment.mutants("def f(x, a=1):\n    return g(x.sum(0), a=1) < 2")
    assert {text.split("return ")[1] for *_, text in slips} == {
        "(g(x.sum(0), a=1) <= 2)", "(x.sum(0)) < 2", "(g(x.sum(0))) < 2", "g(x.sum(0), a=1) < (3)",
        "g(x.sum(0), a=1) < (1)", "g((x), a=1) < 2", "g(x.sum(0), a=(2)) < 2", "g(x.sum(0), a=(0)) < 2",
        "g(x.sum((1)), a=1) < 2", "g(x.sum((-1)), a=1) < 2",
    }  # fmt: skip


def test_grading_gives_partial_points_and_survives_what_students_write(copy, tmp_path, monkeypatch, capsys):
    """Half an exercise, one that ends the process, one that hangs, a file that is no Python, nothing at all."""

    def grade(number, module, old, new):
        text = SOURCES[module].read_text(encoding="utf-8")
        assert text.count(old) == 1
        (tmp_path / SOURCES[module].name).write_text(text.replace(old, new), encoding="utf-8")
        points = assignment.grade(tmp_path, [number])
        shutil.copyfile(SOURCES[module], tmp_path / SOURCES[module].name)
        return points, capsys.readouterr().out.splitlines()

    for path in SOURCES.values():
        shutil.copyfile(path, tmp_path / path.name)
    points, (_, lost, _) = grade(6, "clipbert", 'if how == "lse":', 'if how == "other":')
    assert points == 4 and lost.startswith("     -3 lse: lse is not log(sum(exp))") and "ValueError" in lost
    points, lines = grade(8, "exercises", "was_training, right =", "__import__('os')._exit(0)  #")
    assert points == 0 and lines[1].endswith("the process ended before this test did") and len(lines) == 3
    points, lines = grade(9, "data", "def mask_tokens(", "def mask_tokens(:")
    assert points == 0 and "SyntaxError" in lines[1]
    assert assignment.grade(copy) == 0 and capsys.readouterr().out.count(": Exercise") == len(EXERCISES)
    monkeypatch.setattr(assignment, "LIMIT", 10)
    points, lines = grade(12, "finetune", "return 1 + (scores > own)", "while True: pass  #")
    assert points == 0 and lines[1].endswith("stopped after 10 seconds")


def test_errors_are_one_line(copy, tmp_path):
    for arguments, line in ([copy], "not empty"), ([tmp_path / "nowhere", "--grade"], "no such folder"):
        command = [sys.executable, SOURCES["exercises"].parent / "assignment.py", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and line in result.stderr
