"""What a user may say about the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from lifealign.data.batch import RowLayout
from lifealign.errors import UserError
from lifealign.models.reference_cache import DEFAULT_MAX_MIB


class BaseDtype(Enum):
    """Dtype of the frozen base; the adapter is float32 whatever this says."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantization(Enum):
    """How the frozen base's linear layers are held: in ``model.dtype``, or in 4 bits by bitsandbytes."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"


@dataclass
class LoraOptions:
    """``model.lora.*``."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.lora.r={self.r}: must be at least 1")
        if self.alpha < 1:
            raise UserError(f"model.lora.alpha={self.alpha}: must be at least 1")
        if not self.target_modules:
            raise UserError("model.lora.target_modules=[]: name at least one linear layer, such as q_proj")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout={self.dropout}: must lie in [0, 1)")


@dataclass
class ModelOptions:
    """``model.*``: the base, in which precision it is held, and what is trained on it."""

    name: str = "custom"
    path: str = MISSING  # folder, hub name, or "bundled" for the demonstration model shipped with the package
    dtype: BaseDtype = BaseDtype.float32
    quantization: Quantization = Quantization.none  # with 4 bits, dtype is that of everything else and of the arithmetic
    row_layout: RowLayout = RowLayout.auto
    gradient_checkpointing: bool = False  # recompute activations in backward: slower, and far less memory
    trust_remote_code: bool = False  # run code that comes with the model; a line says so
    lora: LoraOptions = field(default_factory=LoraOptions)


@dataclass
class CacheOptions:
    """``cache.*``: reference log-probabilities on disk."""

    enabled: bool = True
    dir: str | None = None  # None: $LIFEALIGN_CACHE, else $XDG_CACHE_HOME/lifealign, else ~/.cache/lifealign
    max_mib: int = DEFAULT_MAX_MIB  # of all bases together

    def __post_init__(self) -> None:
        if self.max_mib < 1:
            raise UserError(f"cache.max_mib={self.max_mib}: must be at least 1; cache.enabled=false switches the cache off")
