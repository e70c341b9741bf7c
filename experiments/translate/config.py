"""The configuration of a run: one frozen dataclass whose fields are the flags.

This module does not import JAX, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import processes
from experiments.command_line import UsageError
from experiments.data.load import GENERATED
from experiments.data.subwords import KINDS as SUBWORDS

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
# Scores that do not have one projection of the query and one of the key.
_UNTIEABLE = ("bilinear", "concat", "location", "shared_projection")

# Stands in the configuration of a sweep for fields in which its runs differ.
SWEPT = "swept"

# The group of flags that name the processes of a run.
SEVERAL = "Several processes"

# Groups of flags on which the results of a run do not depend.
_NOT_OF_A_RUN = ("Output", SEVERAL, "After training")

# Flags of some modes only.
_MODES = {
    "split": ("evaluate",),
    "input": ("evaluate", "translate", "score"),
    "alignments": ("translate", "score"),
    "translator": ("translate", "score"),
    "coordinator": ("train",),
    "processes": ("train",),
    "process": ("train",),
}

# Flags of data in files only.
_OF_FILES = ("source", "target", "min_count", "max_vocabulary", "lowercase")

# Flags of one architecture only.
OF_MODEL = {
    "bigru": ("query", "bridge"),
    "transformer": ("heads", "layers", "positions"),
}

# Consecutive steps on one bucket: with more, a translator forgets sentences of other lengths.
_LONGEST_CHUNK = 5
# Steps between two synchronisations with the host: more are not faster.
_LONGEST_ROUND = 25


class Range(NamedTuple):
    """The values that a field may have: in words, and as a predicate that is False for NaN."""

    words: str
    contains: Callable[[Any], bool]


POSITIVE = Range("a whole number of at least 1", lambda x: x >= 1)
NOT_NEGATIVE = Range("a finite number of at least 0", lambda x: 0 <= x < math.inf)
ABOVE_ZERO = Range("a finite number above 0", lambda x: 0 < x < math.inf)
BELOW_ONE = Range("a number in [0, 1)", lambda x: 0 <= x < 1)
# With a larger exponent the length penalty of a thousand words overflows float32.
UP_TO_TEN = Range("a number in [0, 10]", lambda x: 0 <= x <= 10)
EVEN = Range("an even whole number of at least 2", lambda x: x >= 2 and x % 2 == 0)


def one_of(*names: str) -> Range:
    """Return the range of a field with one of a few values."""
    return Range(" or ".join(names), names.__contains__)


def _field(group: str, default: Any, help: str, range: Range | None = None) -> Any:
    metadata = {"group": group, "help": help, "range": range}
    return dataclasses.field(default=default, metadata=metadata)


_data = functools.partial(_field, "Data")
_model = functools.partial(_field, "Model")
_training = functools.partial(_field, "Training")
_decoding = functools.partial(_field, "Decoding")
_output = functools.partial(_field, "Output")
_several = functools.partial(_field, SEVERAL)
_use = functools.partial(_field, "After training")


@dataclasses.dataclass(frozen=True)
class Config:
    """All flags of a run; equal configurations give equal results."""

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
    subwords: str = _data(
        "none",
        "Cut words into pieces, at most --max_vocabulary on each side, learnt from the training "
        "pairs: bpe, unigram, characters, or none. Alignments and metrics are of words.",
        one_of(*SUBWORDS),
    )
    lowercase: bool = _data(True, "Lower-case the text of files.")
    data_seed: int = _data(0, "Seed of the generator and of splitting.", NOT_NEGATIVE)

    scores: tuple[str, ...] = _model(
        ("additive", "scaled_dot"),
        f"Scores to compare, in this order: {', '.join(SCORES)}; the controls uniform (the mean "
        "of the source) and none (no attention); or package.module.function, a score of your own.",
    )
    model: str = _model(
        "bigru",
        "bigru: a bidirectional GRU reads, a GRU with attention writes (Bahdanau). transformer: "
        "encoder and decoder of --layers, with the score in every attention; it needs a smaller "
        "--learning_rate, about 0.002.",
        one_of("bigru", "transformer"),
    )
    heads: int = _model(4, "Heads of a Transformer's attention; a divisor of the width.", POSITIVE)
    layers: int = _model(2, "Layers of a Transformer on either side.", POSITIVE)
    positions: str = _model(
        "sinusoidal",
        "Positions of a Transformer: sinusoids added to embeddings, rotary in self-attention, or "
        "none (the decoder still has its causal mask).",
        one_of("sinusoidal", "rotary", "none"),
    )
    width: int = _model(64, "Size of embeddings, decoder state, source states, readout.", EVEN)
    attention_size: int | None = _model(
        None,
        "Size of projected queries and keys, in a Transformer of each head; by default the width, "
        "or the width / heads.",
        POSITIVE,
    )
    match_parameters: bool = _model(
        False, "Give every translator about as many parameters as the first one has."
    )
    query: str = _model(
        "previous",
        "Decoder state that is the query: the previous one, before the cell sees the context "
        "(Bahdanau), or the current one; the cell then sees the previous context (Luong).",
        one_of("previous", "current"),
    )
    bridge: str = _model(
        "dense",
        "Initial state of the decoder: a layer on the last states of the encoder, or zeros.",
        one_of("dense", "zero"),
    )
    projections: str = _model(
        "untied",
        "Whether query and key have a projection each, or share one.",
        one_of("untied", "tied"),
    )
    qk_norm: bool = _model(
        False, "Normalize the queries and keys of the score to unit mean square."
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
    guided_alignment: float = _training(
        0.0,
        "Weight of a loss that pulls attention to the gold alignments of training pairs, which are "
        "generated, in a third column, or in files such as train.en-de.align.",
        NOT_NEGATIVE,
    )
    dtype: str = _training(
        "float32",
        "Type of computation in training; parameters, losses and evaluation are in float32. "
        "bfloat16 is for accelerators: a CPU is slower with it.",
        one_of("float32", "bfloat16"),
    )
    evaluate_every: int = _training(
        50, "Steps between two validations; best a multiple of 25.", POSITIVE
    )

    beam_size: int = _decoding(
        1, "Size of the beam; 1 decodes greedily, as validation does.", POSITIVE
    )
    length_penalty: float = _decoding(
        0.6, "Exponent of a beam's length penalty: log P / ((5 + length) / 6)^this.", UP_TO_TEN
    )

    workdir: str = _output(
        "", "Folder of the run; runs/DATA-KEY unless given. The same command resumes."
    )
    checkpoint_seconds: float = _output(
        20.0, "Seconds between two checkpoints; 0 saves at every opportunity.", NOT_NEGATIVE
    )

    coordinator: str = _several(
        "",
        "HOST:PORT of process 0 on which the processes find each other, the same for all of them; "
        "Slurm, MPI and Cloud TPU say it, and the next two, by themselves.",
    )
    processes: int | None = _several(None, "Number of processes; each batch is split.", POSITIVE)
    process: int | None = _several(None, "Number of this process, from 0.", NOT_NEGATIVE)
    coordinator_seconds: float = _several(
        60.0, "Seconds that the processes wait for each other at the start.", ABOVE_ZERO
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
        "", "File for the alignments of translated or scored sentences, in Pharaoh format: 0-0 1-2."
    )
    translator: int = _use(
        0, "Seed of the translator that translates or scores, of the first score.", NOT_NEGATIVE
    )

    @property
    def chunk(self) -> int:
        """Steps in a row from one bucket: a divisor of `round`."""
        return _largest_divisor(self.round, _LONGEST_CHUNK)

    @property
    def round(self) -> int:
        """Steps in one call, between two synchronisations: a divisor of every interval."""
        return _largest_divisor(math.gcd(self.steps, self.evaluate_every), _LONGEST_ROUND)

    @property
    def has_subwords(self) -> bool:
        """Whether words are cut into pieces."""
        return self.subwords != "none"

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that name the run."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]

    @property
    def identity(self) -> dict[str, Any]:
        """All fields that results depend on, with values as in JSON."""
        fields = {
            k: v for k, v in dataclasses.asdict(self).items() if group_of(k) not in _NOT_OF_A_RUN
        }
        return json.loads(json.dumps(fields))

    @property
    def group(self) -> processes.Group | None:
        """The processes of the run, if they are several."""
        given = self.coordinator, self.processes, self.process, self.coordinator_seconds
        return processes.group_of(*given) if self.mode == "train" else None

    @property
    def directory(self) -> Path:
        """The folder of the run."""
        if self.workdir:
            return Path(self.workdir)
        return Path("runs") / f"{named_after(self.data)}-{self.key}"

    def check(self) -> None:
        """Refuse values that cannot be used.

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
        processes.check(self.coordinator, self.processes, self.process)
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
            if self.guided_alignment and name == "none":
                raise UsageError("--guided_alignment: none has no attention to guide.")
            if self.qk_norm and name == "location":
                raise UsageError("--qk_norm: location does not depend on keys; leave it out.")

    def _check_data(self) -> None:
        """Refuse flags of data in files for generated data.

        After training, the folder of the run has the data flags.
        """
        if self.mode != "train" or self.data not in GENERATED:
            return
        for name in _OF_FILES:
            if name == "max_vocabulary" and self.has_subwords:
                continue
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UsageError(
                    f"--{name} is for data in files, and {self.data} is generated; leave it out."
                )

    def _check_model(self) -> None:
        """Refuse flags of the other architecture."""
        other = "bigru" if self.model == "transformer" else "transformer"
        for name in OF_MODEL[other]:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} is for --model={other}; leave it out.")
        if self.model != "transformer":
            return
        if "none" in self.scores:
            raise UsageError(
                "--scores: none is for --model=bigru, whose decoder starts from the encoder's "
                "state; a Transformer sees the source only through attention."
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
        """Depth of projected queries and keys: --attention_size, or its default."""
        heads = self.heads if self.model == "transformer" else 1
        return self.attention_size or self.width // heads


def _is_path(name: str) -> bool:
    """Whether a name may be package.module.function."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if number % n == 0)


def named_after(data: str) -> str:
    """Return the first part of the folder name of a run, without glob characters.

    >>> named_after("corpora/news[1].tsv")
    'news_1_'
    """
    return re.sub(r"[*?\[\]]", "_", Path(data).stem) or "data"


def group_of(name: str) -> str:
    """Return the heading of a field in the help text."""
    return Config.__dataclass_fields__[name].metadata["group"]
