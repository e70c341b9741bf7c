"""Both ends of what is supported, where the interpreters exist: `nox`."""

import nox

nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "lint"]


@nox.session(python=["3.11", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the tests with the versions in constraints.txt: jax 0.10 on 3.11, 0.12 on 3.13."""
    session.install("-e", ".[test]", "-c", "constraints.txt")
    session.run("python", "-m", "pytest", "-n", "auto", "-m", "", *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    session.install("-e", ".[test,lint]", "-c", "constraints.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")


@nox.session(python="3.11")
def reference(session: nox.Session) -> None:
    """Compare with other people's models: PyTorch, transformers, Keras, PyG and joeynmt."""
    session.install("-e", ".[reference]", "-c", "constraints.txt")
    session.install("--no-deps", "joeynmt")  # its dependencies contradict ours
    session.run("python", "-m", "pytest", "-m", "", "tests/reference", *session.posargs)


@nox.session(python="3.11")
def aot(session: nox.Session) -> None:
    """Compile kernels for TPUs and a GPU that need not be there."""
    session.install("-e", ".[aot,aot-gpu]", "-c", "constraints.txt")
    session.env["JAX_PLATFORMS"] = "cpu"
    session.run("python", "-m", "pytest", "-m", "aot", *session.posargs)
