"""The benchmark's parts run, here on next to nothing; what they measure is not tested."""

import sys
import time
from dataclasses import replace

import benchmark
import pytest
import torch

import clipbert

SMALL = replace(clipbert.ClipBertConfig.tiny(50), hidden_size=32, num_hidden_layers=1, intermediate_size=32)


def test_step_and_memory_are_measured_for_both_tasks(capsys):
    benchmark.step(SMALL, size=32, videos=1)
    benchmark.memory(SMALL, size=32)
    said = capsys.readouterr().out
    assert said.count("TGIF-QA 1x1") == said.count("MSRVTT 8x2") == 2
    assert all(words in said for words in ("plain", "ours", "; aim: 2x", "GiB a video"))


def test_plain_and_our_step_agree_at_first(capsys):
    benchmark.agree(steps=2, videos=1)
    assert capsys.readouterr().out.count(": agreed") == 2


def test_jobs_take_turns_and_the_first_is_what_they_are_compared_with(capsys):
    order = []
    jobs = {"slow": lambda: time.sleep(0.03) or order.append("s"), "ours": lambda: order.append("o")}
    benchmark.compare("a title", jobs, repeats=2, aim=2, videos=1)
    assert "".join(order) == "sososo"  # once more than is counted
    _, _, slow, ours = capsys.readouterr().out.strip().split("\n")
    assert "1.00x" in slow and float(ours.split()[-1]) > float(slow.split()[-1])


def test_a_peer_that_is_missing_is_left_out(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert list(benchmark.readers()) == ["ours"] and "left out, import of av halted" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_needs_a_gpu_is_left_out_by_name(capsys):
    benchmark.step()
    assert capsys.readouterr().out == "\nstep: left out, no GPU\n"
