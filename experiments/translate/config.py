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
from pathlib import Path
from typing import Any

from experiments import processes
from experiments.data.subwords import KINDS as SUBWORDS
from experiments.translate.checks import SCORES, check
from experiments.translate.ranges import (
    ABOVE_ZERO,
    BELOW_ONE,
    EVEN,
    NOT_NEGATIVE,
    POSITIVE,
    UP_TO_TEN,
    ZERO_OR_ONE,
    Range,
    one_of,
)

# Stands in the configuration of a sweep for fields in which its runs differ.
SWEPT = "swept"

# The group of flags that name the processes of a run.
SEVERAL = "Several processes"

# Groups of flags on which the results of a run do not depend.
_NOT_OF_A_RUN = ("Output", SEVERAL, "After training")

# Consecutive steps on one bucket: with more, a translator forgets sentences of other lengths.
_LONGEST_CHUNK = 5
# Steps between two synchronisations with the host: more are not faster.
_LONGEST_ROUND = 25


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
        "a gold alignment, between tabs or |||; DIRECTORY with train.en, train.de, ...; or PREFIX "
        "of such files.",
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
    lowercase: bool = _data(True, "Lower-case the text of files that the tokenizer cuts.")
    words: str = _data(
        "tokenizer",
        "Words of the text of files: those of the tokenizer, unless the training pairs have gold "
        "alignments; or those between spaces, with their case, as the text is.",
        one_of("tokenizer", "spaces"),
    )
    links_from: int = _data(
        0, "Position of a first word in the gold alignments of files.", ZERO_OR_ONE
    )
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
    average: float = _training(
        0.0,
        "Share of the steps, at the end, over which parameters are averaged; the mean is what is "
        "evaluated and translates.",
        BELOW_ONE,
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
        "sentences, or score pairs by log-probability, one a line, source<TAB>target, "
        "perhaps with a gold alignment in a third column.",
        one_of("train", "evaluate", "translate", "score"),
    )
    open: bool = _use(
        False, "Open the report in a browser at the end, also that of a run that is done."
    )
    split: str = _use("test", "What to evaluate on: test, valid, or another set of the corpus.")
    references: tuple[str, ...] = _use(
        (), "Files with further references of the pairs, line by line, for BLEU and chrF."
    )
    comet: str = _use(
        "",
        "Measure COMET too: the checkpoint of a model, or the name of one to download; needs the "
        "package unbabel-comet.",
    )
    input: str = _use(
        "", "File of sentences, or of pairs (.tsv), instead of standard input or --split."
    )
    alignments: str = _use(
        "",
        "File for the alignments of translated or scored sentences, in Pharaoh format, 0-0 1-2, "
        "which counts the words between spaces.",
    )
    pictures: str = _use(
        "", "Folder for pictures of the alignments of translated or scored sentences, by line."
    )
    ensemble: bool = _use(
        False,
        "Let all seeds of all --scores translate, score or be evaluated as one, which predicts the "
        "mean of their probabilities and attends with the mean of their weights.",
    )
    members: tuple[str, ...] = _use(
        (), "Folders of other runs whose translators join the ensemble; of the same vocabularies."
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
        check(self)

    @property
    def head_size(self) -> int:
        """Depth of projected queries and keys: --attention_size, or its default."""
        heads = self.heads if self.model == "transformer" else 1
        return self.attention_size or self.width // heads


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
