"""Kernels compiled for accelerators that are not there: that they compile, and what they cost."""

import json
import pathlib

import pytest

from experiments.benchmark import accelerators, compilers, matrix, schedule

pytestmark = pytest.mark.aot

BEYOND = json.loads(
    pathlib.Path(__file__).with_name("beyond_bounds.json").read_text(encoding="utf-8")
)
"""Programs that cost more than their bounds, as measured: what the suite `matrix` writes."""

FEW = (
    matrix.Cell("v5e", "scaled dot", "causal", False),
    matrix.Cell("v5e", "scaled dot", "segments", True),
    matrix.Cell("v6e", "additive", "window", False),
    matrix.Cell("H100", "scaled dot", "causal", True),
)
"""Those that CI compiles, where it has the compilers."""


def skip_without(target):
    missing = compilers.lacks(target)
    if missing:
        pytest.skip(missing)


def as_parameter(cell):
    marks = [pytest.mark.slow] + [pytest.mark.exhaustive] * (cell not in FEW)
    if cell.name in BEYOND:
        marks.append(pytest.mark.xfail(reason=BEYOND[cell.name], strict=True))
    return pytest.param(cell, marks=marks, id=cell.name)


@pytest.mark.parametrize("cell", [as_parameter(cell) for cell in matrix.cells()])
def test_every_score_and_mask_compiles_for_every_accelerator_within_its_bounds(cell):
    skip_without(cell.target)
    assert matrix.beyond(cell, matrix.measure(cell)) == []


def test_no_other_program_is_expected_to_be_beyond_its_bounds():
    assert set(BEYOND) <= {cell.name for cell in matrix.cells()}


@pytest.mark.slow
def test_a_kernel_needs_no_more_than_those_of_jax():
    skip_without("v5e")
    length = 1024
    programs = accelerators.programs("tpu", length)
    shapes = accelerators.operands("tpu", length)
    ours, flash = (
        compilers.cost(programs[name, "causal"], shapes, "v5e")
        for name in ("attend, scaled dot", "flash")
    )
    assert ours.traffic is not None
    assert flash.traffic is not None
    assert ours.traffic <= 1.05 * flash.traffic


@pytest.fixture(scope="module")
def schedules():
    skip_without(schedule.TARGET)
    return schedule.measure(scale=1)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", schedule.Schedule._fields)
@pytest.mark.parametrize("peer", ["flash", "splash"])
def test_a_causal_schedule_is_within_that_of_hand_written_kernels(peer, name, schedules):
    ours, theirs = (getattr(schedules[program], name) for program in ("attend, scaled dot", peer))
    assert ours <= 1.15 * theirs
