"""A progress bar on standard error, if that is a terminal."""

from __future__ import annotations

import sys


class ProgressBar:
    """A bar that goes when its block ends."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> ProgressBar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        )
        self._progress.start()
        self._task = self._progress.add_task(self._label, total=1.0, words="")
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def tell(self, part: float, words: str) -> None:
        """Show which part is done, and words to it."""
        self._progress.update(self._task, completed=part, words=words)
