"""Export: ``python launch/export.py RUN_DIR --to DIR [--merge] [--task NAME]`` writes a plain PEFT adapter, or merged weights.

The folder also holds the tokenizer and a model card. It is loaded again and compared with the run before it is put in place.
"""

from lifealign.environment import prepare_process

prepare_process()

from pathlib import Path  # noqa: E402

from lifealign.arguments import ArgumentParser  # noqa: E402
from lifealign.command import exit_codes  # noqa: E402
from lifealign.export import export  # noqa: E402


def main() -> None:
    parser = ArgumentParser(description="Write an adapter of a run, or merged weights, with tokenizer and model card.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--merge", action="store_true", help="write whole weights with the adapter in them")
    parser.add_argument("--task", metavar="NAME", help="the adapter that this finished task left; the newest unless told")
    arguments = parser.parse_args()
    export(arguments.run, arguments.to, merge=arguments.merge, task=arguments.task)


if __name__ == "__main__":
    with exit_codes():
        main()
