"""Learning curves are to be seen however few validations there were."""

import matplotlib as mpl
import pytest

from experiments.translate import figures


def drawn(validations, seeds):
    """Axes of exact match and of loss, for two scores."""
    of_score = [
        {
            "step": 50 * n,
            "exact_match": [10.0 * n + seed for seed in range(seeds)],
            "valid_loss": [3.0 / n + 0.1 * seed for seed in range(seeds)],
        }
        for n in range(1, validations + 1)
    ]
    log = {score: [{"step": 25, "train_loss": [4.0]}, *of_score] for score in ("additive", "dot")}
    return figures.learning_curves(log).axes


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("validations", [1, 2])
def test_few_validations_are_points_with_bars(validations, seeds):
    for axes in drawn(validations, seeds):
        assert [bars.get_label() for bars in axes.containers] == ["additive", "dot"]
        for points, caps, (bars,) in axes.containers:
            assert points.get_marker() == "o" and len(points.get_xdata()) == validations
            assert len(caps) == 2 and len(bars.get_segments()) == validations
            heights = [top[1] - bottom[1] for bottom, top in bars.get_segments()]
            assert all(height > 0 for height in heights) == (seeds > 1)


def test_many_validations_are_lines_with_bands():
    for axes in drawn(20, 3):
        assert not axes.containers and len(axes.collections) == 2
        assert [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 20] == 2 * [
            "None"
        ]


def test_pictures_are_in_the_fonts_that_users_name():
    with mpl.rc_context({"font.family": ["DejaVu Sans", "STIXGeneral"]}), figures.style():
        assert mpl.rcParams["font.family"] == ["DejaVu Sans", "STIXGeneral"]
