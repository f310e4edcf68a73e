"""The process group: who is here, and the few exchanges that the framework needs.

Every launcher is accepted: ``deepspeed``, ``torchrun`` and plain ``python`` (a group of one).
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from lifealign.runtime.options import GIVEN_UP

TIMEOUT = timedelta(seconds=GIVEN_UP)

BUCKET_ELEMENTS = 1 << 20  # of one message, 4 MiB in float32, unless a tensor is larger


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start() -> None:
    """Join the process group; does nothing when this process has joined already (the later jobs of a sweep)."""
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, **_rendezvous())


def _rendezvous() -> dict[str, Any]:
    """How the ranks find each other.

    The deepspeed launcher hands the same port to every launch, so two launches on one machine would meet in one group.
    On a single node the ranks need no port: they are children of one launcher, and meet in a file named after it.
    """
    here = {"rank": rank(), "world_size": world_size(), "timeout": TIMEOUT}
    if world_size() == 1:
        return {"store": dist.HashStore(), **here}
    launched_by_deepspeed = "CROSS_SIZE" in os.environ
    if launched_by_deepspeed and os.environ["CROSS_SIZE"] == "1":
        launcher = psutil.Process(os.getppid())
        name = f"lifealign-{launcher.pid}-{launcher.create_time():.2f}.store"
        return {"store": dist.FileStore(str(Path(tempfile.gettempdir()) / name), world_size()), **here}
    return {"init_method": "env://", "timeout": TIMEOUT}


def stop() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_all(tensors: Sequence[torch.Tensor], source: int) -> None:
    """Set tensors of one dtype and device, in place, to what rank ``source`` holds; small ones share a message."""
    if world_size() == 1:
        return
    for bucket in _buckets(tensors, BUCKET_ELEMENTS):
        if len(bucket) == 1:
            dist.broadcast(bucket[0], source)
            continue
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.broadcast(flat, source)
        if source != rank():
            for tensor, value in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(value.view_as(tensor))


def _buckets(tensors: Sequence[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Runs of tensors with ``most`` elements together, or one with more."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > most:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def failing_together(*kinds: type[Exception]) -> Iterator[None]:
    """Inside, an error of these kinds on any rank is raised on all of them, at the end: none may wait for one that stopped."""
    own: Exception | None = None
    try:
        yield
    except kinds as error:
        own = error
    for error in gather_objects(own):
        if error is not None:
            raise error


_waits = itertools.count()  # so that each wait has a name of its own


@contextmanager
def waiting_for_main(poll_seconds: float = 0.5) -> Iterator[None]:
    """Inside, rank 0 may work for longer than a collective waits: the others wait for its end outside of any."""
    done = f"rank 0 is done with {next(_waits)}"
    try:
        yield
    finally:
        if world_size() > 1:
            store = dist.distributed_c10d._get_default_store()
            if is_main():
                store.set(done, "yes")
            while not store.check([done]):
                time.sleep(poll_seconds)


def all_come(place: str, seconds: float) -> bool:
    """Whether every rank calls this with the same words, once, within some seconds of this one.

    No collective: ranks may ask that have left one in which others still wait.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"{place}, rank {rank()}", "here")
        store.wait([f"{place}, rank {number}" for number in range(world_size())], timedelta(seconds=seconds))
    except RuntimeError:  # time is up, or the rank that keeps the store has gone; stores have no other kind of error in common
        return False
    return True


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values
