"""Every verdict rests on its evidence: the committed one, and that of the tiny setting."""

import itertools
import json
import math
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.claims.claim import SETTINGS, Outcome, Verdict, all_claims
from experiments.claims.evidence import difference, shown
from experiments.translate.figures import style

COMMITTED = {
    record["number"]: record
    for record in json.loads(
        (Path(__file__).parents[2] / "experiments" / "results" / "claims.json").read_text("utf-8")
    )["claims"]
}
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?"
P_VALUE = rf", uncorrected p = {NUMBER}"
INTERVAL = re.compile(
    rf"(?P<mean>{NUMBER}) \[(?P<low>{NUMBER}), (?P<high>{NUMBER})\](?P<p>{P_VALUE})?"
)
# Samples that a verdict derives from its data by a function of its own.
DERIVED = {
    62: lambda claim, data: [claim.slopes(data, name) for name in data],
    64: lambda claim, data: [claim.exponents(of) for of in data.values()],
    77: lambda claim, data: claim.shares(data).values(),
}
# Those whose models take longest to compile; others train models of the same kinds.
TRAINED_LONGEST = {*range(39, 43), *range(46, 53), *range(55, 59), 60, 61, 62, 69, *range(71, 80)}
# Without attention all weights are alike, and correlate with nothing.
UNDEFINED = {62: ("without attention", "correlation")}


def leaves(data, path=()):
    """Yield path and value of all numbers and truth values of evidence."""
    if isinstance(data, dict | list):
        for name, part in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(part, (*path, name))
    elif isinstance(data, bool | int | float):
        yield path, data


def samples(data):
    """Yield all lists of numbers of evidence, each the values of several draws or seeds."""
    if isinstance(data, list) and len(data) > 1 and all(isinstance(x, int | float) for x in data):
        yield data
    elif isinstance(data, dict | list):
        for part in data.values() if isinstance(data, dict) else data:
            yield from samples(part)


def replaced(data, replace):
    """Return evidence of the same structure with other leaves."""
    if isinstance(data, dict):
        return {name: replaced(part, replace) for name, part in data.items()}
    if isinstance(data, list):
        return [replaced(part, replace) for part in data]
    return replace(data)


def other(value):
    return not value if isinstance(value, bool) else 2 * value + 1


def check(number, claim, data):
    """Fail unless a verdict and its sentence follow from numbers that were measured.

    Every interval in the sentence is that of a sample of the evidence, or of the paired differences
    of two, with their p; and other evidence makes another sentence.
    """
    found = dict(leaves(data))
    assert found, "nothing was measured"
    undefined = UNDEFINED.get(number, ("none",))
    numbers = [x for path, x in found.items() if path[: len(undefined)] != undefined]
    assert all(map(math.isfinite, numbers)), "not finite"
    verdict = claim.verdict(data)
    assert verdict.outcome in Outcome
    assert bool(verdict.condition) == (verdict.outcome == Outcome.ONLY_IF)
    assert not re.search(r"\b(nan|inf|None)\b", verdict.because)
    assert re.search(NUMBER, verdict.because), "no number"
    given = [*samples(data), *DERIVED.get(number, lambda *_: [])(claim, data)]
    for cited in INTERVAL.finditer(verdict.because):
        assert float(cited["low"]) <= float(cited["mean"]) <= float(cited["high"])
        assert rests_on(cited, given), f"{cited[0]} is not of the evidence"
    # Whole numbers are sizes and counts, unless there is nothing else.
    kinds = float | bool if any(isinstance(x, float | bool) for x in numbers) else int
    moved = replaced(data, lambda x: other(x) if isinstance(x, kinds) else x)
    assert claim.verdict(moved).because != verdict.because, "the same for other numbers"
    return verdict


def rests_on(cited, given):
    """Tell whether an interval is that of a sample, or of the differences of two, with its p."""
    pairs = [
        (a, b)
        for a, b in itertools.permutations(given, 2)
        if len(a) == len(b) and f"{np.mean(np.subtract(a, b)):.3g}" == cited["mean"]
    ]
    if cited["p"]:
        return any(difference(*pair) == cited[0] for pair in pairs)
    near = [x for x in given if f"{np.mean(x):.3g}" == cited["mean"]]
    return any(shown(x) == cited[0] for x in (*near, *(np.subtract(*pair) for pair in pairs)))


@pytest.mark.parametrize("number", list(all_claims()))
def test_a_committed_verdict_follows_from_the_committed_evidence(number):
    record = COMMITTED[number]
    verdict = check(number, all_claims()[number].load(), record["data"])
    assert (str(verdict), verdict.because) == (record["verdict"], record["because"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=[pytest.mark.exhaustive] * (n in TRAINED_LONGEST))
        for n in all_claims()
    ],
)
def test_a_claim_is_measured_judged_and_drawn(number):
    claim = all_claims()[number].load()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        data = json.loads(json.dumps(claim.measure(SETTINGS["tiny"], jax.random.key(number))))
    check(number, claim, data)
    if hasattr(claim, "figure"):
        with style():
            assert claim.figure(data).axes
    if hasattr(claim, "table"):
        header, *rows = claim.table(data)
        assert rows and all(len(row) == len(header) for row in rows)


@pytest.mark.parametrize(
    ("sentence", "complaint"),
    [
        ("The ratio is {trained} after training, of {sizes} depths.", None),
        ("The ratio is 1.5 [1.4, 1.6] after training, of {sizes} depths.", "not of the evidence"),
        ("The ratio is {trained}, uncorrected p = 0.03.", "not of the evidence"),
        ("It is so.", "no number"),
        ("The ratio is above 1 at all depths.", "the same for other numbers"),
        ("The ratio is nan, of {sizes} depths.", "nan"),
    ],
)
def test_a_sentence_that_does_not_rest_on_the_evidence_is_refused(sentence, complaint):
    def verdict(data):
        words = {"trained": shown(data["trained"]), "sizes": len(data["depths"])}
        return Verdict(Outcome.HOLDS, sentence.format(**words))

    claim = types.SimpleNamespace(verdict=verdict)
    if complaint is None:
        check(39, claim, COMMITTED[39]["data"])
    else:
        with pytest.raises(AssertionError, match=complaint):
            check(39, claim, COMMITTED[39]["data"])


@pytest.mark.parametrize("number", list(all_claims()))
def test_empty_or_undefined_evidence_is_refused(number):
    claim, data = all_claims()[number].load(), COMMITTED[number]["data"]
    with pytest.raises(AssertionError, match="nothing was measured"):
        check(number, claim, {})
    with pytest.raises(AssertionError, match="nothing was measured"):
        check(number, claim, dict.fromkeys(data))
    with pytest.raises(AssertionError, match="not finite"):
        check(number, claim, replaced(data, lambda x: math.nan))
