"""A bar for work of known length, on a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def in_notebook() -> bool:
    """Whether this process shows its output in a notebook."""
    from rich.console import Console

    return Console().is_jupyter


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar while the block runs; it disappears at the end.

    Args:
        what: Name of the work, in front of the bar.
        total: How often the work moves on.

    Yields:
        A function to call whenever the work has moved on.
    """
    if in_notebook():  # rich asks for ipywidgets there
        if find_spec("ipywidgets") is not None:
            from tqdm.auto import tqdm
        else:
            from tqdm import tqdm  # type: ignore[assignment]

        with tqdm(desc=what, total=total, leave=False) as bar:

            def advance() -> None:
                bar.update()

            yield advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Into a file or a pipe, rich would write an empty line for the bar that it removes.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total)
        yield lambda: shown.advance(task)
