"""Several processes of one run: the flags that name them, and the watcher of each.

JAX's coordination service ends a process that has lost another one by aborting it with a page of
log. The user is to see one line: the run is in a process of its own, the worker (see
`experiments.worker`), and the process of the command line watches it. Nothing here imports JAX.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.command_line import UsageError, complain

# The exit code where another process of the run ended.
LOST = 3
# The environment variable that makes a process a worker: the socket to its watcher, and the
# descriptors that are its standard output and error.
WORKER = "EXPERIMENTS_WORKER"
# What a worker tells its watcher: it connects now, and it is connected.
CONNECTING, CONNECTED = b"?", b"!"

_THREE = "--coordinator, --processes and --process belong together"
# What JAX needs of Slurm.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"
_SIZES_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_ADDRESSES_OF_TPU = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# The chips of a Cloud TPU.
_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# The end of what libraries print that is kept, in bytes.
_KEPT = 2**16


class Group(NamedTuple):
    """The processes of a run; what is None, JAX asks of the launcher.

    Attributes:
      coordinator: HOST:PORT of process 0.
      count: of the processes.
      index: of this process, from 0.
      seconds: to wait for the others.
      method: how JAX finds the rest, as in `jax.distributed.initialize`; None for Cloud TPU, where
        JAX may also find that there is one process.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    seconds: float
    method: str | None = None

    @property
    def where(self) -> str:
        """The coordinator in words."""
        return self.coordinator or "the address that the launcher gave"


def check(coordinator: str, count: int | None, index: int | None) -> None:
    """Refuse flags that do not name a process of several.

    Raises:
      UsageError: one sentence with the flag, its value and what is needed.
    """
    given = {"coordinator": coordinator or None, "processes": count, "process": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing or count is None or index is None:
        raise UsageError(f"{_THREE}; give {' and '.join(missing)} too.")
    if index >= count:
        raise UsageError(
            f"--process is {index}, but a number of 0 to {count - 1} is needed, since --processes "
            f"is {count}."
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(
            f"--coordinator is {coordinator}, but HOST:PORT is needed, with a port of 1 to 65535."
        )


def group_of(
    coordinator: str,
    count: int | None,
    index: int | None,
    seconds: float,
    environment: Mapping[str, str] = os.environ,
) -> Group | None:
    """Return the processes that the flags name, or that a launcher started; None if it is one.

    Raises:
      UsageError: MPI started them, and mpi4py, by which JAX asks it, is not installed.

    >>> group_of("", None, None, 60.0, {})
    >>> group_of("", None, None, 60.0, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": ""})
    Group(coordinator=None, count=None, index=None, seconds=60.0, method='ompi')
    """
    if coordinator:
        return Group(coordinator, count, index, seconds, "deactivate")
    of_launcher = Group(None, None, None, seconds, _launcher(environment))
    return of_launcher if of_launcher.method or _on_cloud_tpu(environment) else None


def _on_cloud_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a host of a Cloud TPU that the program is to use."""
    if environment.get("JAX_PLATFORMS", "").split(",")[0] not in ("", "tpu"):
        return False
    if any("," in environment.get(name, "") for name in _ADDRESSES_OF_TPU):
        return True
    chips = any(glob.glob(pattern) for pattern in _CHIPS)
    return chips and importlib.util.find_spec("libtpu") is not None


def _launcher(environment: Mapping[str, str]) -> str | None:
    """Return JAX's name of the launcher that started several processes, if one did."""
    if all(name in environment for name in _SLURM):
        return "slurm" if _number(environment["SLURM_NTASKS"]) > 1 else None
    if any(_number(environment.get(name, "")) > 1 for name in _SIZES_OF_MPI):
        if _OPEN_MPI in environment:
            return "ompi"
        if importlib.util.find_spec("mpi4py") is None:
            raise UsageError(
                "MPI started several processes, and JAX needs mpi4py to ask it which; install it, "
                "or give --coordinator, --processes and --process."
            )
        return "mpi4py"
    return None


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def watch(program: str, module: str, arguments: Sequence[str], group: Group) -> int:
    """Run a program in a worker, and return its exit code.

    `LOST` if another process of the run ended; 2 if they did not find each other; 128 and the
    number of the signal that ended the worker. In each of these cases one line says so.

    Args:
      program: its name in messages.
      module: that `python -m` runs.
      arguments: of the command line.
      group: the processes of the run.
    """
    if group.index == 0 and (taken := _taken(group)):
        return complain(program, taken, 2)
    worker = _Worker(module, arguments)
    with _forwarding(worker.process):
        connected = worker.connects(group.seconds)
        if connected is None:
            worker.process.kill()
        code = worker.process.wait()
    log = worker.log()
    if code >= 0:
        return code
    if -code in (signal.SIGINT, signal.SIGTERM):
        return complain(program, "interrupted; the same command goes on from there.", 128 - code)
    if not connected and -code in (signal.SIGKILL, signal.SIGABRT):
        return complain(program, _unanswered(group), 2)
    if (lost := _lost(log)) and -code == signal.SIGABRT:
        return complain(
            program,
            f"{lost}; what was saved before is kept, and the same commands go on from there.",
            LOST,
        )
    print(log, file=sys.stderr, end="")
    name = signal.Signals(-code).name
    sentence = (
        f"the process was ended by {name}; the same command goes on from the last checkpoint."
    )
    return complain(program, sentence, 128 - code)


class _Worker:
    """A process that runs the program, and what libraries print in it."""

    def __init__(self, module: str, arguments: Sequence[str]):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._line, theirs = socket.socketpair()
        read, write = os.pipe()
        # The program itself writes to copies: what libraries print, in C++, comes here instead.
        given = (theirs.fileno(), os.dup(1), os.dup(2))
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=write,
            stderr=write,
            pass_fds=given,
            env={**os.environ, WORKER: json.dumps(given)},
            # Signals of the terminal come once, from here.
            start_new_session=True,
        )
        theirs.close()
        for descriptor in (write, *given[1:]):
            os.close(descriptor)
        self._log = b""
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()

    def connects(self, seconds: float) -> bool | None:
        """Wait until it is connected; False if it ended before, None if time is over."""
        for waited, expected in ((None, CONNECTING), (seconds, CONNECTED)):
            self._line.settimeout(waited)
            try:
                if self._line.recv(1) != expected:
                    return False
            except TimeoutError:
                return None
            except ConnectionError:
                return False
        return True

    def log(self) -> str:
        """Return what libraries printed, once the worker has ended."""
        self._reader.join(timeout=1)
        return self._log.decode(errors="replace")

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb", buffering=0) as file:
            while printed := file.read(_KEPT):
                self._log = (self._log + printed)[-_KEPT:]


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to a process."""

    def forward(number: int, frame: Any) -> None:
        del frame
        process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, forward) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _taken(group: Group) -> str | None:
    """Say that the port of the coordinator, which this process is, is not free."""
    port = int(group.where.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return (
            f"--coordinator={group.where}: process 0 cannot listen on port {port} of this machine: "
            f"{os.strerror(error.errno or 0)}; give another port to all processes."
        )
    return None


def _unanswered(group: Group) -> str:
    """Say which process did not come in time."""
    waited = f"within {group.seconds:g} s (--coordinator_seconds)"
    if group.coordinator is None:
        return f"the processes that the launcher started did not all connect {waited}."
    if group.index == 0 or _listens(group.coordinator):
        return (
            f"--coordinator={group.where}: it answers, but not all of the {group.count} processes "
            f"came {waited}; start them all, each with its own --process."
        )
    return (
        f"--coordinator={group.where} did not answer {waited}; start process 0 on that host, and "
        "check the address."
    )


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _lost(log: str) -> str | None:
    """Say which process ended, if JAX's coordination service ended this one for that."""
    if "JAX distributed service" not in log and "coordination service" not in log:
        return None
    named = re.search(r"unhealthy[^:]*:\s*((?:/job:\S*task:)?\d+)", log)
    if named:
        return f"process {re.sub('.*:', '', named[1])} of this run has ended"
    return "another process of this run has ended"
