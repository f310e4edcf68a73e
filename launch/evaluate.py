"""Score again: ``deepspeed launch/evaluate.py run=RUN_DIR [adapter=TASK] [to=DIR] [overrides]`` writes RUN_DIR/rescored/.

``adapter=TASK`` scores the adapter that one finished task left, on all tasks; ``to=DIR`` writes elsewhere. The rest are
overrides of the run's configuration: evaluation.metrics, data.root, sequence.tasks, ...
"""

from lifealign.environment import prepare_process

prepare_process()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from lifealign.command import exit_codes, without_local_rank  # noqa: E402
from lifealign.errors import UserError  # noqa: E402
from lifealign.rescore import rescore  # noqa: E402


def main() -> None:
    """Take our own words out of the arguments; the rest are overrides of that run's configuration."""
    own: dict[str, list[str]] = {"run": [], "adapter": [], "to": []}
    overrides = []
    for argument in without_local_rank(sys.argv[1:]):
        name, _, value = argument.partition("=")
        own.get(name, overrides).append(value if name in own else argument)
    if len(own["run"]) != 1 or any(len(values) > 1 or "" in values for values in own.values()):
        raise UserError("name one run directory: evaluate.py run=RUN_DIR [adapter=TASK] [to=DIR] [overrides]")
    adapter, to = next(iter(own["adapter"]), None), next(iter(own["to"]), None)
    rescore(Path(own["run"][0]), overrides, adapter, Path(to) if to else None)


if __name__ == "__main__":
    with exit_codes():
        main()
