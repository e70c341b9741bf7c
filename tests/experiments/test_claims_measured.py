"""Every claim is measured, judged and drawn in the tiny setting."""

import json

import jax
import pytest

from experiments.claims.claim import SETTINGS, Outcome, all_claims
from experiments.translate.figures import style

# The others take more than four seconds, most of them compiling what they draw and train.
QUICK = (45, 53, 63, 65, 67, 68, 70)


def _marked(number):
    return number if number in QUICK else pytest.param(number, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("number", [_marked(number) for number in all_claims()])
def test_a_claim_runs(number):
    module = all_claims()[number].load()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        data = json.loads(json.dumps(module.measure(SETTINGS["tiny"], jax.random.key(number))))
    verdict = module.verdict(data)
    assert verdict.outcome in Outcome and len(verdict.because) > 30
    if hasattr(module, "figure"):
        with style():
            assert module.figure(data).axes
    if hasattr(module, "table"):
        header, *rows = module.table(data)
        assert rows and all(len(row) == len(header) for row in rows)
