"""Make a base, or find it made: read, tokenise, train, write, with a record of what went in and what came out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from lifealign.errors import UserError
from lifealign.models.reference_cache import reference_folder
from lifealign.pretrain.corpus import Corpus, fingerprint, pack, read_corpus
from lifealign.pretrain.loop import evaluate, split, train
from lifealign.pretrain.model import new_network, new_tokenizer, save
from lifealign.pretrain.options import PretrainOptions
from lifealign.runtime import distributed
from lifealign.runtime.files import check_writable, read_json, replace_folder, write_json
from lifealign.runtime.terminal import console

FORMAT = 1
"""Raised when the code comes to make another base from the same files and options."""

RECORD, WEIGHTS = "pretraining.json", "model.safetensors"


def make_base(texts: Sequence[Path], root: Path | None, to: Path | None, options: PretrainOptions) -> Path:
    """The folder of the base that these files and options make; where it stands already, nothing is done.

    ``to`` None: a folder of the cache, named after the hash of files and options.

    Raises:
        UserError: files that cannot be used, or something else stands at ``to``.
        TrainingDiverged: nothing is written.
    """
    texts = sorted(texts, key=lambda path: path.name)  # so that the order in which they are given makes no other base
    inputs = fingerprint(texts, root)
    key = hashlib.sha256(json.dumps([FORMAT, asdict(options), inputs], sort_keys=True).encode()).hexdigest()
    folder = reference_folder(None).with_name("bases") / key[:16] if to is None else to
    if not _stands(folder, key):
        check_writable(folder.parent, "--to")
        corpus = read_corpus(texts, root, options.skip_train)
        if not corpus.words():
            raise UserError(
                f"--skip-train {options.skip_train}: no document is left: no task has a usable row of its own after those, and "
                "the texts are empty; skip fewer rows, or give more text"
            )
        _make(folder, corpus, options, {"key": key, "format": FORMAT, "options": asdict(options), "inputs": inputs})
    return folder


def _stands(folder: Path, key: str) -> bool:
    """Whether the base of this key is there, whole."""
    if not folder.exists():
        return False
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    if record.get("key") != key:
        raise UserError(f"--to {folder}: holds something else than these files and options make; name another folder")
    if not (folder / WEIGHTS).is_file() or record["weights_sha256"] != _weights_hash(folder):
        raise UserError(f"--to {folder}: its weights are not those that were made; remove the folder")
    return True


def _weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _make(folder: Path, corpus: Corpus, options: PretrainOptions, record: dict[str, Any]) -> None:
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    tokenizer = new_tokenizer(corpus.words(), options)
    rows = pack(corpus, tokenizer, options.block, generator)
    if len(rows) < 2:
        raise UserError(f"--block {options.block}: the files hold {rows.numel()} tokens in whole rows, two rows are needed")
    training, validation = split(rows, generator)
    model = new_network(tokenizer, options)
    size = f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary"
    console.print(f"{size}, {training.numel():,} tokens to train on", highlight=False)
    epochs = train(model, training, validation, options, generator)
    for weight in model.parameters():  # as they are written, and so what the record's loss is of; not the rotary frequencies
        weight.data = weight.data.to(torch.bfloat16).float()
    record |= _facts(corpus, model, training, validation, options, epochs)
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    save(model.bfloat16(), tokenizer, beside)
    record |= {"seconds": round(time.perf_counter() - started, 1), "weights_sha256": _weights_hash(beside)}
    write_json(beside / RECORD, record)
    replace_folder(beside, folder)


def _facts(
    corpus: Corpus,
    model: Qwen2ForCausalLM,
    training: torch.Tensor,
    validation: torch.Tensor,
    options: PretrainOptions,
    epochs: list[dict[str, float]],
) -> dict[str, Any]:
    """What the record says of the making. The last loss is that of the weights as they are written."""
    return {
        "documents": {source: len(found) for source, found in (corpus.texts | corpus.chats).items()},
        "left_out": corpus.left_out,
        "parameters": model.num_parameters(),
        "vocabulary": model.config.vocab_size,
        "training_tokens": training.numel(),
        "validation_tokens": validation.numel(),
        "tokens_seen": options.epochs * training.numel(),
        "steps": int(epochs[-1]["step"]),
        "epochs": epochs,
        "validation_loss": evaluate(model, validation, options.micro_batch),
        "device": distributed.device().type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
