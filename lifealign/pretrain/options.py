"""What a user may say about the base that is made, and the two presets. The fields are the command's options."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lifealign.errors import UserError

LEAST_VOCABULARY = 259
"""All bytes and the three special tokens."""


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class PretrainOptions:
    """Everything that decides, with the files, which base is made. The defaults are the preset ``small``, for 2 CPU cores."""

    vocab_size: int = _option(4096, "tokens, at most, of the byte-level BPE that is trained on the same texts")
    hidden_size: int = _option(256, "width of the network")
    intermediate_size: int = _option(768, "width of its feed-forward layers")
    layers: int = _option(4, "transformer layers")
    heads: int = _option(4, "attention heads; they divide the width")
    block: int = _option(512, "tokens of a training row; documents are packed into rows of this length")
    batch: int = _option(8, "rows of an optimiser step")
    micro_batch: int = _option(2, "rows that go through the network at a time: memory and speed alone, but for rounding")
    epochs: int = _option(2, "times that every row is seen")
    lr: float = _option(3e-3, "peak learning rate of AdamW: warm-up over a twentieth of the steps, then cosine to a tenth")
    skip_train: int = _option(250, "usable training rows a task, the first of its file, that are left for the tasks")
    seed: int = _option(0, "order of documents and rows, validation rows, first weights")

    def __post_init__(self) -> None:
        for option in fields(self):
            least = {"vocab_size": LEAST_VOCABULARY, "block": 2, "skip_train": 0, "seed": 0}.get(option.name, 1)
            value = getattr(self, option.name)
            if option.name != "lr" and value < least:
                raise UserError(f"{flag(option.name)} {value}: must be at least {least}")
        if not 0 < self.lr < 1:
            raise UserError(f"--lr {self.lr}: must lie between 0 and 1")
        if self.hidden_size % (2 * self.heads):  # rotary embeddings turn pairs of a head's dimensions
            raise UserError(f"--hidden-size {self.hidden_size}: must be an even multiple of --heads {self.heads}")


def flag(name: str) -> str:
    """The command's spelling of a field: ``--skip-train`` of ``skip_train``."""
    return "--" + name.replace("_", "-")


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},  # 4.5 million parameters
    "gpu": {  # 126 million
        "vocab_size": 16384,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layers": 12,
        "heads": 12,
        "block": 1024,
        "batch": 64,
        "micro_batch": 16,
        "lr": 6e-4,
    },
}
"""Where each differs from the defaults."""
