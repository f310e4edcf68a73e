"""Preference objectives: pure functions of log-probabilities, and the components that configurations name."""

from lifealign.objectives.components import DPO, FPO, Objective
from lifealign.objectives.preference import PreferenceLoss, dpo_loss, fpo_loss

__all__ = ["DPO", "FPO", "Objective", "PreferenceLoss", "dpo_loss", "fpo_loss"]
