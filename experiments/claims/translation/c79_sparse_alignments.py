"""Sparse normalizers give weights of exactly zero, and with them more readable alignments.

Source: Peters, Niculae and Martins 2019, section 5 (entmax); Martins and Astudillo 2016, section 5
(sparsemax).

Method: Recurrent translators with additive attention, which differ in their normalizer alone:
softmax, 1.5-entmax, sparsemax; all at the learning rate that is best for softmax (claim 51, 32
features). They read the test pairs; the share of weights on words of the source that are exactly
zero, and the alignment error rate where each target word is linked to the source word of its
largest weight.

Criterion: There are zeros if softmax has none, and the interval over seeds of their share lies
above one half with both others. Alignments are more readable if their error rate is conclusively
lower than that of softmax. Holds if there are zeros and both others are more readable, only with
that normalizer if one is; fails if there are no such zeros, or if with both the interval of what
the error rate falls by lies below 2 points. Undecided if a translator learns nothing (10 BLEU).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import normalizers, statistics
from attention_jax.statistics import Pairs, Statistic, of_matrix
from experiments import metrics
from experiments.claims import translating
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if, undecided
from experiments.claims.drawing import bars
from experiments.claims.evidence import difference, higher, learned, shown, within
from experiments.claims.training import merged, train
from experiments.claims.translating import Material
from experiments.data.vocabulary import PAD
from experiments.significance import interval

ARMS = {
    "softmax": normalizers.softmax,
    "1.5-entmax": normalizers.entmax15,
    "sparsemax": normalizers.sparsemax,
}


def _others(pairs: Pairs) -> jax.Array:
    return jnp.sum(pairs.weights != 0, axis=1, dtype=jnp.int32)


# How many weights of a query are not zero.
support = Statistic(_others, rescale=None)
heaviest = statistics.heaviest(1)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure zeros, alignment error rate and BLEU by normalizer and seed."""
    given = translating.material(setting)
    data: Data = {"zeros": {}, "error": {}, "bleu": {}}
    for name, normalizer in ARMS.items():
        model = translating.recurrent(given, "additive", normalizer=normalizer)
        trained = train(
            model.arm,
            translating.batch,
            rng,
            rates=(1e-2,),
            seeds=setting.pick(tiny=2, quick=6, full=8),
            steps=setting.pick(tiny=4, quick=250, full=1000),
            data=given.train,
            held_out=(given.valid.source, given.valid.target),
        )
        of_seed = functools.partial(_looked_at, merged(model.build), given)
        zeros, keys = jax.jit(jax.vmap(of_seed))(trained.parameters)
        data["zeros"][name] = zeros.tolist()
        data["error"][name] = [_error(of, given) for of in np.asarray(keys)]
        data["bleu"][name] = model.bleu(trained.parameters, given)
    return data


def _looked_at(merge: Callable[[Any], Any], given: Material, own: Any) -> tuple[Any, Any]:
    """Return the share of weights that are zero, and the heaviest key of each target word."""
    source, target = given.test.source, given.test.target
    weights = merge(own)(source, target)[1].swapaxes(0, 1)
    words, of_source = target != PAD, jnp.sum(source != PAD, axis=1)[:, None]
    zeros = jnp.sum(of_source - of_matrix(support, weights), where=words)
    return zeros / jnp.sum(words * of_source), of_matrix(heaviest, weights).keys[..., 0]


def _error(keys: np.ndarray, given: Material) -> float:
    """Return the alignment error rate in percent; the end of the source is a link to nothing."""
    links = []
    for row, pair in zip(keys.tolist(), given.pairs, strict=True):
        heaviest_of = enumerate(row[: len(pair.target)])
        links.append(frozenset((i, j) for j, i in heaviest_of if i < len(pair.source)))
    return 100 * metrics.alignment_quality(links, given.pairs).error_rate


def verdict(data: Data) -> Verdict:
    """Judge the zeros, then the alignments."""
    plain, *sparse = (data["error"][name] for name in ARMS)
    names = list(ARMS)[1:]
    text = ", ".join(
        f"{name} {shown(data['zeros'][name])} zeros, alignment error "
        f"{shown(data['error'][name])}%, BLEU {shown(data['bleu'][name])}"
        for name in ARMS
    )
    gains = ", ".join(
        f"{difference(plain, error)} with {name}" for name, error in zip(names, sparse, strict=True)
    )
    found = f"{text[0].upper()}{text[1:]}. The error falls by {gains}."
    if not learned(*data["bleu"].values()):
        return undecided(found)
    are_zeros = all(interval(data["zeros"][name]).low > 0.5 for name in names)
    if max(data["zeros"]["softmax"]) > 0 or not are_zeros:
        return fails(found)
    better = [name for name, error in zip(names, sparse, strict=True) if higher(plain, error)]
    if len(better) == len(names):
        return holds(found)
    if better:
        return holds_only_if(f"the normalizer is {better[0]}", found)
    small = all(within(plain, error, -100.0, 2.0) for error in sparse)
    return fails(found) if small else undecided(found)


def figure(data: Data):
    """Draw the alignment error rate by normalizer."""
    return bars(data["error"], xlabel="alignment error rate (%)")
