"""Converse with a translator: a sentence, its translation and alignment, line by line.

What was asked is kept in the folder of the run, and comes back with the arrow keys.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from attention_jax.diagnostics import plots
from experiments.command_line import UsageError
from experiments.data.corpus import Pair
from experiments.files import unfinished_of
from experiments.translate.looking import END
from experiments.translate.translators import Translators, alignment, unknown

_PROMPT = "> "
_PICTURE = ":picture"
# Sentences that are kept.
_KEPT = 1000
_HISTORY = "history.txt"
_PICTURES = "pictures"

Ask = Callable[[], str]


def converse(translators: Translators, questions: TextIO, answers: TextIO) -> None:
    """Translate each line as it comes, until an empty one, the end of the input or Ctrl-C."""
    draws = translators.score != "none"
    hint = f" {_PICTURE} draws the last alignment." * draws
    print(f"One sentence a line; an empty one leaves.{hint}", file=answers)
    last: Pair | None = None
    with _asking(questions, answers, translators.config.directory / _HISTORY) as ask:
        while True:
            try:
                line = ask()
            except KeyboardInterrupt:
                line = ""
            except UnicodeDecodeError:
                print("This is not UTF-8.", file=answers)
                continue
            words = translators.tokenizer.words(line)
            if not words:
                print(file=answers)
                return
            if draws and line.strip() == _PICTURE:
                lines = [_drawn(translators, last)]
            else:
                lines, last = _answered(translators, words, last)
            for text in lines:
                print(text, file=answers)


@contextlib.contextmanager
def _asking(questions: TextIO, answers: TextIO, history: Path) -> Iterator[Ask]:
    """Yield a function that asks for a line, "" at the end of the input.

    In a terminal the line can be edited, and earlier ones come back, also those of earlier
    conversations.
    """
    if not (questions is sys.stdin and answers is sys.stdout and questions.isatty()):
        yield lambda: _read(questions, answers)
        return
    try:
        import readline
    except ImportError:  # not on every system
        yield lambda: _read(questions, answers)
        return
    readline.clear_history()
    readline.set_history_length(_KEPT)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield _input
    finally:
        with contextlib.suppress(OSError):  # the folder may be read-only
            _keep(history)


def _keep(history: Path) -> None:
    """Write down what was asked; of a full disk, of which readline says nothing, nothing is new."""
    import readline

    unfinished = unfinished_of(history)
    try:
        readline.write_history_file(unfinished)
        asked = min(readline.get_current_history_length(), _KEPT)
        if unfinished.read_bytes().count(b"\n") >= asked:
            unfinished.replace(history)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(questions: TextIO, answers: TextIO) -> str:
    answers.write(_PROMPT)
    answers.flush()
    return questions.readline()


def _input() -> str:
    try:
        return input(_PROMPT)
    except EOFError:
        return ""


def _answered(
    translators: Translators, words: tuple[str, ...], last: Pair | None
) -> tuple[list[str], Pair | None]:
    """Return what is printed of a sentence, and the pair whose alignment can be drawn."""
    try:
        (found,) = translators.translations([words])
        lines = [translators.tokenizer.text(found)]
        unread = unknown(words, translators.tokenizer.source)
        lines += [f"  read as <unk>: {unread}"] if unread else []
        if translators.score == "none" or not found:
            return lines, last
        last = Pair(words, found)
        (weights,) = translators.weights([last])
        return [*lines, *alignment(words, found, weights)], last
    except UsageError as error:
        return [str(error)], last


def _drawn(translators: Translators, pair: Pair | None) -> str:
    """Draw the alignment of a pair, and return the path of the picture or why there is none."""
    if pair is None:
        return "There is no translation to draw yet."
    config = translators.config
    folder = Path(config.pictures) if config.pictures else config.directory / _PICTURES
    number = 1
    while (folder / f"{number}.png").exists():
        number += 1
    try:
        return str(draw(translators, [pair], folder, [number])[0].absolute())
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror}."


def draw(
    translators: Translators, pairs: Sequence[Pair], folder: Path, numbers: Sequence[int]
) -> list[Path]:
    """Draw the alignments of pairs as NUMBER.png and NUMBER.svg, and return the paths of the PNG.

    Raises:
      OSError: the folder cannot be written to.
    """
    paths = []
    for number, pair, weights in zip(numbers, pairs, translators.weights(pairs), strict=True):
        source, target = [*pair.source, END], [*pair.target, END]
        figure = plots.heads(np.asarray(weights), target, source, [translators.score])
        paths.append(plots.save(figure, folder / str(number))[0])
    return paths
