"""A name is held by one process at a time, and what a dead one held is free again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import leases
from experiments.leases import Holder, Leases, Standing, State, visible

ROOT = Path(__file__).parents[2]
ELSEWHERE = Holder("another kernel", "n2", 7)
HOLDING = """
import sys, time
from pathlib import Path
from experiments.leases import Leases
lease = Leases(Path(sys.argv[1]), beat=0.05).take("a")
print(lease.name, flush=True)
time.sleep(60)
"""


@pytest.fixture
def clock():
    """Seconds that pass only when a test says so."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def holding(folder):
    """A process that holds "a", once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "a\n"
    return process


def written(folder, holder=ELSEWHERE, beat=1, name="a.1"):
    """Write the file of a holder on another host."""
    record = {"state": "held", **holder._asdict(), "locked": True, "beat": beat}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(record))


@pytest.mark.parametrize("state", [State.FREE, State.DONE, State.FAILED])
def test_a_name_is_held_until_it_is_given_back_marked(state, tmp_path):
    first, second = Leases(tmp_path), Leases(tmp_path)
    assert first.standing("a") == Standing(State.FREE)
    with first.take("a") as lease:
        assert second.standing("a") == Standing(State.HELD, 1, first.holder)
        assert second.take("a") is None and second.take("b") is not None
        lease.state = state
    assert second.standing("a").state == state
    with second.take("a"):
        assert first.take("a") is None
    assert not (tmp_path / "a.1").exists() and first.standing("a").generation == 2


def test_a_name_is_free_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), Leases(tmp_path).take("a"):
        raise ZeroDivisionError
    assert Leases(tmp_path).standing("a").state == State.FREE


def test_what_a_killed_process_held_is_free_at_once_on_its_host(tmp_path):
    process = holding(tmp_path)
    assert Leases(tmp_path).take("a") is None
    process.send_signal(signal.SIGSTOP)
    assert Leases(tmp_path).take("a") is None, "one that is stopped may go on"
    process.kill()
    process.communicate()
    with Leases(tmp_path).take("a") as lease:
        assert not lease.orphaned


def test_a_holder_elsewhere_is_dead_after_it_was_silent_while_it_was_watched(tmp_path, clock):
    written(tmp_path)
    here = Leases(tmp_path, beat=10, patience=60, clock=clock)
    assert here.standing("a") == Standing(State.SILENT, 1, ELSEWHERE)
    clock.now += 1e6
    assert here.take("a") is None, "looking away is not watching"
    for beat in range(2, 30):
        clock.now += here.pause
        written(tmp_path, beat=beat)
        assert here.standing("a").state == State.HELD
    for _ in range(11):
        clock.now += here.pause
        assert here.standing("a").state == State.HELD
    clock.now += here.pause
    assert here.standing("a").state == State.FREE
    with here.take("a") as lease:
        assert lease.orphaned
        assert Leases(tmp_path).standing("a").state == State.HELD


@pytest.mark.parametrize("content", ["", '{"state": "he', '{"state": "held"}', "[]"])
def test_a_file_that_was_never_complete_is_free_after_the_same_time(content, tmp_path, clock):
    (tmp_path / "a.1").write_text(content)
    here = Leases(tmp_path, beat=10, patience=60, clock=clock)
    for _ in range(12):
        assert here.take("a") is None
        clock.now += here.pause
    assert here.take("a") is not None


def test_signs_of_life_are_seen_from_other_hosts(tmp_path, clock):
    with Leases(tmp_path, beat=0.01).take("a"):
        there = Leases(tmp_path, holder=ELSEWHERE, clock=clock)
        assert there.standing("a").state == State.SILENT
        end = time.monotonic() + 30
        while there.standing("a").state == State.SILENT and time.monotonic() < end:
            time.sleep(0.01)
        assert there.standing("a").state == State.HELD


def test_a_process_that_was_given_up_ends_when_it_goes_on(tmp_path):
    process = holding(tmp_path)
    process.send_signal(signal.SIGSTOP)
    written(tmp_path, name="a.2")
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said == (
        "a: this process gave no sign of life for so long that another one has taken over; it ends "
        "here, and the same command goes on with the rest.\n"
    )


@pytest.mark.parametrize("newest", [2, 3])
def test_whoever_saw_an_old_state_of_the_folder_takes_nothing(newest, tmp_path, monkeypatch):
    written(tmp_path, name=f"a.{newest}")
    outdated = Leases(tmp_path)
    monkeypatch.setattr(outdated, "standing", lambda name: Standing(State.FREE, 1))
    assert outdated.take("a") is None
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{newest}"]


def test_names_may_have_dots_and_begin_alike(tmp_path):
    here = Leases(tmp_path)
    with here.take("a.1"), here.take("a"), here.take("a.1.1") as last:
        assert last is not None
        assert {here.standing(name).generation for name in ("a.1", "a", "a.1.1")} == {1}


def test_without_locks_of_the_kernel_signs_of_life_decide(tmp_path, clock, monkeypatch):
    def none(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(leases.fcntl, "flock", none)
    held = Leases(tmp_path).take("a")
    here = Leases(tmp_path, beat=10, patience=60, clock=clock)
    assert here.standing("a").state == State.SILENT
    for _ in range(12):
        clock.now += here.pause
        here.standing("a")
    assert here.standing("a").state == State.FREE
    held.__exit__(None)


def test_a_file_is_visible_if_it_is_there(tmp_path):
    path = tmp_path / "runs" / "a" / "b.json"
    assert not visible(path)
    path.parent.mkdir(parents=True)
    path.touch()
    assert visible(path)
