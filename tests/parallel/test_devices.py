"""Run the tests that need several devices: in a process that has eight, all on this CPU."""

import pytest

from tests.parallel import eight

FILES = ["tests/parallel/test_sequence.py", "tests/parallel/test_sequence_derivatives.py"]


@pytest.mark.slow
def test_sequences_are_split_over_eight_devices():
    command = ["pytest", "-n", "0", "-v", "-m", "not exhaustive", "-p", "no:cacheprovider", *FILES]
    output = eight.run(*command, flags=eight.QUICK)
    assert "passed" in output
    assert "skipped" not in output
