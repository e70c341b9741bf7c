"""Strictness for every test: implicit rank or dtype promotion is an error."""

import chex
import hypothesis
import jax
import pytest

from attention_jax import attention

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


# Tiles small enough that even the shortest sequences have several; cuDNN is tested on a GPU.
OPTIONS = {"tiled": {"tile_sizes": (2, 3)}}
PORTABLE = [name for name in attention.IMPLEMENTATIONS if name != "cudnn"]


@pytest.fixture(params=PORTABLE)
def implementation(request):
    """Run a test once for every implementation, as arguments of `attend` that ask for it."""
    return {"implementation": request.param} | OPTIONS.get(request.param, {})


# Where numbers are looked at closely, programs are compiled as users compile them. Elsewhere the
# compiler's effort would take most of the time.
COMPILED_AS_USERS_DO = "implementations"


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compile without optimization what is compiled once to be called once."""
    quick = COMPILED_AS_USERS_DO not in request.path.parts
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def fresh_trace_counter():
    """Count the traces of `chex.assert_max_traces` for each test by itself."""
    chex.clear_trace_counter()
