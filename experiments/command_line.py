"""What all programs share on the command line: absl flags, error messages, and the terminal."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from rich.console import Console
from rich.text import Text

from experiments.data.corpus import shortened
from experiments.files import unfinished_of

Options = TypeVar("Options")

# A word of a message that is longer, also a path, is not repeated.
_LONG_WORD = re.compile(r"\S{1000,}?(?=[:;,.]?(?:\s|$))")

# The width where the output is no terminal, enough for all tables.
_WIDTH = 140


class UsageError(ValueError):
    """A request that cannot be met; the message is one sentence for the user."""


class HelpRequested(Exception):  # noqa: N818  it is no error
    """`--help` was given; the argument is the text to print."""


def parse_flags(
    program: str, values: flags.FlagValues, arguments: Sequence[str], help: Callable[[], str]
) -> dict[str, Any]:
    """Parse the arguments behind a program's name and return the value of each flag.

    Raises:
      UsageError: an unknown flag, a value of another type, or an argument that is no flag.
      HelpRequested: the help text was asked for.

    >>> values = flags.FlagValues()
    >>> flags.DEFINE_integer("length", 16, "", flag_values=values)
    <absl.flags._flagvalues.FlagHolder ...>
    >>> parse_flags("draw", values, ["--lenght=8"], str)
    Traceback (most recent call last):
    experiments.command_line.UsageError: unknown flag --lenght; did you mean --length?
    """
    names = list(values)
    flags.DEFINE_flag(flags.BooleanFlag("help", False, "this text", short_name="h"), values)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            rest = values([program, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, names, n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists all flags."
        raise UsageError(f"unknown flag --{error.flagname}; {hint}") from None
    except RecursionError:  # absl looks for similar names letter by letter
        longest = shortened_words(max(arguments, key=len))
        raise UsageError(f"unknown flag {longest}; --help lists all flags.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--flagfile: text in {error.encoding} is needed, but the file has the byte "
            f"0x{error.object[error.start]:02x} where no character can have it; give another file."
        ) from None
    except flags.CantOpenFlagFileError as error:
        refused = error.__context__
        why = reason(refused) if isinstance(refused, OSError) else refused
        raise UsageError(f"--flagfile: {why}; give a file of flags.") from None
    except (flags.Error, ValueError) as error:
        raise UsageError(f"{_mistake(error)}; --help lists all flags.") from None
    # The only warning of absl is that a file of flags includes itself.
    if warning := said.getvalue():
        file = warning.strip().rpartition(": ")[2]
        raise UsageError(f"--flagfile: {file} includes itself; take --flagfile out of it.")
    if values["help"].value:
        raise HelpRequested(help())
    if rest and rest[0].startswith("\ufeff"):
        raise UsageError(
            "--flagfile: the file begins with a byte order mark, which is no flag; save it as "
            "UTF-8 without one."
        )
    if rest:
        raise UsageError(f"{rest[0]!r} is no flag; write --name=value, and --help lists all flags.")
    return {name: values[name].value for name in names}


def _mistake(error: Exception) -> str:
    """Return the message of absl in one line."""
    text = " ".join(str(error).split())
    # For a value that is no boolean absl shows a tuple.
    if boolean := re.fullmatch(r"flag --(\w+)=(.*): \('Non-boolean .*\)", text):
        return "--{} is {}, but true or false is needed".format(*boolean.groups())
    # For what is no number it shows the error of Python.
    for pattern, sentence in (
        (r"flag --(\w+)=.*: invalid literal .*?: ('.*')", "--{}: {} is no whole number"),
        (r"flag --(\w+)=.*: could not convert .*?: ('.*')", "--{}: {} is no number"),
        (r"flag --(\w+)=.*: Exceeds the limit .*", "--{}: the number has too many digits"),
    ):
        if number := re.fullmatch(pattern, text):
            return sentence.format(*number.groups())
    return text


def check_file(flag: str, path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
      UsageError: it is a folder, or cannot be created where it is.
    """
    if os.path.isdir(path):
        raise UsageError(f"--{flag}: {path} is a folder; give a file.")
    _check_written(path.absolute().parent, flag, path)


def check_folder(flag: str, path: Path) -> None:
    """Refuse a folder that cannot be written to, before any work is done.

    Raises:
      UsageError: it is a file, or cannot be created where it is, or written to.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(f"--{flag}: {path} is a file; give a directory.")
    _check_written(path.absolute(), flag, path)


def _check_written(folder: Path, flag: str, path: Path) -> None:
    """Create and remove a folder, because permissions alone do not decide; and try the names."""
    parent = next(there for there in (folder, *folder.parents) if os.path.exists(there))
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent))
        for part in path.absolute().relative_to(parent).parts:
            _check_name(parent / part)
    except OSError as error:
        raise UsageError(
            f"--{flag}: {path} cannot be written in {parent}: {error.strerror}; give another."
        ) from None


def _check_name(path: Path) -> None:
    """Raise the system's error if a file has too long a name to be written atomically."""
    with contextlib.suppress(FileNotFoundError):
        os.lstat(unfinished_of(path))


def show(text: object) -> None:
    """Print a text; a closed pipe, as of `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nor is there anyone to tell so at exit, when Python flushes again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(
    program: str,
    arguments: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Options],
    do: Callable[[Options], int | None],
) -> int:
    """Run a program and return its exit code: what `do` returns, 0 for None.

    1 where the system refused a file; 2 for a request that cannot be met.
    """
    try:
        with _no_backend(), _short_warnings(program):
            return _done(sys.argv[1:] if arguments is None else arguments, parse, do)
    except UsageError as error:
        return complain(program, error, 2)
    except OSError as error:
        drop_output()
        return complain(program, f"{reason(error)}; put that right, and try again.", 1)


def _done(
    arguments: Sequence[str],
    parse: Callable[[Sequence[str]], Options],
    do: Callable[[Options], int | None],
) -> int:
    try:
        return do(parse(arguments)) or 0
    except HelpRequested as help:
        show(help)
        return 0


def drop_output() -> None:
    """Forget what cannot be written to standard output, so that Python does not try it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shortened_words(sentence: str) -> str:
    """Return a sentence of whose words of at least 1000 characters only the beginning is left.

    >>> shortened_words("there is no " + 20_000 * "x")
    'there is no xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... (20,000 characters)'
    """
    return _LONG_WORD.sub(lambda word: shortened(word[0]), sentence)


@contextlib.contextmanager
def _no_backend() -> Iterator[None]:
    """Hide matplotlib's backend of the environment, because programs only write files.

    A cell of a notebook names one that another Python environment may lack, and matplotlib could
    not be imported.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


@contextlib.contextmanager
def _short_warnings(program: str) -> Iterator[None]:
    """Print a warning as one line, without the line of code that it comes from."""

    def short(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"{program}: {shortened_words(' '.join(str(message).split()))}\n"

    before, warnings.formatwarning = warnings.formatwarning, short
    try:
        yield
    finally:
        warnings.formatwarning = before


def reason(error: OSError) -> str:
    """Return the file and the reason of a system error."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def complain(program: str, sentence: object, code: int) -> int:
    """Print an error message, and return the exit code, also where nobody can read the message."""
    with contextlib.suppress(OSError):
        print(f"{program}: {shortened_words(str(sentence))}", file=sys.stderr, flush=True)
    return code


class _Console(Console):
    """A console whose output may be closed early, as `| head` does."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def terminal(*, quiet: bool = False) -> Console:
    """Return a console that prints brackets and colons as they are, or nothing if it is quiet.

    A console that is not a terminal is wide enough for all tables.
    """
    width = None if _Console().is_terminal else _WIDTH
    return _Console(width=width, markup=False, emoji=False, highlight=False, quiet=quiet)


def two_lines(value: str, remark: str) -> Text:
    """Return a value with a dimmed remark below it, if there is one."""
    return Text.assemble(value, ("\n" + remark if remark else "", "dim"))
