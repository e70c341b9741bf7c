"""Comparisons run in float64; the largest differences are printed at the end."""

import sys

import jax
import pytest


@pytest.fixture(autouse=True)
def float64(x64, monkeypatch):
    """Compare in float64, where both sides would compute norms and softmax in float32.

    Norms of Flax, and casts of indices, rely on implicit promotion.
    """
    torch = pytest.importorskip("torch")
    single = torch.get_default_dtype()
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    torch.set_default_dtype(single)


def pytest_terminal_summary(terminalreporter):
    comparing = sys.modules.get("tests.reference.comparing")
    for name, difference in getattr(comparing, "DIFFERENCES", {}).items():
        terminalreporter.write_line(f"{name}: largest difference {difference:.0e}")
