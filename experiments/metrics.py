"""Quality of translations and alignments.

Hypotheses and references are tuples of words. References are the words of the text, so that an
``<unk>`` in a hypothesis never matches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

from attention_jax.diagnostics import AlignmentQuality, quality_of_counts
from experiments.data.alignments import pharaoh
from experiments.data.corpus import Links, Pair
from experiments.data.text import UNSPACED, detokenize

__all__ = [
    "CLASSES",
    "AlignmentQuality",
    "Score",
    "alignment_quality",
    "bleu",
    "by_class",
    "chrf",
    "chrf_plus_plus",
    "comet",
    "exact_match",
    "links",
    "pharaoh",
    "signatures",
    "token_accuracy",
    "tokenizer_notice",
    "tokenizer_of",
]

CLASSES = ("sure_found", "possible_found", "links_wrong")

_LETTER = regex.compile(r"\p{L}")
_SCRIPTS = {
    "kana": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "han": regex.compile(r"\p{Han}"),
    "unspaced": regex.compile(rf"[{UNSPACED}]"),
}
# What sacrebleu's tokenizer of Japanese imports.
_MECAB = ("MeCab", "ipadic")

Sentences = Sequence[Sequence[str]]


class Score(NamedTuple):
    """A corpus score in 0..100 and sacrebleu's signature."""

    value: float
    signature: str


def _check(name: str, hypotheses: Sequence, references: Sequence) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"{name}: expected one hypothesis for each of at least one reference, got "
            f"{len(hypotheses)} hypotheses and {len(references)} references."
        )


def exact_match(hypotheses: Sentences, references: Sentences) -> float:
    """The share of sentences that are equal to their reference.

    >>> exact_match([("a", "b"), ("a",)], [("a", "b"), ("b",)])
    0.5
    """
    _check("exact_match", hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    return sum(tuple(h) == tuple(r) for h, r in pairs) / len(references)


def token_accuracy(hypotheses: Sentences, references: Sentences) -> float:
    """Words that are right at their position, among max(len(hypothesis), len(reference)) each.

    >>> token_accuracy([("a", "b", "c")], [("a", "x")])
    0.333...
    """
    _check("token_accuracy", hypotheses, references)
    pairs = list(zip(hypotheses, references, strict=True))
    right = sum(a == b for h, r in pairs for a, b in zip(h, r, strict=False))
    return right / max(1, sum(max(len(h), len(r)) for h, r in pairs))


def tokenizer_of(references: Sentences) -> str:
    """The tokenizer of sacrebleu for the language of a text, by its script.

    `zh` for Chinese, `ja-mecab` for Japanese (`char` where MeCab is not installed), `char` for
    other scripts without spaces between words, and `13a`, the default, for all others.

    >>> tokenizer_of([("我", "喜欢", "猫")]), tokenizer_of([("ein", "Hund")])
    ('zh', '13a')
    """
    text = "".join(word for words in references for word in words)
    letters = len(_LETTER.findall(text)) or 1
    share = {name: len(of.findall(text)) / letters for name, of in _SCRIPTS.items()}
    # Japanese has Chinese characters too, and other texts may quote a few of either.
    if share["kana"] > 0.1:
        return "ja-mecab" if all(map(importlib.util.find_spec, _MECAB)) else "char"
    if share["han"] > 0.5:
        return "zh"
    return "char" if share["unspaced"] > 0.5 else "13a"


def tokenizer_notice(references: Sentences) -> str | None:
    """A sentence on the tokenizer of BLEU, where it is not the default."""
    name = tokenizer_of(references)
    if name == "13a":
        return None
    notice = f"BLEU counts tokens of sacrebleu's tokenizer {name}"
    if name == "char" and any(_SCRIPTS["kana"].search(w) for words in references for w in words):
        notice += "; for ja-mecab, which papers use for Japanese, install sacrebleu[ja]"
    return f"{notice}."


def bleu(hypotheses: Sentences, references: Sentences, *others: Sentences) -> Score:
    """Corpus BLEU of the detokenised text (Papineni et al. 2002; Post 2018); see `tokenizer_of`."""
    from sacrebleu.metrics.bleu import BLEU

    measure = BLEU(tokenize=tokenizer_of(references))
    return _corpus_score("bleu", measure, hypotheses, references, *others)


def chrf(hypotheses: Sentences, references: Sentences, *others: Sentences) -> Score:
    """Corpus chrF2 of the detokenised text (Popović 2015)."""
    from sacrebleu.metrics.chrf import CHRF

    return _corpus_score("chrf", CHRF(), hypotheses, references, *others)


def chrf_plus_plus(hypotheses: Sentences, references: Sentences, *others: Sentences) -> Score:
    """Corpus chrF2++ of the detokenised text, with pairs of words (Popović 2017)."""
    from sacrebleu.metrics.chrf import CHRF

    measure = CHRF(word_order=2)
    return _corpus_score("chrf_plus_plus", measure, hypotheses, references, *others)


def signatures(
    references: Sentences = (), lowercased: bool = False, further: int = 0
) -> dict[str, str]:
    """What sacrebleu calls the settings of `bleu` and of `chrf`.

    Args:
      references: the text, whose language decides on the tokenizer.
      further: how many references each sentence has beside the first.
      lowercased: whether all words were lower-cased before they were compared; scores are then
        those that sacrebleu gives without regard to case, and say so.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    measures = {
        "bleu": BLEU(lowercase=lowercased, tokenize=tokenizer_of(references)),
        "chrf": CHRF(lowercase=lowercased),
    }
    word = [("a",)]
    return {
        name: _corpus_score(name, measure, word, word, *further * [word]).signature
        for name, measure in measures.items()
    }


def _corpus_score(
    name: str, metric, hypotheses: Sentences, references: Sentences, *others: Sentences
) -> Score:
    for reference in (references, *others):
        _check(name, hypotheses, reference)
    texts = [[detokenize(s) for s in sentences] for sentences in (hypotheses, references, *others)]
    value = metric.corpus_score(texts[0], texts[1:]).score
    return Score(value, str(metric.get_signature()))


def comet(model: str, sources: Sentences, hypotheses: Sentences, references: Sentences) -> float:
    """The score of a trained COMET model (Rei et al. 2020), in 0..100.

    Args:
      model: path of a checkpoint, or the name of a model to download.
      sources: what was translated.
      hypotheses: the translations.
      references: of the same sentences.

    Raises:
      ImportError: the package unbabel-comet is not installed.
    """
    from comet import download_model, load_from_checkpoint  # pyright: ignore[reportMissingImports]

    _check("comet", hypotheses, references)
    path = model if Path(model).exists() else download_model(model)
    rows = zip(sources, hypotheses, references, strict=True)
    names = ("src", "mt", "ref")
    data = [dict(zip(names, map(detokenize, row), strict=True)) for row in rows]
    found = load_from_checkpoint(path).predict(data, gpus=0, progress_bar=False)
    return 100 * float(found.system_score)


def links(weights: np.ndarray, source_length: int, target_length: int) -> Links:
    """The alignment that attention weights [T, S] show: for each target word its argmax.

    Positions from ``source_length`` on (EOS, padding) are the empty word: they give no link.
    Rows from ``target_length`` on are left out. Of equal weights the first position counts.

    >>> sorted(links(np.array([[.1, .8, .1], [.2, .2, .6], [.9, 0., .1]]), 2, 3))
    [(0, 2), (1, 0)]
    """
    weights = np.asarray(weights)
    if weights.ndim != 2 or weights.shape[0] < target_length or weights.shape[1] < source_length:
        raise ValueError(
            f"links: expected weights [T, S] with T >= {target_length} and S >= {source_length}, "
            f"got shape {weights.shape}."
        )
    if target_length == 0 or source_length == 0:
        return frozenset()
    best = weights[:target_length].argmax(axis=1)
    return frozenset((int(i), j) for j, i in enumerate(best) if i < source_length)


def alignment_quality(alignments: Iterable[Links], gold: Iterable[Pair]) -> AlignmentQuality:
    """Alignment error rate, precision and recall of a corpus; see `attention_jax.alignment`.

    Pairs without gold alignment are left out. The alignments must belong to the
    reference translations: weights of forced decoding, not of free translations.

    >>> gold = Pair(("a", "b"), ("c", "d"), frozenset({(0, 0)}), frozenset({(0, 0), (1, 1)}))
    >>> alignment_quality([frozenset({(0, 0), (0, 1)})], [gold])
    AlignmentQuality(error_rate=0.333..., precision=0.5, recall=1.0)
    """
    size = sure = in_sure = in_possible = 0
    for found, pair in zip(alignments, gold, strict=True):
        if pair.sure is not None and pair.possible is not None:
            size += len(found)
            sure += len(pair.sure)
            in_sure += len(found & pair.sure)
            in_possible += len(found & pair.possible)

    quality = quality_of_counts(size, sure, in_sure, in_possible)
    return AlignmentQuality(*map(float, quality))


def by_class(alignments: Iterable[Iterable[Links]], gold: Sequence[Pair]) -> dict[str, list[float]]:
    """Recall of sure and of possible links, and the share of wrong links, of several alignments.

    `sure_found` is the share of the sure links that were found, `possible_found` that of the
    links that are possible and not sure, and `links_wrong` the share of what was found that is
    neither; NaN where there is none.

    >>> gold = Pair(("a", "b"), ("c", "d"), frozenset({(0, 0)}), frozenset({(0, 0), (1, 1)}))
    >>> by_class([[frozenset({(0, 0), (0, 1)})]], [gold])
    {'sure_found': [1.0], 'possible_found': [0.0], 'links_wrong': [0.5]}
    """
    shares: dict[str, list[float]] = {name: [] for name in CLASSES}
    for found in alignments:
        counts = np.zeros((3, 2))
        for links, pair in zip(found, gold, strict=True):
            if pair.sure is not None and pair.possible is not None:
                merely = pair.possible - pair.sure
                counts[0] += len(links & pair.sure), len(pair.sure)
                counts[1] += len(links & merely), len(merely)
                counts[2] += len(links - pair.possible), len(links)
        for name, (part, whole) in zip(CLASSES, counts, strict=True):
            shares[name].append(float(part / whole) if whole else float("nan"))
    return shares
