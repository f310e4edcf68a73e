"""Demonstration assets that ship with LifeAlign: a tiny chat model and six small preference domains."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

#: Folder of the tiny causal language model (weights, tokenizer, chat template), see ``build_model``.
TINY_MODEL = _HERE / "tiny"
#: Folder with one sub-folder a task, each holding ``train.jsonl`` and ``test.jsonl``, see ``build_domains``.
SIX_DOMAINS = _HERE / "six_domains"
