"""What a run is: one frozen dataclass, whose fields are the flags of the command line.

Nothing here imports JAX, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.command_line import UsageError
from experiments.data.load import GENERATED

SCORES = (
    "additive",
    "bilinear",
    "concat",
    "cosine",
    "dot",
    "gaussian",
    "key_normalized_dot",
    "location",
    "low_rank_bilinear",
    "normalized_additive",
    "scaled_dot",
    "shared_projection",
    "trilinear",
)
CONTROLS = ("uniform", "none")
# Scores without two projections, one of the query and one of the key.
_UNTIEABLE = ("bilinear", "concat", "location", "shared_projection")

# What the configuration of a sweep has where its runs may differ.
SWEPT = "swept"

# Groups of flags that a run does not depend on.
_NOT_OF_A_RUN = ("Output", "After training")

# Flags that only some modes know.
_MODES = {
    "split": ("evaluate",),
    "input": ("evaluate", "translate", "score"),
    "alignments": ("translate", "score"),
    "translator": ("translate", "score"),
}

# Flags that only data in files know.
_OF_FILES = ("source", "target", "min_count", "max_vocabulary", "lowercase")

# Flags that only one architecture knows.
OF_MODEL = {
    "bigru": ("query", "bridge"),
    "transformer": ("heads", "layers", "positions"),
}

# Steps in a row from one bucket: with more, a translator forgets sentences of other lengths.
_LONGEST_CHUNK = 5
# Steps between two synchronisations with the host: more do not make training faster.
_LONGEST_ROUND = 25


class Range(NamedTuple):
    """The values a field may have, in words and as a predicate that NaN does not pass."""

    words: str
    contains: Callable[[Any], bool]


POSITIVE = Range("a whole number of at least 1", lambda x: x >= 1)
NOT_NEGATIVE = Range("a finite number of at least 0", lambda x: 0 <= x < math.inf)
ABOVE_ZERO = Range("a finite number above 0", lambda x: 0 < x < math.inf)
BELOW_ONE = Range("a number in [0, 1)", lambda x: 0 <= x < 1)
# Of sentences of a thousand words, the penalty of a larger one would be beyond float32.
UP_TO_TEN = Range("a number in [0, 10]", lambda x: 0 <= x <= 10)
EVEN = Range("an even whole number of at least 2", lambda x: x >= 2 and x % 2 == 0)


def one_of(*names: str) -> Range:
    """Return the range of a field that names one of a few things."""
    return Range(" or ".join(names), names.__contains__)


def _field(group: str, default: Any, help: str, range: Range | None = None) -> Any:
    metadata = {"group": group, "help": help, "range": range}
    return dataclasses.field(default=default, metadata=metadata)


def _data(default: Any, help: str, range: Range | None = None) -> Any:
    return _field("Data", default, help, range)


def _model(default: Any, help: str, range: Range | None = None) -> Any:
    return _field("Model", default, help, range)


def _training(default: Any, help: str, range: Range | None = None) -> Any:
    return _field("Training", default, help, range)


def _decoding(default: Any, help: str, range: Range | None = None) -> Any:
    return _field("Decoding", default, help, range)


def _use(default: Any, help: str, range: Range | None = None) -> Any:
    return _field("After training", default, help, range)


def _output(default: Any, help: str, range: Range | None = None) -> Any:
    return _field("Output", default, help, range)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run; equal configurations give equal results."""

    data: str = _data(
        "grammar",
        "grammar, numbers, copy or reverse (generated); FILE.tsv with source, target and perhaps "
        "a gold alignment; DIRECTORY with train.en, train.de, ...; or PREFIX of such files.",
    )
    source: str = _data("en", "Ending of the source files, or column of the table.")
    target: str = _data("de", "Ending of the target files, or column of the table.")
    train_size: int | None = _data(None, "Training pairs; all in the files, or 20000.", POSITIVE)
    valid_size: int | None = _data(None, "Validation pairs; all, or 500.", POSITIVE)
    test_size: int | None = _data(None, "Test pairs; all, or 1000.", POSITIVE)
    max_length: int | None = _data(
        None, "Longest sentence in tokens; longer pairs are dropped and counted.", POSITIVE
    )
    min_count: int = _data(2, "Words of the files seen less often are read as <unk>.", POSITIVE)
    max_vocabulary: int = _data(10_000, "Most frequent words kept on each side.", POSITIVE)
    lowercase: bool = _data(True, "Lower-case the text of files.")
    data_seed: int = _data(0, "Seed of the generator and of splitting.", NOT_NEGATIVE)

    scores: tuple[str, ...] = _model(
        ("additive", "scaled_dot"),
        f"What is compared, in this order: {', '.join(SCORES)}; the controls uniform (the mean "
        "of the source) and none (no attention); or package.module.function, a score of your own.",
    )
    model: str = _model(
        "bigru",
        "bigru: a bidirectional GRU reads, a GRU with attention writes (Bahdanau). transformer: "
        "encoder and decoder of --layers, the score in all attention; it wants a smaller "
        "--learning_rate, about 0.002.",
        one_of("bigru", "transformer"),
    )
    heads: int = _model(4, "Heads of a Transformer's attention; a divisor of the width.", POSITIVE)
    layers: int = _model(2, "Layers of a Transformer on either side.", POSITIVE)
    positions: str = _model(
        "sinusoidal",
        "How a Transformer knows the order of words: sinusoids, rotated queries and keys of words "
        "of one side, or not at all (but for what the decoder's causal mask gives away).",
        one_of("sinusoidal", "rotary", "none"),
    )
    width: int = _model(64, "Size of embeddings, decoder state, source states, readout.", EVEN)
    attention_size: int | None = _model(
        None,
        "Size that query and key are projected to, in a Transformer in each head; the width "
        "unless given, or the width / heads.",
        POSITIVE,
    )
    match_parameters: bool = _model(
        False, "Give every translator about as many parameters as the first one has."
    )
    query: str = _model(
        "previous",
        "Which state asks: the one before the step, whose cell then sees the context (Bahdanau), "
        "or the current one, after it (Luong); the cell sees the context of the step before.",
        one_of("previous", "current"),
    )
    bridge: str = _model(
        "dense",
        "What the decoder begins with: a layer on the last states of the encoder, or zeros.",
        one_of("dense", "zero"),
    )
    projections: str = _model(
        "untied",
        "Whether query and key have a projection each, or share one.",
        one_of("untied", "tied"),
    )
    qk_norm: bool = _model(
        False, "Bring the query and key that a score is asked about to unit mean square."
    )
    dropout: float = _model(0.0, "Share of embedding and readout features dropped.", BELOW_ONE)

    seeds: int = _training(3, "Translators of each score, all trained at once.", POSITIVE)
    steps: int = _training(800, "Training steps; best a multiple of 25.", POSITIVE)
    batch_size: int = _training(64, "Sentence pairs in a step.", POSITIVE)
    buckets: int = _training(3, "Shapes that sentences of similar length share.", POSITIVE)
    learning_rate: float = _training(1e-2, "Largest learning rate of AdamW.", ABOVE_ZERO)
    warmup: float = _training(
        0.1, "Share of the steps in which the learning rate grows, before its cosine.", BELOW_ONE
    )
    weight_decay: float = _training(1e-4, "Decoupled weight decay.", NOT_NEGATIVE)
    clip: float = _training(1.0, "Largest norm of the gradient.", ABOVE_ZERO)
    label_smoothing: float = _training(
        0.1, "Share of the probability that training spreads over all words.", BELOW_ONE
    )
    dtype: str = _training(
        "float32",
        "What training computes in; parameters, losses and evaluation are in float32. bfloat16 is "
        "for accelerators: a CPU is slower with it.",
        one_of("float32", "bfloat16"),
    )
    evaluate_every: int = _training(
        50, "Steps between two validations; best a multiple of 25.", POSITIVE
    )

    beam_size: int = _decoding(
        1, "Translations kept at a time of each sentence; 1 is greedy, as validation is.", POSITIVE
    )
    length_penalty: float = _decoding(
        0.6, "How much a beam makes up for length: log P / ((5 + length) / 6)^this.", UP_TO_TEN
    )

    workdir: str = _output(
        "", "Folder of the run; runs/DATA-KEY unless given. The same command resumes."
    )
    checkpoint_seconds: float = _output(
        20.0, "Seconds between two checkpoints; 0 saves at every opportunity.", NOT_NEGATIVE
    )

    mode: str = _use(
        "train",
        "train and compare; or, with the --workdir of a run: evaluate it on pairs, translate "
        "sentences, or score pairs by log-probability, one a line, source<TAB>target.",
        one_of("train", "evaluate", "translate", "score"),
    )
    split: str = _use("test", "What to evaluate on: test, valid, or another set of the corpus.")
    input: str = _use(
        "", "File of sentences, or of pairs (.tsv), instead of standard input or --split."
    )
    alignments: str = _use(
        "", "File to write the alignments of what is translated or scored to, Pharaoh's 0-0 1-2."
    )
    translator: int = _use(
        0, "Which of the translators of the first score translates, by its seed.", NOT_NEGATIVE
    )

    @property
    def chunk(self) -> int:
        """Steps in a row from one bucket: a divisor of `round`."""
        return _largest_divisor(self.round, _LONGEST_CHUNK)

    @property
    def round(self) -> int:
        """Steps in one call, after which the host waits: a divisor of every interval."""
        return _largest_divisor(math.gcd(self.steps, self.evaluate_every), _LONGEST_ROUND)

    @property
    def key(self) -> str:
        """Eight letters that two different runs do not share."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]

    @property
    def identity(self) -> dict[str, Any]:
        """All fields that results depend on, as JSON has them."""
        fields = {
            k: v for k, v in dataclasses.asdict(self).items() if group_of(k) not in _NOT_OF_A_RUN
        }
        return json.loads(json.dumps(fields))

    @property
    def directory(self) -> Path:
        """The folder of the run."""
        if self.workdir:
            return Path(self.workdir)
        return Path("runs") / f"{named_after(self.data)}-{self.key}"

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
          UsageError: one sentence with flag, value and what is needed.
        """
        for field in dataclasses.fields(self):
            value, range = getattr(self, field.name), field.metadata["range"]
            if range and value is not None and not range.contains(value):
                raise UsageError(f"--{field.name} is {value}, but {range.words} is needed.")
        for name, modes in _MODES.items():
            field = self.__dataclass_fields__[name]
            if self.mode not in modes and getattr(self, name) != field.default:
                raise UsageError(f"--{name} is for --mode={' or '.join(modes)}; leave it out.")
        if self.translator >= self.seeds:
            raise UsageError(f"--translator is {self.translator}, but the seeds are {self.seeds}.")
        self._check_data()
        self._check_model()
        if not self.scores:
            raise UsageError("--scores is empty; name at least one score.")
        if "" in self.scores:
            raise UsageError("--scores has an empty name; put one comma between two names.")
        for name in self.scores:
            if self.scores.count(name) > 1:
                raise UsageError(f"--scores names {name} twice; name every score once.")
            if name not in SCORES + CONTROLS and not _is_path(name):
                raise UsageError(
                    f"--scores: there is no score {name!r}; choose from "
                    f"{', '.join(SCORES + CONTROLS)}, or give package.module.function."
                )
            if self.projections == "tied" and self.model == "bigru" and name in _UNTIEABLE:
                raise UsageError(f"--projections=tied: {name} has no two projections to tie.")
            if self.qk_norm and name == "location":
                raise UsageError("--qk_norm: location takes no notice of keys; leave it out.")

    def _check_data(self) -> None:
        """Refuse flags that generated data do not know, by name.

        After training it is the folder of the run that says what its data are.
        """
        if self.mode != "train" or self.data not in GENERATED:
            return
        for name in _OF_FILES:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UsageError(
                    f"--{name} is for data in files, and {self.data} is generated; leave it out."
                )

    def _check_model(self) -> None:
        """Refuse flags that the architecture does not know, by name."""
        other = "bigru" if self.model == "transformer" else "transformer"
        for name in OF_MODEL[other]:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} is for --model={other}; leave it out.")
        if self.model != "transformer":
            return
        if "none" in self.scores:
            raise UsageError(
                "--scores: none is for --model=bigru, whose decoder begins with what was read; a "
                "Transformer sees the source through attention alone."
            )
        if self.width % self.heads:
            raise UsageError(f"--heads is {self.heads}, but a divisor of {self.width} is needed.")
        if self.positions == "rotary" and self.head_size % 2:
            raise UsageError(
                f"--positions=rotary turns pairs, but a head has depth {self.head_size}; choose "
                "an even --attention_size."
            )

    @property
    def head_size(self) -> int:
        """Depth of queries and keys: the attention size that is given, or its default."""
        heads = self.heads if self.model == "transformer" else 1
        return self.attention_size or self.width // heads


def _is_path(name: str) -> bool:
    """Whether a name may be that of something in a module."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if number % n == 0)


def named_after(data: str) -> str:
    """Return what the folder of a run on these data is called, without what stands for names.

    >>> named_after("corpora/news[1].tsv")
    'news_1_'
    """
    return re.sub(r"[*?\[\]]", "_", Path(data).stem) or "data"


def group_of(name: str) -> str:
    """Return the heading that the help text lists a field under."""
    return Config.__dataclass_fields__[name].metadata["group"]
