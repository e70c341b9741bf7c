"""Several processes do everything once, also if some of them die."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import shards
from experiments.command_line import UsageError
from experiments.leases import Holder, Leases, State
from experiments.shards import Shard, dealt, parse_shard, shares
from tests.experiments.kills import wait_for

ROOT = Path(__file__).parents[2]
WORKER = """
import sys, time
from pathlib import Path
from experiments.leases import Leases
from experiments.shards import dealt, parse_shard
folder, shard = Path(sys.argv[1]), parse_shard(sys.argv[2])
items = {name: folder / name for name in map(str, range(24))}
# Who is killed before it wrote into its file is known by its silence alone.
leases = Leases(folder / "leases", beat=0.1, patience=5.0)
for path, lease in dealt(items, shard, leases, Path.exists, print):
    with lease:
        with (folder / "log").open("a") as log:
            log.write(f"{path.name}\\n")
        time.sleep(0.02)
        path.touch()
"""


def started(folder, shard):
    return subprocess.Popen([sys.executable, "-c", WORKER, folder, shard], cwd=ROOT)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_parts_and_every_shard_helps_with_all_others(count):
    names = [str(number) for number in range(7)]
    parts = [shares(names, Shard(index, count)) for index in range(1, count + 1)]
    assert sorted(name for own, _ in parts for name in own) == names
    assert max(len(own) for own, _ in parts) - min(len(own) for own, _ in parts) <= 1
    assert all(sorted(own + others) == names for own, others in parts)


@pytest.mark.parametrize(
    "text", ["9/8", f"{5000 * '9'}/2", "0/8", "a/b", "2", "2/0", "-1/8", "1/-8", "1.0/8", "1/8/9"]
)
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UsageError) as error:
        parse_shard(text)
    assert str(error.value) == (
        f"--shard is {text}, but I/N with I from 1 to N is needed, as in 2/8."
    )


@pytest.mark.slow
def test_four_processes_at_once_do_everything_once(tmp_path):
    processes = [started(tmp_path, f"{index}/4") for index in (1, 2, 3, 4)]
    assert [process.wait(300) for process in processes] == [0] * 4
    done = (tmp_path / "log").read_text().split()
    assert sorted(done, key=int) == [str(number) for number in range(24)]


def test_what_killed_processes_held_is_done_by_others(tmp_path):
    processes = [started(tmp_path, f"{index}/4") for index in (1, 2, 3, 4)]
    wait_for((tmp_path / "log").exists, processes[0], 300)
    time.sleep(random.Random(0).uniform(0, 0.1))
    for process in processes[:3]:
        process.send_signal(signal.SIGKILL)
    killed = [process.wait(300) for process in processes[:3]].count(-signal.SIGKILL)
    assert processes[3].wait(300) == 0 and killed > 0
    done = (tmp_path / "log").read_text().split()
    assert set(done) == {str(number) for number in range(24)}
    assert len(done) <= 24 + killed, "only what was held by a killed process is begun twice"


class Work:
    """Items that are done when their name is in a set, and what was asked for."""

    def __init__(self, folder, names, shard=None, done=()):
        self.done, self.said, self.names = set(done), [], names
        self.leases = Leases(folder, beat=0.02)
        self.shard = shard and parse_shard(shard)

    def run(self, state=State.DONE):
        """Do everything; return names with whether they were done here."""
        found = []
        items = {name: name for name in self.names}
        is_done = self.done.__contains__
        for name, lease in dealt(items, self.shard, self.leases, is_done, self.said.append):
            found.append((name, lease is not None))
            if lease:
                with lease:
                    lease.state = state
                    self.done |= {name} if state == State.DONE else set()
        return found


def test_without_a_shard_everything_comes_once_in_order(tmp_path):
    found = Work(tmp_path, "abc", done="b").run()
    assert found == [("a", True), ("b", False), ("c", True)]


def test_a_shard_does_its_share_then_what_others_left(tmp_path):
    assert Work(tmp_path, "abcd", "2/2", done="a").run() == [("b", True), ("d", True), ("c", True)]


def test_a_shard_ends_where_living_processes_do_the_rest(tmp_path):
    with Leases(tmp_path).take("c"):
        work = Work(tmp_path, "abcd", "2/2")
        assert work.run() == [("b", True), ("d", True), ("a", True)]
    assert work.said == []


def test_whoever_collects_waits_for_living_processes(tmp_path, monkeypatch):
    work = Work(tmp_path, "ab")
    held = Leases(tmp_path).take("a")
    paused = []

    def pause(seconds):
        paused.append(seconds)
        if len(paused) == 3:
            work.done.add("a")
            held.__exit__(None)

    monkeypatch.setattr(shards.time, "sleep", pause)
    assert work.run() == [("b", True), ("a", False)]
    assert work.said == [
        f"waiting for what other processes do: a ({held._file.holder}); what gives no sign of life "
        "for 120 s is done here"
    ]


def test_what_a_dead_process_elsewhere_held_is_done_here(tmp_path, monkeypatch):
    record = {"state": "held", **Holder("k", "n2", 7)._asdict(), "locked": True}
    tmp_path.joinpath("a.1").write_text(json.dumps(record))
    work = Work(tmp_path, "ab", "1/2")
    now = [0.0]
    work.leases = Leases(tmp_path, beat=10, patience=60, clock=lambda: now[0])
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    assert work.run() == [("b", True), ("a", True)]
    assert now[0] >= 60 and "a (process 7 on n2)" in work.said[0]


def test_what_failed_is_tried_again_in_its_share_alone(tmp_path):
    assert len(Work(tmp_path, "abcd", "1/2").run(State.FAILED)) == 4
    assert Work(tmp_path, "abcd", "2/2").run(State.FAILED) == [("b", True), ("d", True)]
    assert len(Work(tmp_path, "abcd").run()) == 4


def test_a_result_that_was_deleted_is_made_again(tmp_path):
    assert len(Work(tmp_path, "ab").run()) == 2
    assert Work(tmp_path, "ab", done="a").run() == [("a", False), ("b", True)]
