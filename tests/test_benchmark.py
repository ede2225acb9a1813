"""The benchmark's parts run, here on next to nothing; what they measure is not tested."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import benchmark
import pytest
import torch

import clipbert

SMALL = replace(clipbert.ClipBertConfig.tiny(50), hidden_size=32, layers=1, intermediate_size=32)


def once(jobs, repeats=1):
    for job in jobs.values():
        job()
    return {name: [0.1] for name in jobs}


def test_step_prints_both_versions(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", once)
    benchmark.step_part(SMALL, size=32, batch_size=1)
    said = capsys.readouterr().out
    assert all(name in said for name in ("plain", "fast", "target for 'fast'", "TGIF-QA 1x1", "MSRVTT 8x2"))


def test_memory_is_estimated_for_both_tasks(capsys):
    benchmark.memory_part(SMALL, size=32)
    said = capsys.readouterr().out
    assert "TGIF-QA 1x1 at 32 px" in said and "MSRVTT 8x2 at 32 px" in said


def test_plain_and_fast_step_agree_at_first(capsys):
    benchmark.agree_part(steps=2, batch_size=1)
    assert capsys.readouterr().out.count(": agreed") == 2


def test_a_peer_whose_first_decoder_fails_is_left_out(capsys, monkeypatch):
    def decoder(*arguments, **options):
        raise RuntimeError("Could not load\nlibtorchcodec: FFmpeg is not properly installed")

    def import_module(name):
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'")
        return SimpleNamespace(VideoDecoder=decoder)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert list(benchmark.readers()) == ["ours"]
    said = capsys.readouterr().out
    assert "PyAV): left out, ModuleNotFoundError" in said
    assert "torchcodec, 1 thread: left out, RuntimeError: Could not load libtorchcodec" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_needs_a_gpu_is_left_out_by_name(capsys):
    benchmark.step_part()
    assert capsys.readouterr().out == "\nstep: left out, no GPU\n"
