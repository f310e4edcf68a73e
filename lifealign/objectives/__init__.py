"""Preference objectives: pure functions of log-probabilities, and the components that configurations name."""

from lifealign.objectives.components import DPO, FPO, IPO, Objective, Robust, SimPO
from lifealign.objectives.ipo import ipo_loss
from lifealign.objectives.preference import PreferenceLoss, dpo_loss, fpo_loss
from lifealign.objectives.robust import robust_loss
from lifealign.objectives.simpo import simpo_loss

__all__ = [
    "DPO",
    "FPO",
    "IPO",
    "Objective",
    "PreferenceLoss",
    "Robust",
    "SimPO",
    "dpo_loss",
    "fpo_loss",
    "ipo_loss",
    "robust_loss",
    "simpo_loss",
]
