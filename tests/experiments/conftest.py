"""One small translator is trained for all tests."""

import fcntl
import os
import shutil

import jax
import pytest

from experiments.translate.__main__ import main


@pytest.fixture(scope="session")
def translate():
    """The main job in this process, with the promotion of arrays that a user's process has."""

    def run(*arguments):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return main(arguments)

    return run


@pytest.fixture(scope="session")
def done(tmp_path_factory, translate):
    """Flags of a small run on a table with gold alignments, and a folder with the finished run.

    It is trained once for all workers, each of which has its own copy.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    data = f"--data={shared}/trained/table.tsv"
    sizes = ("--seeds=1", "--width=4", "--batch_size=4", "--buckets=1", "--max_length=8")
    # The mean of parameters begins, at step 2800, before a run is interrupted.
    steps = ("--steps=4000", "--evaluate_every=1000", "--dropout=0.1", "--min_count=1")
    steps += ("--average=0.3",)
    flags = (data, "--scores=dot", *sizes, *steps)
    with (shared / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "trained" / "run" / "report.html").exists():
            write_table(shared / "trained")
            assert translate(*flags, f"--workdir={shared}/trained/run") == 0
    folder = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(shared / "trained" / "run", folder)
    return flags, folder


def write_table(folder):
    """Write sentences of three words in another order, with a line to skip and one too long."""
    folder.mkdir(exist_ok=True)
    words = ("one", "two", "three", "four", "five")
    lines = [f"{a} {b} {c}\t{c} {a} {b}\t2 0 1" for a in words for b in words for c in words]
    lines[3] = "\t\t"
    lines[7] = " ".join(9 * ["one"]) + "\tone\t0"
    (folder / "table.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
