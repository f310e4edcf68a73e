"""A history with a bound: a thousand updates through one factor that keeps 64 directions.

    python benchmarks/memory_rank.py --json out.json

Two histories: updates that are ever new but for a part in the span of those before, and updates that all lie in few
directions, with energies falling as 1/i². Time is a median over updates, of refining and joining; what was forgotten is the
spectrum of HᵀH - VᵀSV, exact but for rounding, beside ``merged_energy`` and the bound of docs/memory.md.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from common import (  # noqa: E402
    Claim,
    claims_json,
    claims_table,
    heading,
    load_average,
    resident,
    table,
    write_results,
)
from slmc import HIDDEN, OPTIONS, updates  # noqa: E402

from lifealign.memory.basis import Basis, rescale_history  # noqa: E402

SHAPE, COUNT, LIMIT = torch.Size((8, HIDDEN)), 1000, 64


def histories() -> dict[str, torch.Tensor]:
    """(updates, rows, columns) each."""
    source, generator = updates("stream", SHAPE), torch.Generator().manual_seed(0)
    directions = torch.randn(COUNT, SHAPE.numel(), generator=generator) / SHAPE.numel() ** 0.5
    weights = torch.randn(COUNT, COUNT, generator=generator) / torch.arange(1, COUNT + 1)
    return {
        "ever new": torch.stack([next(source) for _ in range(COUNT)]),
        "of few directions": 0.2 * (weights @ directions).view(COUNT, *SHAPE),
    }


def row(name: str, own: dict[str, Any]) -> list[str]:
    quarters = [f"{own[key] * 1e3:.2f}" for key in ("first_quarter_seconds", "last_quarter_seconds")]
    mib = [f"{own['store_bytes'] / 2**20:.1f}", *(f"{bytes_ / 2**20:.0f}" for bytes_ in own["rss"])]
    energies = [f"{own[key]:.4g}" for key in ("loss", "merged", "bound")]
    return [name, *quarters, *mib, *energies, f"{own['loss'] / own['energy']:.2%}"]


HEADINGS = ["", "ms, first quarter", "last quarter", "store MiB", "rss MiB at 100", "at 1000"]
HEADINGS += ["most forgotten", "merged", "bound", "of all energy"]


def claims_of(name: str, own: dict[str, Any]) -> list[Claim]:
    # The vectors are float32: inequalities hold up to its rounding of the whole energy.
    beyond = max(own["loss"] - own["merged"], own["merged"] - own["bound"], -own["least_loss"]) / own["energy"]
    growth = own["last_quarter_seconds"] / own["first_quarter_seconds"]
    return [
        Claim(f"{name}: 0 <= forgotten <= merged <= bound, missed by", beyond, 1e-6, ""),
        Claim(f"{name}: last quarter, of the first", growth, 1.1, "x"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    load = os.getloadavg()
    found = {name: sketch(history) for name, history in histories().items()}
    print(f"{COUNT} updates of {tuple(SHAPE)}, at most {LIMIT} directions, float32")
    print(table(HEADINGS, [row(name, own) for name, own in found.items()]))
    claims = [claim for name, own in found.items() for claim in claims_of(name, own)]
    print("\n" + claims_table(claims))
    print(load_average())
    write_results(args.json, {**heading(load), "claims": claims_json(claims), "figures": found})
    return 0


def sketch(history: torch.Tensor, limit: int = LIMIT) -> dict[str, Any]:
    """Every update is refined against those before it, and joins them; then what the sketch has forgotten."""
    basis, seconds, rss = Basis(1, history.shape[1:], dtype=torch.float32, limit=limit), [], []
    for i, update in enumerate(history.unsqueeze(1)):
        started = time.perf_counter()
        rescale_history(update, basis, OPTIONS.scale)
        basis.extend(update)
        seconds.append(time.perf_counter() - started)
        if i + 1 in (100, len(history)):
            rss.append(resident("VmRSS"))
    quarter = (len(history) - limit) // 4
    losses, squares = forgotten(history.flatten(1).double(), basis)
    tails = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])  # ||H - H_k||², from k = 0 on
    return {
        "first_quarter_seconds": median(seconds[limit : limit + quarter]),
        "last_quarter_seconds": median(seconds[-quarter:]),
        "store_bytes": basis._store.nbytes,
        "vectors_bytes": basis.vectors.nbytes,
        "rss": rss,
        "loss": losses.max().item(),
        "least_loss": losses.min().item(),
        "merged": basis.merged.item(),
        "bound": min((tails[k] / (limit + 1 - k)).item() for k in range(limit + 1)),
        "energy": squares.sum().item(),
    }


def forgotten(history: torch.Tensor, basis: Basis) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of HᵀH - VᵀSV, all but the zeros outside the rows of both, and of HHᵀ, descending; exact but for rounding."""
    rows = torch.cat([history, basis.vectors.flatten(1).double()])
    squares, turned = torch.linalg.eigh(rows @ rows.T)
    root = squares.clamp(min=0).sqrt().unsqueeze(-1) * turned.T  # rows = rootᵀ Q with orthonormal Q
    signed = torch.block_diag(torch.eye(len(history), dtype=torch.float64), -basis._energies[0])
    return torch.linalg.eigvalsh(root @ signed @ root.T), torch.linalg.eigvalsh(history @ history.T).flip(0).clamp(min=0)


if __name__ == "__main__":
    raise SystemExit(main())
