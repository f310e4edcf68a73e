"""Check: ``python launch/validate.py +sequence=... [ranks=N] [overrides]`` reads configuration and data, and trains nothing.

``ranks=N`` reckons with the N processes that ``deepspeed --num_gpus N`` would start; without it, with those that are there.
"""

from lifealign.environment import prepare_process

prepare_process()

import sys  # noqa: E402
from functools import partial  # noqa: E402

from lifealign.command import exit_codes, hydra_command  # noqa: E402
from lifealign.errors import UserError  # noqa: E402
from lifealign.validate import validate  # noqa: E402


def take_ranks(arguments: list[str]) -> tuple[int | None, list[str]]:
    """The number that the last ``ranks=N`` names, and the other arguments."""
    named = [argument for argument in arguments if argument.startswith("ranks=")]
    number = named[-1].removeprefix("ranks=") if named else None
    if number is not None and (not number.isascii() or not number.isdigit() or int(number) < 1):
        raise UserError(f"{named[-1]}: give a number of processes, such as ranks=8")
    return int(number) if number is not None else None, [argument for argument in arguments if argument not in named]


if __name__ == "__main__":
    with exit_codes():
        ranks, sys.argv[1:] = take_ranks(sys.argv[1:])
        hydra_command(partial(validate, ranks=ranks), leaves_notes=False)
