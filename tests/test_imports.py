"""Imports point downward: each sub-package may import those below it, and none has a cycle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "attention_jax"
LAYERS = (
    ("base",),
    ("masks",),
    ("head_maps", "normalizers", "statistics"),
    ("scores",),
    ("positions",),
    ("request",),
    ("operands",),
    ("implementations",),
    ("attention",),
    ("cache", "linear", "parallel"),
    ("layers", "diagnostics", "interop"),
    ("nnx", "linen"),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
FLAT = {"__init__", "attention", "request", "operands", "cache"}


def modules(package):
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(path, known):
    """Return the modules of `known` that a file imports when it is loaded."""
    found = set()
    for node in _loaded(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
    return found & set(known)


def _loaded(tree):
    """Yield the statements outside functions, also those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        yield node
        yield from _loaded(node)


def cycle(graph):
    """Return a cycle of a graph {node: successors}, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        found = next(filter(None, map(visit, sorted(graph[node]))), None)
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("package", ["attention_jax", "experiments"])
def test_no_module_imports_itself_through_others(package):
    known = modules(package)
    doors = {name for name, path in known.items() if path.name == "__init__.py"}
    graph = {name: imports(path, known) - doors for name, path in known.items()}
    assert cycle(graph) is None


def test_imports_of_the_library_point_downward():
    known, upward = modules("attention_jax"), []
    for name, path in known.items():
        if name == "attention_jax":
            continue
        here = name.split(".")[1]
        for other in imports(path, known) - {"attention_jax"}:
            there = other.split(".")[1]
            if here != there and HEIGHT[there] >= HEIGHT[here]:
                upward.append(f"{name} imports {other}")
    assert not upward, upward


def test_every_file_and_folder_has_its_place():
    assert {path.stem for path in LIBRARY.glob("*.py")} <= FLAT
    folders = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert folders | FLAT - {"__init__"} == set(HEIGHT)


def test_the_library_imports_no_experiment():
    known = modules("attention_jax") | modules("experiments")
    for name, path in modules("attention_jax").items():
        assert not {x for x in imports(path, known) if x.startswith("experiments")}, name


def test_every_folder_has_one_door():
    """What a sub-package offers is in its `__all__`."""
    for path in LIBRARY.glob("*/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
        assert "__all__" in names, path
