"""What translating needs of a run beside its parameters: configuration and vocabularies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.command_line import UsageError
from experiments.data.corpus import Corpus, Pair
from experiments.data.tokens import detokenize, tokenize
from experiments.data.vocabulary import Vocabulary
from experiments.translate.config import Config, group_of
from experiments.translate.workdir import shown, write_json

_FILE = "vocabularies.json"
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
        return tuple(text.split()) if self.at_spaces else tokenize(text, self.lowercase)

    def text(self, words: tuple[str, ...]) -> str:
        """Return words as a line of text."""
        return " ".join(words) if self.at_spaces else detokenize(words)

    def corpus(self, name: str, pairs: tuple[Pair, ...] = ()) -> Corpus:
        """Return pairs as the test set of a corpus with these vocabularies."""
        return Corpus(name, (), (), pairs, self.source, self.target)


def write(folder: Path, corpus: Corpus, longest: int, config: Config) -> None:
    """Keep the languages of a run in its folder."""
    record = {
        "source": json.loads(corpus.source_vocabulary.to_json()),
        "target": json.loads(corpus.target_vocabulary.to_json()),
        "longest": longest,
        "at_spaces": any(pair.sure is not None for pair in corpus.train),
        "lowercase": config.lowercase,
    }
    if not (folder / _FILE).exists():
        write_json(folder / _FILE, record)


def read(folder: Path) -> Languages:
    """Return the languages of a run.

    Raises:
      UsageError: they are not there, or not to be read.
    """
    record = _read(folder / _FILE, folder)
    try:
        sides = {side: Vocabulary(record[side]) for side in ("source", "target")}
        return Languages(**{**record, **sides})
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"{folder / _FILE} is damaged; the run's command writes it anew."
        ) from None


def configured(config: Config, given: Mapping[str, Any]) -> Config:
    """Return the configuration of the run in the folder of `config`, with what is given beside.

    Args:
      config: from the command line alone.
      given: its fields that the command line names.

    Raises:
      UsageError: there is no run, or it was another one.
    """
    held = _read(config.directory / "config.json", config.directory).get("config")
    names = Config.__dataclass_fields__
    if not isinstance(held, dict) or not isinstance(held.get("scores"), list):
        raise UsageError(f"{config.directory / 'config.json'} is not the configuration of a run.")
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
    free = {name: value for name, value in given.items() if name == "scores" or _is_free(name)}
    found = Config(**{**trained, **free, "workdir": str(config.directory)})
    found.check()
    return found


def _is_free(name: str) -> bool:
    return group_of(name) in _FREE


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(
            f"--workdir {folder} holds no run that can translate ({path.name} is missing); train "
            "one first, or give another."
        ) from None
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{path} cannot be read; the run's command writes it anew.") from None


def _python(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
