"""A run that was stopped, by a person, a signal or a loss that is no number, loses nothing."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.translate import train
from experiments.translate.checkpoints import Checkpoints
from experiments.translate.log import Log
from tests.experiments.kills import killed, unfinished, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 4000


def records(folder, name="metrics.jsonl"):
    """A log of a run, without what only the clock and this run know."""
    lines = (folder / name).read_text(encoding="utf-8").split("\n")[:-1]
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "seal")}
        for line in lines
    ]


def parameters(folder, step):
    """All arrays of a checkpoint, by number."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / "checkpoints" / "dot" / f"{step:08d}").absolute())


def assert_stopped(code, err, number, folder):
    """Check what a stopped run left and said, and return the step after which it was stopped."""
    assert code == 128 + number, err
    said = r"translate: interrupted after step (\d+) of dot; the same command goes on from .*\n"
    match = re.fullmatch(said, err)
    assert match, err
    step = int(match[1])
    assert max(record["step"] for record in records(folder)) == step < STEPS
    assert (folder / "checkpoints" / "dot" / f"{step:08d}.seal").exists()
    assert not (folder / "results.json").exists()
    return step


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    done, tmp_path, translate, capsys, monkeypatch
):
    """Ctrl-C, then SIGTERM to a process of its own, then a bit that flipped on the disk."""
    flags, uninterrupted = done
    folder = tmp_path / "run"
    command = [*flags, f"--workdir={folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", raises_a_signal_after(2900))
        code = translate(*command)
    first = assert_stopped(code, capsys.readouterr().err, signal.SIGINT, folder)
    assert first == 2900

    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.translate", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and records(folder)[-1]["step"] == first:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    second = assert_stopped(process.returncode, err, signal.SIGTERM, folder)
    assert second > first

    flip_a_bit(folder / "checkpoints" / "dot" / f"{second:08d}")
    assert translate(*command) == 0
    printed = capsys.readouterr()
    said = f"checkpoint {second} in {folder}/checkpoints/dot is damaged: skipped."
    assert printed.out.splitlines().count(said) == 1
    assert printed.err == ""

    assert records(folder) == records(uninterrupted)
    ours, theirs = parameters(folder, STEPS), parameters(uninterrupted, STEPS)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    for path in (uninterrupted / "translations").iterdir():
        assert (folder / "translations" / path.name).read_bytes() == path.read_bytes()


def raises_a_signal_after(step):
    """Log.append, but Ctrl-C is pressed when a step is logged."""
    append = Log.append

    def pressed(log, record):
        append(log, record)
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return pressed


def flip_a_bit(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", ["losses", "parameters"])
def test_what_is_no_number_stops_the_run_and_the_last_checkpoint_is_kept(
    what, done, tmp_path, capsys, translate, monkeypatch
):
    """Training goes on at step 2000 from weights whose products overflow."""
    flags, uninterrupted = done
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder, ignore=shutil.ignore_patterns("outcomes", "results.*"))
    grown = {
        name: array * np.float32(1e30) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in parameters(uninterrupted, STEPS).items()
    }
    shutil.rmtree(folder / "checkpoints")
    checkpoints = Checkpoints.of_run(folder, "dot")
    checkpoints.save(2000, grown)
    reason = "the loss of step 2001 is (nan|inf)"
    if what == "parameters":
        monkeypatch.setattr(train._Trainer, "_check_losses", lambda *_: None)
        monkeypatch.setattr(train._Trainer, "_check_validation", lambda *_: None)
        reason = r"parameters are not finite after step \d+"
    assert translate(*flags, f"--workdir={folder}", "--checkpoint_seconds=0") == 1
    printed = capsys.readouterr()
    assert re.fullmatch(
        f"translate: dot, seed 0: {reason}; the checkpoint of step 2000 in {checkpoints.folder} is "
        "kept. A lower --learning_rate may help.\n",
        printed.err,
    )
    assert checkpoints.steps == [2000]
    assert not (folder / "results.json").exists()


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

    while kills < 6:
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
    assert kills >= 5 and inside >= 2, (kills, inside)
    print(f"{kills} kills, {inside} of them inside a save")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)

    assert records(folder) == records(uninterrupted)
    looks = [records(run, "attention.jsonl") for run in (folder, uninterrupted)]
    assert looks[0] == looks[1] and len(looks[0]) == STEPS // 1000
    ours, theirs = parameters(folder, STEPS), parameters(uninterrupted, STEPS)
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
