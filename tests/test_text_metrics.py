"""Text metrics against oracles written here from the definitions, not from the libraries under test."""

from __future__ import annotations

import math
import random
import time
from collections import Counter

import pytest

from lifealign.evaluation.text import TEXT_METRICS, bleu4_char, rouge_l, sacrebleu


def clipped_precision(prediction: str, reference: str, order: int) -> tuple[int, int]:
    """How many character n-grams of the prediction the reference accounts for, and how many there are (at least 1)."""
    grams = [Counter(text[k : k + order] for k in range(len(text) - order + 1)) for text in (prediction, reference)]
    return sum((grams[0] & grams[1]).values()), max(1, sum(grams[0].values()))


def bleu_oracle(prediction: str, reference: str) -> float:
    """BLEU with the NIST smoothing: the k-th order without a match counts 1/2^k matches instead of none."""
    product, halvings = 1.0, 0
    for order in range(1, 5):
        hits, total = clipped_precision(prediction, reference, order)
        if hits == 0:
            if order == 1:
                return 0.0
            halvings += 1
        product *= (hits or 0.5**halvings) / total
    brevity = min(1.0, math.exp(1 - len(reference) / len(prediction)))
    return 100 * brevity * product**0.25


def test_bleu_by_hand() -> None:
    """ "abcd" against "abce": 3 of 4 characters, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruple, smoothed to 1/2.

    No brevity penalty. BLEU = (3/4 · 2/3 · 1/2 · 1/2)^(1/4) = (1/8)^(1/4) = 0.59460.
    """
    assert bleu4_char(["abcd"], ["abce"]) == pytest.approx(100 * 0.125**0.25, abs=1e-9)
    assert bleu_oracle("abcd", "abce") == pytest.approx(100 * 0.125**0.25, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("the cat sat on the mat", "a cat is on the mat"),
        ("cat", "the cat sat"),
        ("aab", "aba cab"),
        ("今天天气很好", "今天的天气好"),
        ("xyz", "abc"),
        ("Same text.", "Same text."),
    ],
)
def test_bleu_agrees_with_ngram_counts(prediction: str, reference: str) -> None:
    assert bleu4_char([prediction], [reference]) == pytest.approx(bleu_oracle(prediction, reference), abs=1e-9)


def test_bleu_is_the_mean_over_examples() -> None:
    pairs = [("abcd", "abce"), ("cat", "the cat sat"), ("", "anything")]
    expected = (bleu_oracle(*pairs[0]) + bleu_oracle(*pairs[1]) + 0.0) / 3
    assert bleu4_char([p for p, _ in pairs], [r for _, r in pairs]) == pytest.approx(expected, abs=1e-9)


def test_rouge_l_by_hand() -> None:
    """The longest common subsequence of "the cat sat on the mat" (6 words) and "the mat has a cat on it" (7).

    It is "the cat on", 3 words. P = 3/6, R = 3/7, F1 = 2·3/(6 + 7) = 6/13. The second example, all equal
    but for case and the full stop, scores 1; the mean is (6/13 + 1)/2.
    """
    predictions = ["the cat sat on the mat", "Yes, sure."]
    references = ["the mat has a cat on it", "yes sure"]
    assert rouge_l(predictions, references) == pytest.approx(100 * (6 / 13 + 1) / 2, abs=1e-9)


def test_rouge_l_does_not_stem() -> None:
    assert rouge_l(["cats"], ["cat"]) == 0.0


def test_sacrebleu_is_a_corpus_score() -> None:
    """Tokens "a b c d e" against "a b c d f", and "g h i j" against itself; counts are summed before dividing.

    Orders 1–4: (4 + 4)/(5 + 4), (3 + 3)/(4 + 3), (2 + 2)/(3 + 2), (1 + 1)/(2 + 1); lengths are equal.
    """
    expected = 100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25
    assert sacrebleu(["a b c d e", "g h i j"], ["a b c d f", "g h i j"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_empty_text_scores_zero(name: str) -> None:
    metric = TEXT_METRICS[name]
    assert metric([""], ["something"]) == 0.0
    assert metric(["", " "], ["", "x"]) == 0.0
    assert metric(["something"], [""]) == 0.0
    assert metric([], []) == 0.0
    assert metric(["", "a b c d"], ["x", "a b c d"]) > 0.0


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_lengths_must_match(name: str) -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        TEXT_METRICS[name](["a"], ["a", "b"])


def test_sixty_generations_score_at_once() -> None:
    draw = random.Random(0)
    words = ["sure", "the", "answer", "is", "not", "known", "because", "people", "differ", "here"]
    texts = [" ".join(draw.choices(words, k=40))[:200] for _ in range(120)]
    for metric in TEXT_METRICS.values():
        metric(texts[:1], texts[60:61])  # the import of its library is not what is measured
    start = time.process_time()
    for metric in TEXT_METRICS.values():
        assert 0 < metric(texts[:60], texts[60:]) < 100
    assert time.process_time() - start < 2.0
