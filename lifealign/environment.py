"""Settings of the process that must stand before torch is imported; so this module imports nothing but the standard library."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings

SETTINGS = {
    # Threads that wait for each other spin for some microseconds and then sleep. On cores that are shared with another
    # process (a second rank, a neighbour) spinning on was measured to make a small model forty times slower; not spinning at
    # all costs a wake-up an operation, a sixth of a step.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    # torch asks for huge pages where a tensor is large; fewer page faults were measured to save an eighth of a step.
    "THP_MEM_ALLOC_ENABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "warning",
}


def prepare_process() -> None:
    """Call first of all in a command. What the user has set stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal whose encoding lacks a sign gets another, and no error
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())
