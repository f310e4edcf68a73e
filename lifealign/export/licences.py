"""Where a task's rows come from, and under which licence, as far as that is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from omegaconf import OmegaConf

import lifealign.conf
from lifealign.config import Config
from lifealign.errors import UserError

UNKNOWN = "not known"


def data_source(task: str, config: Config) -> tuple[str, str]:
    """Where the rows of a task come from, and their licence.

    Rows under ``data.root`` have the licence that ``ROOT/TASK/README.md``, or else ``ROOT/README.md``, states in its front
    matter (``license:``), as data sets of the Hugging Face hub do.
    """
    source = config.sequence.sources.get(task)
    owner = (source.of if source else None) or task
    known = _known()
    if config.data.root is not None:
        return f"files in {config.data.root}/{owner}", _stated(Path(config.data.root), owner)
    if config.data.hub:
        hub = config.sequence.sources[owner].hub
        assert hub is not None  # the run has read it
        return f"hub: {hub.path}", known["hub"].get(hub.path, UNKNOWN)
    return "the demonstration set that ships with lifealign", known["bundled"]


def _known() -> dict[str, Any]:
    """``conf/licences.yaml``."""
    path = Path(lifealign.conf.__file__).parent / "licences.yaml"
    return OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[return-value]


def _stated(root: Path, task: str) -> str:
    for page in (root / task / "README.md", root / "README.md"):
        if not page.is_file():
            continue
        try:
            stated = (metadata_load(page) or {}).get("license")
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{page}: its front matter cannot be read; mend it, or take it out") from error
        if stated:
            return ", ".join(stated) if isinstance(stated, list) else str(stated)
    return UNKNOWN
