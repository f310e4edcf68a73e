"""Log-probabilities of many pairs without training, spread over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lifealign.data.batch import Row, collate, length_buckets
from lifealign.data.tokenize import Pair
from lifealign.models.base_hash import base_hash
from lifealign.models.options import CacheOptions
from lifealign.models.policy import Policy
from lifealign.models.reference_cache import ReferenceCache, reference_folder
from lifealign.runtime import distributed
from lifealign.runtime.signals import between_batches


def pair_row(pair: Pair) -> Row:
    return Row(pair.prompt, (pair.chosen, pair.rejected))


PORTION = 4096
"""Pairs that are scored before the cache is told: what a run has to compute again that was ended meanwhile."""


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
    rows = [policy.prefixed(pair_row(pair)) for pair in pairs]
    buckets = list(length_buckets([row.length for row in rows], batch_size))
    world = distributed.world_size()
    was_training = module.training
    module.eval()
    mine: list[tuple[list[int], torch.Tensor]] = []
    for start in range(0, len(buckets), world):
        between_batches()
        number = start + distributed.rank()
        bucket = buckets[min(number, len(buckets) - 1)]  # a rank without work repeats the last batch and drops it
        batch = collate([rows[i] for i in bucket], layout=policy.layout, pad_token_id=pad_token_id)
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


class ReferenceCounts(NamedTuple):
    """What :meth:`ReferenceLogps.ensure` did: pairs asked for; of these, read from disk, and computed."""

    needed_pairs: int
    cached_pairs: int
    computed_pairs: int


class ReferenceLogps:
    """Log-probabilities under the base without its adapter, held for every pair of a run.

    The reference never changes, so they serve every stage, epoch, replay and evaluation, and through the cache on disk other
    runs. They are part of a checkpoint: a resumed run then reads the very numbers that the interrupted one used.

    Args:
        cache: the cache on disk; None for none. The base is hashed when the first pair is missing, and only then.
    """

    def __init__(self, cache: CacheOptions | None = None) -> None:
        self._known: dict[bytes, torch.Tensor] = {}
        self._options = cache if cache is not None and cache.enabled else None
        self.base: str | None = None  # hash of the base, once it has been asked for
        self._cache: ReferenceCache | None = None  # on rank 0, likewise

    def ensure(
        self, module: nn.Module, policy: Policy, pairs: Sequence[Pair], *, batch_size: int, pad_token_id: int
    ) -> ReferenceCounts:
        """Read or compute what is not known yet, on every rank alike."""
        missing = {key: pair for pair in pairs if (key := pair_key(pair)) not in self._known}
        found = self._cached(policy, missing) if missing else {}
        self._known.update(found)
        left = [key for key in missing if key not in found]
        for start in range(0, len(left), PORTION):
            keys = left[start : start + PORTION]
            with policy.without_adapter():
                some = [missing[key] for key in keys]
                scores = score_pairs(module, policy, some, batch_size=batch_size, pad_token_id=pad_token_id)
            self._known.update(zip(keys, scores, strict=True))
            if self._cache is not None:
                sound = torch.isfinite(scores).all(dim=1)  # what went wrong once must not come back in every run
                self._cache.add([key for key, good in zip(keys, sound, strict=True) if good], scores[sound].numpy())
        return ReferenceCounts(len(pairs), len(found), len(left))

    def identify(self, policy: Policy) -> str:
        """The hash of the base, which is read once. Call on every rank."""
        if self.base is None:
            self.base = base_hash(policy)
        return self.base

    def _cached(self, policy: Policy, missing: Mapping[bytes, Pair]) -> dict[bytes, torch.Tensor]:
        """What the cache holds of the missing pairs. Rank 0 reads for all: what is left is computed by all ranks together."""
        if self._options is None:
            return {}
        base = self.identify(policy)
        if self._cache is None and distributed.is_main():
            about = {"model": policy.base.name_or_path, "dtype": str(policy.dtype).removeprefix("torch.")}
            about["device"] = distributed.device().type
            folder, limit = reference_folder(self._options.dir), self._options.max_mib * 2**20
            self._cache = ReferenceCache(folder, base, limit, about)
        found = self._cache.lookup(missing) if self._cache is not None else None
        return {key: torch.tensor(logps) for key, logps in distributed.broadcast_object(found).items()}

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
