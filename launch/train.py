"""Train: ``deepspeed launch/train.py +sequence=six_domains [overrides]``, or under ``torchrun`` or plain ``python``."""

from lifealign.environment import prepare_process

prepare_process()

from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from lifealign.command import hydra_command  # noqa: E402
from lifealign.run import train  # noqa: E402
from lifealign.sweep import Ended  # noqa: E402


def compare(folder: Path, ended: Sequence[Ended]) -> None:
    """Compare the runs of a sweep. What makes tables and pictures is loaded here: it takes a second, which no run need wait."""
    from lifealign.comparison.command import compare_sweep

    compare_sweep(folder, ended)


if __name__ == "__main__":
    hydra_command(train, compare)
