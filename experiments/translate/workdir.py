"""The folder of a run: its configuration, its lock, its log, and how files are written to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from experiments.command_line import UsageError, check_folder
from experiments.files import unsealed, write_sealed
from experiments.translate.config import SWEPT, Config, group_of
from experiments.translate.environment import environment

Record = dict[str, Any]


# The files of a run that was killed while it started, or is starting.
_FIRST = re.compile(r"\.lock|config\.json(\..+)?")

# Orbax takes a path with these for a glob pattern.
_GLOB = re.compile(r"[*?\[]")

# Groups of flags that may differ from those of the training.
_FREE = ("Decoding", "Output", "After training")

# The field with the mark of a run.
MARK = "run"

# Seconds after which a file that one host wrote is seen by the others.
_SHARED_WITHIN = 10.0

# What to do about a damaged file.
LOST = "restore it from a copy, or train again in another --workdir."


class Owner(Protocol):
    """What a folder belongs to: a run, or a sweep of runs."""

    @property
    def directory(self) -> Path:
        """Its folder."""
        ...

    @property
    def identity(self) -> Record:
        """The values, as in JSON, that must be the same for every command in the folder."""
        ...


def is_first() -> bool:
    """Whether this process writes the files of a run: it is process 0, or the only one."""
    import jax

    return jax.process_index() == 0


def check(owner: Owner) -> None:
    """Refuse a folder that the owner cannot use, before anything is computed or written.

    Raises:
      UsageError: it holds another run or other files, cannot be written to, or has a character
        in its path that Orbax takes for a glob pattern.
    """
    folder = owner.directory
    hint = "give another --workdir."
    if found := _GLOB.search(str(folder.absolute())):
        raise UsageError(
            f"--workdir {folder.absolute()} has a {found[0]} in its path, but checkpoints can be "
            f"saved only in a path without *, ? and [; {hint}"
        )
    if not os.path.exists(folder):
        check_folder("workdir", folder)
        return
    if not folder.is_dir():
        raise UsageError(f"--workdir {folder} is a file, not a folder; {hint}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir {folder} is not writable; {hint}")
    path = folder / "config.json"
    if not path.exists():
        if not all(_FIRST.fullmatch(file.name) for file in folder.iterdir()):
            raise UsageError(f"--workdir {folder} holds other files and no run; {hint}")
        return
    try:
        held = dict(unsealed(json.loads(path.read_text(encoding="utf-8")))["config"])
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {hint}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not the configuration of a run; {hint}") from None
    differing = [name for name, value in owner.identity.items() if held.get(name) != value]
    if differing:
        name = differing[0]
        raise UsageError(
            f"--workdir {folder} holds another run (--{name} was {shown(held.get(name))}, now it "
            f"is {shown(owner.identity[name])}); {hint}"
        )


def trained_config(config: Config, given: Mapping[str, Any]) -> Config:
    """Return the configuration of the run in the folder of `config`, updated by given flags.

    Its scores are the given ones, or else all with a checkpoint: an interrupted run has not
    trained all of them, and a run of a sweep trains only the last one.

    Args:
      config: from the command line alone.
      given: the fields that the command line names.

    Raises:
      UsageError: there is no run, a given flag contradicts it, or two sets are to be evaluated.
    """
    if config.mode == "evaluate" and "split" in given and given.get("input"):
        raise UsageError("--split and --input both say what to evaluate on; leave one of them out.")
    held = _stored_config(config.directory)
    names = Config.__dataclass_fields__
    trained = {name: from_json(value) for name, value in held.items() if name in names}
    for name, value in given.items():
        if name == "scores":
            for score in value:
                if score not in trained["scores"]:
                    raise UsageError(
                        f"--scores: {config.directory} holds no {score}, only "
                        f"{', '.join(trained['scores'])}."
                    )
        elif not _is_free(name, config) and value != trained.get(name, names[name].default):
            raise UsageError(
                f"--{name} is {shown(value)}, but the run in {config.directory} has "
                f"{shown(trained.get(name, names[name].default))}; leave it out."
            )
    if "scores" not in given:
        scores = trained["scores"]
        begun = tuple(name for name in scores if has_checkpoint(config.directory, name))
        trained["scores"] = begun or scores
    free = {n: value for n, value in given.items() if n == "scores" or _is_free(n, config)}
    found = Config(**{**trained, **free, "workdir": str(config.directory)})
    found.check()
    return found


def run_scores(folder: Path) -> tuple[str, ...]:
    """Return all scores of the run in a folder, trained or not.

    Raises:
      UsageError: there is no run.
    """
    return tuple(_stored_config(folder)["scores"])


def run_languages(folder: Path) -> tuple[str, str]:
    """Return the source and the target that the run in a folder was trained with.

    Raises:
      UsageError: there is no run.
    """
    held = {**vars(Config()), **_stored_config(folder)}
    return held["source"], held["target"]


def has_checkpoint(folder: Path, score: str) -> bool:
    """Whether a score of the run in a folder has a checkpoint."""
    return bool(sealed_steps(checkpoints_of(folder, score)))


def checkpoints_of(folder: Path, score: str) -> Path:
    """Return where the checkpoints of a score of the run in a folder are."""
    return folder / "checkpoints" / score


def sealed_steps(checkpoints: Path) -> list[int]:
    """Return the steps of all sealed checkpoints, the last one first."""
    names = (seal.stem for seal in checkpoints.glob("*.seal"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _stored_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    held = read_json(path, folder, LOST).get("config")
    if isinstance(held, dict) and held.get("scores") == SWEPT:
        raise UsageError(
            f"--workdir {folder} holds a sweep, not a run; give one of the folders in "
            f"{folder / 'runs'}."
        )
    if not isinstance(held, dict) or not isinstance(held.get("scores"), list):
        raise UsageError(f"{path} is damaged; {LOST}")
    return held


def _is_free(name: str, config: Config) -> bool:
    """Whether a command may give another value than the training.

    A file has columns and a count of links of its own.
    """
    of_file = config.mode == "evaluate" and config.input and name in ("source", "target")
    of_links = name == "links_from" and (config.mode == "score" or bool(config.input))
    return bool(of_file) or of_links or group_of(name) in _FREE


def read_json(path: Path, folder: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file of a run.

    Args:
      path: of the file.
      folder: of the run.
      remedy: what to do about a damaged file, the end of the error message.

    Raises:
      UsageError: the file is missing or damaged.
    """
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(
            f"--workdir {folder} holds no run that can translate ({path.name} is missing); train "
            "one first, or give another."
        ) from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}; give another --workdir."
        ) from None
    except (ValueError, TypeError):
        raise UsageError(f"{path} is damaged; {remedy}") from None


def from_json(value: Any) -> Any:
    """Return a field of `Config` from its value in JSON, where tuples are lists."""
    return tuple(value) if isinstance(value, list) else value


@contextlib.contextmanager
def opened(owner: Owner, *, orphaned: bool = False) -> Iterator[Path]:
    """Create the folder, lock it against other runs, and write config.json.

    Of several processes the first one does so, and the others see that the folder is the same.

    Args:
      owner: of the folder.
      orphaned: whether the last process in it is known to be dead, so that a lock is only what a
        file server has not given up yet.

    Raises:
      UsageError: it cannot be written to, another run has locked it, or a process of this run
        has another folder of this name.
    """
    # Importing JAX takes a second; the help text does not wait for it.
    from experiments.worker import by_first, together

    with contextlib.ExitStack() as stack:
        by_first(functools.partial(stack.enter_context, _locked(owner, orphaned)))
        together(lambda: _check_shared(owner.directory))
        yield owner.directory


def _check_shared(folder: Path) -> None:
    """Refuse a folder that another process made and that is not there."""
    end = time.monotonic() + _SHARED_WITHIN
    while not (folder / "config.json").exists():
        if time.monotonic() > end:
            raise UsageError(
                f"--workdir {folder}, which process 0 made, is not here; give a folder that all "
                "processes share."
            )
        time.sleep(0.1)


@contextlib.contextmanager
def _locked(owner: Owner, orphaned: bool) -> Iterator[Path]:
    folder = owner.directory
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors say that the file system has no locks.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and not orphaned:
                raise UsageError(
                    f"--workdir {folder} is in use by another process; wait for it, or give "
                    "another."
                ) from None
        if not (folder / "config.json").exists():
            write_sealed(folder / "config.json", _configuration(owner))
        yield folder


def shared(owner: Owner) -> Path:
    """Create the folder with its config.json, which several processes may do at once.

    Raises:
      UsageError: it cannot be written to, or another owner was faster.
    """
    folder = owner.directory
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        if not path.exists():
            own = folder / f"{path.name}.{socket.gethostname()}-{os.getpid()}"
            write_sealed(own, _configuration(owner))
            try:
                os.link(own, path)  # unlike a renaming it replaces nothing
            except FileExistsError:
                pass
            except OSError:  # this file system has no links
                own.replace(path)
            own.unlink(missing_ok=True)
    check(owner)
    return folder


@contextlib.contextmanager
def _refused(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--workdir {folder} cannot be written to: {error.strerror}; give another --workdir."
        ) from None


def _configuration(owner: Owner) -> Record:
    return {"config": owner.identity, "environment": environment(), MARK: uuid.uuid4().hex}


def shown(value: Any) -> str:
    """Write a value as on the command line."""
    return ",".join(value) if isinstance(value, list) else str(value)
