"""What every command shares: arguments made fit for Hydra, users' mistakes told in one line, exit codes.

Exit 0: the work was done. 2: a user's mistake, told in one line on standard error. 1: anything else, with its traceback.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import hydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lifealign.conf
from lifealign.config import Config
from lifealign.errors import UserError, did_you_mean
from lifealign.runtime import distributed

GRACE_SECONDS = 10.0
"""How long other ranks wait for rank 0 to tell the user what is wrong, before they exit and the launcher ends everything."""


def conf_dir() -> Path:
    """The folder of configuration files, in a checkout and in an installed package alike."""
    return Path(lifealign.conf.__file__).parent


def run_command(task: Callable[[DictConfig], object]) -> None:
    """Compose the configuration from ``sys.argv`` and call ``task`` with it, once, or once a job of a sweep. Exits."""
    try:
        sys.argv = [sys.argv[0], *prepare_arguments(sys.argv[1:])]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as they are

        def checked(composed: DictConfig) -> object:
            check_keys(composed)
            return task(composed)

        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(checked)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _tell(one_line(error))
    finally:
        distributed.stop()


def _tell(message: str) -> None:
    """Rank 0 speaks; the others give it time to, since a launcher kills all ranks when the first of them exits."""
    if distributed.is_main():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)
    sys.exit(2)


def prepare_arguments(arguments: Iterable[str]) -> list[str]:
    """Take out what Hydra would refuse, and let ``sequence=x`` mean ``+sequence=x``.

    - launchers add ``--local_rank=N``, ``--local-rank=N`` or either with the number apart;
    - ``sequence`` is not in the defaults list, the other groups are: users need not know which takes a ``+``;
    - what Hydra itself writes, ranks other than 0 write to a folder that nobody reads.
    """
    prepared: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", next(rest, "0"))
        elif argument.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", argument.split("=", 1)[1])
        elif argument.startswith("sequence="):
            prepared.append("+" + argument)
        elif argument.startswith("+") and argument[1:].split("=")[0] in group_names() - {"sequence"}:
            prepared.append(argument[1:])
        else:
            prepared.append(argument)
    if not distributed.is_main():
        nowhere = Path(tempfile.gettempdir()) / f"lifealign-rank-{os.getpid()}"
        prepared += [f"hydra.run.dir={nowhere}", f"hydra.sweep.dir={nowhere}"]
    return prepared


def group_names() -> set[str]:
    return {path.name for path in conf_dir().iterdir() if path.is_dir() and not path.name.startswith("_")}


def check_keys(composed: DictConfig) -> None:
    """Hydra accepts ``+anything=x``; we do not.

    Raises:
        UserError: naming a key that no part of the program reads, or the sequence that is missing.
    """
    known = {f for f in Config.__dataclass_fields__}
    for key in composed:
        if key not in known:
            raise UserError(f"'{key}' is no key of the configuration{did_you_mean(str(key), known | group_names())}")
    if OmegaConf.is_missing(composed, "sequence"):
        sequences = sorted(p.stem for p in (conf_dir() / "sequence").glob("*.yaml"))
        raise UserError(f"no sequence of tasks was chosen; add +sequence=NAME; known: {', '.join(sequences)}")


def one_line(error: Exception) -> str:
    """What is wrong, where, and the nearest thing that would be right, in one line."""
    if isinstance(error, UserError):
        return str(error)
    cause: BaseException = error
    while isinstance(cause, HydraException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        hint = did_you_mean(name, error.options or [])
        return f"{group}={name}: there is no such preset{hint}" if group else f"no configuration named '{name}'{hint}"
    first = str(error).strip().splitlines()[0].rstrip(".")
    if isinstance(error, OverrideParseException):
        return f"the override {error.override!r} cannot be read: {first}"
    if isinstance(error, ConfigCompositionException) or isinstance(cause, OmegaConfBaseException):
        return _composition_line(error, cause, first)
    return first


def _composition_line(error: Exception, cause: BaseException, first: str) -> str:
    detail = str(cause).strip().splitlines()[0].rstrip(".")
    key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
    if "not in" in detail and key is not None:
        return f"'{key}' is no key of the configuration{did_you_mean(str(key), all_keys())}"
    if "No match in the defaults list" in first:
        word = first.split("'")[1]
        return f"'{word}' is no key of the configuration{did_you_mean(word, all_keys() | group_names())}"
    return f"{key}: {detail}" if key is not None and cause is not error else (detail if cause is not error else first)


def all_keys() -> set[str]:
    """Every dotted key of the schema, those of all registered components included."""
    from hydra.core.config_store import ConfigStore

    keys = _dotted(OmegaConf.structured(Config))
    for group, entries in ConfigStore.instance().repo.get("schema", {}).items():
        for entry in entries.values():
            keys |= {f"{group}.{key}" for key in _dotted(entry.node)}
    return keys


def _dotted(node: DictConfig, prefix: str = "") -> set[str]:
    keys = set()
    for key in node:
        keys.add(f"{prefix}{key}")
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not (value._is_missing() or value._is_none()):
            keys |= _dotted(value, f"{prefix}{key}.")
    return keys
