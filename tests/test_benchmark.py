"""The benchmark's parts run, here on next to nothing; what they measure is not tested."""

from dataclasses import replace

import benchmark
import pytest
import torch

import clipbert

SMALL = replace(clipbert.ClipBertConfig.tiny(50), hidden_size=32, layers=1, intermediate_size=32)
CPU = clipbert.Device("cpu", torch.bfloat16, 0)


def once(jobs):
    for job in jobs.values():
        job()
    return {name: [0.1] for name in jobs}


def test_step_prints_both_versions_and_the_ceiling(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", once)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: None)
    benchmark.step_part(CPU, SMALL, size=32, batch_size=1)
    lines = capsys.readouterr().out
    assert all(name in lines for name in ("plain", "fast", "ceiling", "target for 'fast'", "TGIF-QA 1x1", "MSRVTT 8x2"))


def test_plain_and_fast_step_agree_at_first(capsys):
    benchmark.agree_part(steps=2, batch_size=1)
    assert capsys.readouterr().out.count(": agreed") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_needs_a_gpu_is_left_out_by_name(capsys):
    benchmark.step_part()
    benchmark.memory_part()
    assert capsys.readouterr().out.split("\n") == ["", "step: left out, no GPU", "", "memory: left out, no GPU", ""]
