"""Rows through the ``datasets`` library: Parquet files and the Hugging Face hub."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lifealign.data.options import HubSource
from lifealign.data.rows import Rows
from lifealign.errors import UserError, library_line

HOLD_OUT_SEED = 0  # not the run's seed: every run must be scored on the same held-out rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Rows of one Parquet file. Raises UserError where it is none."""
    import datasets  # takes a second to import, which a run on JSON files need not wait for

    # A cache of its own, thrown away: the shared one knows a file by its date and would miss a quick change.
    with _quiet(datasets), tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except Exception as error:  # datasets wraps whatever pyarrow raised in errors of its own; texts may be no UTF-8
            raise UserError(f"{path}: not a Parquet file ({library_line(error.__cause__ or error)})") from error


def read_hub(source: HubSource) -> tuple[Rows, Rows]:
    """Training and held-out rows of a hub data set. Raises UserError where it cannot be had."""
    train = _load(source, source.train_split)
    if source.eval_split is None:
        return hold_out(train, source.eval_share)
    return train, _load(source, source.eval_split)


def hold_out(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """``rows`` without, and only, a fixed random ``share`` of them; both keep the order and the row numbers."""
    count = len(rows.items)
    size = round(count * share)
    if not 0 < size < count:
        raise UserError(
            f"{rows.source}: hub.eval_share={share} of {count} rows leaves nothing to "
            f"{'train on' if size else 'evaluate on'}; give a share between 0 and 1"
        )
    held = set(random.Random(HOLD_OUT_SEED).sample(range(count), size))
    parts = ([n for n in range(count) if n not in held], sorted(held))
    train, test = (Rows(rows.source, rows.split, [rows.items[n] for n in part], part) for part in parts)
    return train, test


def _load(source: HubSource, split: str) -> Rows:
    import datasets

    options = {key: getattr(source, key) for key in ("name", "revision", "data_dir", "data_files")}
    place = "/".join(filter(None, (source.path, source.name or source.data_dir)))
    with _quiet(datasets):
        try:
            items = datasets.load_dataset(source.path, split=split, **options).to_list()
        except Exception as error:  # no network, no such data set, configuration, split or right: a dozen classes
            raise UserError(
                f"hub data set '{place}', split '{split}': {library_line(error)}; check the name and the network, "
                f"or give local files with data.hub=false data.root=FOLDER"
            ) from error
    if not items:
        raise UserError(f"hub data set '{place}', split '{split}': no rows")
    return Rows(f"{place} [{split}]", split, items, range(len(items)))


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars of ``datasets`` while rows are read; what the program had set comes back."""
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
