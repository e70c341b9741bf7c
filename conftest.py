"""How programs are compiled in tests and in the examples of docstrings."""

import jax
import pytest

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
