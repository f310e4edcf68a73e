"""What a run stands on: the process group, the DeepSpeed engine, files, checkpoints, tracking and the terminal."""

import os

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns, before anyone can redirect it, that it chose so
