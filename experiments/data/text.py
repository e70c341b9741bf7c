"""Reading lines of UTF-8 text so that two files never shift against each other."""

from __future__ import annotations

import codecs
from pathlib import Path

from experiments.data.corpus import DataError


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file of at least one; see `lines_of`.

    Raises:
      DataError: the file is missing, a folder, unreadable, empty, not UTF-8, or not text.
    """
    return lines_of(read_content(path), path)


def read_content(path: Path) -> bytes:
    """The bytes of a file, which are more than a byte order mark.

    Raises:
      DataError: the file is missing, a folder, unreadable or empty.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder where a file was expected; give a text file.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not content.removeprefix(codecs.BOM_UTF8):
        raise DataError(f"{path} is empty, but lines of text were expected; give another file.")
    return content


def lines_of(content: bytes, path: object) -> list[str]:
    r"""Lines of UTF-8 text, without byte order mark and line ends (LF or CRLF).

    Only "\n" ends a line: U+2028, U+0085, vertical tab and form feed stay inside it, so that
    line n of one file belongs to line n of the other.

    Args:
      content: the bytes.
      path: where they come from, for the message of an error.

    Raises:
      DataError: they are not UTF-8, or not text.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path} line 1 begins with the mark of UTF-16, but UTF-8 was expected; "
            f"convert the file with `iconv -f UTF-16 -t UTF-8`."
        )
    if (zero := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, zero) + 1
        raise DataError(
            f"{path} line {line} has a NUL byte, so the file is binary or UTF-16, but UTF-8 text "
            "was expected; give a text file or convert it with iconv."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); if the "
            "file is Latin-1, convert it with `iconv -f LATIN1 -t UTF-8`."
        ) from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
