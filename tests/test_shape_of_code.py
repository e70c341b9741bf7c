"""Functions take few arguments, close over few names, and use no private name of another file."""

import ast
import symtable
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("attention_jax", "experiments", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# Tests may close over their arrays, and look at what is private.
PROGRAMS = [name for name in PATHS if not name.startswith("tests/")]
MOST_ARGUMENTS, MOST_OUTER_NAMES = 10, 2
# Beside the constructors of classes: the operator, its description, and the signatures of others.
LONG_SIGNATURES = {
    "attention_jax/attention.py": ("attend", "explain"),
    "attention_jax/interop/jax_nn.py": ("dot_product_attention",),
    "attention_jax/interop/flax_layers.py": ("__call__",),
    "attention_jax/linen/multi_head.py": ("__call__",),
    "attention_jax/nnx/multi_head.py": ("__call__",),
}
# JAX has no public name for the key-value store of its coordination service.
PRIVATE_OF_OTHERS = {"experiments/worker.py": ("_src",)}
# Methods of named tuples, what Python itself makes, and the end of a process from a thread of it.
PUBLIC = ("_replace", "_asdict", "_fields", "_make", "_exit")


def long_signatures(source, allowed=()):
    """Return the functions with too many arguments, not counting `self` and `cls`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            name = getattr(node, "name", "lambda")
            given = node.args
            every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
            count = sum(a is not None and a.arg not in ("self", "cls") for a in every)
            if count > MOST_ARGUMENTS and name not in ("__init__", *allowed):
                found.append(f"line {node.lineno}: {name} has {count} arguments")
    return found


def wide_closures(source):
    """Return the nested functions (also lambdas) that use too many names of the functions around.

    Names of the module do not count, nor modules that the functions around import. What a
    comprehension binds counts, as it may change before a function is called.
    """
    found, waiting = [], [(symtable.symtable(source, "source", "exec"), ())]
    while waiting:
        table, around = waiting.pop()
        if around and table.get_type() == "function" and table.get_name() not in COMPREHENSIONS:
            frees = set(table.get_frees()) - {"__class__"}
            names = sorted(name for name in frees if not _is_import(name, around))
            if len(names) > MOST_OUTER_NAMES:
                found.append(f"line {table.get_lineno()}: {table.get_name()} uses {names}")
        inner = (table, *around) if table.get_type() == "function" else around
        waiting += [(child, inner) for child in table.get_children()]
    return sorted(found)


def _is_import(name, tables):
    """Tell whether the innermost function that binds a name imports it."""
    symbols = [table.lookup(name) for table in tables if name in table.get_identifiers()]
    return next((symbol.is_imported() for symbol in symbols if symbol.is_local()), False)


COMPREHENSIONS = ("listcomp", "setcomp", "dictcomp", "genexpr")


def private_names(source):
    """Return the private names that are used but not defined here."""
    tree, found = ast.parse(source), []
    own = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and not _is_self(node.value):
            parts = [node.attr] if node.attr not in own else []
        else:
            continue
        found += [f"line {node.lineno}: {part}" for part in parts if _is_private(part)]
    return found


def _is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def offenders(check, names):
    """Return what a check finds in files of the repository."""
    return [
        f"{name} {found}"
        for name in names
        for found in check(name, PATHS[name].read_text(encoding="utf-8"))
    ]


def test_functions_have_few_arguments():
    def check(name, source):
        return long_signatures(source, LONG_SIGNATURES.get(name, ()))

    found = offenders(check, PATHS)
    assert not found, "\n".join(found)


def test_the_list_of_long_signatures_has_no_others():
    for name, functions in LONG_SIGNATURES.items():
        found = "\n".join(long_signatures(PATHS[name].read_text(encoding="utf-8")))
        assert all(f": {function} has" in found for function in functions), name


def test_nested_functions_use_few_outer_names():
    found = offenders(lambda name, source: wide_closures(source), PROGRAMS)
    assert not found, "\n".join(found)


def test_private_names_are_used_where_they_are_defined():
    def check(name, source):
        allowed = PRIVATE_OF_OTHERS.get(name, ())
        return [found for found in private_names(source) if found.split(": ")[1] not in allowed]

    found = offenders(check, PROGRAMS)
    assert not found, "\n".join(found)


def test_the_list_of_private_names_has_no_others():
    for name, allowed in PRIVATE_OF_OTHERS.items():
        found = private_names(PATHS[name].read_text(encoding="utf-8"))
        assert {line.split(": ")[1] for line in found} == set(allowed), name


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (
            long_signatures,
            "def f(a, b, c, d, e, f, g, /, h, i, *, j, k): pass",
            "def f(self, a, b, c, d, e, f, g, /, h, i, *j): pass",
        ),
        (
            wide_closures,
            """
            def f(a, b):
                c = 1
                return lambda x: [a + b + c for _ in x]
            """,
            """
            c = 1
            def f(a, b):
                return lambda x: [a + b + c + d for d in x]
            """,
        ),
        (
            wide_closures,
            """
            def f(a, b, c):
                class G:
                    def g(self):
                        super().g()
                        return a + b + c
            """,
            """
            def f(a, b, c):
                class G:
                    h = c
                    def g(self):
                        super().g()
                        return a + b
            """,
        ),
        (private_names, "from a import _b", "from a import b; b._replace()"),
        (private_names, "from a import b; b._c()", "class A:\n def _c(self): A()._c(), self._d()"),
        (private_names, "import a._b", "import a.b; a.__file__"),
    ],
)
def test_offenders_are_found(check, bad, good):
    assert len(check(textwrap.dedent(bad))) == 1
    assert not check(textwrap.dedent(good))
