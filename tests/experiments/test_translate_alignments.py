"""The file of --alignments takes the place of nothing that is needed."""

import errno
import io
import os
import pathlib
import sys

import pytest

from experiments.command_line import UsageError
from experiments.translate.config import Config
from experiments.translate.use import check_alignments, write_alignments


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Check a file for a run in `run`, with sentences from a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    (tmp_path / "sentences").write_text("one\n")
    monkeypatch.chdir(tmp_path)

    def checked(path, **given):
        config = Config(mode="translate", workdir="run", alignments=str(path))
        check_alignments(Config(**{**vars(config), "input": "sentences", **given}))

    return checked


def refusal(check, path, **given):
    with pytest.raises(UsageError) as error:
        check(path, **given)
    return str(error.value)


@pytest.mark.parametrize("name", ["sentences", "./sentences", "link", "hard"])
def test_the_input_is_not_written_over(name, check, tmp_path):
    (tmp_path / "link").symlink_to("sentences")
    os.link("sentences", "hard")
    assert refusal(check, name) == (
        f"--alignments {os.path.normpath(name)} is the file of --input; name another file."
    )


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_stream_is_not_written_over(name, check, tmp_path, monkeypatch):
    with (tmp_path / "taken").open("a+") as stream:
        monkeypatch.setattr(sys, name, stream)
        assert refusal(check, "taken", input="sentences") == (
            f"--alignments taken is the file of standard {name[3:]}put; name another file."
        )


def test_files_of_the_run_are_not_written_over(check, tmp_path):
    (tmp_path / "link").symlink_to("run")
    for name in ("run/metrics.jsonl", "link/metrics.jsonl"):
        assert refusal(check, name) == (
            f"--alignments {name} is a file of the run in run; name another file."
        )
    check("run/links")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/proc/self/al", "No such file or directory"),
        ("run", "it is a folder"),
        ("/no/al", "No such file or directory"),
        ("n" * 300, "File name too long"),
        ("n" * 250, "File name too long"),
        ("closed", "Permission denied"),
    ],
)
def test_what_cannot_be_written_is_known_before(name, why, check, tmp_path, monkeypatch):
    (tmp_path / "closed").touch()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode)
    )
    assert refusal(check, name) == (
        f"--alignments {name} cannot be written: {why}; name another file."
    )


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_says_is_repeated(code, check, monkeypatch):
    """A folder that cannot be written to is not called missing."""

    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(pathlib.Path, "touch", refuse)
    assert refusal(check, "links") == (
        f"--alignments links cannot be written: {os.strerror(code)}; name another file."
    )


def test_a_closed_standard_input_is_no_matter(check, tmp_path, monkeypatch):
    (tmp_path / "links").touch()
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdin", stream)
        check("links")


def test_what_a_link_points_to_is_written(tmp_path):
    for name in ("there", "missing"):
        (tmp_path / f"to-{name}").symlink_to(name)
    (tmp_path / "there").write_text("before")
    for name in ("there", "missing"):
        write_alignments(tmp_path / f"to-{name}", ["0-0", "", "1-0"])
        assert (tmp_path / f"to-{name}").is_symlink()
        assert (tmp_path / name).read_text() == "0-0\n\n1-0\n"


def test_a_pipe_is_written_into_and_stays_one(check, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    check(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_alignments(path, ["0-0"])
    assert os.read(reader, 99) == b"0-0\n"
    os.close(reader)
    assert path.is_fifo()
    check(os.devnull)
    write_alignments(tmp_path / os.devnull, ["0-0"])
    assert not os.path.isfile(os.devnull)
