"""The cache of reference log-probabilities: ``python launch/cache.py list | size | clear [BASE] [--dir DIR]``."""

import sys

from lifealign.cache_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
