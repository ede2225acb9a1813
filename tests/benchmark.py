"""What is fast and by how much: ratios, each measured in one run.

    python tests/benchmark.py                 every part that this machine can run
    python tests/benchmark.py decode step     only these

A table a part: the median of several runs, their spread, the ratio to the first row, and the target where there is one.
A missed target says so. What cannot run here (no GPU, a peer that is not installed) is named and left out.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def measure(jobs, repeats=5):
    """{name: function} -> {name: seconds of each run}. The jobs take turns, so that a busy moment hits them all."""
    for job in jobs.values():
        job()  # caches fill, kernels compile
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def table(title, seconds, target=None, ours=None):
    """Print a part's rows; the first is what the others are compared with.

    target: at least how many times as fast `ours` (default: the last row) should be.
    """
    base, ours = median(next(iter(seconds.values()))), ours or list(seconds)[-1]
    print(f"\n{title}\n{'':44}{'median ms':>11}{'spread':>9}{'speed':>9}")
    for name, runs in seconds.items():
        spread = (max(runs) - min(runs)) / median(runs)
        print(f"{name:44}{1000 * median(runs):11.1f}{spread:9.0%}{base / median(runs):8.2f}x")
    if target:
        ratio = base / median(seconds[ours])
        print(f"target for {ours!r}: {target}x, {'reached' if ratio >= target else 'MISSED'} ({ratio:.2f}x)")


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


# ----------------------------------------------------------------------------------------------------------------------
# The model: the training step, retrieval


# ----------------------------------------------------------------------------------------------------------------------

PARTS = {
    # decoding
    # the model
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}, "
          f"torch {torch.__version__}")  # fmt: skip
    for part in args.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
