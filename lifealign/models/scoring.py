"""Log-probabilities of many pairs without training, spread over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lifealign.data.batch import Row, collate, length_buckets
from lifealign.data.tokenize import Pair
from lifealign.models.policy import Policy
from lifealign.runtime import distributed


def pair_row(pair: Pair) -> Row:
    return Row(pair.prompt, (pair.chosen, pair.rejected))


@torch.no_grad()
def score_pairs(
    module: nn.Module, policy: Policy, pairs: Sequence[Pair], *, batch_size: int, pad_token_id: int
) -> torch.Tensor:
    """(pairs, 2) float32 log-probabilities of the chosen and the rejected response, on the CPU of every rank.

    Batches hold pairs of like length and go to ranks in turn. Every rank runs the same number of them, since a
    partitioned model (ZeRO-3) can only be called by all ranks at once.

    Args:
        module: the policy, or the engine around it.
        policy: the policy itself, for its row layout.
    """
    buckets = list(length_buckets([pair_row(p).length for p in pairs], batch_size))
    world = distributed.world_size()
    was_training = module.training
    module.eval()
    mine: list[tuple[list[int], torch.Tensor]] = []
    for start in range(0, len(buckets), world):
        number = start + distributed.rank()
        bucket = buckets[min(number, len(buckets) - 1)]  # a rank without work repeats the last batch and drops it
        batch = collate([pair_row(pairs[i]) for i in bucket], layout=policy.layout, pad_token_id=pad_token_id)
        logps = module(batch.to(distributed.device())).view(-1, 2).cpu()
        if number < len(buckets):
            mine.append((bucket, logps))
    module.train(was_training)
    scores = torch.empty(len(pairs), 2)
    for share in distributed.gather_objects(mine):
        for bucket, logps in share:
            scores[bucket] = logps
    return scores


def pair_key(pair: Pair) -> bytes:
    """What a pair's reference log-probabilities depend on, besides the base: its token ids. 32 bytes."""
    digest = hashlib.sha256()
    for ids in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.digest()


class ReferenceLogps:
    """Log-probabilities under the base without its adapter, computed once for each pair of a run.

    The reference never changes, so they serve every stage, epoch, replay and evaluation. They are part of a checkpoint:
    a resumed run then reads the very numbers that the interrupted one computed.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, torch.Tensor] = {}

    def ensure(self, module: nn.Module, policy: Policy, pairs: Sequence[Pair], *, batch_size: int, pad_token_id: int) -> int:
        """Compute what is not known yet, on every rank alike; returns how many pairs that were."""
        missing = list({pair_key(p): p for p in pairs if pair_key(p) not in self._known}.items())
        if missing:
            with policy.without_adapter():
                scores = score_pairs(module, policy, [p for _, p in missing], batch_size=batch_size, pad_token_id=pad_token_id)
            self._known.update(zip((key for key, _ in missing), scores, strict=True))
        return len(missing)

    def of(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """(pairs, 2) float32, chosen first. Raises KeyError for a pair that was never computed."""
        return torch.stack([self._known[pair_key(p)] for p in pairs])

    def state_dict(self) -> dict[str, torch.Tensor]:
        keys = b"".join(self._known)
        return {
            "keys": torch.from_numpy(np.frombuffer(keys, dtype=np.uint8).reshape(-1, 32).copy()),
            "logps": torch.stack(list(self._known.values())) if self._known else torch.empty(0, 2),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        keys = (row.tobytes() for row in state["keys"].numpy())
        self._known = dict(zip(keys, state["logps"], strict=True))
