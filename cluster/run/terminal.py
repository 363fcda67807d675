"""What a person sees while a run goes on: a live panel, or a plain line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.run.directory import RunState
from cluster.run.display import ELAPSED_S, duration, known, parts

PLAIN_EVERY_S = 5.0
_REFRESH_PER_S = 4.0


class Terminal:
    """Shows states of a run, and events as they come.

    On a terminal the panel is redrawn in place. Anywhere else, a pipe or a log file, a line is
    written whenever the phase changes, and every `plain_every_s` seconds if it has changed.
    """

    def __init__(
        self, *, console: Console | None = None, plain_every_s: float = PLAIN_EVERY_S
    ) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._plain_every_s = plain_every_s
        self._last_plain_s = float("-inf")
        self._phase = self._line = ""

    def __enter__(self) -> "Terminal":
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, refresh_per_second=_REFRESH_PER_S, transient=True
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def event(self, text: str) -> None:
        """Say something that stays, such as 'actor 2 died, replaced'."""
        clock = time.strftime("%H:%M:%S")
        self._console.print(Text(f"{clock} {text}"), soft_wrap=True)

    def show(self, state: RunState) -> None:
        if self._live is not None:
            self._live.update(panel(state))
            return
        now, line = time.monotonic(), plain_line(state)
        due = line != self._line and now - self._last_plain_s >= self._plain_every_s
        if state.phase != self._phase or due:
            self._phase, self._line, self._last_plain_s = state.phase, line, now
            self._console.print(Text(line), soft_wrap=True)


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, and for how long, until it is over; told to what this gives.

    Where there is no terminal it is a line whenever it changes, but no more than one in
    PLAIN_EVERY_S.
    """
    began_s, last_s = time.monotonic(), float("-inf")

    def plain(stage: str) -> None:
        nonlocal last_s
        if (now := time.monotonic()) - last_s >= PLAIN_EVERY_S:
            last_s = now
            console.print(Text(f"{duration(now - began_s)}: {stage}"), soft_wrap=True)

    if not console.is_terminal:
        yield plain
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        shown = progress.add_task("")
        yield lambda stage: progress.update(shown, description=escape(stage))


def plain_line(state: RunState) -> str:
    pieces = [f"{state.phase} step {state.step}/{state.steps} version {state.version}"]
    pieces += [f"{label} {value}" for label, value in known(state)]
    return " | ".join(filter(None, [*pieces, parts(state)]))


def panel(state: RunState) -> Group:
    """The state as a bar and a grid of figures."""
    head = Text.assemble(
        (state.run, "bold"),
        f"  {state.phase}  step {state.step} of {state.steps}  version {state.version}  ",
        (parts(state), "green" if state.actual == state.desired else "yellow"),
    )
    if ELAPSED_S in state.metrics:
        head.append(f"  {duration(state.metrics[ELAPSED_S])}")
    shown = list(known(state))
    grid = Table.grid(*[""] * len(shown), padding=(0, 3))
    grid.add_row(*(Text(label, style="dim") for label, _ in shown))
    grid.add_row(*(Text(value, style="bold") for _, value in shown))
    bar = ProgressBar(total=max(state.steps, 1), completed=state.step, width=60)
    return Group(head, bar, grid)
