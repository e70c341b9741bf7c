"""How far training is: a bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Meter:
    """Shows step, loss, exact match, tokens per second and the time left of one training."""

    def __init__(self, console: Console, name: str, done: int, total: int):
        self.console, self.name, self.first, self.total = console, name, done, total
        self.start = time.perf_counter()
        self.exact = "-"
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=total, completed=done, text="compiling")

    def __enter__(self) -> Meter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self) -> None:
        """Start the clock, when compilation is over."""
        self.start = time.perf_counter()

    def trained(self, step: int, loss: float, speed: float) -> None:
        """Show where training stands."""
        text = f"loss {loss:.3f}  exact {self.exact}  {speed / 1000:.0f}k tokens/s"
        self.bar.update(self.task, completed=step, text=text)

    def evaluated(self, step: int, loss: float, exact: float, speed: float) -> None:
        """Show what validation says; elsewhere than in a terminal this prints a line."""
        self.exact = f"{exact:.1f}%"
        if self.console.is_terminal:
            return
        passed = time.perf_counter() - self.start
        left = passed / max(1, step - self.first) * (self.total - step)
        self.console.print(
            f"{self.name}: step {step}/{self.total}, valid loss {loss:.3f}, exact match "
            f"{exact:.1f}%, {speed / 1000:.0f}k tokens/s, {left:.0f} s left",
            soft_wrap=True,
        )
