import chex
import jax.numpy as jnp
import pytest

from attention_jax import attend, bind, scores
from attention_jax.base import ShapeError, checks


def test_axes_returns_every_size():
    sizes = checks.axes("f", query=(jnp.zeros((2, 3)), "TH"), key=(jnp.zeros((0, 3)), "SH"))
    assert sizes == {"T": 2, "H": 3, "S": 0}


def test_wrong_rank_names_operation_tensor_and_layout():
    with pytest.raises(checks.ShapeError) as error:
        checks.axes("dot", query=(jnp.zeros((2, 3, 4)), "TH"))
    assert str(error.value) == (
        "dot: query must have the 2 axes [T, H], got shape (2, 3, 4); "
        "reshape it, or lift the function with jax.vmap."
    )


@pytest.mark.parametrize("weight", [[[1.0, 2.0]], ((1.0, 2.0),), (1, 2)])
def test_a_list_is_no_array(weight):
    message = (
        rf"bilinear: weight must be an array \[Q, H\], got a {type(weight).__name__}; "
        r"convert it with jnp\.asarray\."
    )
    x = jnp.ones((1, 3, 1, 2))
    for score in (bind(scores.bilinear, weight=weight), lambda q, k: scores.bilinear(q, k, weight)):
        with pytest.raises(ShapeError, match=message):
            attend(x, x, x, score=score)


def test_wrong_size_names_both_tensors_and_the_axis():
    with pytest.raises(checks.ShapeError) as error:
        checks.axes("dot", query=(jnp.zeros((2, 3)), "TH"), key=(jnp.zeros((5, 4)), "SH"))
    assert str(error.value) == (
        "dot: axis H (number 1) of key [S, H] must be 3 as in query, got 4; give both the same H."
    )


def test_a_letter_may_repeat_within_one_tensor():
    assert checks.axes("f", weight=(jnp.zeros((3, 3)), "HH")) == {"H": 3}
    with pytest.raises(checks.ShapeError, match="must be 3 as in weight, got 4"):
        checks.axes("f", weight=(jnp.zeros((3, 4)), "HH"))


def test_disabling_chex_disables_the_checks():
    chex.disable_asserts()
    try:
        checks.axes("dot", query=(jnp.zeros((2, 3)), "TH"), key=(jnp.zeros((5, 4)), "SH"))
    finally:
        chex.enable_asserts()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"query": jnp.zeros(2, jnp.int32)},
            "attend: query must be floating point, got int32; "
            "convert it with query.astype(jnp.float32).",
        ),
        (
            {"query": jnp.zeros(2), "key": jnp.zeros(2, jnp.bfloat16)},
            "attend: key must have the dtype of query, float32, got bfloat16; cast one of them.",
        ),
    ],
)
def test_dtypes_that_do_not_fit(tensors, message):
    with pytest.raises(checks.ShapeError) as error:
        checks.floating("attend", **tensors)
    assert str(error.value) == message


def test_multiple():
    assert checks.multiple("attend", "N", 6, "K", 2) == 3
    for of in (4, 0):
        with pytest.raises(checks.ShapeError) as error:
            checks.multiple("attend", "query heads N", 6, "key heads K", of)
        assert str(error.value) == (
            f"attend: query heads N must be a multiple of key heads K, got query heads N = 6 "
            f"and key heads K = {of}."
        )
