"""Pictures show what they are given, and are saved as PNG and SVG."""

import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.font_manager import findfont, get_font

from attention_jax import masks
from attention_jax.diagnostics import explore, plots

WEIGHTS = np.array([[[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]] * 5)
QUERY, KEY = ["ja", "so"], ["yes", "like", "that"]


def image(axes):
    return axes.images[0].get_array()


def test_a_grid_of_heads_with_tokens():
    figure = plots.heads(jnp.asarray(WEIGHTS), QUERY, KEY, across=2)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [f"head {head}" for head in range(5)]
    for axes, weights in zip(shown, WEIGHTS, strict=True):
        np.testing.assert_allclose(image(axes), weights)
        assert axes.images[0].get_clim() == (0, 1)
    for axis, labels in ((shown[-1].xaxis, KEY), (shown[-1].yaxis, QUERY)):
        assert [label.get_text() for label in axis.get_ticklabels()] == labels
    has_labels = [axes.xaxis.get_tick_params()["labelbottom"] for axes in shown]
    assert has_labels == [False, False, False, True, True], "where no other head is below"
    assert shown[0].get_position().x0 < shown[1].get_position().x0


def test_one_head_and_half_precision():
    figure = plots.heads(jnp.asarray(WEIGHTS[0], jnp.bfloat16), titles=["mine"])
    assert [axes.get_title() for axes in figure.axes] == ["mine"]
    np.testing.assert_allclose(image(figure.axes[0]), WEIGHTS[0])


def test_of_very_many_labels_some_are_written():
    figure = plots.heads(np.eye(200), [str(i) for i in range(200)])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["0", "4"] and len(labels) <= 64
    assert max(figure.get_size_inches()) < 10


def test_dollars_begin_no_formula(tmp_path):
    figure = plots.heads(np.eye(3)[None], ["$x^2$", "b", "$$"], ["$\\frac{1$", "a", "c"], ["$5 $"])
    plots.save(figure, tmp_path / "weights")
    axes = figure.axes[0]
    written = [axes.title, *axes.get_yticklabels(), *axes.get_xticklabels()]
    assert [text.get_text() for text in written][:3] == ["$5 $", "$x^2$", "b"]
    assert not any(text.get_parse_math() for text in written)
    plots.save(plots.masks({"$\\frac{1$": masks.Causal()}, 4), tmp_path / "masks")


def test_characters_that_no_font_has_are_told_of_once(tmp_path, recwarn):
    plots._tell_of_boxes.cache_clear()
    figure = plots.heads(np.eye(3)[None], ["你", "好", "吗"], ["a", "b", "\U0010ffff"])
    for name in ("first", "second"):
        plots.save(figure, tmp_path / name)
    (warning,) = recwarn
    assert warning.filename == __file__
    assert str(warning.message) == (
        "plots: no installed font has some of the characters, which are drawn as boxes; install "
        "one that has them (Debian, Ubuntu: fonts-noto-cjk)."
    )


def test_characters_that_the_fonts_in_use_lack_are_drawn_in_one_that_has_them(tmp_path, recwarn):
    there = [set(get_font(findfont(name)).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")]
    character = next(c for c in map(chr, sorted(there[1] - there[0])) if c.isprintable())
    figure = plots.heads(np.eye(3)[None], [character, "a", "b"], titles=[character])
    plots.save(figure, tmp_path / "weights")
    axes = figure.axes[0]
    for text in (axes.title, axes.get_yticklabels()[0]):
        assert text.get_text() == character
        assert text.get_fontfamily() == ["sans-serif", "STIXGeneral"]
    assert axes.get_yticklabels()[1].get_fontfamily() == ["sans-serif"]
    assert not list(recwarn)


def test_other_warnings_are_passed_on(tmp_path):
    figure = plots.heads(np.eye(3)[None])
    figure.savefig = lambda *_, **__: warnings.warn("another", stacklevel=2)
    with pytest.warns(UserWarning, match="another") as said:
        plots.save(figure, tmp_path / "x")
    assert len(said) == 2


def test_masks_are_dark_where_allowed_and_shaded_where_tiles_are_live():
    figure = plots.masks({"causal": masks.Causal(), "all": None}, 5, 7, tile_sizes=(2, 3))
    causal, everything = (image(axes) for axes in figure.axes)
    assert causal.shape == (5, 7)
    np.testing.assert_array_equal(causal >= 2, masks.Causal().to_dense(5, 7))
    np.testing.assert_allclose(causal[0], [2.5, 0.5, 0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(causal[2:4, :3], [[3, 3, 3]] * 2)
    np.testing.assert_allclose(everything, 3)


def test_saved_twice_alike_as_png_and_svg(tmp_path):
    def once(name):
        return plots.save(plots.heads(WEIGHTS[:1], QUERY, KEY), tmp_path / "new" / name)

    png, svg = once("layer.1")
    assert (png.name, svg.name) == ("layer.1.png", "layer.1.svg")
    assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text()
    assert [path.read_bytes() for path in once("again")] == [png.read_bytes(), svg.read_bytes()]


@pytest.mark.slow
def test_a_full_disk_leaves_no_part_of_a_picture(tmp_path, full_disk):
    figure = plots.heads(np.eye(60)[None])
    sizes = {path.suffix: path.stat().st_size for path in plots.save(figure, tmp_path / "one")}
    limit = max(sizes.values()) - 1
    with full_disk(limit), pytest.raises(OSError, match="File too large") as error:
        plots.save(figure, tmp_path / "other")
    assert error.value.filename.startswith(f"{tmp_path}/other.")
    for path in tmp_path.glob("other*"):
        assert path.stat().st_size == sizes[path.suffix] <= limit


@pytest.mark.slow
def test_a_full_disk_leaves_the_page_before_alone(tmp_path, full_disk):
    page = explore(np.random.default_rng(0).random((1, 9, 9)), list("abcdefghi"))
    page.save(tmp_path / "page.html")
    before = (tmp_path / "page.html").read_bytes()
    with full_disk(len(before) - 1), pytest.raises(OSError, match="File too large"):
        page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_matplotlib_is_needed_only_to_draw():
    command = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from attention_jax.diagnostics import plots\n"
        "try: plots.heads([[1.0]])\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout == (
        "plots: matplotlib is not installed; install attention_jax with its extra 'plots'.\n"
    ), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((1, 2, 3, 3)),), r"heads: weights must be \[N, T, S\] or \[T, S\], got shape"),
        ((WEIGHTS, KEY), r"query_labels must have one label for each of T = 2 tokens, got 3\."),
        ((WEIGHTS, QUERY, QUERY), r"key_labels must have one label for each of S = 3 tokens"),
        ((WEIGHTS, None, None, ["a"]), r"heads: give one title for each of N = 5 heads, got 1\."),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.heads(*arguments)
