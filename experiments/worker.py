"""What the processes of one run say to each other, over JAX's coordination service.

Every function is for one process too, which has nobody to ask.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed

from experiments.command_line import UsageError, reason
from experiments.processes import CONNECTED, CONNECTING, WORKER, Group

Found = TypeVar("Found")

# Seconds without a sign of life after which a process counts as ended, and after which all others
# have heard of it.
_HEARTBEAT, _HEARD = 12, 18
# Seconds that a process waits for another one that lives: reading data may take long.
_PATIENCE = 24 * 3600

_numbers = itertools.count()


class Agreed(UsageError):  # noqa: N818  the caller reports it as a sentence
    """A request that all processes of a run refuse, with the same sentence."""


def adopted() -> socket.socket:
    """Return the line to the watcher that started this process, and print where it prints."""
    descriptors = json.loads(os.environ.pop(WORKER))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    line, output, error = descriptors
    sys.stdout = open(output, "w", encoding=sys.stdout.encoding)  # noqa: SIM115  until the end
    sys.stderr = open(error, "w", buffering=1, encoding=sys.stderr.encoding)  # noqa: SIM115
    watcher = socket.socket(fileno=line)
    threading.Thread(target=_end_with, args=(watcher,), daemon=True).start()
    return watcher


def _end_with(watcher: socket.socket) -> None:
    """Kill this process when its watcher was killed."""
    watcher.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def connected(
    watcher: socket.socket, group: Group, common: tuple[type[Exception], ...]
) -> Iterator[None]:
    """Connect with the other processes of a run, until all have come to the end of the block.

    Args:
      watcher: from `adopted`.
      group: the processes.
      common: exceptions that are raised in all processes at once.

    Raises:
      UsageError: JAX cannot find the other processes.
    """
    watcher.send(CONNECTING)
    # It would take SIGTERM away from the program.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=group.coordinator,
            num_processes=group.count,
            process_id=group.index,
            cluster_detection_method=group.method,
            # The watcher ends the wait earlier, with one line.
            initialization_timeout=math.ceil(group.seconds) + 1,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_PATIENCE,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        # A host of a Cloud TPU may be the only one.
        if group.method is not None or not isinstance(error, ValueError):
            cause = str(error).split("\n")[0].rstrip(".")
            raise UsageError(
                f"JAX cannot find the other processes: {cause}; give --coordinator, --processes "
                "and --process."
            ) from None
    watcher.send(CONNECTED)
    try:
        yield
    except Agreed:
        # The process with the coordination service stays until all have heard.
        jax.distributed.shutdown()
        raise
    except common:
        raise
    except Exception:
        # A computation or a barrier fails when another process has ended. Then JAX ends this one
        # too, which the watcher reports; else the mistake is here.
        time.sleep(_HEARD)
        raise
    jax.distributed.shutdown()


def exchanged(text: str) -> Iterator[str]:
    """Say a text to all processes, and yield what each of them says, in their order."""
    if not jax.distributed.is_initialized():
        yield text
        return
    state = distributed.global_state
    client: Any = state.client
    number = next(_numbers)
    client.key_value_set(f"experiments/{number}/{state.process_id}", text)
    for index in range(state.num_processes):
        yield client.blocking_key_value_get(f"experiments/{number}/{index}", 1000 * _PATIENCE)


def told(value: Any) -> Any:
    """Return the value of process 0, whatever the others give; it is written as JSON."""
    return json.loads(next(exchanged(json.dumps(value))))


def wait() -> None:
    """Wait until all processes have come here."""
    for _ in exchanged(""):
        pass


def together(function: Callable[[], Found]) -> Found:
    """Call a function in all processes; if one refuses, all do.

    Raises:
      Agreed: what the first process with an error says.
    """
    if not jax.distributed.is_initialized():
        return function()
    found, refused = [], ""
    try:
        found.append(function())
    except UsageError as error:
        refused = str(error)
    except OSError as error:
        refused = f"{reason(error)}; put that right, and try again."
    said = list(exchanged(refused))
    if not any(said):
        return found[0]
    sentence = next(filter(None, said))
    raise Agreed(sentence if len(set(said)) == 1 else f"process {said.index(sentence)}: {sentence}")


def by_first(function: Callable[[], Any]) -> None:
    """Call a function in process 0 alone; if it refuses, all do.

    Raises:
      Agreed: what process 0 says.
    """
    together(function if jax.process_index() == 0 else _nothing)


def _nothing() -> None:
    """What a process does while another one does its part."""


def check_equal(differ: str, record: Mapping[str, Any], remedy: str) -> None:
    """Refuse values in which processes differ.

    Args:
      differ: what the processes did, as in "were started with different flags".
      record: the values by name.
      remedy: what to do.

    Raises:
      Agreed: one sentence with the first such value and the two processes.
    """
    first: Mapping[str, Any] = {}
    for index, said in enumerate(exchanged(json.dumps(record))):
        other = json.loads(said)
        first = first or other
        for name in {**first, **other}:
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                raise Agreed(
                    f"processes 0 and {index} {differ}: {name} is {_shown(ours)} in process 0, and "
                    f"{_shown(theirs)} in process {index}; {remedy}."
                )


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value) or "empty"
