"""How far scores on old tasks fall while a new one is learned: the stability gap (De Lange et al., 2023, arXiv 2205.13452).

Scores after each task miss a fall that has been made good by then. Probes, taken every few optimiser steps, do not.
Pure: no torch, no file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any


def stability(probes: Sequence[Mapping[str, Any]], metric: str = "preference_accuracy") -> dict[str, Any] | None:
    """The worst score of each task after its own training and the one of the last look at it, and their means over tasks.

    The mean of the worst scores is the paper's min-ACC (eq. 2), over all tasks but the one being learned.

    Args:
        probes: in the order in which they were taken, each with ``on``, the name of an old task, ``step`` and the metric.
            Those whose metric overflowed, None, are left out.
        metric: one that is better when higher.

    Returns:
        ``{"metric", "tasks": {name: {"worst", "worst_step", "end"}}, "worst", "end", "gap"}``; ``gap`` is end - worst. None
        where no probe has a score.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for probe in probes:
        if probe[metric] is not None:
            by_task[probe["on"]].append(probe)
    if not by_task:
        return None
    tasks = {}
    for name, taken in by_task.items():
        lowest = min(taken, key=lambda probe: probe[metric])
        tasks[name] = {"worst": lowest[metric], "worst_step": lowest["step"], "end": taken[-1][metric]}
    worst, end = (math.fsum(task[key] for task in tasks.values()) / len(tasks) for key in ("worst", "end"))
    return {"metric": metric, "tasks": tasks, "worst": worst, "end": end, "gap": end - worst}
