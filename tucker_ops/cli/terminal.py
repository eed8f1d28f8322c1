"""What commands show on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


class case_progress:
    """A progress bar on standard error; entered, it gives a function of (label, done, total)."""

    def __init__(self, title: str):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._title = title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[label]}"),
            console=(out := console(stderr=True)),
            disable=not out.is_terminal,
        )

    def __enter__(self):
        self._bar.start()
        task = self._bar.add_task(self._title, total=None, label="")
        return lambda label, done, total: self._bar.update(task, completed=done, total=total, label=label)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
