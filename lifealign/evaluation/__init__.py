"""Scores: on held-out pairs, over tasks, and on paper."""

from lifealign.evaluation.scores import ScoreBook, continual_metrics

__all__ = ["ScoreBook", "continual_metrics"]
