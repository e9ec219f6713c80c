"""Progress and complaints on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any


def tell(text: str) -> None:
    """A line on stderr; control characters are shown, never sent to the terminal."""
    print("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), file=sys.stderr, flush=True)


class Console:
    """Progress on stderr: one live line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Terminal(stderr=True)
        self.live = self.console.is_terminal
        columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
        self.bar = Progress(
            TextColumn(columns[0]), BarColumn(), TextColumn(columns[2]), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False), console=self.console, transient=True,
        )  # fmt: skip
        self.task: Any = None
        self._reset()

    def _reset(self) -> None:
        self.started = self.last_call = time.monotonic()
        self.last, self.total, self.before = 0.0, 0, 0

    def stage(self, name: str, skipped: bool) -> None:
        self._close()
        self._reset()
        if skipped:
            tell(f"{name}: done before")
            return
        tell(f"{name} …")
        if self.live:
            self.task = self.bar.add_task(name, total=None, text="")
            self.bar.start()

    def say(self, text: str) -> None:
        tell(text)

    def progress(self, done: int, total: int, text: str = "") -> None:
        if self.live and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if total != self.total:  # another part of the same stage begins
            self.total, self.started, self.before = total, self.last_call, done - 1
        self.last_call = now
        if done == total or now - self.last >= 10:
            self.last = now
            left = (now - self.started) / max(1, done - self.before) * (total - done)
            tell(f"  {done}/{total} {text} (about {left:.0f} s left)")

    def _close(self) -> None:
        if self.task is not None:
            self.bar.stop()
            self.bar.remove_task(self.task)
            self.task = None

    def __del__(self) -> None:
        self._close()
