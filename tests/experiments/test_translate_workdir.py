"""What a run keeps beside its parameters: it goes on with the data that it began with, or not."""

import errno
import fcntl
import json
import os
import re
import shutil

import pytest

from experiments.command_line import UsageError
from experiments.files import write_sealed, write_text
from experiments.translate.config import Config
from experiments.translate.log import Log
from experiments.translate.workdir import check


def sentence(call):
    with pytest.raises(UsageError) as error:
        call()
    return str(error.value)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(done, tmp_path, translate, capsys):
    """The folder of a finished run, and a command on it that returns its code and its errors."""
    folder = tmp_path / "run"
    shutil.copytree(done[1], folder, ignore=shutil.ignore_patterns("figures"))

    def command(*flags):
        code = translate(*(flags or done[0]), f"--workdir={folder}")
        said = capsys.readouterr()
        return code, said.err.removeprefix("translate: ").rstrip("\n")

    return folder, command


@pytest.mark.slow
def test_changed_data_are_not_evaluated_on(copied, done):
    folder, command = copied
    held = json.loads((folder / "data.json").read_text("utf-8"))
    (path,) = held["files"]
    changed = {"run": held["run"], "files": {path: "other"}}
    write_sealed(folder / "data.json", changed)
    before = content(folder)
    said = (
        f"{path} has changed since the run in {folder} began; restore the data as they were or "
        "give another --workdir."
    )
    assert command() == command("--mode=evaluate") == (2, said)
    assert content(folder) == before
    assert command("--mode=evaluate", f"--input={path}")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("text", ['{"config": {"scores"', "[1]", '{"config": [1]}'])
def test_a_damaged_configuration(text, copied):
    folder, command = copied
    (folder / "config.json").write_text(text)
    assert command("--mode=evaluate") == (
        2,
        f"{folder}/config.json is damaged; restore it from a copy, or train again in another "
        "--workdir.",
    )
    assert command() == (
        2,
        f"{folder}/config.json is not the configuration of a run; give another --workdir.",
    )


@pytest.mark.slow
def test_a_damaged_outcome_is_measured_again_when_it_is_deleted(copied):
    folder, command = copied
    path = folder / "outcomes" / "dot.json"
    whole = json.loads(path.read_text("utf-8"))
    path.write_text(path.read_text("utf-8")[:99])
    assert command() == (
        2,
        f"{path} is damaged; delete it, and the same command measures again what was trained.",
    )
    path.unlink()
    assert command() == (0, "")
    assert json.loads(path.read_text("utf-8"))["sets"] == whole["sets"]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"score": "dot',
        b"[]",
        b"{}",
        b"\xff",
        b"",
        b'{"score": "dot", "step": 1}',
        "digit",
        "other",
    ],
)
def test_a_damaged_line_of_the_log(damaged, tmp_path):
    log = Log(tmp_path / "metrics.jsonl", "one run")
    log.append({"score": "dot", "step": 1})
    whole = log.path.read_bytes()
    if damaged == "digit":
        damaged = whole.strip().replace(b"1", b"2", 1)
    elif damaged == "other":
        other = Log(tmp_path / "other.jsonl", "another run")
        other.append({"score": "dot", "step": 1})
        damaged = other.path.read_bytes().strip()
    log.path.write_bytes(whole + damaged + b"\n" + whole)
    said = (
        f"{log.path} line 2 is damaged or of another run; delete that line, and the same command "
        "goes on."
    )
    assert sentence(lambda: log.records("dot")) == sentence(lambda: log.rewind("dot", 1)) == said
    log.path.write_bytes(whole + damaged)
    assert log.records("dot") == [{"score": "dot", "step": 1}]


@pytest.mark.slow
def test_a_log_that_was_lost_is_told_before_anything_is_done(copied):
    folder, command = copied
    (folder / "metrics.jsonl").unlink()
    before = content(folder)
    said = (
        f"{folder}/metrics.jsonl lacks the measurements of training dot; restore it from a copy, "
        "or train again in another --workdir."
    )
    assert command() == (2, said)
    assert content(folder) == before
    (folder / "outcomes" / "dot.json").unlink()
    assert command() == (2, said)
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("held", ["exact_match", "tokens"])
def test_a_log_needs_steps_and_validations(held, tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    log.append({"score": "dot", "step": 1, held: 1})
    assert sentence(lambda: log.complete_records("dot")).startswith(
        f"{log.path} lacks the measurements of "
    )
    log.append({"score": "dot", "step": 2, "tokens": 1, "exact_match": [1.0]})
    assert len(log.complete_records("dot")) == 2


def test_measurements_that_a_log_lacks_are_told(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    for step in (10, 30):
        log.append({"score": "dot", "step": step, "tokens": 1})
    assert log.gap("dot", "tokens", (10, 30)) is None
    assert log.gap("dot", "tokens", range(10, 40, 10)) == (
        "metrics.jsonl lacks 1 measurements of training dot, after step 20: what is computed of "
        "them, or drawn, is without these."
    )
    assert "after step 1, 2, 3, 4, 5, ...:" in str(log.gap("none", "tokens", range(1, 9)))


@pytest.mark.slow
def test_what_a_log_lacks_is_in_the_report(copied):
    folder, command = copied
    (folder / "attention.jsonl").unlink()
    assert command() == (0, "")
    assert "attention.jsonl lacks 4 measurements of training dot" in (
        folder / "report.html"
    ).read_text("utf-8")


def test_a_folder_that_cannot_be_had(tmp_path, capsys, translate):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for folder, sentence in {
        "file": "is a file, not a folder",
        "full": "holds other files and no run",
    }.items():
        assert translate(f"--workdir={tmp_path}/{folder}") == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        said = rf"translate: --workdir {tmp_path}/{folder} {sentence}; give another --workdir\.\n"
        assert re.fullmatch(said, printed.err)
    for folder, parent, why in (
        ("file/below", tmp_path / "file", "Not a directory"),
        (300 * "a", tmp_path, "File name too long"),
    ):
        assert translate(f"--workdir={tmp_path}/{folder}") == 2
        assert capsys.readouterr().err == (
            f"translate: --workdir: {tmp_path}/{folder} cannot be written in {parent}: {why}; give "
            "another.\n"
        )
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?/run"])
def test_a_folder_in_which_no_checkpoint_could_be_saved(name, tmp_path, capsys, translate):
    assert translate(f"--workdir={tmp_path}/{name}") == 2
    assert capsys.readouterr().err == (
        f"translate: --workdir {tmp_path}/{name} has a {name[1]} in its path, but checkpoints can "
        "be saved only in a path without *, ? and [; give another --workdir.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_run_was_killed_at_birth_is_taken_over(tmp_path):
    for name in (".lock", "config.json.unfinished"):
        (tmp_path / name).write_text("{")
    check(Config(workdir=str(tmp_path)))


@pytest.mark.slow
def test_another_process_in_the_folder_is_refused(done, capsys, translate):
    flags, folder = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert translate(*flags, f"--workdir={folder}") == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"translate: --workdir {folder} is in use by another process; wait for it, or give "
        "another.\n"
    )
    assert printed.out == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_record_that_could_not_be_written_is_not_in_the_log(tmp_path, full_disk):
    log = Log(tmp_path / "metrics.jsonl")
    log.append({"score": "dot", "step": 1})
    with full_disk(40), pytest.raises(OSError, match="File too large") as error:
        log.append({"score": "dot", "step": 2})
    assert error.value.filename == str(log.path)
    log.append({"score": "dot", "step": 3})
    assert [record["step"] for record in log.records("dot")] == [1, 3]


def test_a_file_that_could_not_be_written_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_text(path, "before")

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write_text(path, "after")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "before"
