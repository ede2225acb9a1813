"""Tests import the project's files from the folder above, wherever pytest is started."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # the models are tiny: on a busy machine, threads would mostly wait for each other
