"""Scores of generated text against references, each over a whole evaluation set and on a scale of 0 to 100.

The libraries are imported on first use: nltk alone costs a noticeable part of a second, and most commands score no
text. None of them needs data of its own, so nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

TextMetric = Callable[[Sequence[str], Sequence[str]], float]


def bleu4_char(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The paper's BLEU-4, which is LLaMA-Factory's: sentence BLEU over *characters*, averaged over examples, ×100.

    Four n-gram orders in equal parts, NLTK's smoothing method 3, one reference an example, case and spaces kept.
    LLaMA-Factory also rounds each example to four decimals; we do not. Its figures lie far above word-level BLEU and
    must not be compared with it.

    Args:
        predictions, references: one string an example. An empty prediction scores 0, and so does an empty set.

    Raises:
        ValueError: the two have different lengths.
    """
    _check_lengths(predictions, references)
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method3
    return _mean_percent(
        # NLTK leaves a hypothesis without any n-gram to its smoothing; without text there is nothing to smooth.
        sentence_bleu([list(reference)], list(prediction), smoothing_function=smooth) if prediction else 0.0
        for prediction, reference in zip(predictions, references, strict=True)
    )


def sacrebleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The standard corpus BLEU of sacreBLEU: 13a tokens, case kept, exponential smoothing, one reference, 0 to 100.

    A corpus score: the n-gram counts of all examples are summed before anything is divided.

    Raises:
        ValueError: the two have different lengths.
    """
    _check_lengths(predictions, references)
    if not any(prediction.strip() for prediction in predictions):
        return 0.0
    from sacrebleu.metrics import BLEU

    # force: generations often end in " .", and sacreBLEU would warn about tokenised input at every evaluation.
    return float(BLEU(force=True).corpus_score(list(predictions), [list(references)]).score)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, averaged over examples, ×100.

    Google's rouge-score, ``rougeL`` (the whole text as one sequence), without stemming. Its words are runs of a–z and
    0–9 after lower-casing, so text in another script scores 0.

    Raises:
        ValueError: the two have different lengths.
    """
    _check_lengths(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return _mean_percent(
        scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure
        for prediction, reference in zip(predictions, references, strict=True)
    )


TEXT_METRICS: dict[str, TextMetric] = {"bleu4_char": bleu4_char, "sacrebleu": sacrebleu, "rouge_l": rouge_l}


def _check_lengths(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")


def _mean_percent(scores: Iterable[float]) -> float:
    values = [float(score) for score in scores]
    return 100.0 * sum(values) / len(values) if values else 0.0
