"""Leases: of all processes that share a folder, also from several hosts, one holds a name.

A lease rests on what network file systems promise: a file is created exclusively by one process,
and is read anew when it is opened. It is the file `NAME.GENERATION`, and the highest generation
counts. A name whose holder is dead or has released it is taken by creating the next generation.
The highest file is never removed, so that a process that saw an old state of the folder can take
nothing that another one holds.

A holder on the same host is dead if the kernel's lock on its file is free. One on another host is
dead if its file, which it writes again every BEAT seconds, stayed the same for PATIENCE seconds
while it was read again and again. Clocks of two hosts are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

# Seconds between two signs of life, and without any until a holder on another host counts as dead:
# longer than the 90 seconds after which an NFS server gives up a client.
BEAT, PATIENCE = 10.0, 120.0

# A file is written in place, in one piece of always the same length.
_LENGTH = 512


class State(StrEnum):
    """What is known of a name."""

    FREE = "free"  # never taken, released, or its holder is dead
    HELD = "held"  # its holder lives
    SILENT = "silent"  # it has a holder, who gave no sign of life since this process looks
    DONE = "done"
    FAILED = "failed"


class Holder(NamedTuple):
    """Who holds a lease: a process, and the running kernel and the name of its host."""

    kernel: str
    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Standing(NamedTuple):
    """The state of a name, the generation of its file, and its last holder if it has one."""

    state: State
    generation: int = 0
    holder: Holder | None = None


class _Seen(NamedTuple):
    """A holder's file as it was read, when, and how long it has been the same."""

    content: bytes
    at: float
    silent: float = 0.0
    has_changed: bool = False


class Lease:
    """A name that this process holds.

    As a context it is marked with its `state` at the end, and FREE after an exception.

    Attributes:
      name: what is held.
      orphaned: whether it was taken from a holder on another host that died, whose other locks a
        server may still keep.
      state: how it is marked at the end, DONE unless set.
    """

    def __init__(self, name: str, orphaned: bool, file: _File, is_lost: Callable[[], bool]):
        self.name, self.orphaned, self.state = name, orphaned, State.DONE
        self._file, self._is_lost = file, is_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._file.write(State.FREE if kind else self.state)
        self._file.close()

    def _live(self) -> None:
        """Give signs of life, and end the process as soon as another one holds the name."""
        while not self._ended.wait(self._file.beat):
            # A folder that cannot be reached for a while is no reason to stop.
            with contextlib.suppress(OSError):
                self._file.write(State.HELD)
                if self._is_lost():
                    _stop(self.name)


class _File:
    """The file of a lease, open and locked as long as its process lives."""

    def __init__(self, path: Path, holder: Holder, beat: float):
        self.holder, self.beat, self.count = holder, beat, 0
        self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_locked = True
        except OSError:  # this file system has no locks
            self.is_locked = False
        self.write(State.HELD)

    def write(self, state: State) -> None:
        """Write a state, and another number each time."""
        self.count += 1
        record = {
            "state": state,
            **self.holder._asdict(),
            "locked": self.is_locked,
            "beat": self.count,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        os.pwrite(self._number, json.dumps(record).encode().ljust(_LENGTH - 1) + b"\n", 0)
        os.fsync(self._number)

    def close(self) -> None:
        """Close it, and with it its lock."""
        os.close(self._number)


class Leases:
    """The leases in a folder.

    Args:
      folder: of their files, created when the first lease is taken.
      beat: seconds between two signs of life.
      patience: seconds without any, until a holder on another host counts as dead.
      holder: this process.
      clock: of this process, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        beat: float = BEAT,
        patience: float = PATIENCE,
        holder: Holder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.beat, self.patience = folder, beat, patience
        self.holder, self._clock = holder or this_process(), clock
        self._seen: dict[tuple[str, int], _Seen] = {}

    @property
    def pause(self) -> float:
        """Seconds to wait before a standing is asked for again."""
        return self.beat / 2

    def standing(self, name: str) -> Standing:
        """Return what is known of a name; each call is one look at its holder."""
        generation = max(self._generations(name), default=0)
        if not generation:
            return Standing(State.FREE)
        path = self._path(name, generation)
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # a later generation has come, and this one was removed
            return Standing(State.SILENT, generation)
        record = _parsed(content)
        holder = Holder(*(record[field] for field in Holder._fields)) if record else None
        if record and record["state"] != State.HELD:
            return Standing(record["state"], generation, holder)
        if record and record["locked"] and self._is_here(holder):
            state = State.HELD if _is_locked(path) else State.FREE
        else:
            state = self._watched((name, generation), content)
        return Standing(state, generation, holder)

    def take(self, name: str) -> Lease | None:
        """Take a name, unless it is held or may be held: then return None."""
        before = self.standing(name)
        if before.state in (State.HELD, State.SILENT):
            return None
        self.folder.mkdir(exist_ok=True)
        generation = before.generation + 1
        path = self._path(name, generation)
        try:
            file = _File(path, self.holder, self.beat)
        except FileExistsError:
            return None
        is_lost = functools.partial(self._is_outdated, name, generation)
        if is_lost():
            file.close()
            path.unlink(missing_ok=True)
            return None
        for older in self._generations(name):
            if older < generation:
                self._path(name, older).unlink(missing_ok=True)
        orphaned = before.holder is not None and not self._is_here(before.holder)
        return Lease(name, orphaned, file, is_lost)

    def _watched(self, key: tuple[str, int], content: bytes) -> State:
        """Return the state of a holder by how its file changes from look to look."""
        now, seen = self._clock(), self._seen.get(key)
        if seen is None:
            found = _Seen(content, now)
        elif seen.content != content:
            found = _Seen(content, now, has_changed=True)
        else:
            # While this process did not look, the folder may have been out of reach for all.
            passed = min(now - seen.at, 2 * self.pause)
            found = seen._replace(at=now, silent=seen.silent + passed)
        self._seen[key] = found
        if found.silent >= self.patience:
            return State.FREE
        return State.HELD if found.has_changed else State.SILENT

    def _is_here(self, holder: Holder | None) -> bool:
        # Where kernels have no number, hosts may share a name.
        return holder is not None and bool(holder.kernel) and holder[:2] == self.holder[:2]

    def _is_outdated(self, name: str, generation: int) -> bool:
        return max(self._generations(name), default=0) > generation

    def _generations(self, name: str) -> list[int]:
        """Return the generations of a name; a listing is never older than this call."""
        try:
            files = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        parts = (file.rpartition(".") for file in files)
        return [int(number) for of, _, number in parts if of == name and number.isdecimal()]

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}"


def this_process() -> Holder:
    """Return this process as a holder."""
    kernel = Path("/proc/sys/kernel/random/boot_id")
    found = kernel.read_text(encoding="ascii").strip() if kernel.exists() else ""
    return Holder(found, socket.gethostname(), os.getpid())


def visible(path: Path) -> bool:
    """Tell whether a file exists, whatever this host remembers of it.

    A host may remember for a minute that a file of a network folder is missing; listing the
    folders above it asks the server.
    """
    for folder in reversed(path.parents[:3]):
        with contextlib.suppress(OSError):
            os.listdir(folder)
    return path.exists()


def _parsed(content: bytes) -> dict[str, Any] | None:
    """Return the record in a file; None if its holder died while it wrote it."""
    try:
        record = json.loads(content)
        known = {field: record[field] for field in (*Holder._fields, "locked")}
        return {**known, "state": State(record["state"])}
    except (ValueError, KeyError, TypeError):
        return None


def _is_locked(path: Path) -> bool:
    """Tell whether a process of this host has locked a file."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        # Shared, so that two processes that look at the same time do not see each other.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(file)


def _stop(name: str) -> None:
    """End this process, whose work another one does now."""
    print(
        f"{name}: this process gave no sign of life for so long that another one has taken over; "
        "it ends here, and the same command goes on with the rest.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
