"""Compare: ``python launch/compare.py RUN_DIR... [--to DIR] [--against RUN]`` makes a leaderboard, a page and a table."""

from lifealign.environment import prepare_process

prepare_process()

import sys  # noqa: E402

from lifealign.comparison.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
