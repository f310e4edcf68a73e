"""Where figures come from: the code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch


def commit(repository: Path) -> str:
    """The commit of the checkout, and whether files differ from it; what is no checkout has none."""

    def git(*words: str) -> str:
        ended = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
        return ended.stdout.strip() if ended.returncode == 0 else ""

    found = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{found} with changes" if git("status", "--porcelain", "--untracked-files=no") else found


def machine() -> str:
    """The processor, its cores and memory, and the accelerator."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [names[0] if names else model, f"{os.cpu_count()} cores", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)
