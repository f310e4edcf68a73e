"""Export: ``python launch/export.py RUN_DIR --to DIR [--merge]`` writes a plain PEFT adapter, or merged weights."""

from lifealign.environment import prepare_process

prepare_process()

from pathlib import Path  # noqa: E402

from lifealign.arguments import ArgumentParser  # noqa: E402
from lifealign.command import exit_codes  # noqa: E402
from lifealign.export import export  # noqa: E402


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--merge", action="store_true", help="write whole weights with the adapter in them")
    arguments = parser.parse_args()
    export(arguments.run, arguments.to, merge=arguments.merge)


if __name__ == "__main__":
    with exit_codes():
        main()
