"""The assignment keeps its word: right solutions pass, wrong ones fail, no exercise needs another."""

import subprocess
import sys

import assignment
import pytest
from assignment import EXERCISES, SOURCES, run_tests

TEXTS = {name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()}

# What students get wrong: {exercise: {what: (a piece of the other solution, what stands there instead)}}.
MISTAKES = {
    1: {
        "uniform in training": ("if train:", "if train and n_clips == 1:"),
        "one random start for all clips": ("rand(n_clips, 1,", "rand(1, 1,"),
        "random starts in order": ("generator=generator).double()", "generator=generator).double().sort(0).values"),
        "clips in the middle of their share": ("arange(n_clips).double()", "arange(n_clips).double().add(0.5)"),
        "one test clip at the start": ("free / 2", "0.0"),
        "around the end to the start": ("torch.minimum(frames, torch.tensor(num_frames - 1))", "(frames % num_frames)"),
    },
    2: {
        "norm after the trunk": ("x = self.normalize(frames).flatten(0, 1)\n        x = self.resnet(x)",
                                 "x = self.normalize(self.resnet(frames.flatten(0, 1).float())[:, :3])"),
        "colours turned, mean not": ("self.pixel_mean[order]", "self.pixel_mean"),
        "black stays zero": ("return (frames - self.pixel_mean[order]) / self.pixel_std[order]",
                             "return (frames - self.pixel_mean[order]) / self.pixel_std[order] * (frames > 0)"),
        "frame by frame": ("x = self.resnet(x)", "x = torch.cat([self.resnet(one[None]) for one in x])"),
        "mean for max": ("F.max_pool2d", "F.avg_pool2d"),
        "rows and columns confused": (".movedim(1, -1)", ".transpose(1, 3)"),
    },
    3: {
        "one frame for all": ("grid.sum(dim=1)", "grid[:, T // 2] * T"),
        "column by column": ("grid.sum(dim=1)", "grid.sum(dim=1).transpose(1, 2)"),
        "LayerNorm before positions": ("grid.sum(dim=1).reshape(B, h * w, d) / T",
                                       "self.LayerNorm(grid.sum(dim=1).reshape(B, h * w, d) / T)"),
        "other places in each video": ("tokens.index_select(1, chosen)",
                                       "torch.stack([t[torch.randperm(h * w)[:keep]] for t in tokens])"),
        "neighbouring places": ("torch.multinomial(torch.ones(h * w, device=grid.device), keep)",
                                "(torch.arange(keep, device=grid.device) + torch.randint(h * w, ())) % (h * w)"),
        "drawn before the positions": (
            "tokens.index_select(1, chosen)", "tokens[:, chosen] + (rows + columns)[:keep] - (rows + columns)[chosen]"),
    },
    4: {
        "1 and 0 added to the scores": ("bias = torch.zeros(hide.shape, device=hide.device).masked_fill(hide, -1e9)",
                                        "bias = 1.0 - hide.float()"),
        "a mask too weak for large scores": ("-1e9", "-10"),
        "black cells masked": ("(0, visual.shape[1]))",
                               "(0, visual.shape[1]))\n        hide[:, -visual.shape[1] :] |= (visual == 0).all(-1)"),
        "mask of [grid; text]": ("(0, visual.shape[1])", "(visual.shape[1], 0)"),
        "videos in turn": ("// (texts // videos)", "% videos"),
        "grid without gradient": ("(grid, keep)[owner]", "(grid, keep)[owner].detach()"),
    },
    5: {
        "a pass of the CNN for each text": ("    ids, mask", "    [model.encode_frames(f) for f in frames]\n    ids, mask"),
        "clips of video 1, then of video 2": ("frames.transpose(0, 1).flatten(0, 1)", "frames.flatten(0, 1)"),
        "texts shared out by clips": (".repeat(clips, 1)", ".repeat_interleave(clips, 0)"),
        "clips and videos confused": ("unflatten(0, (clips, videos * n))",
                                      "unflatten(0, (videos * n, clips)).transpose(0, 1)"),
        "the first text for all": (".repeat(clips, 1)", "[:videos].repeat_interleave(n, 0).repeat(clips, 1)"),
        "grids without gradient": ("flatten(0, 1))\n", "flatten(0, 1)).detach()\n"),
    },
    6: {
        "probabilities, not logits": ('torch.einsum("nbk->bk", logits)', "logits.softmax(-1).sum(0)"),
        "LogSumExp overflows": ("(logits - largest).exp().sum(0).log() + largest[0]", "logits.exp().sum(0).log()"),
        "one largest number for all": ("logits.max(dim=0, keepdim=True).values.detach()", "logits.amax() + logits[:1] * 0"),
        "log of the mean": (".exp().sum(0)", ".exp().mean(0)"),
        "over answers": ("logits.max(dim=0).values", "logits.max(dim=2).values"),
        "largest by size": ("logits.max(dim=0).values", "logits.abs().max(dim=0).values"),
    },
    7: {
        "options not brought together": ("p.reshape(target.shape[0], -1)", "p.reshape(-1, target.shape[0]).T"),
        "softmax twice": ("F.log_softmax(p, dim=-1)", "F.log_softmax(p.softmax(-1), dim=-1)"),
        "log of a softmax": ("F.log_softmax(p, dim=-1)", "p.softmax(-1).log()"),
        "count of all pairs": ("p[:, 0] - target", "p - target"),
        "soft averaged over answers": ("loss.sum(1).mean()", "loss.mean() * target.shape[1]"),
        "unlisted answers left out": ("return loss.sum(1)", "return loss[:, : target.shape[1]].sum(1)"),
    },
    8: {
        "votes": ("p = clipbert.aggregate_clips(torch.stack(p), how).flatten()",
                  "p = torch.stack(p).flatten(1)\n            p = F.one_hot(p.argmax(1), p.shape[1]).sum(0)"),
        "G of each part": ("p += clipbert.clip_logits(model, clips[None, first : first + at_once], ids, mask)",
                           "x = clipbert.clip_logits(model, clips[None, first : first + at_once], ids, mask);"
                           + " p.append(clipbert.aggregate_clips(x, how))"),
        "always the mean": ("(torch.stack(p), how)", "(torch.stack(p), 'mean')"),
        "all clips at once": ("range(0, len(clips), at_once)", "[0]"),
        "with a graph": ("torch.inference_mode()", "torch.enable_grad()"),
        "dropout, or left in testing": ("model.train(mode)", "model.train()"),
    },
    9: {
        "exactly 15%": ("(torch.rand(input_ids.shape, generator=generator) < rate)",
                        "(torch.rand(input_ids.shape, generator=generator).argsort(-1).argsort(-1)"
                        + " < rate * input_ids.shape[-1])"),
        "one fate for all": ("fate = torch.rand(input_ids.shape", "fate = torch.rand((1,) * input_ids.dim()"),
        "all chosen words masked": ("fate < 0.8)", "fate < 1)"),
        "special tokens too": (" & ~special", ""),
        "labels after masking": ("labels = torch.where(chosen, input_ids, -100)", "labels = input_ids"),
        "the text itself changed": ("input_ids.clone()", "input_ids"),
    },
    10: {
        "mean of the texts' means": ("total = -log_p.gather(1, labels[masked][:, None]).sum()",
                                     "total = -(log_p.gather(1, labels[masked][:, None])[:, 0] * masked.sum()"
                                     + " / len(labels) / masked.sum(1)[masked.nonzero()[:, 0]]).sum()"),
        "0 / 0": ("max(int(masked.sum()), 1)", "int(masked.sum())"),
        "padded length of the batch": ("labels.shape[0] * text_length", "labels.numel()"),
        "word 0 is no word": ("labels != -100", "labels > 0"),
        "in half precision": ("scores[masked].float()", "scores[masked]"),
        "column 0 means a match": ("scores.float().flip(1)\n    margin = (other - scores.float())",
                                   "scores.float().flip(1)\n    margin = (scores.float() - other)"),
    },
    11: {
        "capital letters are others": ("t.lower() not in said", "t not in said"),
        "only its own caption is its own": ("t.lower() not in said[image]", "t.lower() != text.lower()"),
        "its caption's words are its own": ("t.lower() not in said[image]",
                                            "not any(t.lower() in own for own in said[image])"),
        "every second one": ("int(torch.randint(2, (1,), generator=generator)) == 1", "len(texts) % 2 == 0"),
        "the next caption": ("place.item()", "0 * place.item()"),
        "labels upside down": ("int(stays)", "int(not stays)"),
    },
    12: {
        "ties are luck": ("(lucky + unlucky) / 2", "lucky * 1.0"),
        "video to text by rows": ("scores[:, video]", "scores[video]"),
        "own captions compete": ("if i not in own or i == best", "if True"),
        "the first caption counts": ("max(own, key=lambda i: column[i].item())", "own[0]"),
        "every video has a caption": ("if not own:\n            continue", "own = own or [0]"),
        "nearly equal is equal": ("(scores >= own)", "(scores >= own - 1e-6)"),
    },
}  # fmt: skip

# Slips in the other solutions that change nothing that anybody could see, where --mutants finds them.
EQUIVALENT = {f"{name} {place}" for name, places in {
    # a difference of 0, or rounded away; float32 is precise enough for videos of some hours
    "sample_clips": "3:34-53/0 3:59-62/1 11:24-34/0 15:28-41/0 5:16-68/0 7:16-65/1 9:16-46/0 10:12-43/0 14:16-46/0",
    "forward": "4:8-69/1 5:8-48/2",  # the default
    "fuse": "5:12-51/1 10:74-77/0 10:74-77/1 11:69-70/1",  # an index may lie anywhere; 1e9 + 1; the only one
    "aggregate_clips": "4:18-65/0 5:63-64/1",  # gradients that cancel; the only one
    "video_loss": "3:40-41/1 4:23-65/1 6:26-50/1 6:47-49/0 8:21-22/1",  # the only axis, the only column
    "evaluate": "10:16-71/0 11:25-42/0",  # argmax flattens, too; a tensor of that number
    "mask_tokens": "5:14-69/0 9:21-31/0 10:24-35/0 10:40-50/0 11:53-71/0",  # a random number is hardly ever .8
    "mlm_loss": "5:47-49/0 7:76-93/0",  # the last axis; a tensor of that number
    "itm_loss": "2:12-26/0 3:22-36/0",  # float32 because of the other one
    # the other side of the coin; zip's check of lengths
    "match_captions": "3:23-57/1 3:52-56/0 6:23-57/1 6:52-56/0 8:30-83/0 8:30-78/0 8:82-83/1 11:26-38/0",
    # zip's check of lengths; shapes that torch would bring about by itself
    "retrieval_metrics": "2:24-34/0 4:22-64/1 4:59-63/0 5:30-54/0 11:38-54/0 13:31-57/0 13:59-88/0",
}.items() for place in places.split()}  # fmt: skip


def undone(number):
    """Exercise functions without their bodies."""
    blanks = {}
    for name in EXERCISES[number]:
        module, name_there = name.split(".", 1)
        source = assignment.blank(TEXTS[module], name_there, f"Exercise {number}")
        blanks[name] = assignment.extract(source, name_there)
    return blanks


def failed(number, functions):
    return [wrong for wrong in run_tests(number, functions).values() if wrong]


@pytest.mark.parametrize("number", EXERCISES)
def test_right_solutions_pass_and_an_undone_one_fails_everywhere(number):
    others = {name: text for i in EXERCISES if i != number for name, text in undone(i).items()}
    assert failed(number, others) == []  # no exercise needs another
    assert failed(number, assignment.other_solution(number)) == []
    results = run_tests(number, undone(number))
    assert all(wrong == f"NotImplementedError: Exercise {number}" for wrong in results.values())
    assert len(results) >= 3


@pytest.mark.parametrize("number", EXERCISES)
def test_mistakes_and_a_sample_of_slips_are_found(number):
    assert len(MISTAKES[number]) >= 6
    for what, (old, new) in MISTAKES[number].items():
        solution = assignment.other_solution(number)
        changed = {name: text.replace(old, new) for name, text in solution.items()}
        assert changed != solution, f"{what}: {old!r} does not stand in the solution"
        assert assignment.found(number, changed), what
    slips = [slip for slip in assignment.all_mutants(number) if slip[0] not in EQUIVALENT]
    for where, what, changed in slips[number :: len(slips) // 4]:
        assert assignment.found(number, changed), f"{where} {what}"


# --------------------------------------------------------------------------------------------------
# The copy and its grading


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "out"
    assignment.write_copy(out)
    return out


def test_the_copy_has_no_solution_and_says_what_its_tests_count(copy):
    for number, functions in EXERCISES.items():
        for module, name in (function.split(".", 1) for function in functions):
            text = assignment.extract((copy / SOURCES[module].name).read_text(encoding="utf-8"), name)
            whole = assignment.extract(TEXTS[module], name)
            *kept, last = text.splitlines()
            assert whole.startswith("\n".join(kept)) and kept[-1].endswith(('"""', ":", ")"))
            assert last.strip() == f'raise NotImplementedError("Exercise {number}: {assignment.titles()[number]}")'
    text, worth = (copy / "ASSIGNMENT.md").read_text(encoding="utf-8"), assignment.properties()
    for number, title in assignment.titles().items():
        points = sum(points for points, _ in worth[number].values())
        assert f"## Exercise {number}: {title} ({points} points)" in text
        for function in EXERCISES[number]:
            assert f"`{function.split('.', 1)[1]}`" in text
    assert sum(points for tests in worth.values() for points, _ in tests.values()) == 100
    assert not (copy / "tests" / "ANSWERS.md").exists()


def test_blank_keeps_decorators_signature_and_docstring():
    kept = 'class A:\n    @property\n    def f(self):\n        """Doc."""\n'
    source = kept + "        x = 1\n        return x\n\n    y = 2\n"
    assert assignment.blank(source, "A.f", "no") == kept + '        raise NotImplementedError("no")\n\n    y = 2\n'
    with pytest.raises(LookupError, match="A.g"):
        assignment.blank(source, "A.g", "")


def test_slips_are_one_change_each():
    slips = assignment.mutants("def f(x):\n    return g(x.sum(0), a=1) < 2")
    assert {text.split("return ")[1] for *_, text in slips} == {
        "g(x.sum(0), a=1) <= 2", "x.sum(0) < 2", "g(x.sum(0)) < 2", "g(x.sum(0), a=1) < 3", "g(x.sum(0), a=1) < 1",
        "g(x, a=1) < 2", "g(x.sum(0), a=2) < 2", "g(x.sum(0), a=0) < 2", "g(x.sum(1), a=1) < 2", "g(x.sum(-1), a=1) < 2",
    }  # fmt: skip


def test_grading_gives_partial_points_and_survives_what_students_write(copy, tmp_path, monkeypatch, capsys):
    """Half an exercise, one that hangs, one that ends the process, a lost one, a file that is no Python."""
    def write(module, name=None, text=None):
        source = assignment.splice(TEXTS[module], name, text) if name else text
        (tmp_path / SOURCES[module].name).write_text(source, encoding="utf-8")

    monkeypatch.setattr(assignment, "LIMIT", 20)
    no_lse = assignment.extract(TEXTS["clipbert"], "aggregate_clips").replace('== "lse"', '== "other"')
    write("clipbert", "aggregate_clips", no_lse)
    write("clipbert", None, assignment.splice((tmp_path / "clipbert.py").read_text(), "clip_logits", ""))
    write("data", None, "def sample_clips(:\n")
    assert assignment.grade(tmp_path, [6]) == 0 and "-7 : SyntaxError" in capsys.readouterr().out
    write("data", None, TEXTS["data"])
    write("exercises", "evaluate", "def evaluate(*_, **__):\n    __import__('os')._exit(0)")
    write("finetune", "ranks_of", "def ranks_of(own, scores):\n    while True:\n        pass")
    assert assignment.grade(tmp_path, [5, 6, 8, 12]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" 0 of 10") and "LookupError: there is no clip_logits" in lines[1]
    assert lines[2].endswith(" 1 of  7") and lines[3].startswith("     -2 value: ValueError")
    assert lines[6].endswith(" 0 of  8") and "the process ended before" in lines[7]
    assert lines[8].endswith(" 0 of  7") and "stopped after 20 seconds" in lines[9]
    assert lines[10].split() == ["all", "1", "of", "32"]


def test_errors_are_one_line(copy, tmp_path):
    for arguments, line in ([copy], "not empty"), ([tmp_path / "nowhere", "--grade"], "no such folder"):
        command = [sys.executable, SOURCES["exercises"].parent / "assignment.py", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and line in result.stderr
