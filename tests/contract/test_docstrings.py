"""Every public symbol says in one line what it is; functions of arrays add shapes and a doctest."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import attention_jax

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(attention_jax.__path__, "attention_jax.")
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in getattr(module, "__all__", [])
    if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
}
SHAPE = re.compile(  # [T, S], [Hq + Hk, A], [A], [..., T, S]
    r"\[(\.\.\., )?[A-Z*]\w*(, ?[A-Z*(]| \+ [A-Z]|\])|any shape"
)


def takes_arrays(function):
    """Tell whether an argument is an array, a random key aside."""
    parameters = inspect.signature(function).parameters
    arrays = {name for name, p in parameters.items() if "Array" in str(p.annotation)}
    return bool(arrays - {"key", "rng"})


def test_there_is_something_to_check():
    assert len(PUBLIC) > 40
    assert "attention_jax.scores.additive" in PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_the_first_line_is_a_sentence(name):
    first, *rest = inspect.getdoc(PUBLIC[name]).splitlines()
    assert first.endswith((".", ":")), first
    assert not rest or not rest[0].strip(), "a blank line follows the first"


@pytest.mark.parametrize("name", [n for n, f in PUBLIC.items() if inspect.isfunction(f)])
def test_functions_of_arrays_give_shapes_and_an_example(name):
    function = PUBLIC[name]
    if not takes_arrays(function):
        pytest.skip("takes no arrays")
    documented = inspect.getdoc(function)
    assert SHAPE.search(documented), "no shape with axis letters"
    assert doctest.DocTestParser().get_examples(documented), "no doctest"


@pytest.mark.parametrize("name", PUBLIC)
def test_what_raises_says_so(name):
    """A public function that itself raises or checks shapes has a section Raises."""
    symbol = PUBLIC[name]
    if not inspect.isfunction(symbol):
        pytest.skip("classes say it where they are built")
    source = inspect.getsource(symbol)
    if re.search(r"^\s+raise |at_least\(|checks\.(axes|floating|multiple)\(", source, re.MULTILINE):
        assert "Raises:" in inspect.getdoc(symbol)
