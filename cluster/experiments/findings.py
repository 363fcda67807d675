"""What experiments found, for people and programs: tables, a figure, one HTML page, JSON."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from pydantic_core import to_json
from rich.console import Console

from cluster.experiments.comparison import Choice, Result, Table, summarise
from cluster.reports.html_page import write_html
from cluster.reports.plots import new_figure
from cluster.reports.score_table import Grid
from cluster.run.directory import RunDirectory, write_whole

_COLUMNS = 3  # of panels in the figure
_MOST_PANELS = 9
_MOST_LEVEL = 4  # names of bars that stand beside each other unturned
# Family of methods -> colour and marker.
_STYLES = {
    "base": ("#7b828b", "o"),
    "sft": ("#5c9a55", "s"),
    "ppo": ("#d98a2b", "P"),
    "gflownet": ("#1f5a96", "D"),
    "gflownet_em": ("#0b2c4d", "D"),
    "sample": ("#7b828b", "x"),
    "tempered": ("#b06a9b", "^"),
    "nucleus": ("#4aa3a2", "v"),
    "greedy": ("#333333", "_"),
    "beam": ("#c2493d", "<"),
    "diverse_beam": ("#8a6d3b", ">"),
}


@dataclass
class Findings:
    """The results of an experiment."""

    folder: RunDirectory
    name: str  # of its files, `NAME.png`, `NAME.json` and `NAME.md`
    task: str
    results: Sequence[Result]
    choices: Sequence[Choice] = ()  # what was chosen for methods before they were measured
    _: KW_ONLY
    held_out: bool = True  # on data of their own, the validation split

    def __post_init__(self) -> None:
        self.metrics: Table = summarise(self.results, "metrics")
        self._compute = summarise(self.results, "compute")
        self._notes = list(dict.fromkeys(result.note for result in self.results if result.note))
        chosen = [_chosen(self.choices, self.task, self.held_out)] if self.choices else []
        measured = _grid("What was measured", self.metrics)
        self._grids = [measured, *chosen, _grid("What it took", self._compute)]

    def leave(self, plots: Sequence[Path] = ()) -> None:
        """Write the JSON, the tables as Markdown, the figure, and the page with it and `plots`."""
        file = self.folder.path / self.name
        figure = draw(self.metrics, file.with_suffix(".png"))
        title = f"{self.task}: {', '.join(self.metrics)}"
        write_html(
            self.folder.report_file,
            "comparison.html",
            title=title,
            grids=self._grids,
            notes=self._notes,
            plots=[*plots, figure],
            runs="\n".join(result.run for result in self.results),
        )
        tables = [f"{grid.title}:\n\n{grid.markdown()}" for grid in self._grids]
        text = "\n\n".join([f"# {title}", *self._notes, *tables])
        write_whole(file.with_suffix(".md"), f"{text}\n")
        write_whole(file.with_suffix(".json"), self._as_json())

    def show(self, title: str, *, as_json: bool, console: Console) -> None:
        """Print the tables, or one JSON object."""
        if as_json:
            print(self._as_json())
            return
        for line in (title, *self._notes):
            console.print(line, soft_wrap=True, markup=False)
        for grid in self._grids:
            console.print(grid.drawn())
        console.print(f"page: {self.folder.report_file}", soft_wrap=True, markup=False)

    def _as_json(self) -> str:
        content = {
            "task": self.task,
            "table": self.metrics,
            "notes": self._notes,
            "search": {choice.method: choice for choice in self.choices},
            "compute": self._compute,
            "runs": list(self.results),
        }
        return to_json(content, inf_nan_mode="null").decode()


def _grid(title: str, table: Table) -> Grid:
    """A row for each figure of any method, in order of appearance: its name and their values."""
    methods = table.values()
    rows = [[name, *(str(method.get(name, "")) for method in methods)] for name in _figures(table)]
    return Grid(title, ["", *table], rows)


def _chosen(choices: Sequence[Choice], task: str, held_out: bool) -> Grid:
    """What was chosen for each method, by which figure, out of which trials."""
    on = "on the validation split"
    if not held_out:
        on = f"by the same figures as above: {task} holds no data out"
    rows = []
    for choice in choices:
        trials = (
            f"{trial}: {'none' if trial.figure is None else f'{trial.figure:.4g}'}"
            for trial in choice.trials
        )
        by = f"{choice.metric} ({choice.better} is better)"
        rows.append([choice.method, str(choice.chosen), by, "; ".join(trials)])
    return Grid(f"What was chosen, {on}", ["method", "chosen", "by", "out of"], rows)


def _figures(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.values() for name in row))


def style_of(family: str) -> tuple[str, str]:
    """Colour and marker of a family of methods."""
    return _STYLES.get(family, ("#7d6aa5", "o"))


def draw(table: Table, path: Path) -> Path:
    """A panel for each of the first figures, a bar with its deviation for each method."""
    names = _figures(table)[:_MOST_PANELS]
    height = 2.5 * -(-len(names) // _COLUMNS)
    figure, panels = new_figure(3.2 * _COLUMNS, height, panels=len(names), columns=_COLUMNS)
    for name, axes in zip(names, panels, strict=True):
        found = {method: row[name] for method, row in table.items() if name in row}
        axes.bar(
            list(found),
            [one.mean for one in found.values()],
            yerr=[one.std or 0.0 for one in found.values()],
            color=[style_of(method)[0] for method in found],
            capsize=3,
        )
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        if len(found) > _MOST_LEVEL:
            axes.tick_params("x", rotation=30)
    figure.savefig(path)
    return path
