"""Strictness for every test: implicit rank or dtype promotion is an error."""

import contextlib

import chex
import hypothesis
import jax
import pytest

from attention_jax import attention
from attention_jax.implementations import machine

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def x64():
    """Run a test in float64, for oracles and finite differences."""
    with jax.enable_x64(True):
        yield


# Tiles small enough that even the shortest sequences have several; kernels have
# no float64: cuDNN is tested on a GPU, and pallas in tests/implementations/test_pallas.py.
OPTIONS = {"tiled": {"tile_sizes": (2, 3)}}
PORTABLE = [name for name in attention.IMPLEMENTATIONS if name not in ("pallas", "cudnn")]


@pytest.fixture(params=PORTABLE)
def implementation(request):
    """Run a test once for every implementation, as arguments of `attend` that ask for it."""
    return {"implementation": request.param} | OPTIONS.get(request.param, {})


@pytest.fixture(autouse=True)
def fresh_trace_counter():
    """Count the traces of `chex.assert_max_traces` for each test by itself."""
    chex.clear_trace_counter()


@pytest.fixture
def full_disk():
    """Return a context in which files cannot grow beyond some bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(bytes_of_file):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_file, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session", autouse=True)
def same_tiles_on_every_machine():
    """Visit tiles as on two cores with level-2 caches of a MiB, whatever runs the tests."""
    pairs = machine.pairs_of(cores=2, cache=2**20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "pairs_of_cpu", lambda: pairs)
        yield
