"""Lifelong-learning strategies, one file each. A new one is a file here and a preset in ``conf/strategy/``."""

import sys

from lifealign.registry import import_components
from lifealign.strategies.base import Context, Experience, Run, Seen, State, Strategy, seeded_generator

import_components(sys.modules[__name__])

__all__ = ["Context", "Experience", "Run", "Seen", "State", "Strategy", "seeded_generator"]
