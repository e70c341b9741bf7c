import jax.numpy as jnp
import pytest

from attention_jax import Attended, merge


def part(queries=6, keys=6):
    return Attended(jnp.ones((1, queries, 2, 4)), logsumexp=jnp.ones((1, keys, 2)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "merge: give at least one part, got none."),
        (
            [part(), part(5, 5)],
            "merge: the context of every part must have the shape of the first, (1, 6, 2, 4), got "
            "(1, 5, 2, 4); merge joins blocks of keys that the same queries attend to.",
        ),
        (
            [part()._replace(logsumexp=None)],
            "merge: a part has no log-sum-exp; attend with return_logsumexp=True.",
        ),
        (
            [part(6, 5)],
            "merge: a log-sum-exp must have the shape of its context without the last axis, "
            "(1, 6, 2), got (1, 5, 2).",
        ),
    ],
)
def test_errors(parts, message):
    with pytest.raises(ValueError) as error:
        merge(*parts)
    assert str(error.value) == message
