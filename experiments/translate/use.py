"""The modes of a trained run: evaluate its last valid checkpoint, translate, score."""

from __future__ import annotations

import errno
import functools
import importlib.util
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import metrics
from experiments.command_line import UsageError, check_folder, reason, show, terminal
from experiments.data.alignments import all_aligned, is_alignment
from experiments.data.corpus import DataError, Pair, shortened
from experiments.data.files import BARS, Reader, separator_of
from experiments.data.text import (
    is_there,
    lines_of,
    read_lines,
    readable,
    without_last_blanks,
)
from experiments.files import unfinished_of, write_text
from experiments.translate import results, table, workdir
from experiments.translate.config import Config
from experiments.translate.conversation import converse, draw
from experiments.translate.data import Tokenizer, check_data, load_task
from experiments.translate.evaluate import Words, evaluate
from experiments.translate.marks import read_marked, write_marked
from experiments.translate.spaces import Line
from experiments.translate.translators import Translators, load, load_ensemble, tell, unknown
from experiments.translate.workdir import Record

_STDIN = "standard input"
_NOT_TO_BE_WRITTEN = (errno.EROFS, errno.EACCES, errno.EPERM)
# Characters of an input file's name in the name of its evaluation.
_PREFIX = 40


def use(config: Config) -> None:
    """Run the mode of a configuration that is not training.

    Raises:
      UsageError: the run, its checkpoints or the input cannot be used.
    """
    check_alignments(config)
    if config.comet and not importlib.util.find_spec("comet"):
        raise UsageError("--comet needs the package unbabel-comet; install it, or leave it out.")
    modes = {"evaluate": _evaluate, "translate": _translate, "score": _score}
    try:
        modes[config.mode](config)
    except DataError as error:
        raise UsageError(str(error)) from None


def _evaluate(config: Config) -> None:
    for score in workdir.run_scores(config.directory):
        if score not in config.scores and not workdir.has_checkpoint(config.directory, score):
            tell(f"{score} has no checkpoint and is left out.")
    if config.ensemble:
        loaded = [load_ensemble(config)]
    else:
        loaded = [load(score, config) for score in config.scores]
    if config.input:
        name, pairs = _pairs_of_file(config, loaded[0].tokenizer)
    else:
        name, pairs = _pairs_of_split(config)
    further = _references(config, loaded[0].tokenizer, name, len(pairs))
    more = {"further": further, "comet": config.comet}
    records = []
    for translators in loaded:
        measure = functools.partial(evaluate, translators.score, **more)
        found = translators.evaluated(measure, pairs)
        records.append({"score": translators.score, "step": translators.step, **found.measured})
    tokenizer = loaded[0].tokenizer
    signatures = results.signatures(pairs, tokenizer.lowercase, tokenizer.at_spaces, len(further))
    about = {"set": name, "pairs": len(pairs), "signatures": signatures}
    if config.ensemble:
        about["ensemble"] = loaded[0].score
    if path := report_evaluation(config, about, records):
        show(path.absolute())


def _references(config: Config, tokenizer: Tokenizer, name: str, count: int) -> list[list[Words]]:
    """Return the further references of each file, for a set of `count` pairs.

    Raises:
      UsageError: a file has another number of lines.
    """
    found = []
    for path in config.references:
        lines = without_last_blanks(read_lines(Path(path)), count)
        if len(lines) != count:
            raise UsageError(
                f"--references: {path} has {len(lines)} lines, but {name} has {count} pairs; line "
                "n must be a reference of pair n."
            )
        found.append([tokenizer.words(line) for line in lines])
    return found


def report_evaluation(config: Config, about: Record, records: Sequence[Record]) -> Path | None:
    """Print the metrics of each score, write them as JSON, and return its path.

    None, and a sentence is told, where the run is not to be written to.

    The file keeps earlier evaluations of the run's other scores.

    Args:
      config: of the run.
      about: name of the set, number of pairs, signatures of the metrics.
      records: for each score its name, step and metrics.
    """
    names = [name for name, _, _ in table.EVALUATION_COLUMNS]
    rows = [
        {"score": r["score"], "step": r["step"], **{k: results.summary(r.get(k)) for k in names}}
        for r in records
    ]
    evaluation = {**about, "config": config.identity, "scores": rows}
    table.show_evaluation(terminal(), evaluation)
    how = "-ensemble" * config.ensemble + "-references" * bool(config.references)
    path = config.directory / "evaluations" / f"{about['set']}{how}{_decoding(config)}.json"
    every = [*rows, *_other_rows(path, config.directory, [row["score"] for row in rows])]
    scores = {"scores": [row["score"] for row in every]}
    record = {**evaluation, "config": config.identity | scores, "scores": every}
    try:
        path.parent.mkdir(exist_ok=True)
        write_marked(path, config.directory, record)
    except OSError as error:
        if error.errno not in _NOT_TO_BE_WRITTEN:
            raise
        tell(f"{reason(error)}; the evaluation is printed and not kept.")
        return None
    return path


def _other_rows(path: Path, folder: Path, scores: Sequence[str]) -> list[Record]:
    """Return the rows of other scores from an earlier evaluation of the run."""
    try:
        rows = read_marked(path, folder, "", of_another="")["scores"]
        return [row for row in rows if row["score"] not in scores]
    except (UsageError, KeyError, TypeError):  # missing, damaged or of another run
        return []


def _decoding(config: Config) -> str:
    """Return the part of a file's name that names the decoding."""
    if config.beam_size == 1:
        return ""
    return f"-beam{config.beam_size}-penalty{config.length_penalty:g}"


def _chosen(config: Config) -> Translators:
    """Return the translator that the flags name, or the ensemble."""
    if config.ensemble:
        return load_ensemble(config)
    return load(config.scores[0], config).of_seed(config.translator)


def _translate(config: Config) -> None:
    translators = _chosen(config)
    if not config.input and sys.stdin.isatty():
        converse(translators, sys.stdin, sys.stdout)
        return
    lines = _lines(config)
    parts = [translators.tokenizer.parts(line) for line in lines]
    sentences = [tuple(itertools.chain.from_iterable(of_line)) for of_line in parts]
    _tell_unknown(translators.tokenizer, [(words, ()) for words in sentences])
    full = [number for number, words in enumerate(sentences) if words]
    found: list[Words] = [()] * len(lines)
    for number, words in zip(
        full, translators.translations([sentences[n] for n in full]) if full else (), strict=True
    ):
        found[number] = words
    for words in found:
        show(translators.tokenizer.text(words))
    translated = []
    for source, of_line, target in zip(sentences, parts, found, strict=True):
        counts = tuple(map(len, of_line)), translators.tokenizer.counts(target)
        translated.append(Line(Pair(source, target), *counts))
    _save_links(translators, translated)


def _score(config: Config) -> None:
    translators = _chosen(config)
    where = f"{config.input or _STDIN} line"
    given = _lines(config)
    separator = separator_of(given)
    rows = [line.split(separator) for line in given]
    lines = []
    for number, row in enumerate(rows, 1):
        sides = [translators.tokenizer.parts(cell) for cell in [*row, ""][:2]]
        source, target = (tuple(itertools.chain.from_iterable(side)) for side in sides)
        line = Line(Pair(source, target), *(tuple(map(len, side)) for side in sides))
        _check_full(f"{where} {number}", line.pair, row, separator)
        lines.append(line)
    gold = _gold(where, rows, config.links_from)
    _tell_unknown(translators.tokenizer, [(line.pair.source, line.pair.target) for line in lines])
    full = [line.pair for line in lines if line.pair.source]
    values = iter(translators.log_probabilities(full) if full else ())
    for line in lines:
        show(f"{next(values):.4f}" if line.pair.source else "")
    _save_links(translators, lines, gold)


def _gold(where: str, rows: Sequence[list[str]], first: int) -> list[Pair]:
    """Return the pairs with the gold alignments of a third column; none where it is empty.

    Raises:
      DataError: an alignment cannot be read.
      UsageError: the column has something else, or there are more.
    """
    wide = [row for row in rows if any(cell.strip() for cell in row[3:])]
    if wide:
        raise UsageError(
            f"{where.removesuffix(' line')}: a source, a target and perhaps a gold alignment are "
            f"read, but a line has {len(wide[0])} columns. Leave the others out."
        )
    third = [row[2] for row in rows if len(row) > 2 and row[2].strip()]
    if any(map(is_alignment, third)):
        numbered = [(number, [*row, ""]) for number, row in enumerate(rows, 1)]
        return all_aligned(where, numbered, tell, first=first)
    if third:
        raise UsageError(
            f"{where.removesuffix(' line')}: its third column is no alignment, such as 0-0 1-2; "
            f"{shortened(third[0])!r} is there. Leave the column out."
        )
    return []


def _check_full(where: str, pair: Pair, row: list[str], separator: str) -> None:
    """Refuse a line with one sentence; one without any is a blank line."""
    if bool(pair.source) == bool(pair.target) and (len(row) > 1 or not pair.source):
        return
    name, form = ("|||",) * 2 if separator == BARS else ("tab", "<TAB>")
    what = f"has no {name} between two sentences"
    if len(row) > 1:
        what = f"has nothing {'before' if pair.target else 'behind'} its {name}"
    raise UsageError(f"{where} {what}, but source{form}target is needed, or a blank line.")


def _lines(config: Config) -> list[str]:
    if config.input:
        return read_lines(Path(config.input))
    return lines_of(sys.stdin.buffer.read(), _STDIN)


def _pairs_of_split(config: Config) -> tuple[str, Sequence[Pair]]:
    task = load_task(config)
    check_data(config.directory, task.corpus)
    sets = task.sets
    if config.split not in sets:
        raise UsageError(f"--split: there is no {config.split!r}; choose from {', '.join(sets)}.")
    return config.split, sets[config.split].pairs


def _pairs_of_file(config: Config, tokenizer: Tokenizer) -> tuple[str, Sequence[Pair]]:
    how = tokenizer.lowercase, tokenizer.at_spaces, config.links_from
    reader = Reader(config.source, config.target, *how)
    path = Path(config.input)
    with readable(path):
        is_file = is_there(path) and path.is_file()
    if not is_file:
        raise UsageError(f"--input {path} is not a file; give a table of pairs, source<TAB>target.")
    splits, _ = reader.read_splits(str(path))
    for notice in reader.notices:
        tell(notice)
    # The hash distinguishes files of the same name in other folders.
    name = f"input-{path.stem[:_PREFIX]}-{reader.files[str(path)][:8]}"
    columns = config.source, config.target
    if columns != workdir.run_languages(config.directory):
        name += "".join("-" + re.sub(r"\W", "_", column) for column in columns)
    return name, splits["train"]


def _tell_unknown(tokenizer: Tokenizer, sentences: Sequence[tuple[Words, Words]]) -> None:
    """Print the words that are not in the vocabularies, line by line."""
    sides = ("source", tokenizer.source), ("target", tokenizer.target)
    for number, sentence in enumerate(sentences, 1):
        found = {
            side: unknown(words, vocabulary)
            for words, (side, vocabulary) in zip(sentence, sides, strict=True)
        }
        said = ", ".join(f"{words} ({side})" for side, words in found.items() if words)
        if said:
            tell(f"line {number}: read as <unk>: {said}")


def _save_links(translators: Translators, lines: Sequence[Line], gold: Sequence[Pair] = ()) -> None:
    """Write the alignment of each line and draw it, if that is asked; compare it with a gold one.

    What is written counts the words between spaces from 0, as gold alignments do.
    """
    full = [number for number, line in enumerate(lines) if line.pair.source and line.pair.target]
    pairs = [lines[number].pair for number in full]
    config = translators.config
    if full and config.pictures:
        draw(translators, pairs, Path(config.pictures), [n + 1 for n in full])
    if gold and translators.score == "none":
        tell("none does not attend, so the gold alignments of the third column are not used.")
        gold = ()
    if not config.alignments and not gold:
        return
    weights = translators.weights(pairs) if full else []
    links = [lines[n].links(of_pair) for n, of_pair in zip(full, weights, strict=True)]
    if gold:
        held = [gold[number] for number in full]
        quality = metrics.alignment_quality(links, held)
        error, precision, recall = (
            "undefined" if math.isnan(share) else f"{100 * share:.1f}%" for share in quality
        )
        count = sum(pair.sure is not None for pair in held)
        tell(
            f"alignment error {error}, precision {precision}, recall {recall}; pairs with a gold "
            f"alignment in the third column: {count}."
        )
    if config.alignments:
        texts = dict(zip(full, map(metrics.pharaoh, links), strict=True))
        write_alignments(Path(config.alignments), [texts.get(n, "") for n in range(len(lines))])


def check_alignments(config: Config) -> None:
    """Refuse a file of --alignments that cannot be written or would overwrite another file.

    Raises:
      UsageError: one sentence that says why.
    """
    flag = "alignments" if config.alignments else "pictures"
    if not config.alignments and not config.pictures:
        return
    translating = config.scores if config.ensemble else config.scores[:1]
    if set(translating) == {"none"}:
        raise UsageError(f"--{flag}: none does not attend; name another of the --scores.")
    if config.pictures:
        check_folder("pictures", Path(config.pictures))
    if not config.alignments:
        return
    if not config.input and sys.stdin.isatty():
        raise UsageError("--alignments is for sentences from --input or a pipe; leave it out.")
    path = Path(config.alignments)
    try:
        if os.path.isfile(path):
            _check_existing(path, config)
        _try_to_write(path)
    except OSError as error:
        raise UsageError(
            f"--alignments {path} cannot be written: {error.strerror or error}; name another file."
        ) from None


def write_alignments(path: Path, lines: Iterable[str]) -> None:
    """Write lines to a file atomically, or to a device or a pipe."""
    text = "".join(f"{line}\n" for line in lines)
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
    else:
        write_text(_real(path), text)


def _check_existing(path: Path, config: Config) -> None:
    """Refuse to overwrite the input, the output, and files of the run."""
    status = path.stat()
    taken = {
        "--input": _status(config.input),
        "standard input": _status_of(sys.stdin),
        "standard output": _status_of(sys.stdout),
    }
    for name, other in taken.items():
        if other and os.path.samestat(status, other):
            raise UsageError(f"--alignments {path} is the file of {name}; name another file.")
    if _real(path).is_relative_to(_real(config.directory)):
        raise UsageError(
            f"--alignments {path} is a file of the run in {config.directory}; name another file."
        )


def _try_to_write(path: Path) -> None:
    """Raise the system's error if a file cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if not _is_special(path):
        # Only trying shows what a file system forbids.
        unfinished = unfinished_of(_real(path))
        unfinished.touch()
        unfinished.unlink()


def _is_special(path: Path) -> bool:
    """Whether a file is a device or a pipe, which cannot be replaced."""
    return path.exists() and not path.is_file()


def _real(path: Path) -> Path:
    """Follow links, so that the target of a link is replaced and not the link."""
    return Path(os.path.realpath(path))


def _status(path: str) -> os.stat_result | None:
    return os.stat(path) if os.path.exists(path) else None


def _status_of(stream: Any) -> os.stat_result | None:
    try:
        return os.fstat(stream.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        return None
