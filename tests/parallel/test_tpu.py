"""What the compiler for a TPU makes of automatic axes and of a ring, read from its programs."""

import functools
import importlib.util
import json

import pytest

from tests.parallel import eight
from tests.parallel.tpu_cases import waits

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler: pip install libtpu"
)


@functools.cache
def records():
    environment = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    output = eight.run("tests.parallel.tpu_cases", environment=environment)
    found = (json.loads(line) for line in output.splitlines())
    return {one["name"]: one for one in found}


@pytest.mark.aot
@pytest.mark.slow
@needs_libtpu
def test_examples_and_heads_exchange_nothing():
    """Forward and gradients, with a mask that is known at run time; 2 x 2 chips."""
    assert not records()["automatic"]["exchanges"]
    assert records()["a sum over examples"]["exchanges"]  # so they can be read


@pytest.mark.aot
@pytest.mark.slow
@needs_libtpu
def test_keys_travel_while_tiles_are_computed():
    """Keys and values: to the first step that needs others, and in the loop over the rest.

    Backward the same, and their gradients in the loop and after it; the last of these go home when
    there is nothing left to compute.
    """
    assert records()["ring"]["waits"] == [True] * 4
    backward = records()["ring, gradients"]["waits"]
    assert len(backward) == 4 + 4 + 2 + 2 + 2
    assert backward.count(False) == 2


SCHEDULE = """
HloModule jit_f, is_scheduled=true
%body (x: f32[2]) -> f32[2] {
  %collective-permute-start.1 = (f32[2]{0}, f32[2]{0}) collective-permute-start(%x)
  %while.2 = (f32[2]{0}) while(%y), condition=%c, body=%b
  %collective-permute-done.1 = f32[2]{0} collective-permute-done(%collective-permute-start.1)
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %while.3 = (f32[2]{0}) while(%y), condition=%c, body=%body
  %collective-permute-start = (f32[2]{0}, f32[2]{0}) collective-permute-start(%z)
  %collective-permute-done = f32[2]{0} collective-permute-done(%collective-permute-start)
}
"""


def test_schedules_are_read():
    assert waits(SCHEDULE) == [True, False]
