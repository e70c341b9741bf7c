"""Work dealt to several processes that share a folder: each item is done once.

A shard does its own share first, then what is left of the others'. What a process held when it
died is done by another one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from experiments.command_line import UsageError
from experiments.leases import Lease, Leases, Standing, State

T = TypeVar("T")


class Shard(NamedTuple):
    """The share `index`, from 1 to `count`, of work dealt to several processes."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_shard(text: str | None) -> Shard | None:
    """Read the value of `--shard`.

    Raises:
      UsageError: it is no share.

    >>> parse_shard("2/8")
    Shard(index=2, count=8)
    >>> parse_shard("9/8")
    Traceback (most recent call last):
    experiments.command_line.UsageError: --shard is 9/8, but I/N with I from 1 to N is needed, ...
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return Shard(int(found[1]), int(found[2]))
    raise UsageError(
        f"--shard is {text or 'empty'}, but I/N with I from 1 to N is needed, as in 2/8."
    )


def dealt(
    items: Mapping[str, T],
    shard: Shard | None,
    leases: Leases,
    is_done: Callable[[T], bool],
    say: Callable[[str], object],
) -> Iterator[tuple[T, Lease | None]]:
    """Yield items to do, each with its lease; use this as a context while it is done.

    Without a shard every item is yielded once: with None as soon as it is done, with a lease if
    nobody else does it. So the caller waits for other processes as long as they live.

    With a shard only items to do are yielded, the share of the shard first. It ends when all that
    is left is done by living processes.

    Args:
      items: by name, the same in all processes.
      shard: of this process.
      leases: the same folder in all processes.
      is_done: tells whether the result of an item is there, complete.
      say: prints a line.
    """
    own, others = shares(list(items), shard)
    left, is_waiting = [*own, *others], False
    while left:
        before = len(left)
        for name in tuple(left):
            if is_done(items[name]):
                left.remove(name)
                if shard is None:
                    yield items[name], None
            elif name in others and leases.standing(name).state == State.FAILED:
                left.remove(name)
            elif lease := leases.take(name):
                left.remove(name)
                # It may have been done after the first look.
                if not is_done(items[name]):
                    yield items[name], lease
                    continue
                with lease:
                    pass
                if shard is None:
                    yield items[name], None
        if left and len(left) == before:
            standings = {name: leases.standing(name) for name in left}
            if shard and all(found.state == State.HELD for found in standings.values()):
                return
            if not is_waiting:
                say(_waiting(standings, leases.patience))
            is_waiting = True
            time.sleep(leases.pause)


def shares(names: Sequence[str], shard: Shard | None) -> tuple[list[str], list[str]]:
    """Return the names of a share, and all others in the order in which it helps with them.

    Each share begins to help at another place.

    >>> shares("abcdefg", Shard(2, 3))
    (['b', 'e'], ['f', 'c', 'g', 'd', 'a'])
    >>> shares("abc", None)
    (['a', 'b', 'c'], [])
    """
    if shard is None:
        return list(names), []
    own, *others = (
        list(names[(shard.index - 1 + step) % shard.count :: shard.count])
        for step in range(shard.count)
    )
    return own, [name for of_other in others for name in reversed(of_other)]


def _waiting(standings: Mapping[str, Standing], patience: float) -> str:
    held = [f"{name} ({found.holder or 'unknown'})" for name, found in standings.items()]
    rest = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return (
        f"waiting for what other processes do: {', '.join(held[:3])}{rest}; what gives no sign of "
        f"life for {patience:g} s is done here"
    )
