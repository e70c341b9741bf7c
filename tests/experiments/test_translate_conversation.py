"""A conversation keeps its history, and draws the last alignment when it is asked to."""

import builtins
import io
import re
import sys
import types

import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.data.text import tokenize
from experiments.translate import conversation, run
from experiments.translate.command_line import parse
from experiments.translate.config import Config
from experiments.translate.conversation import converse
from experiments.translate.use import check_alignments


def upper(folder, score="dot", **options):
    """A translator that writes in capitals and attends from right to left."""
    return types.SimpleNamespace(
        score=score,
        config=Config(workdir=str(folder), **options),
        tokenizer=types.SimpleNamespace(words=tokenize, text=" ".join, source="one two"),
        translations=lambda sentences: [tuple(map(str.upper, words)) for words in sentences],
        weights=lambda pairs: [np.eye(len(p.source) + 1)[::-1] for p in pairs],
    )


def said(translators, *lines):
    answers = io.StringIO()
    converse(translators, io.StringIO("".join(f"{line}\n" for line in lines)), answers)
    return answers.getvalue().replace("> ", "").split("\n")


def test_the_last_alignment_is_drawn_on_request(tmp_path):
    lines = said(upper(tmp_path), ":picture", "one two", ":picture", "two", ":picture")
    assert lines[0].endswith(":picture draws the last alignment.")
    assert lines[1] == "There is no translation to draw yet."
    paths = [line for line in lines if line.endswith(".png")]
    assert paths == [f"{tmp_path}/pictures/{number}.png" for number in (1, 2)]
    for path in (tmp_path / "pictures").iterdir():
        assert path.stat().st_size > 1000
    (tmp_path / "mine").write_text("")
    (refused,) = said(upper(tmp_path, pictures=f"{tmp_path}/mine/a"), "a", ":picture")[-3:-2]
    assert refused == f"{tmp_path}/mine/a cannot be written to: Not a directory."
    lines = said(upper(tmp_path, "none"), ":picture")
    assert "draws" not in lines[0] and lines[1] == ": PICTURE", "without attention it is a sentence"


def test_what_was_asked_comes_back_in_the_next_conversation(tmp_path, monkeypatch, full_disk):
    readline = pytest.importorskip("readline")
    asked = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def answered(*lines):
        waiting = list(lines)

        def ask(prompt):
            asked.append([readline.get_history_item(n + 1) for n in range(9)])
            if not waiting:
                raise EOFError
            readline.add_history(waiting[0])
            return waiting.pop(0)

        monkeypatch.setattr(builtins, "input", ask)
        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(sys, "stdout", Terminal())
        converse(upper(tmp_path), sys.stdin, sys.stdout)
        return sys.stdout.getvalue()

    assert "ONE" in answered("one", "two")
    assert (tmp_path / "history.txt").read_text("utf-8").split() == ["one", "two"]
    answered("three")
    assert asked[-1][:4] == ["one", "two", "three", None]
    with full_disk(5):
        assert "FOUR" in answered("four")
    assert [path.name for path in tmp_path.iterdir()] == ["history.txt"]
    assert (tmp_path / "history.txt").read_text("utf-8").split() == ["one", "two", "three"]
    (tmp_path / "history.txt").unlink()
    (tmp_path / "history.txt").mkdir()
    assert "ONE" in answered("one"), "a history that cannot be kept is none"
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys, "stdin", Terminal("one\n"))
    monkeypatch.setattr(sys, "stdout", Terminal())
    conversation.converse(upper(tmp_path), sys.stdin, sys.stdout)
    assert "> ONE" in sys.stdout.getvalue()


def test_pictures_that_cannot_be_drawn_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "mine").write_text("")
    config = Config(mode="translate", scores=("dot",), pictures=f"{tmp_path}/mine")
    with pytest.raises(UsageError, match=re.escape(f"--pictures: {tmp_path}/mine is a file; give")):
        check_alignments(config)
    config = Config(mode="translate", scores=("none",), pictures=f"{tmp_path}/new")
    with pytest.raises(UsageError, match="--pictures: none does not attend; name another of"):
        check_alignments(config)
    with pytest.raises(UsageError, match="--pictures is for --mode=translate or score; leave it"):
        parse([f"--pictures={tmp_path}"])


@pytest.mark.slow
@pytest.mark.parametrize("found", [True, False])
def test_the_report_of_a_run_that_is_done_opens(found, done, translate, monkeypatch, capsys):
    flags, folder = done
    opened = []
    monkeypatch.setattr(run.webbrowser, "open", lambda url: opened.append(url) or found)
    assert translate(*flags, f"--workdir={folder}", "--open") == 0
    assert opened == [(folder / "report.html").as_uri()]
    assert ("no browser was found" in capsys.readouterr().out) is not found
