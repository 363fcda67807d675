"""What experiments found, for people and programs: tables, a figure, one HTML page, JSON."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from pydantic_core import to_json
from rich.console import Console

from cluster.experiments.comparison import Choice, Result, Table, summarise
from cluster.reports.html_page import write_html
from cluster.reports.plots import new_figure
from cluster.reports.score_table import text_table
from cluster.run.directory import RunDirectory, write_whole

_COLUMNS = 3  # of panels in the figure
_MOST_PANELS = 9
_COLOURS = {"base": "#b8bcc2", "sft": "#8fb58a", "ppo": "#d9a15b", "gflownet": "#1f5a96"}
_COLOURS |= {"gflownet_em": "#0b2c4d"}
_OTHER = "#7d6aa5"
_CHOSEN = ("method", "chosen", "by", "out of")
Rows = list[list[str]]


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
        self._file = self.folder.path / self.name
        self._chosen_on = (
            "what was chosen, on the validation split"
            if self.held_out
            else f"what was chosen, by the same figures as above: {self.task} holds no data out"
        )
        self._notes = list(dict.fromkeys(result.note for result in self.results if result.note))

    def leave(self, plots: Sequence[Path] = ()) -> None:
        """Write the JSON, the tables as Markdown, the figure, and the page with it and `plots`."""
        figure = draw(self.metrics, self._file.with_suffix(".png"))
        title = f"{self.task}: {', '.join(self.metrics)}"
        metrics, compute = ["", *self.metrics], ["", *self._compute]
        write_html(
            self.folder.report_file,
            "comparison.html",
            title=title,
            measured=(metrics, _rows(self.metrics)),
            notes=self._notes,
            chosen_on=self._chosen_on,
            chosen=(_CHOSEN, self._chosen()) if self.choices else (),
            plots=[*plots, figure],
            spent=(compute, _rows(self._compute)),
            runs="\n".join(result.run for result in self.results),
        )
        parts = [f"# {title}", _markdown(metrics, _rows(self.metrics)), *self._notes]
        if self.choices:
            parts += [f"{self._chosen_on}:", _markdown(_CHOSEN, self._chosen())]
        parts.append(_markdown(compute, _rows(self._compute)))
        write_whole(self._file.with_suffix(".md"), "\n\n".join(parts) + "\n")
        write_whole(self._file.with_suffix(".json"), self._as_json())

    def show(self, title: str, *, as_json: bool, console: Console) -> None:
        """Print the tables, or one JSON object."""
        if as_json:
            print(self._as_json())
            return
        console.print(text_table(["", *self.metrics], _rows(self.metrics), title))
        for note in self._notes:
            console.print(note, soft_wrap=True, markup=False)
        if self.choices:
            console.print(text_table(_CHOSEN, self._chosen(), self._chosen_on))
        console.print(text_table(["", *self._compute], _rows(self._compute), "what it took"))
        console.print(f"page: {self.folder.report_file}", soft_wrap=True, markup=False)

    def _chosen(self) -> Rows:
        """What was chosen for each method, by which figure, out of which trials."""
        rows = []
        for choice in self.choices:
            trials = (
                f"{trial}: {'none' if trial.figure is None else f'{trial.figure:.4g}'}"
                for trial in choice.trials
            )
            by = f"{choice.metric} ({choice.better} is better)"
            rows.append([choice.method, str(choice.chosen), by, "; ".join(trials)])
        return rows

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


def _rows(table: Table) -> Rows:
    """A row for each figure of any method, in order of appearance: its name and their values."""
    methods = table.values()
    return [[name, *(str(method.get(name, "")) for method in methods)] for name in _figures(table)]


def _figures(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.values() for name in row))


def _markdown(header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
            color=[_COLOURS.get(method, _OTHER) for method in found],
            capsize=3,
        )
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
    figure.savefig(path)
    return path
