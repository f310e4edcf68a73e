"""A language model as judge of answers: through an endpoint, or held in this process."""

from lifealign.evaluation.judge.answers import Item, JudgeResult, check_judge, judge_answers, judge_folder
from lifealign.evaluation.judge.budget import Budget
from lifealign.evaluation.judge.judge import Judge
from lifealign.evaluation.judge.options import JudgeOptions
from lifealign.evaluation.judge.pairwise import Duel, WinRate, judge_pairs

__all__ = [
    "Budget",
    "Duel",
    "Item",
    "Judge",
    "JudgeOptions",
    "JudgeResult",
    "WinRate",
    "check_judge",
    "judge_answers",
    "judge_folder",
    "judge_pairs",
]
