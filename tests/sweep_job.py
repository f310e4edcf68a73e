"""A command whose jobs fail as told, for tests of sweeps: ``python tests/sweep_job.py -m +sequence=six_domains seed=0,1,2``.

``data.max_train`` says how: 1, by a mistake; 2, by an error of no known kind on every rank; 3, on the last rank alone; 6, by a
mistake on the last rank alone.
"""

from __future__ import annotations

from lifealign.environment import prepare_process

prepare_process()

from omegaconf import DictConfig  # noqa: E402

from lifealign.command import hydra_command  # noqa: E402
from lifealign.errors import UserError  # noqa: E402
from lifealign.runtime import distributed  # noqa: E402


def work(composed: DictConfig) -> None:
    distributed.start()
    how, last = composed.data.max_train, distributed.rank() == distributed.world_size() - 1
    if how == 1 or (how == 6 and last):
        raise UserError(f"data.max_train={how}: so it goes")
    if how == 2 or (how == 3 and last):
        raise RuntimeError(f"lost with seed {composed.seed}")
    distributed.barrier()
    if distributed.is_main():
        print(f"done: seed {composed.seed}", flush=True)


if __name__ == "__main__":
    hydra_command(work)
