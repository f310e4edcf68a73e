"""Truncation of a full-weight update: the randomized range finder beside torch's SVD.

    python benchmarks/range_finder.py --json out.json

A dense 3584 x 3584 update with singular values 1/i; 90 % of its energy is to be kept. Both contenders get the same float32
matrix and take turns, after one call that is not timed. Extra memory is the peak of the first call.
"""

from lifealign.environment import prepare_process

prepare_process()

import argparse  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from common import Claim, claims_json, claims_table, heading, load_average, table, take_turns, write_results  # noqa: E402

from lifealign.memory import SVDMethod  # noqa: E402
from lifealign.memory.truncation import truncate  # noqa: E402

SIZE, ENERGY = 3584, 0.9


def decaying(size: int) -> torch.Tensor:
    """A (size, size) matrix with random singular vectors and singular values 1/i."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return (left / torch.arange(1, size + 1)) @ right.T


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    load, update = os.getloadavg(), decaying(SIZE)
    whole = update.double().square().sum()

    def full() -> torch.Tensor:
        u, s, vt = torch.linalg.svd(update, full_matrices=False)
        energy = s.square().cumsum(0)
        keep = int((energy < ENERGY * energy[-1]).sum()) + 1
        return (u[:, :keep] * s[:keep]) @ vt[:keep]

    found = take_turns({"lifealign": lambda: truncate(update, ENERGY, SVDMethod.randomized).update, "svd": full}, args.repeats)
    for own in found.values():
        own["energy"] = (own.pop("result").double().square().sum() / whole).item()
    rows = [
        [name, f"{own['seconds'] * 1e3:.0f}", f"{own['extra_bytes'] / 2**20:.0f}", f"{own['energy']:.6f}"]
        for name, own in found.items()
    ]
    print(table(["", "ms", "extra MiB", "captured energy"], rows))
    ours, svd = found["lifealign"], found["svd"]
    claims = [
        Claim("faster than the SVD", svd["seconds"] / ours["seconds"], 10, "x", at_least=True),
        Claim("captured energy differs", abs(ours["energy"] / svd["energy"] - 1) * 100, 0.5, " %"),
    ]
    print("\n" + claims_table(claims))
    print(load_average())
    write_results(args.json, {**heading(load), "claims": claims_json(claims), "figures": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
