import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend
from attention_jax.masks import EMPTY, FULL, GridWindow, swin, window_order
from attention_jax.masks.grids import draw_grid
from tests.oracle import assert_sound


def cyclic_shift_with_mask(height, width, window, shift):
    """Shifted windows as in the paper: roll, cut into windows, mask what was not adjacent."""
    tokens = np.arange(height * width).reshape(height, width)
    regions = np.zeros((height, width), int)
    edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
        regions[rows, columns] = number
    rolled = np.roll(tokens, (-shift, -shift), axis=(0, 1))
    allowed = np.zeros((height * width,) * 2, bool)
    for top in range(0, height, window):
        for left in range(0, width, window):
            square = np.s_[top : top + window, left : left + window]
            inside, region = rolled[square].ravel(), regions[square].ravel()
            allowed[np.ix_(inside, inside)] = region[:, None] == region[None, :]
    return allowed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(4, 4, 2, 1), (8, 8, 4, 2), (6, 12, 3, 1), (8, 4, 4, 3)],
)
def test_shifted_windows_are_the_cyclic_shift_with_its_mask(height, width, window, shift):
    mask = GridWindow(height, width, window, shift)
    expected = cyclic_shift_with_mask(height, width, window, shift)
    np.testing.assert_array_equal(mask.to_dense(height * width), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "window"), [(4, 4, 2), (6, 9, 3), (5, 7, 3), (1, 7, 2)]
)
def test_plain_windows_tile_the_grid(height, width, window):
    """Also a grid that the window does not divide: the last windows are cut off."""
    tokens = [(row, column) for row in range(height) for column in range(width)]
    expected = [
        [a // window == c // window and b // window == d // window for c, d in tokens]
        for a, b in tokens
    ]
    mask = swin(height, width, window)
    np.testing.assert_array_equal(mask.to_dense(height * width), expected)
    for sizes in ((1, 1), (width, width), (3, 5)):
        assert_sound(mask.tiles(height * width, height * width, *sizes), expected, *sizes)


def test_two_layers_connect_neighboring_windows():
    plain, shifted = (np.asarray(swin(4, 4, 2, s).to_dense(16)).astype(int) for s in (False, True))
    assert not plain[5, 10]
    assert (plain @ shifted)[5, 10] > 0
    assert (np.linalg.matrix_power(plain @ shifted, 2) > 0).all()


@pytest.mark.parametrize("shift", [0, 2])
def test_window_order_makes_the_live_tiles_as_few_as_the_windows(shift):
    mask = GridWindow(32, 32, window=8, shift=shift)
    order, segments = window_order(mask)
    np.testing.assert_array_equal(np.sort(order), np.arange(1024))
    dense = np.asarray(mask.to_dense(1024))
    np.testing.assert_array_equal(segments.to_dense(1024), dense[np.ix_(order, order)])
    states = segments.tiles(1024, 1024, 64, 64)
    in_rows = mask.tiles(1024, 1024, 64, 64)
    if shift == 0:
        np.testing.assert_array_equal(states, np.where(np.eye(16, dtype=bool), FULL, EMPTY))
    assert (states != EMPTY).sum() < 0.8 * (in_rows != EMPTY).sum() < 0.4 * states.size


@pytest.mark.slow
def test_attention_in_window_order_is_the_same(implementation):
    mask = swin(6, 6, window=3, shifted=True)
    order, segments = window_order(mask)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 36, 1, 4)), jnp.float32)
    expected = attend(x, x, x, mask=mask, implementation="dense")
    ordered = attend(x[:, order], x[:, order], x[:, order], mask=segments, **implementation)
    np.testing.assert_allclose(ordered[:, order.argsort()], expected, rtol=1e-5, atol=1e-6)


def test_picture():
    assert draw_grid(swin(4, 4, 2), 4, 4, query=2) == "··██\n··██\n····\n····"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GridWindow(0, 4, 2), "GridWindow: height must be 1 or more, got 0."),
        (lambda: swin(4, 4, 0), "GridWindow: window must be 1 or more, got 0."),
        (
            lambda: GridWindow(4, 4, 2, shift=2),
            "GridWindow: shift must be in [0, window) = [0, 2), got 2.",
        ),
        (
            lambda: GridWindow(4, 4, 2, shift=-1),
            "GridWindow: shift must be in [0, window) = [0, 2), got -1.",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message
