"""An evaluation in a process of its own, to be killed: ``python tests/judge_run.py OPTIONS FOLDER ITEMS [debug]``.

OPTIONS are those of the judge as JSON; the result is printed as JSON. ``debug``: every library logs all it has to say.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path

from lifealign.command import exit_codes
from lifealign.evaluation.judge import Item, JudgeOptions, judge_answers


def items(count: int) -> list[Item]:
    return [Item(f"What of item-{number}?", f"An answer, number {number}.") for number in range(count)]


if __name__ == "__main__":
    if "debug" in sys.argv:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    with exit_codes():
        result = judge_answers(
            JudgeOptions(**json.loads(sys.argv[1])), items(int(sys.argv[3])), task="instruct", folder=Path(sys.argv[2])
        )
        print(json.dumps(dataclasses.asdict(result)))
