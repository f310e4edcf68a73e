"""What every command shares: arguments made fit for Hydra, users' mistakes told in one line, exit codes.

Exit 0: the work was done. 2: a user's mistake, told in one line on standard error. 3: training diverged. 130 and 143: a run was
stopped by SIGINT or SIGTERM and is saved. 1: anything else; with its traceback, unless it is a failure that a line tells of.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import Signals
from typing import NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lifealign.conf
from lifealign import sweep
from lifealign.composition import calls_refused, refuse_packages
from lifealign.config import Config
from lifealign.data.options import SequenceOptions
from lifealign.environment import prepare_process
from lifealign.errors import (
    DIVERGED,
    FAILURES,
    SIGNALLED,
    Interrupted,
    TrainingDiverged,
    UserError,
    did_you_mean,
    printable,
    yaml_line,
)
from lifealign.runtime import distributed
from lifealign.runtime.terminal import console

KNOWN = (UserError, *FAILURES, PermissionError, HydraException, OmegaConfBaseException, yaml.YAMLError)
"""What is told in one line."""

FREE_KEYS = ("zero.settings.", "evaluation.judge.rubrics.")
"""Beginnings of keys that a user may add."""

GRACE_SECONDS = 10.0
"""How long other ranks leave rank 0 to tell the user what is wrong: a launcher ends all ranks when the first one exits."""


def conf_dir() -> Path:
    """The folder of configuration files, in a checkout and in an installed package alike."""
    return Path(lifealign.conf.__file__).parent


AfterSweep = Callable[[Path, Sequence[sweep.Ended]], object]
"""Called on rank 0 with the folder of a sweep and how each of its jobs ended."""


class _SweepStopped(BaseException):
    """No further job may start; holds the exit code. Not an ``Exception``: Hydra keeps those of a job and starts the next."""


def hydra_command(
    task: Callable[[DictConfig], object], after_sweep: AfterSweep | None = None, *, leaves_notes: bool = True
) -> None:
    """Compose the configuration from ``sys.argv`` and call ``task`` with it, once, or once a job of a sweep.

    A job of a sweep that fails leaves the jobs after it to run; the exit code tells of it. Without ``leaves_notes`` a sweep
    is gone through and leaves nothing, so that one which was trained there keeps its notes.
    """
    with exit_codes() as codes:
        sweep.Beginning.folder = None  # a process may have gone through one before, as tests do
        sys.argv = [sys.argv[0], *prepare_arguments(sys.argv[1:])]
        if not leaves_notes:
            sys.argv = [sys.argv[0], *_with_overrides(sys.argv[1:], f"hydra.sweep.dir={_nowhere()}")]
        parser = get_args_parser()
        parser.error = _refuse_arguments  # type: ignore[method-assign]  as below
        given = parser.parse_args()
        keys = sweep.swept_keys(given.overrides)
        _refuse_processes_apart(sys.argv[1:])
        refuse_packages(sys.argv[1:])
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as they are
        here = os.getpid()
        failed: list[Exception] = []  # outside of a sweep; told once Hydra is left, as any other mistake

        def job(composed: DictConfig) -> object:
            if os.getpid() != here:  # some launchers start a process for a job
                prepare_process()
            with sweep.job(keys) as current:
                try:
                    check_keys(composed)
                    result = task(composed)
                except Exception as error:  # kept from Hydra, which would print more than a line and end the sweep
                    if current is not None:
                        _tell_of_job(error, current)
                    elif isinstance(error, KNOWN):
                        failed.append(error)
                    else:
                        raise
                    return None
                if current is not None:
                    sweep.note(current, 0, None)
                    if current.stop is not None:
                        line = f"stopped by {Signals(current.stop).name} after job {current.number}; the same command goes on"
                        _print_error(Interrupted(line, current.stop))
                        raise _SweepStopped(SIGNALLED + current.stop)
                return result

        try:
            with calls_refused():
                hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
        except _SweepStopped as stopped:
            codes.append(stopped.args[0])
        else:
            if failed:
                raise failed[0]
            if sweep.Beginning.folder is not None and distributed.is_main():
                codes += _end_sweep(sweep.Beginning.folder, after_sweep)


def _refuse_processes_apart(arguments: Sequence[str]) -> None:
    """Raises UserError where several ranks would each start, or search with, processes of their own."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("hydra/launcher", "hydra/sweeper") and value != "basic" and distributed.world_size() > 1:
            raise UserError(f"{argument} does not go with several ranks: start the sweep with plain python")


def _tell_of_job(error: Exception, job: sweep.Job) -> None:
    """Say why a job of a sweep failed, and take note of it.

    Raises:
        _SweepStopped: where no job may follow, because a signal asked for an end. A rank that failed alone ends here, since the
            others wait for it within the job.
    """
    known = isinstance(error, KNOWN)
    together = distributed.all_come(f"failure of job {job.number}", GRACE_SECONDS)
    if known:
        _print_error(error, alone=not together)
    elif distributed.is_main() or not together:
        traceback.print_exception(error)
    sweep.note(job, exit_code(error), one_line(error) if known else f"{type(error).__name__}: {error}")
    if isinstance(error, Interrupted):
        raise _SweepStopped(exit_code(error))
    if not together:
        told = "failed alone, and the others wait for it: the sweep ends here, and the same command goes on"
        print(f"error: rank {distributed.rank()} {told}", file=sys.stderr, flush=True)
        _end_alone(exit_code(error))


def _end_sweep(folder: Path, after_sweep: AfterSweep | None) -> list[int]:
    """Close a sweep, on rank 0. Returns the exit codes of jobs that failed."""
    ended = sweep.read_ended(folder)
    failed = [job.exit_code for job in ended if job.exit_code]
    if after_sweep is not None:
        after_sweep(folder, ended)
    if failed:
        console.print(f"{len(failed)} of {len(ended)} jobs failed; {folder / sweep.JOBS} says which and why", markup=False)
    return failed


def exit_code(error: Exception) -> int:
    """The code with which a command that met an error exits."""
    if isinstance(error, Interrupted):
        return SIGNALLED + error.signal
    if isinstance(error, TrainingDiverged):
        return DIVERGED
    return 2 if isinstance(error, KNOWN) and not isinstance(error, FAILURES) else 1


@contextmanager
def exit_codes() -> Iterator[list[int]]:
    """Inside, known mistakes are told in one line; on leaving, the process exits with the code they ask for, if any.

    Yields a list to which the codes of failures that have been told already are added.
    """
    codes: list[int] = []
    together = True
    try:
        yield codes
    except KNOWN as error:
        codes.append(exit_code(error))
        _print_error(error)
        # A failure is met by all, of whom rank 0 may take long to close what it tells of the run elsewhere.
        together = isinstance(error, FAILURES) or distributed.all_come("the end", GRACE_SECONDS)
        if not together and not distributed.is_main():
            _print_error(error, alone=True)
    except Exception:
        if distributed.world_size() == 1:
            raise
        traceback.print_exc()  # now: what follows may take long
        codes.append(1)
        together = distributed.all_come("the end", GRACE_SECONDS)
    finally:
        if together:
            distributed.stop()
    if codes:
        code = max(codes) if max(codes) > SIGNALLED else min(codes)  # a signal first, then 1, 2, 3
        if not together:
            _end_alone(code)
        if not distributed.is_main():
            time.sleep(GRACE_SECONDS)
        sys.exit(code)


def _end_alone(code: int) -> NoReturn:
    """End this rank where others are at work. Over nccl, leaving the group could wait for ranks that wait for this one."""
    if not distributed.is_main():
        time.sleep(GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_error(error: Exception, *, alone: bool = False) -> None:
    """What all ranks met, rank 0 tells; a rank that met it ``alone`` tells it itself."""
    if distributed.is_main() or alone:
        place = "" if distributed.is_main() else f"rank {distributed.rank()}: "
        print(f"error: {place}{printable(one_line(error))}", file=sys.stderr, flush=True)


def _refuse_arguments(message: str) -> NoReturn:
    raise UserError(f"{message}; --help says what there is")


def prepare_arguments(arguments: Iterable[str]) -> list[str]:
    """Take out what Hydra would refuse, and let ``sequence=x`` mean ``+sequence=x``.

    - launchers add ``--local_rank=N``, ``--local-rank=N`` or either with the number apart;
    - ``sequence`` is not in the defaults list, the other groups are: users need not know which takes a ``+``;
    - nor which key is new to a mapping that may hold any, and so takes one, too;
    - Hydra takes overrides on one side of ``-m`` only;
    - ``zero=2`` would reach Hydra as a number, and presets have names;
    - what Hydra itself writes, ranks other than 0 write to a folder that nobody reads.
    """
    prepared = [_group_override(argument) for argument in without_local_rank(arguments)]
    prepared.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    if not distributed.is_main():
        return _with_overrides(prepared, f"hydra.run.dir={_nowhere()}", f"hydra.sweep.dir={_nowhere()}")
    return prepared


def _with_overrides(arguments: Sequence[str], *more: str) -> list[str]:
    """Arguments with overrides that beat those among them, and stand behind these: Hydra takes overrides in one place only."""
    own = [place for place, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-")]
    end = own[-1] + 1 if own else len(arguments)
    return [*arguments[:end], *more, *arguments[end:]]


def _nowhere() -> Path:
    """A folder that nobody reads; each user of a machine has one."""
    return Path(tempfile.gettempdir()) / f"lifealign-unread-{os.getuid()}"


def without_local_rank(arguments: Iterable[str]) -> list[str]:
    """Arguments without what a launcher adds; the rank it names goes where everybody looks for it."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", next(rest, "0"))
        elif argument.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", argument.split("=", 1)[1])
        else:
            kept.append(argument)
    return kept


def _group_override(argument: str) -> str:
    """The one spelling that Hydra takes of a group's override, or of a free key's; other arguments come back as they are."""
    if argument.lstrip("+").startswith(FREE_KEYS):
        return f"++{argument.lstrip('+')}"
    group, is_override, names = argument.removeprefix("+").partition("=")
    if not is_override or group not in group_names():
        return argument
    quoted = ",".join(f"'{name}'" if name.isdigit() else name for name in names.split(","))
    return f"{'+' if group == 'sequence' else ''}{group}={quoted}"


def group_names() -> set[str]:
    """The groups that a run is composed of; a study is made of runs, and ``hydra`` holds ways to start them."""
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir() and not path.name.startswith("_")}
    return folders - {"study", "hydra"}


def check_keys(composed: DictConfig) -> None:
    """Hydra accepts ``+anything=x``; we do not.

    Raises:
        UserError: naming a key that no part of the program reads, or the sequence that is missing.
    """
    for key in _undeclared(composed):
        raise UserError(f"'{key}' is no key of the configuration{did_you_mean(key, all_keys() | group_names())}")
    if OmegaConf.is_missing(composed, "sequence"):
        raise UserError(_no_sequence())
    for key in sorted(OmegaConf.missing_keys(composed)):
        raise UserError(f"{key} must be given: {key}=VALUE")


def _no_sequence() -> str:
    sequences = sorted(p.stem for p in (conf_dir() / "sequence").glob("*.yaml"))
    return f"no sequence of tasks was chosen; add +sequence=NAME; known: {', '.join(sequences)}"


def _undeclared(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted keys that stand in a node and not in its schema; a mapping without a schema may hold any."""
    schema = OmegaConf.get_type(node)
    for key in node:
        if dataclasses.is_dataclass(schema) and key not in schema.__dataclass_fields__:
            yield f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not (value._is_missing() or value._is_none()):
            yield from _undeclared(value, f"{prefix}{key}.")


def one_line(error: Exception) -> str:
    """What is wrong, where, and the nearest thing that would be right, in one line."""
    if isinstance(error, (UserError, *FAILURES)):
        return str(error)
    cause: BaseException = error
    # Of what goes wrong as presets are put together, Hydra names the file, and leaves the reason to the context.
    while isinstance(cause, HydraException) and (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        hint = did_you_mean(name, error.options or [])
        if group in ("hydra/launcher", "hydra/sweeper"):
            hint = "; pip install 'lifealign[sweep]' brings those for joblib, Slurm and optuna"
        return f"{group}={name}: there is no such preset{hint}" if group else f"no configuration named '{name}'{hint}"
    if isinstance(error, OverrideParseException):
        return f"the override {error.override!r} cannot be read; overrides are key=value, with Hydra's quoting"
    if isinstance(error, yaml.YAMLError):
        return yaml_line(error)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, ConfigCompositionException) or isinstance(cause, OmegaConfBaseException):
        preset = re.match(r"In '([^']+)'", first)
        return _composition_line(error, cause, first) + (f" (in {preset[1]}.yaml)" if preset else "")
    return first


def _composition_line(error: Exception, cause: BaseException, first: str) -> str:
    detail = str(cause).strip().splitlines()[0].rstrip(".")
    key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
    if "Missing mandatory value: sequence" in detail:
        return _no_sequence()
    if str(key).startswith("sequence.sources.") or "TaskSource" in detail:
        return "sequence.sources: a task is described in the YAML file of its sequence, such as conf/sequence/recurring.yaml"
    if "not in" in detail and str(key) in all_keys():
        return f"'{key}' is not an option of the {str(key).split('.')[0]} that was chosen"
    if "not in" in detail and key is not None:
        return f"'{key}' is no key of the configuration{did_you_mean(str(key), all_keys())}"
    if "No match in the defaults list" in first:
        word = first.split("'")[1]
        return f"'{word}' is no key of the configuration{did_you_mean(word, all_keys() | group_names())}"
    return f"{key}: {detail}" if key is not None and cause is not error else (detail if cause is not error else first)


def all_keys() -> set[str]:
    """Every dotted key of the schema, those of all registered components included."""
    keys = _dotted(OmegaConf.structured(Config))
    keys |= {f"sequence.{key}" for key in _dotted(OmegaConf.structured(SequenceOptions))}
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
