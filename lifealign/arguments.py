"""Command lines without Hydra: mistakes told in one line. Imports nothing heavy, so that answers come at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from lifealign.errors import UserError, printable


class ArgumentParser(argparse.ArgumentParser):
    """The library's, with its mistakes raised."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help says what there is")


def exit_code(work: Callable[[], None]) -> int:
    """Do it; a user's mistake, or a file that cannot be read or written, is told in one line, and the exit code is 2."""
    try:
        work()
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0
