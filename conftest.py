"""How programs are compiled in tests and in the examples of docstrings."""

import os
import pathlib

import jax
import pytest

# Where numbers are looked at closely, programs are compiled as users compile them. Elsewhere the
# compiler's effort would take most of the time.
COMPILED_AS_USERS_DO = "implementations"


@pytest.fixture(scope="session", autouse=True)
def shared_programs(tmp_path_factory):
    """Keep compiled programs where all workers and the programs that tests start find them.

    JAX_COMPILATION_CACHE_DIR, if set, is a folder that several runs of the tests share.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or _shared(tmp_path_factory) / "compiled"
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            jax.config.update(name, value)
            environment.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def _shared(tmp_path_factory) -> pathlib.Path:
    """The folder of this run of all tests, whichever worker asks."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def quick_compilation():
    """Compile without optimization what is called once, in programs that tests start too."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def compilation_as_users_know_it(request, quick_compilation):
    """Compile well where numbers are looked at closely."""
    well = COMPILED_AS_USERS_DO in request.path.parts
    jax.config.update("jax_disable_most_optimizations", not well)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
