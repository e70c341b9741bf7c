"""Parallel corpora on disk: FILE.tsv, DIRECTORY/train.en, PREFIX.train.en."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.data.alignments import Row, aligned, all_aligned, by_sentence, is_alignment
from experiments.data.corpus import DataError, Pair
from experiments.data.text import (
    cut,
    is_there,
    lines_of,
    read_content,
    readable,
    without_last_blanks,
)

Splits = dict[str, list[Pair]]

# The empty name is for a prefix without splits: PREFIX.en, PREFIX.de.
SPLIT_NAMES = {
    "train": ("train", "training", ""),
    "valid": ("valid", "val", "dev", "validation"),
    "test": ("test",),
}
_LANGUAGES = {"en": ("english", "eng"), "de": ("german", "deutsch", "deu", "ger")}
_COLUMN_NAMES = frozenset(("1", "2", "source", "target", "src", "tgt", "trg", *_LANGUAGES)).union(
    *_LANGUAGES.values()
)


BARS = "|||"
"""Between the sentences of a line, as in the files of fast_align; a tab is the other separator."""

# A line as the shared tasks on word alignment number it.
_NUMBERED = re.compile(r'<s snum="?(\d+)"?>(.*)</s>', re.ASCII)


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
      lowercase: whether text is lower-cased, unless it is split at spaces only.
      at_spaces: split text at spaces only; otherwise so is text with gold alignments.
      links_from: the position of a first word in gold alignments, 0 or 1.
    """

    lowercase: bool = True
    at_spaces: bool = False
    links_from: int = 0


@dataclass
class Reader:
    """Reads pairs in one direction, and collects notices for the user.

    `at_spaces` says whether to split text at spaces only, as the text of a vocabulary was split;
    where it is None, the training set decides for all sets. `links_from` is the position of a first
    word in gold alignments, 0 or 1. `files` has the SHA-256 of every file that was read, by its
    path.
    """

    source: str
    target: str
    lowercase: bool
    at_spaces: bool | None = None
    links_from: int = 0
    notices: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def read_splits(self, data: str) -> tuple[Splits, Splits]:
        """The splits that are on disk, by name, and further test sets by name.

        Raises:
          DataError: nothing is there, or what is there cannot be read as a parallel corpus.
        """
        with readable(Path(data)):
            return self._read_splits(data)

    def _read_splits(self, data: str) -> tuple[Splits, Splits]:
        path = Path(data)
        if is_there(path) and path.is_dir():
            if path.suffix == ".tsv":
                raise DataError(f"{path} is a folder where a .tsv file was expected; name a file.")
            return self._splits(path, "")
        if is_there(path):
            return {"train": self._table(path)}, {}
        prefix = f"{path.name}."
        if is_there(path.parent) and any(map(_begins(prefix), os.listdir(path.parent))):
            return self._splits(path.parent, prefix)
        raise DataError(
            f"{data} does not exist: it is no generated corpus (grammar, numbers, copy, reverse), "
            f"no file, no folder and no prefix of files like {path.name}.train.{self.source}; "
            "check the spelling and the path."
        )

    def _splits(self, folder: Path, prefix: str) -> tuple[Splits, Splits]:
        if self.source == self.target:
            raise DataError(
                f"source and target are both {self.source!r}; name two different languages."
            )
        splits: Splits = {}
        for split, names in SPLIT_NAMES.items():
            for name in names:
                if split not in splits and (pairs := self._split(folder, prefix + name)):
                    splits[split] = pairs
            # The training set, read first, decides; text without gold alignments is tokenised.
            self.at_spaces = bool(self.at_spaces)
        extra: Splits = {}
        ending = f".{self.source}"
        for file in sorted(filter(_begins(f"{prefix}test"), os.listdir(folder))):
            name = file.removeprefix(prefix).removesuffix(ending)
            if file.endswith(ending) and name != "test":
                extra[name] = self._split(folder, prefix + name) or []
        if "test" not in splits and extra:
            name = next(iter(extra))
            splits["test"] = extra.pop(name)
            self.notices.append(f"The test set is {name}.")
        if "train" not in splits:
            left, right = f"{prefix}train.{self.source}", f"{prefix}train.{self.target}"
            raise DataError(
                f"{folder} has neither {left} with {right} nor {prefix}train.tsv; name another "
                "folder, or set source and target to the endings of its files."
            )
        return splits, extra

    def _split(self, folder: Path, name: str) -> list[Pair] | None:
        name = name.removesuffix(".")
        table, left, right = (
            folder / f"{name}.{ending}" for ending in ("tsv", self.source, self.target)
        )
        if is_there(table):
            return self._table(table)
        if is_there(left) and is_there(right):
            if beside := self._beside(folder, name):
                return self._three_files(left, right, *beside)
            return self._two_files(left, right)
        if is_there(left) or is_there(right):
            there, missing = (left, right) if is_there(left) else (right, left)
            raise DataError(f"{there} has no partner: {missing} does not exist; both are needed.")
        return None

    def _beside(self, folder: Path, name: str) -> tuple[Path, tuple[int, int]] | None:
        """The file of gold alignments of a set; its columns of the source and of the target."""
        languages = self.source, self.target
        for columns in ((0, 1), (1, 0)):
            path = folder / f"{name}.{'-'.join(languages[column] for column in columns)}.align"
            if is_there(path):
                return path, columns
        return None

    def _three_files(
        self, left: Path, right: Path, links: Path, columns: tuple[int, int]
    ) -> list[Pair]:
        """Source, target and gold alignments, of a target and its source if columns are (1, 0)."""
        pairs = enumerate(self._linked_beside(left, self._sides(left, right), links, columns), 1)
        return self._without_empty(pairs, f"{left} and {right.name}")

    def _linked_beside(
        self,
        path: Path,
        sentences: Sequence[tuple[str, str]],
        links: Path,
        columns: tuple[int, int],
    ) -> list[Pair]:
        """Sources and targets of `path` with the gold alignments of a file of their own."""
        lines = without_last_blanks(self._lines(links), len(sentences))
        try:
            numbered = by_sentence(lines, len(sentences))
        except ValueError as error:
            raise DataError(f"{links} {error}.") from None
        if numbered is None and len(lines) != len(sentences):
            raise _unequal(path, len(sentences), links, len(lines), "belong to")
        found = zip(sentences, lines if numbered is None else numbered, strict=True)
        rows: list[Row] = []
        for number, (sentence, text) in enumerate(found, 1):
            rows.append((number, [*(sentence[column] for column in columns), text]))
        if numbered is not None:
            return self._linked(f"{links} sentence", links.name, rows, columns, 1)
        return self._linked(f"{links} line", links.name, rows, columns)

    def _two_files(self, left: Path, right: Path) -> list[Pair]:
        pairs = (
            (number, self._tokenize(*lines))
            for number, lines in enumerate(self._sides(left, right), 1)
        )
        return self._without_empty(pairs, f"{left} and {right.name}")

    def _sides(self, left: Path, right: Path) -> list[tuple[str, str]]:
        """The lines of two files, each with its translation."""
        sides = self._sentences(left), self._sentences(right)
        shorter = min(map(len, sides))
        sources, targets = (without_last_blanks(side, shorter) for side in sides)
        if len(sources) != len(targets):
            raise _unequal(left, len(sources), right, len(targets), "translate")
        return list(zip(sources, targets, strict=True))

    def _sentences(self, path: Path) -> list[str]:
        """The lines of one side, without ``<s snum=0001>`` and ``</s>`` where all have them."""
        lines = self._lines(path)
        found = [_NUMBERED.fullmatch(line.strip()) for line in lines]
        if sum(map(bool, found)) != sum(bool(line.strip()) for line in lines) or not any(found):
            return lines
        sentences = [match[2] if match else "" for match in found]
        for number, match in enumerate(found, 1):
            if match and int(match[1]) != number:
                raise DataError(
                    f"{path} line {number} has snum={match[1]}, but gold alignments need the "
                    "number of the line; number the sentences from 1."
                )
        self.notices.append(f"{path.name}: <s snum=...> and </s> were left out of its lines.")
        return sentences

    def _lines(self, path: Path) -> list[str]:
        content = read_content(path)
        self.files[str(path)] = hashlib.sha256(content).hexdigest()
        return lines_of(content, path)

    def _tokenize(self, source: str, target: str) -> Pair:
        options = {"at_spaces": bool(self.at_spaces), "lowercase": self.lowercase}
        return Pair(cut(source, **options), cut(target, **options))

    def _table(self, path: Path) -> list[Pair]:
        """Columns source, target and, where it can be read as one, gold alignment.

        With an alignment the text is taken as tokenised already, because links count its tokens,
        unless `at_spaces` is given: where that gives other tokens, the links are dropped.
        """
        numbered = list(enumerate(self._rows(path), 1))
        first = next((row for row in numbered if any(map(str.strip, row[1]))), numbered[0])
        columns, header = self._columns(path, *first)
        numbered = numbered[first[0] * header :]
        third = [row[2] for _, row in numbered if len(row) > 2 and row[2].strip()]
        if any(map(is_alignment, third)):
            pairs = self._linked(f"{path} line", path.name, numbered, columns)
        else:
            if third:
                self.notices.append(f"{path.name}: its third column is no alignment: ignored.")
            sentences = [(row[columns[0]], row[columns[1]]) for _, row in numbered]
            if beside := self._beside(path.parent, path.stem):
                pairs = self._linked_beside(path, sentences, *beside)
            else:
                pairs = [self._tokenize(*both) for both in sentences]
        numbers = (number for number, _ in numbered)
        return self._without_empty(zip(numbers, pairs, strict=True), str(path))

    def _rows(self, path: Path) -> list[list[str]]:
        """The columns of each line, between tabs or, in a file without them, between ``|||``."""
        lines = self._lines(path)
        separator = separator_of(lines)
        rows = [line.split(separator) if line.strip() else ["", ""] for line in lines]
        for number, row in enumerate(rows, 1):
            if len(row) < 2 and separator == BARS:
                raise DataError(
                    f"{path} line {number} has no |||, but source ||| target was expected, as in "
                    "the lines before; put ||| between the two sentences."
                )
            if len(row) < 2:
                raise DataError(
                    f"{path} line {number} has no tab, but source<TAB>target was expected; put "
                    "one tab between the two sentences, or name the folder or prefix of two files."
                )
        return rows

    def _linked(
        self,
        where: str,
        name: str,
        rows: Sequence[Row],
        columns: tuple[int, int],
        first: int | None = None,
    ) -> list[Pair]:
        """Pairs with gold alignments, which are of the words between spaces.

        Args:
          where: the rows are, before their numbers in the message of an error.
          name: of the file with the links.
          rows: numbered, in the columns of the links.
          columns: of the source and the target.
          first: the position of a first word, where the format says it.
        """
        if first is None:
            pairs = all_aligned(where, rows, self.notices.append, columns, self.links_from)
        else:
            pairs = [aligned(where, row, columns, first) for row in rows]
        if self.at_spaces is not None:
            return self._recut(name, [number for number, _ in rows], pairs)
        self.at_spaces = True
        self.notices.append(f"{name} has gold alignments, so it was split at spaces only.")
        return pairs

    def _recut(self, name: str, numbers: Sequence[int], pairs: Sequence[Pair]) -> list[Pair]:
        """Tokenise aligned pairs again, and drop the links of those whose tokens change."""
        recut, unlinked = [], []
        for number, pair in zip(numbers, pairs, strict=True):
            found = self._tokenize(" ".join(pair.source), " ".join(pair.target))
            if _lengths(found) == _lengths(pair):
                found = replace(found, sure=pair.sure, possible=pair.possible)
            elif pair.sure is not None:
                unlinked.append(number)
            recut.append(found)
        if unlinked:
            self.notices.append(
                f"{name}: gold alignments that count other words than the vocabularies do were "
                f"left out: {len(unlinked)}, the first is that of line {unlinked[0]}."
            )
        return recut

    def _columns(self, path: Path, number: int, first: list[str]) -> tuple[tuple[int, int], bool]:
        """The columns of source and target, and whether the first line names the columns."""
        names = [name.strip().lower() for name in first[:2]]
        header = names[0] != names[1] and _COLUMN_NAMES.union((self.source, self.target)) >= set(
            names
        )
        if header:
            self.notices.append(
                f"{path.name}: line {number} ({names[0]}, {names[1]}) was read as the names of "
                "columns."
            )

        def column(language: str, otherwise: int) -> int:
            for name in (language, *_LANGUAGES.get(language, ())):
                if header and name in names:
                    return names.index(name)
            return {"1": 0, "2": 1}.get(language, otherwise)

        source, target = column(self.source, 0), column(self.target, 1)
        if source == target:
            raise DataError(
                f"{path}: source {self.source!r} and target {self.target!r} are the same column; "
                "name two columns, or 1 and 2."
            )
        self.notices.append(
            f"{path.name}: column {source + 1} is the source ({self.source}) and column "
            f"{target + 1} the target ({self.target}); source={target + 1} with "
            f"target={source + 1} exchanges them."
        )
        return (source, target), header

    def _without_empty(self, pairs: Iterable[tuple[int, Pair]], where: str) -> list[Pair]:
        kept, empty = [], []
        for number, pair in pairs:
            if pair.source and pair.target:
                kept.append(pair)
            else:
                empty.append(number)
        if not kept:
            raise DataError(f"{where}: no line has both sentences; give full pairs.")
        if empty:
            self.notices.append(
                f"{where}: lines with an empty sentence were skipped: {len(empty)}, the first is "
                f"line {empty[0]}."
            )
        return kept


def separator_of(lines: Sequence[str]) -> str:
    """Return what is between the sentences of a line: a tab, or bars where no line has a tab.

    >>> separator_of(["ein Hund ||| a dog"])
    '|||'
    """
    begins = next((line for line in lines if line.strip()), "")
    return BARS if BARS in begins and not any("\t" in line for line in lines) else "\t"


def _begins(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


def _lengths(pair: Pair) -> tuple[int, int]:
    return len(pair.source), len(pair.target)


def _unequal(left: Path, lines: int, right: Path, others: int, must: str) -> DataError:
    return DataError(
        f"{left} has {lines} lines but {right} has {others}; line n of one must {must} line n of "
        "the other."
    )
