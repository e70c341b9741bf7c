"""A checkpoint is valid or skipped, and each skipped one is named in one line."""

import errno
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.translate import checkpoints
from experiments.translate.checkpoints import Checkpoints
from tests.experiments.kills import killed, unfinished, wait_for


def state(step):
    return {"step": jnp.int32(step), "matrix": jnp.arange(12.0).reshape(3, 4) + step}


@pytest.fixture
def saved(tmp_path):
    saved = Checkpoints(tmp_path / "dot")
    for step in (5, 10):
        saved.save(step, state(step))
    return saved


def restored(folder):
    given = Checkpoints(folder)
    found = given.restore(jax.tree.map(jnp.zeros_like, state(0)))
    return given.damaged, found


def assert_is(found, step):
    assert found[0] == step
    jax.tree.map(np.testing.assert_array_equal, found[1], state(step))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(folder):
    path = largest(folder / "00000010")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder):
    path = largest(folder / "00000010")
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder):
    largest(folder / "00000010").write_bytes(b"")


def remove(folder):
    largest(folder / "00000010").unlink()


def seal_half(folder):
    """As an earlier version did where Orbax left a checkpoint unfinished."""
    path = folder / "00000010"
    (path / "manifest.ocdbt").unlink()
    (folder / "00000010.seal").write_text(
        json.dumps({"run": None, "files": checkpoints._checksums(path)})
    )


def scribble(folder):
    (folder / "00000010.seal").write_bytes(b"\xff{")


def empty_seal(folder):
    (folder / "00000010.seal").write_bytes(b"")


def test_the_last_checkpoint_is_restored(saved):
    damaged, found = restored(saved.folder)
    assert damaged == []
    assert_is(found, 10)


def test_nothing_is_restored_from_nothing(tmp_path):
    assert restored(tmp_path / "none") == ([], None)


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove, seal_half, scribble, empty_seal])
def test_a_damaged_checkpoint_is_passed_over(saved, damage):
    damage(saved.folder)
    damaged, found = restored(saved.folder)
    assert damaged == [f"checkpoint 10 in {saved.folder} is damaged: skipped."]
    assert_is(found, 5)


def test_a_checkpoint_without_a_seal_was_never_finished(saved):
    (saved.folder / "00000010.seal").unlink()
    damaged, found = restored(saved.folder)
    assert damaged == []
    assert_is(found, 5)
    assert not (saved.folder / "00000010").exists()


def test_two_checkpoints_are_kept_and_a_damaged_one_is_none_of_them(saved):
    flip(saved.folder)
    for step, kept in ((6, [6, 5]), (7, [7, 6]), (10, [10, 7])):
        saved.save(step, state(step))
        assert saved.steps == kept
    damaged, found = restored(saved.folder)
    assert damaged == []
    assert_is(found, 10)


def test_a_folder_that_cannot_be_written_to_keeps_what_is_there(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        Checkpoints(tmp_path / "file" / "dot").save(3, state(3))
    assert error.value.errno == errno.ENOTDIR and error.value.strerror == (
        f"checkpoint 3 cannot be saved in {tmp_path}/file/dot: Not a directory"
    )


SAVES_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from experiments.command_line import run
from experiments.translate.checkpoints import Checkpoints

def save(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"matrix": np.ones((10, 10))})
    # As on a full disk, writing fails in the middle of a file, in the threads of Orbax too.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    random = np.random.default_rng(0)
    checkpoints.save(2, {str(n): random.random((400 + n, 500)) for n in range(20)})

sys.exit(run("save", None, lambda arguments: Path(arguments[0]), save))
"""


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line_and_nothing_unfinished_is_left(tmp_path):
    folder = tmp_path / "dot"
    command = [sys.executable, "-c", SAVES_ON_A_FULL_DISK, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"save: checkpoint 2 cannot be saved in {folder}: File too large; put that right, and try "
        "again.\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000001.seal"]


def test_what_orbax_leaves_unfinished_is_not_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MANIFEST", "what was not written")
    given = Checkpoints(tmp_path / "dot")
    with pytest.raises(OSError, match=r"checkpoint 3 .*: Orbax left it without its what was"):
        given.save(3, state(3))
    assert given.steps == []
    assert not (given.folder / "00000003").exists()


def test_the_checkpoints_of_another_run_are_passed_over(saved):
    other = Checkpoints(saved.folder, "another mark")
    assert other.restore(state(0)) is None
    assert other.damaged == [
        f"checkpoint {step} in {saved.folder} was written by another run: skipped."
        for step in (10, 5)
    ]


def test_the_checkpoints_of_another_score_are_passed_over(saved):
    other = Checkpoints(saved.folder.with_name("scaled_dot"))
    shutil.copytree(saved.folder, other.folder)
    assert other.restore(state(0)) is None
    assert other.damaged == [
        f"checkpoint {step} in {other.folder} is one of dot: skipped." for step in (10, 5)
    ]


def test_a_seal_that_no_step_names_is_left_alone(saved):
    (saved.folder / "x.seal").write_text("{}")
    assert saved.steps == [10, 5]
    assert_is(restored(saved.folder)[1], 10)
    assert (saved.folder / "x.seal").exists()


def test_a_checkpoint_of_another_state_is_passed_over(saved):
    other = Checkpoints(saved.folder)
    assert other.restore({**state(0), "more": jnp.zeros(2)}) is None
    assert len(other.damaged) == 2


@pytest.mark.parametrize("logger", ["absl", "asyncio"])
def test_what_fails_after_an_error_is_not_told_again(logger, monkeypatch):
    """Threads and tasks of Orbax may fail when `save` has raised already."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    said = [
        logging.makeLogRecord({"msg": f"{words}: no space left"})
        for words in (*checkpoints._RAISED_TOO, "another sentence")
    ]
    passes = logging.getLogger(logger).filter
    with checkpoints._silent_orbax():
        pass
    assert all(map(passes, said)), "nothing is hidden where nothing failed"
    with pytest.raises(OSError), checkpoints._silent_orbax():
        raise OSError
    try:
        assert [bool(passes(record)) for record in said] == [False, False, True]
    finally:
        logging.getLogger("absl").removeFilter(checkpoints._unless_raised)
        logging.getLogger("asyncio").removeFilter(checkpoints._unless_raised)


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
