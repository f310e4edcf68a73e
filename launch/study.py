"""Study: ``python launch/study.py +study=NAME [study.KEY=VALUE] [overrides of launch/train.py]``; see docs/studies.md.

A grid over methods, regimes, sequences and seeds, one process a run, and the tables and figures made of them. The same
command goes on where it was ended, skips what is finished or has diverged, and tries again what failed otherwise.
"""

from lifealign.environment import prepare_process

prepare_process()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from lifealign.command import exit_codes  # noqa: E402
from lifealign.study.command import study  # noqa: E402

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    with exit_codes():
        code = study(sys.argv[1:], Path(__file__).with_name("train.py"))
    sys.exit(code)
