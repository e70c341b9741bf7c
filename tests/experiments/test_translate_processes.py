"""Several processes train as one, end together, and refuse together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import processes
from experiments.command_line import UsageError
from experiments.translate.__main__ import main
from tests.experiments.kills import wait_for

ROOT = Path(__file__).parents[2]
TINY = (
    "--data=copy",
    "--train_size=200",
    "--valid_size=16",
    "--test_size=16",
    "--scores=dot",
    "--width=8",
    "--seeds=1",
    "--batch_size=16",
    "--buckets=1",
    "--learning_rate=0.001",
    "--evaluate_every=10",
)
DEVICES = 4
# Until the others have heard of a process that was killed.
BAR = 30
SLURM = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def started(*flags, devices=DEVICES, cwd=ROOT, environment=None):
    """A process with a few virtual devices."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.translate", *flags],
        cwd=cwd,
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(*flags, others=(), count=2, port=None):
    """Two processes; the second one has other flags at the end."""
    coordinator = f"--coordinator=127.0.0.1:{port or free_port()}"
    every = [(*flags, coordinator, f"--processes={count}", f"--process={n}") for n in (0, 1)]
    return started(*every[0]), started(*every[1], *others)


def ended(processes):
    """What each process printed, and its exit code."""
    said = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, *printed) for p, printed in zip(processes, said, strict=True)]


def records(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_training(first, second):
    """Losses and translations are equal within rounding."""
    ours, theirs = records(first), records(second)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() - {"seconds", "score", "seal"}:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6)
    ours, theirs = (
        json.loads((folder / "outcomes" / "dot.json").read_text("utf-8"))["sets"]
        for folder in (first, second)
    )
    assert ours.keys() == theirs.keys() == {"valid", "test", "long"}
    for name, measured in ours.items():
        for metric, values in measured.items():
            if values is None:
                assert theirs[name][metric] is None
            else:
                np.testing.assert_allclose(values, theirs[name][metric], rtol=1e-3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--processes=2"],
            "--coordinator, --processes and --process belong together; give --coordinator and "
            "--process too.",
        ),
        (
            ["--coordinator=here:1234", "--process=0"],
            "--coordinator, --processes and --process belong together; give --processes too.",
        ),
        (
            ["--coordinator=here:1234", "--processes=2", "--process=2"],
            "--process is 2, but a number of 0 to 1 is needed, since --processes is 2.",
        ),
        (
            ["--coordinator=here:1234", "--processes=2", "--process=-1"],
            "--process is -1, but a finite number of at least 0 is needed.",
        ),
        (
            ["--coordinator=here", "--processes=2", "--process=0"],
            "--coordinator is here, but HOST:PORT is needed, with a port of 1 to 65535.",
        ),
        (
            ["--mode=evaluate", "--coordinator=here:1234"],
            "--coordinator is for --mode=train; leave it out.",
        ),
    ],
)
def test_flags_that_name_no_process(flags, sentence, tmp_path, capsys):
    assert main([*flags, f"--workdir={tmp_path}/run"]) == 2
    assert capsys.readouterr() == ("", f"translate: {sentence}\n")
    assert list(tmp_path.iterdir()) == []


def test_what_launchers_say(monkeypatch):
    def found(**environment):
        group = processes.group_of("", None, None, 60.0, environment)
        return (group.method or "Cloud TPU") if group else None

    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **SLURM}
    assert found(**slurm) == "slurm"
    assert found(**slurm | {"SLURM_NTASKS": "1"}) is None
    assert found(**{k: v for k, v in slurm.items() if k != "SLURM_STEP_NODELIST"}) is None
    assert found(OMPI_COMM_WORLD_SIZE="1") is None
    assert found(TPU_WORKER_HOSTNAMES="one") is None
    assert found(TPU_WORKER_HOSTNAMES="one,two") == "Cloud TPU"
    assert found(TPU_WORKER_HOSTNAMES="one,two", JAX_PLATFORMS="cpu") is None
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert found() is None
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"])
    assert found() == "Cloud TPU"


def test_mpi_that_jax_cannot_ask(monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^MPI started several processes, and JAX needs mpi4py"):
        processes.group_of("", None, None, 60.0, {"PMI_SIZE": "2"})


def test_a_port_that_is_taken(tmp_path, capfd):
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        flags = (f"--coordinator={address}", "--processes=2", "--process=0")
        assert main([*TINY, *flags, f"--workdir={tmp_path}/run"]) == 2
    assert capfd.readouterr().err == (
        f"translate: --coordinator={address}: process 0 cannot listen on port "
        f"{address.split(':')[1]} of this machine: Address already in use; give another port to "
        "all processes.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer(tmp_path):
    """Nobody is there; and process 0 is there, but waits for one that does not come."""
    port = free_port()
    flags = (*TINY, "--coordinator_seconds=2", f"--workdir={tmp_path}/run")
    alone = started(*flags, f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=1")
    other = free_port()
    waiting = started(*flags, f"--coordinator=127.0.0.1:{other}", "--processes=2", "--process=0")
    found = ended([alone, waiting])
    assert found[0] == (
        2,
        "",
        f"translate: --coordinator=127.0.0.1:{port} did not answer within 2 s "
        "(--coordinator_seconds); start process 0 on that host, and check the address.\n",
    )
    assert found[1] == (
        2,
        "",
        f"translate: --coordinator=127.0.0.1:{other}: it answers, but not all of the 2 processes "
        "came within 2 s (--coordinator_seconds); start them all, each with its own --process.\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_with_different_flags(tmp_path):
    sentence = (
        "translate: processes 0 and 1 were started with different flags: --width is 8 in process "
        "0, and 16 in process 1; give all the same.\n"
    )
    found = ended(pair(*TINY, f"--workdir={tmp_path}/run", others=["--width=16"]))
    assert found == [(2, "", sentence)] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_with_different_data_that_slurm_started(tmp_path):
    """Each host has its own copy of a file, and one of them is not the same."""
    both = []
    for index in range(2):
        here = tmp_path / str(index)
        here.mkdir()
        lines = [f"one two {n}\tzwei eins {n}" for n in range(100 + index)]
        (here / "table.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        both.append(
            started(
                *TINY[4:],
                "--data=table.tsv",
                f"--workdir={tmp_path}/run",
                cwd=here,
                environment={
                    "SLURM_JOB_ID": str(os.getpid()),
                    "SLURM_PROCID": str(index),
                    "SLURM_LOCALID": str(index),
                    "PYTHONPATH": str(ROOT),
                    **SLURM,
                },
            )
        )
    (zero, out, first), one = ended(both)
    assert (zero, out, first) == one
    assert zero == 2 and out == ""
    digest = "[0-9a-f]{12,64}"
    assert re.fullmatch(
        "translate: processes 0 and 1 read different data: table.tsv is "
        f"{digest} in process 0, and {digest} in process 1; give all the same files.\n",
        first,
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_the_devices_do_not_divide(tmp_path):
    sentence = (
        "translate: --batch_size is 12, which the 8 devices of 2 processes do not divide; give 8 "
        "or 16.\n"
    )
    found = ended(pair(*TINY, "--batch_size=12", f"--workdir={tmp_path}/run"))
    assert found == [(2, "", sentence)] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_any_number_goes_on(tmp_path):
    """Two processes, one is killed; one process goes on, and is killed; two end the run.

    What they trained is what one process trains that nobody kills.
    """
    flags = (*TINY, "--steps=120", "--checkpoint_seconds=0")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    alone = started(*flags, f"--workdir={whole}", devices=1)

    def reached(step):
        seals = (folder / "checkpoints" / "dot").glob("*.seal")
        return any(int(seal.stem) >= step for seal in seals)

    both = pair(*flags, f"--workdir={folder}")
    wait_for(lambda: reached(20), both[0])
    both[1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    (code, _, said), _ = ended(both)
    assert time.monotonic() - start < BAR
    assert code == processes.LOST
    assert said == (
        "translate: process 1 of this run has ended; what was saved before is kept, and the same "
        "commands go on from there.\n"
    )
    assert reached(20) and not (folder / "results.json").exists()

    one = started(*flags, f"--workdir={folder}", devices=1)
    wait_for(lambda: reached(50), one)
    one.send_signal(signal.SIGKILL)
    one.communicate()

    both = pair(*flags, f"--workdir={folder}")
    wait_for(lambda: reached(80), both[0])
    both[0].send_signal(signal.SIGKILL)
    start = time.monotonic()
    _, (code, _, said) = ended(both)
    assert time.monotonic() - start < BAR
    assert code == processes.LOST
    assert said.count("\n") == 1 and "of this run has ended" in said

    found = ended(pair(*flags, f"--workdir={folder}"))
    assert [code for code, _, _ in found] == [0, 0], found
    assert [err for _, _, err in found] == ["", ""]
    assert "each batch on 8 devices of 2 processes" in found[0][1]
    assert f"{folder}/report.html" in found[0][1]
    assert found[1][1] == ""
    assert ended([alone])[0][0] == 0
    assert_same_training(whole, folder)
