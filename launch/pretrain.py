"""Make a small base model: ``python launch/pretrain.py --text FILE... --root DATA_ROOT --to DIR [--preset small|gpu]``."""

from lifealign.environment import prepare_process

prepare_process()

import dataclasses  # noqa: E402
from pathlib import Path  # noqa: E402

from lifealign.arguments import ArgumentParser  # noqa: E402
from lifealign.command import exit_codes  # noqa: E402
from lifealign.errors import UserError  # noqa: E402
from lifealign.pretrain.make import make_base  # noqa: E402
from lifealign.pretrain.options import PRESETS, PretrainOptions, flag  # noqa: E402
from lifealign.runtime import distributed  # noqa: E402

NAMES = {option.name for option in dataclasses.fields(PretrainOptions)}


def parser() -> ArgumentParser:
    made = ArgumentParser(description="Make a small base model from plain text, instructions and chosen answers.")
    made.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="texts or instructions; see the manual")
    made.add_argument("--root", type=Path, metavar="DATA_ROOT", help="a data.root: TASK/train.* and TASK/test.* or dev.*")
    made.add_argument("--to", type=Path, metavar="DIR", help="where the base goes; a folder of the cache unless told")
    made.add_argument("--preset", choices=PRESETS, default="small", help="where the other options start from")
    for option in dataclasses.fields(PretrainOptions):
        kind = type(option.default)
        made.add_argument(flag(option.name), type=kind, metavar=kind.__name__.upper(), help=option.metadata["meaning"])
    return made


def main() -> None:
    given = parser().parse_args()
    told = {name: value for name, value in vars(given).items() if name in NAMES and value is not None}
    options = PretrainOptions(**PRESETS[given.preset] | told)
    if distributed.world_size() > 1:
        raise UserError("pre-training runs in one process; start it with python")
    distributed.start()
    print(f"the base: {make_base(given.text, given.root, given.to, options)}")


if __name__ == "__main__":
    with exit_codes():
        main()
