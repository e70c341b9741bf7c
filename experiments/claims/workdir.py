"""The work directory: refuse that of another program; cache measurements.

A measurement is reused as long as all code that it depends on is the same.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from experiments.claims.claim import SETTINGS, Claim, Data, Setting
from experiments.command_line import UsageError
from experiments.files import unsealed, write_sealed
from experiments.leases import visible

# Written before the results.
_BEFORE = ("cache", "errors", "figures", "leases", "results.json.unfinished")
_MEASURED = re.compile(rf"\d+-({'|'.join(SETTINGS)})-[0-9a-f]{{16}}\.json")
_HINT = "give another --workdir."

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# These only read the data; their changes do not invalidate them.
_VIEWS = ("verdict", "figure", "table")


def writable(folder: Path) -> Path:
    """Create a folder; refuse one that belongs to another program or cannot be written to.

    Raises:
      UsageError: it holds other files, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_ours(folder)
    except OSError as error:
        raise UsageError(f"--workdir {folder}: {error.strerror or error}; {_HINT}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir {folder} is not to be written to; {_HINT}")
    return folder


def are_verdicts(path: Path) -> bool:
    """Tell whether a file holds results of this program."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(held, dict) and {"setting", "claims"} <= held.keys()


def _check_ours(folder: Path) -> None:
    for name in ("results.json", "report.html"):
        if (folder / name).is_dir():
            raise UsageError(f"--workdir: {folder / name} is a folder; {_HINT}")
    path = folder / "results.json"
    if path.exists():
        if not are_verdicts(path):
            raise UsageError(f"--workdir {folder}: {path} is not of this program; {_HINT}")
    elif not _has_measurements(folder):
        others = sorted(file.name for file in folder.iterdir() if file.name not in _BEFORE)
        if others:
            raise UsageError(
                f"--workdir {folder} holds other files, such as {others[0]}, and no tests of "
                f"claims; {_HINT}"
            )


def _has_measurements(folder: Path) -> bool:
    """Tell whether the folder holds measurements of an interrupted run."""
    return any(_MEASURED.fullmatch(file.name) for file in folder.glob("cache/*.json"))


class Cache:
    """A folder with one file for each measurement: its data, and the seconds it took."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, claim: Claim, setting: Setting) -> tuple[Data, float] | None:
        """Return data and seconds of a claim measured by the same code, or None.

        A file that is not as it was written counts as none: the claim is measured again.
        """
        try:
            held = unsealed(json.loads(self._path(claim, setting).read_text(encoding="utf-8")))
            return held["data"], held["seconds"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, claim: Claim, setting: Setting, data: Data, seconds: float) -> None:
        """Write data, and delete those measured by other code."""
        path = self._path(claim, setting)
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"{claim.number}-{setting.name}-*.json"):
            old.unlink()
        write_sealed(path, {"data": data, "seconds": seconds})

    def has(self, claim: Claim, setting: Setting) -> bool:
        """Tell whether this process or another one has measured a claim by the same code."""
        try:
            path = self._path(claim, setting)
        except (SyntaxError, ValueError):  # its file has a mistake
            return False
        return visible(path) and self.get(claim, setting) is not None

    def _path(self, claim: Claim, setting: Setting) -> Path:
        return self.folder / f"{claim.number}-{setting.name}-{fingerprint(claim.path)}.json"


def fingerprint(path: Path) -> str:
    """Return a hash of the code that a file runs and of the versions of libraries."""
    digest = hashlib.sha256()
    for source in sorted(imported_files(path)):
        digest.update(_content(source, views=source != path).encode())
    for package in _PACKAGES:
        digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()[:16]


def together(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    """Return groups of claims by name; those of a group train the same models, once in a process.

    A group has the name of the cached function that trains, which its files import by name; any
    other claim is a group of its own.

    >>> from experiments.claims.claim import all_claims
    >>> groups = together([all_claims()[number] for number in (39, 51, 76)])
    >>> {name: [claim.number for claim in group] for name, group in groups.items()}
    {'39': [39], 'by_attention_size': [51, 76]}
    """
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(_trained(claim.path) or str(claim.number), []).append(claim)
    return groups


def _trained(path: Path) -> str | None:
    """Return the first cached function that a file imports by name."""
    try:
        tree = _tree(path)
    except (SyntaxError, ValueError):  # it will be reported when the claim is tested
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            cached = {name for file in _module_files(node.module) for name in _cached(file)}
            for alias in node.names:
                if alias.name in cached:
                    return alias.name
    return None


@functools.cache
def _cached(path: Path) -> set[str]:
    return {
        node.name
        for node in _tree(path).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(of) == "functools.cache" for of in node.decorator_list)
    }


def imported_files(path: Path) -> set[Path]:
    """Return the files of this repository that a file imports, however indirectly, and itself."""
    found, waiting = set(), [path]
    while waiting:
        at = waiting.pop()
        if at not in found:
            found.add(at)
            waiting += _imported(at)
    return found


@functools.cache
def _imported(path: Path) -> list[Path]:
    return [file for name in _names(_tree(path)) for file in _module_files(name)]


def _names(tree: ast.Module) -> Iterator[str]:
    """Yield dotted names that may be modules, of absolute imports alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_files(name: str) -> list[Path]:
    """Return the files that importing a module of this repository runs."""
    *packages, last = name.split(".")
    parents = [_ROOT.joinpath(*packages[: n + 1]) for n in range(len(packages))]
    whole = _ROOT.joinpath(*packages, last)
    files = [folder / "__init__.py" for folder in (*parents, whole)] + [whole.with_suffix(".py")]
    return [file for file in files if file.is_file()]


@functools.cache
def _content(path: Path, views: bool) -> str:
    """Return the code of a file without comments, layout and its docstring."""
    body = _tree(path).body
    kept = [
        node
        for node in body
        if views or not (isinstance(node, ast.FunctionDef) and node.name in _VIEWS)
    ]
    return "\n".join(ast.dump(node) for node in kept if not _is_string(node))


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
