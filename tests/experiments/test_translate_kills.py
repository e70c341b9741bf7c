"""Real processes, killed at random moments and inside a save, lose nothing but time."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.translate.checkpoints import Checkpoints
from experiments.translate.config import Config
from experiments.translate.workdir import check

ROOT = Path(__file__).parents[2]
SAVES = """
import sys
from pathlib import Path
import numpy as np
from experiments.translate.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
first = max(checkpoints.steps, default=0) + 1
for step in range(first, 10_000):
    checkpoints.save(step, {"step": np.int32(step), "matrix": np.full((300, 300), step)})
    print(step, flush=True)
"""


def unfinished(folder):
    """Checkpoints that were begun and have no seal."""
    return [
        p for p in folder.glob("*") if p.is_dir() and not p.with_name(f"{p.name}.seal").exists()
    ]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)


def killed(process):
    """Kill a process, and tell whether it was still at work."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_process_killed_inside_a_save_leaves_a_whole_checkpoint(tmp_path):
    folder = tmp_path / "dot"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for _ in range(3):
        last = int(process.stdout.readline())
    wait_for(lambda: unfinished(folder), process)
    assert killed(process)
    assert_whole(folder, last)


def assert_whole(folder, last):
    """Check that what is restored is one of the last checkpoints, as it was saved."""
    checkpoints = Checkpoints(folder)
    like = {
        "step": jax.ShapeDtypeStruct((), np.int32),
        "matrix": jax.ShapeDtypeStruct((300, 300), np.int64),
    }
    with jax.enable_x64(True):
        found = checkpoints.restore(like)
    assert found is not None and checkpoints.damaged == []
    step, state = found
    assert step >= last and int(state["step"]) == step
    np.testing.assert_array_equal(state["matrix"], step)
    assert unfinished(folder) == []


def test_a_folder_whose_run_was_killed_at_birth_is_taken_over(tmp_path):
    for name in (".lock", "config.json.unfinished"):
        (tmp_path / name).write_text("{")
    check(Config(workdir=str(tmp_path)))


def records(folder):
    """The log of a run, without what only the clock knows."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def parameters(folder):
    path = folder / "checkpoints" / "dot" / "00004000"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute())


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(done, tmp_path):
    """Every other kill comes as soon as a save has begun, the others at any moment."""
    flags, uninterrupted = done
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints" / "dot"
    command = [sys.executable, "-m", "experiments.translate", *flags, f"--workdir={folder}"]
    moments = random.Random(0)
    kills = inside = 0

    def logged():
        path = folder / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    while kills < 12:
        before = logged()
        process = subprocess.Popen(
            [*command, "--checkpoint_seconds=0"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if kills % 2:
            wait_for(lambda before=before: logged() > before, process)
            wait_for(lambda: unfinished(checkpoints), process)
        elif kills % 4:
            wait_for(lambda before=before: logged() > before, process)
            time.sleep(moments.uniform(0, 0.5))
        else:
            time.sleep(moments.uniform(0, 4))
        if not killed(process):
            break
        kills += 1
        inside += bool(unfinished(checkpoints))
    assert kills >= 8 and inside >= 3, (kills, inside)
    print(f"{kills} kills, {inside} of them inside a save")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)

    assert records(folder) == records(uninterrupted)
    ours, theirs = parameters(folder), parameters(uninterrupted)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    for path in (uninterrupted / "translations").iterdir():
        assert (folder / "translations" / path.name).read_bytes() == path.read_bytes()
    metrics = [
        json.loads((run / "results.json").read_text("utf-8"))["mechanisms"][0]["metrics"]
        for run in (folder, uninterrupted)
    ]
    assert metrics[0] == metrics[1]
