"""Figures of the paper's tables (LifeAlign, AAAI 2026, arXiv 2509.17183), to stand beside ours."""

from __future__ import annotations

from typing import NamedTuple


class PaperTable(NamedTuple):
    """One of the paper's tables."""

    caption: str
    metric: str  # ours that is nearest to the paper's
    rows: dict[str, dict[str, float]]  # label of a method -> figure -> value


def _row(bwt: float, last: float, ap: float) -> dict[str, float]:
    return {"last": last, "bwt": bwt, "ap": ap}


TABLES = {
    "main": PaperTable(
        "Qwen2.5-7B-Instruct; the mean of BLEU-4 over characters, ROUGE-L and an LLM judge.",
        "text_mean",
        {
            "seqft": _row(-13.36, 22.34, 25.39),
            "l2p": _row(1.85, 18.81, 21.15),
            "olora": _row(-10.46, 23.50, 33.98),
            "er": _row(-4.46, 32.22, 35.63),
            "gem": _row(-11.90, 25.93, 27.77),
            "ewc": _row(-8.75, 26.09, 32.70),
            "cppo": _row(-8.40, 25.89, 28.13),
            "lifealign": _row(0.91, 37.67, 36.43),
            "stl": {"last": 36.94},
            "mtl": {"last": 38.00},
        },
    ),
    "ablation": PaperTable(
        "Qwen2.5-7B-Instruct; BLEU-4 over characters.",
        "bleu4_char",
        {
            "er": {"last": 21.25, "bwt": -7.67},
            "slmc_only": {"last": 27.12, "bwt": -1.39},
            "fpo_only": {"last": 25.40, "bwt": -3.68},
            "lifealign": {"last": 29.14, "bwt": 0.02},
        },
    ),
}
