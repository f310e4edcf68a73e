"""Start a launcher and wait for all it starts: ``python launch/supervised.py deepspeed --num_gpus 2 launch/train.py ...``.

The exit code is the launcher's, or where that is 0 and a process it left behind ended otherwise, that one's.
"""

import sys

from lifealign.arguments import exit_code
from lifealign.errors import UserError
from lifealign.supervise import supervise


def main() -> None:
    if len(sys.argv) < 2:
        raise UserError("give the command to start: supervised.py deepspeed --num_gpus 2 launch/train.py ...")
    sys.exit(supervise(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
