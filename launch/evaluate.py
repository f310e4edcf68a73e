"""Score again: ``deepspeed launch/evaluate.py run=RUN_DIR [overrides]`` writes RUN_DIR/rescored/."""

from lifealign.environment import prepare_process

prepare_process()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from lifealign.command import exit_codes, without_local_rank  # noqa: E402
from lifealign.errors import UserError  # noqa: E402
from lifealign.rescore import rescore  # noqa: E402


def main() -> None:
    """Take ``run=`` out of the arguments; the rest are overrides of that run's configuration."""
    arguments = without_local_rank(sys.argv[1:])
    runs = [argument.removeprefix("run=") for argument in arguments if argument.startswith("run=")]
    if len(runs) != 1:
        raise UserError("name one run directory: evaluate.py run=RUN_DIR [overrides]")
    rescore(Path(runs[0]), [argument for argument in arguments if not argument.startswith("run=")])


if __name__ == "__main__":
    with exit_codes():
        main()
