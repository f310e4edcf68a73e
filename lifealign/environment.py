"""Settings of the process that must stand before torch is imported; so this module imports nothing but the standard library."""

from __future__ import annotations

import logging
import os
import warnings

SETTINGS = {
    # Threads that wait for each other sleep instead of spinning. On cores that are shared with another process (a second
    # rank, a neighbour) spinning was measured to make a small model forty times slower; on idle cores it gains little.
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "warning",
}


def prepare_process() -> None:
    """Call first of all in a command. What the user has set stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())
