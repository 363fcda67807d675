"""What `amortize posterior` says in a terminal, of 80 columns too: prompt by prompt."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cluster.reports.score_table import Grid
from tasks.posterior.bounds import Bounds, Interval
from tasks.posterior.records import Assessment, PolicyReport, PromptReport, StringShare

_EXACT = {
    **{"TV": ("tv", ".4f"), "KL(q‖p)": ("kl_q_p", ".4f"), "KL(p‖q)": ("kl_p_q", ".4f")},
    **{"JSD": ("jsd", ".4f"), "log Z error": ("log_z_error", ".4f"), "valid": ("valid", ".3%")},
}
_BOUNDS = "bounds of log Z, with 95 % intervals"


def show(assessment: Assessment, *, policy: str, beside_base: bool, console: Console) -> None:
    """Of each prompt exact figures, bounds, and the strings that are most amiss; then means."""
    console.print(
        f"[bold]{escape(assessment.task)}[/bold]: {escape(policy)} against the posterior "
        f"∝ R^(1/T), T = {assessment.temperature:g} (where training ends); nats"
    )
    header = ("", policy, "base")[: 2 + beside_base]
    for prompt in assessment.prompts:
        reports = (prompt, prompt.base)[: 1 + beside_base]
        console.print(Text(f"\n{prompt.title}", style="bold"))
        console.print(_log_z(prompt))
        if prompt.enumerable:
            left_out = (f"{max(one.left_out_q, prompt.left_out_p):.1e}" for one in reports)
            exact = [["left out", *left_out], *_exact([dict(one) for one in reports])]
            console.print(Grid("exact, by enumeration", header, exact).drawn())
        console.print(Grid(_BOUNDS, header, list(_bounds(reports))).drawn())
        if prompt.oversampled or prompt.undersampled:
            console.print(_strings(prompt))
    shares = f"{assessment.enumerated} of {len(assessment.prompts)} prompts"
    means = (assessment.policy, assessment.base)[: 1 + beside_base]
    console.print()
    title = f"means of the {shares} that could be enumerated"
    grid = Grid(title, header, list(_exact(means)))
    console.print(grid.drawn() if assessment.enumerated else title)


def _log_z(prompt: PromptReport) -> str:
    sizes = f"{prompt.completions} completions, {prompt.nodes} prefixes"
    exact = "not enumerable" if prompt.log_z is None else f"log Z {prompt.log_z:.4f}"
    texts = _interval(prompt.log_z_of_texts)
    if prompt.texts and not texts:
        texts = f"none of {prompt.texts} fits"
    return escape(f"{exact}: {sizes}" + (f"; log Z from texts: {texts}" if texts else ""))


def _exact(reports: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """A row for each figure, with a column for each policy."""
    for label, (name, reads) in _EXACT.items():
        values = (report[name] for report in reports)
        yield [label, *("" if value is None else f"{value:{reads}}" for value in values)]


def _bounds(reports: Sequence[PolicyReport]) -> Iterator[Sequence[str]]:
    """The same of bounds."""
    sizes = sorted({k for report in reports if report.bounds for k in report.bounds.iwae})
    lower = ("ELBO", *(f"IWAE {k}" for k in sizes), "log Z from q")
    labels = (*lower, "EUBO", "KL(q‖p) within", "ESS share")
    yield from zip(labels, *(_bound_cells(one.bounds, sizes) for one in reports), strict=True)


def _bound_cells(bounds: Bounds | None, sizes: Sequence[int]) -> Iterator[str]:
    if bounds is None:
        yield "none: a sampled completion has no reward"
        yield from [""] * (len(sizes) + 4)
        return
    yield _interval(bounds.elbo)
    yield from (_interval(bounds.iwae.get(k)) for k in sizes)
    yield _interval(bounds.log_z)
    yield _interval(bounds.eubo) or f"{bounds.posterior_samples} samples: too few"
    most = bounds.kl_q_p_at_most
    upper = "?" if most is None else f"{most.high:.3f}"
    yield f"{max(bounds.kl_q_p_at_least.low, 0.0):.3f} – {upper}"
    yield _interval(bounds.posterior_ess_share or bounds.ess_share)


def _strings(prompt: PromptReport) -> Table:
    table = Table("of the policy", "completion", "q", "p", box=None)
    table.title, table.title_justify = "completions most amiss", "left"
    for label, shares in (
        ("sampled too often", prompt.oversampled),
        ("too rarely", prompt.undersampled),
    ):
        for number, share in enumerate(shares):
            table.add_row("" if number else label, *_share(share))
    return table


def _share(one: StringShare) -> tuple[str, str, str]:
    return escape(repr(one.text)), f"{one.q:.2e}", f"{one.p:.2e}"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
