"""What is kept of a run beside its parameters: configuration, vocabularies, and whose data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.command_line import UsageError
from experiments.data.corpus import Corpus, Pair
from experiments.data.text import cut, detokenize
from experiments.data.vocabulary import Vocabulary
from experiments.translate.config import SWEPT, Config, group_of
from experiments.translate.workdir import shown, write_json

_FILE = "vocabularies.json"
_DATA = "data.json"
# What to do about a damaged file.
_WRITTEN_ANEW = "the run's command writes it anew."
_LOST = "restore it from a copy, or train again in another --workdir."
# What may differ from the training: the scores may be fewer.
_FREE = ("Decoding", "Output", "After training")


@dataclasses.dataclass(frozen=True)
class Languages:
    """Both vocabularies, and how text becomes words.

    Text with gold alignments was cut at spaces, because links count its words; `longest` is the
    number of words after which a translation is cut off.
    """

    source: Vocabulary
    target: Vocabulary
    longest: int
    at_spaces: bool
    lowercase: bool

    def words(self, text: str) -> tuple[str, ...]:
        """Cut a sentence into words as those of the training were."""
        return cut(text, self.at_spaces, self.lowercase)

    def text(self, words: tuple[str, ...]) -> str:
        """Return words as a line of text."""
        return " ".join(words) if self.at_spaces else detokenize(words)

    def corpus(self, name: str, pairs: tuple[Pair, ...] = ()) -> Corpus:
        """Return pairs as the test set of a corpus with these vocabularies."""
        return Corpus(name, (), (), pairs, self.source, self.target)


def write(folder: Path, corpus: Corpus, longest: int, config: Config) -> None:
    """Keep the languages of a run in its folder, and what the files of its data held.

    Raises:
      UsageError: the run began with other data.
    """
    check_data(folder, corpus)
    path = folder / _FILE
    # A run that began without a record of its data may have begun with others.
    if corpus.files and not path.exists() and not (folder / _DATA).exists():
        write_json(folder / _DATA, dict(corpus.files))
    languages = Languages(
        source=corpus.source_vocabulary,
        target=corpus.target_vocabulary,
        longest=longest,
        at_spaces=corpus.at_spaces,
        lowercase=config.lowercase,
    )
    try:
        held = read(folder)
    except UsageError:
        vocabularies = {side: getattr(languages, side).to_json() for side in ("source", "target")}
        words = {side: json.loads(text) for side, text in vocabularies.items()}
        write_json(path, {**vars(languages), **words})
        return
    if held != languages:
        raise UsageError(
            f"{path} does not hold the words of --data={config.data}, so that the run began with "
            "others; restore them or give another --workdir."
        )


def check_data(folder: Path, corpus: Corpus) -> None:
    """Refuse a corpus whose files are not those that the run in a folder began with.

    Raises:
      UsageError: a file has changed, is gone or is new.
    """
    path = folder / _DATA
    if not path.exists():
        return
    try:
        held = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UsageError(
            f"{path} is damaged; delete it if the data are those that the run began with."
        ) from None
    for name in {**held, **corpus.files}:
        if held.get(name) != corpus.files.get(name):
            what = "is new" if name not in held else "has changed"
            what = what if name in corpus.files else "is gone"
            raise UsageError(
                f"{name} {what} since the run in {folder} began; restore the data as they were or "
                "give another --workdir."
            )


def read(folder: Path) -> Languages:
    """Return the languages of a run.

    Raises:
      UsageError: they are not there, or not to be read.
    """
    record = _read(folder / _FILE, folder, _WRITTEN_ANEW)
    try:
        sides = {side: Vocabulary(record[side]) for side in ("source", "target")}
        return Languages(**{**record, **sides})
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{folder / _FILE} is damaged; {_WRITTEN_ANEW}") from None


def configured(config: Config, given: Mapping[str, Any]) -> Config:
    """Return the configuration of the run in the folder of `config`, with what is given beside.

    Its scores are those that are given, or all that have been trained: a run may be interrupted,
    and one of a sweep trains the last of its scores alone.

    Args:
      config: from the command line alone.
      given: its fields that the command line names.

    Raises:
      UsageError: there is no run, it was another one, or two sets are to be evaluated.
    """
    if config.mode == "evaluate" and "split" in given and given.get("input"):
        raise UsageError("--split and --input both say what to evaluate on; leave one of them out.")
    held = _configuration(config.directory)
    names = Config.__dataclass_fields__
    trained = {name: _python(value) for name, value in held.items() if name in names}
    for name, value in given.items():
        if name == "scores":
            for score in value:
                if score not in trained["scores"]:
                    raise UsageError(
                        f"--scores: {config.directory} holds no {score}, only "
                        f"{', '.join(trained['scores'])}."
                    )
        elif not _is_free(name) and value != trained.get(name, names[name].default):
            raise UsageError(
                f"--{name} is {shown(value)}, but the run in {config.directory} has "
                f"{shown(trained.get(name, names[name].default))}; leave it out."
            )
    if "scores" not in given:
        begun = tuple(name for name in trained["scores"] if is_begun(config.directory, name))
        trained["scores"] = begun or trained["scores"]
    free = {name: value for name, value in given.items() if name == "scores" or _is_free(name)}
    found = Config(**{**trained, **free, "workdir": str(config.directory)})
    found.check()
    return found


def scores_of(folder: Path) -> tuple[str, ...]:
    """Return all scores of the run in a folder, whether they have been trained or not.

    Raises:
      UsageError: there is no run.
    """
    return tuple(_configuration(folder)["scores"])


def is_begun(folder: Path, score: str) -> bool:
    """Whether a score of the run in a folder has a checkpoint."""
    return any((folder / "checkpoints" / score).glob("*.seal"))


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    held = _read(path, folder, _LOST).get("config")
    if isinstance(held, dict) and held.get("scores") == SWEPT:
        raise UsageError(
            f"--workdir {folder} holds a sweep, which is no run; give one of the folders in "
            f"{folder / 'runs'}."
        )
    if not isinstance(held, dict) or not isinstance(held.get("scores"), list):
        raise UsageError(f"{path} is damaged; {_LOST}")
    return held


def _is_free(name: str) -> bool:
    return group_of(name) in _FREE


def _read(path: Path, folder: Path, remedy: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(
            f"--workdir {folder} holds no run that can translate ({path.name} is missing); train "
            "one first, or give another."
        ) from None
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{path} is damaged; {remedy}") from None


def _python(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
