"""The long-term memory of a run: ``python launch/memory.py RUN_DIR list | show | scale | revert | export``."""

from lifealign.environment import prepare_process

prepare_process()

import sys  # noqa: E402

from lifealign.memory_command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
