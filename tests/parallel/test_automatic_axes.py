"""Under plain `jit`, examples and heads that are split over automatic mesh axes stay split.

From the compiled programs: devices exchange nothing but gradients of parameters, each does its
share of the products, and results are sharded as the queries are.
"""

import json

import pytest

from tests.parallel import eight
from tests.parallel.programs import collectives, numbers, product_flops


def records(group):
    """Return what was read from the programs of a group, each compiled for eight devices."""
    output = eight.run("tests.parallel.spread_cases", group, flags=eight.QUICK)
    return [json.loads(line) for line in output.splitlines()]


def faults(found):
    """Say what is wrong with a program, if anything."""
    allowed = {"all-reduce": found["parameters"], "all-gather": found.get("gathered", [])}
    wrong = [
        f"{found['name']}: {exchange}"
        for exchange in found["collectives"]
        if not set(numbers(exchange)) <= set(allowed.get(exchange.split(" ")[0], []))
    ]
    if found["parameters"] and not found["collectives"]:
        wrong.append(f"{found['name']}: gradients of parameters are not summed")
    if not all(found["as wanted"]):
        wrong.append(f"{found['name']}: results are {found.get('results', found['as wanted'])}")
    return wrong


@pytest.mark.slow
def test_examples_and_heads_stay_split():
    """Also where the mesh is not known while tracing, and masks are known at run time alone."""
    (found,) = records("quick")
    assert not faults(found)


@pytest.mark.slow
def test_each_device_does_its_share():
    shares = {program["name"]: program["share"] for program in records("shares")}
    assert len(shares) == 5
    assert all(share == 1 / 8 for share in shares.values()), shares


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "number"),
    [
        pytest.param("masks", 19, marks=pytest.mark.exhaustive),
        pytest.param("scores", 17, marks=pytest.mark.exhaustive),
        pytest.param("options", 10, marks=pytest.mark.exhaustive),
        ("dense", 9),
        pytest.param("linear", 9, marks=pytest.mark.exhaustive),
        ("cache", 4),
        ("whole", 4),
        ("nnx", 14),
        pytest.param("linen", 14, marks=pytest.mark.exhaustive),
        ("executed", 4),
    ],
)
def test_everything_stays_split(group, number):
    """Every exported mask, score, option, linear attention, cache and module."""
    found = records(group)
    assert len(found) >= number
    assert not [fault for program in found for fault in faults(program)]


PROGRAM = """
ENTRY main {
  %a = f32[2,3,5]{2,1,0} parameter(0)
  %b = f32[2,5,4]{2,1,0} parameter(1)
  %c = f32[2,3,4]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}
  %d = (f32[3]{0}, /*index=1*/f32[7,2]{1,0}) all-reduce(%c, %c), channel_id=1
  %e = f32[8,3]{1,0} all-gather-start(%c), dimensions={0}
}
"""


def test_programs_are_read():
    assert product_flops(PROGRAM) == 2 * (2 * 3 * 4) * 5
    found = collectives(PROGRAM)
    assert [line.split(" ")[0] for line in found] == ["all-reduce", "all-gather"]
    assert [numbers(line) for line in found] == [[3, 14], [24]]


def test_faults_are_found():
    good = {"name": "x", "collectives": [], "parameters": [], "as wanted": [True]}
    assert not faults(good)
    summed = {**good, "parameters": [6], "collectives": ["all-reduce f32[2,3]{1,0}"]}
    assert not faults(summed)
    assert faults({**summed, "collectives": []})
    assert faults({**summed, "collectives": ["all-gather f32[2,3]{1,0}"]})
    assert faults({**summed, "collectives": ["all-reduce f32[2,4]{1,0}"]})
    assert faults({**summed, "collectives": ["all-to-all f32[2,3]{1,0}"]})
    gathered = {**summed, "gathered": [8], "collectives": ["all-gather f32[2,4]{1,0}"]}
    assert not faults(gathered)
    assert faults({**gathered, "gathered": [6]})
    assert faults({**good, "as wanted": [True, False]})
