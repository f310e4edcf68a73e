"""Log-probability of each response, from its hidden states and the output head.

``impl="reference"`` materialises the logits of every token; ``impl="chunked"`` never holds more than a few rows of them;
``impl="triton"`` never writes them to memory. Beside it :func:`focal_preference_loss`, from log-probabilities to the loss.
"""

from __future__ import annotations

import torch

from .chunked import chunked_sequence_logps
from .dispatch import choose_triton
from .loss import FocalLoss, focal_preference_loss
from .reference import reference_sequence_logps

__all__ = ["FocalLoss", "focal_preference_loss", "sequence_logps"]

IMPLEMENTATIONS = {"reference": reference_sequence_logps, "chunked": chunked_sequence_logps}  # on every device


def sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Summed log-probability of each sequence: ``logp[s] = sum over tokens t of s of log softmax(W h_t + b)[y_t]``.

    Args:
        hidden: (tokens, d) hidden state that predicts each target, in any floating dtype.
        weight: (vocab, d) output head, in the dtype of ``hidden``.
        targets: (tokens,) int64 token to be predicted, in [0, vocab).
        sequence_ids: (tokens,) int64 sequence of each token, in [0, num_sequences).
        num_sequences: length of the result; a sequence without tokens has log-probability 0.
        bias: (vocab,) bias of the head.
        softcap: logits z become ``softcap * tanh(z / softcap)`` (Gemma 2).
        impl: "reference", "chunked" or "triton"; None picks for the device at hand: "triton" on CUDA where it is installed
            and takes the dtype, "chunked" elsewhere.

    Returns:
        (num_sequences,) float32 (float64 for float64 input), differentiable in ``hidden``, and in ``weight`` and ``bias``
        where they require grad. Log-sum-exp and sums are taken in that dtype whatever the dtype of ``hidden``.

    Raises:
        ValueError: for shapes that do not agree, an unknown ``impl``, or "triton" where it cannot run.
    """
    tokens, width = hidden.shape
    if weight.shape[1] != width or targets.shape != (tokens,) or sequence_ids.shape != (tokens,):
        shapes = [tuple(x.shape) for x in (hidden, weight, targets, sequence_ids)]
        raise ValueError(f"hidden (n, d), weight (v, d), targets (n,), sequence_ids (n,) expected, got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of shape ({weight.shape[0]},) expected, got {tuple(bias.shape)}")
    if choose_triton(hidden, impl):
        from .fused import triton_sequence_logps  # triton need not be installed

        return triton_sequence_logps(hidden, weight, targets, sequence_ids, num_sequences, bias, softcap)
    name = impl or "chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl={name!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}, triton")
    return IMPLEMENTATIONS[name](hidden, weight, targets, sequence_ids, num_sequences, bias, softcap)
