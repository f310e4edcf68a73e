"""What the benchmarks share: the model, the rows, the machine's own speed, tables and JSON.

Import after ``lifealign.environment.prepare_process``, which must run before torch is loaded.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lifealign.assets.build_model import train_tokenizer
from lifealign.data.files import read_task
from lifealign.data.options import Columns, DataOptions
from lifealign.data.rules import read_preferences

if torch.cuda.is_available():  # some contenders would take the card and others not
    sys.exit("error: the benchmarks measure the CPU; on a machine with GPUs give CUDA_VISIBLE_DEVICES= before the command")

VOCAB_SIZE = 8192
LIBRARIES = ("lifealign", "torch", "deepspeed", "transformers", "peft", "accelerate", "trl", "triton")


# The model: 16 M parameters, Qwen2-style, random


def model_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_sliding_window=False,
    )


def save_base(folder: Path, rows: Path, seed: int = 0) -> None:
    """Write the random model, in float32, and a tokenizer trained on ``rows`` to ``folder``."""
    tokenizer = train_tokenizer(row_texts(rows), VOCAB_SIZE)
    config = model_config()
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def row_texts(rows: Path) -> Iterable[str]:
    """All texts of the training split of a task's folder."""
    preferences, _ = read_preferences(read_task(rows.parent, rows.name)[0], rows.name, Columns(), DataOptions().max_empty)
    for preference in preferences:
        yield from (turn["content"] for turn in preference.prompt)
        yield from (preference.chosen, preference.rejected)


def body_parameters(model: torch.nn.Module) -> int:
    """Body parameters N: weights of the matrix products of all layers, without embeddings, head and adapter."""
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2 and "lora_" not in n)


# Claims


class Claim(NamedTuple):
    """A figure and what it must not pass."""

    name: str
    figure: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


def claims_table(claims: Sequence[Claim]) -> str:
    rows = [
        [c.name, f"{'>=' if c.at_least else '<='} {c.limit:.4g}{c.unit}", f"{c.figure:.3g}{c.unit}", "yes" if c.holds else "no"]
        for c in claims
    ]
    return table(["claim", "limit", "figure", "holds"], rows)


def claims_json(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [{**claim._asdict(), "holds": claim.holds} for claim in claims]


# Time and memory of a call


def resident(which: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    found = re.search(rf"^{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def extra_memory(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes at the peak of a call beyond what was there before it, and its result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is resident now
    result = call()
    return resident("VmHWM") - before, result


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def take_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Of each call: memory of the first, the median time of the others, and the result of the last."""
    found: dict[str, dict[str, Any]] = {name: {"all_seconds": []} for name in calls}
    for name, call in calls.items():
        found[name]["extra_bytes"], found[name]["result"] = extra_memory(call)
    for _ in range(repeats):
        for name, call in calls.items():
            del found[name]["result"]  # its memory is not to stand beside the next one's
            seconds, found[name]["result"] = timed(call)
            found[name]["all_seconds"].append(seconds)
    return {name: {"seconds": median(own["all_seconds"]), **own} for name, own in found.items()}


# The machine


def matmul_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Median FLOP/s of a ``size``-cubed matrix product, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(named.get("flags", "").split())
    return {
        "cpu": named.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "bf16_instructions": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _without_folders(argument: str) -> str:
    """Absolute paths say nothing to a reader: the last two names are enough."""
    path = Path(argument)
    return "/".join(path.parts[-2:]) if path.is_absolute() else argument


def heading(started_load: Sequence[float]) -> dict[str, Any]:
    """What every JSON file begins with; call it when the measurements are done."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(_without_folders(argument) for argument in sys.argv),
        "machine": machine(),
        "load_average": {"before": list(started_load), "after": list(os.getloadavg())},
        "versions": versions(),
    }


# Output


def load_average() -> str:
    return "load average: " + " ".join(f"{x:.2f}" for x in os.getloadavg())


def rate_line(rates: dict[str, float]) -> str:
    """Measured FLOP/s of a matrix product by dtype."""
    return "matmul rate: " + ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    pad = lambda row: [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # noqa: E731
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [pad(headings), rule, *map(pad, rows)])


def write_results(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {path}")
