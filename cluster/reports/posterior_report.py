"""What `amortize posterior` says in a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.posterior.bounds import Bounds, Interval
from tasks.posterior.records import Assessment, PolicyReport, PromptReport, StringShare

_EXACT = ("left out", "TV", "KL(q‖p)", "KL(p‖q)", "JSD", "log Z error", "valid")


def show(assessment: Assessment, *, policy: str, beside_base: bool, console: Console) -> None:
    """Tables of exact figures, of bounds, and of the strings that are most amiss."""
    console.print(
        f"[bold]{escape(assessment.task)}[/bold]: {escape(policy)} against the posterior "
        f"∝ R^(1/T), T = {assessment.temperature:g} (where training ends); nats"
    )
    console.print(_exact(assessment, policy, beside_base))
    console.print(_bounds(assessment.prompts, policy, beside_base))
    told = _strings(assessment.prompts)
    if told.row_count:
        console.print(told)


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None)


def _exact(assessment: Assessment, policy: str, beside_base: bool) -> Table:
    head = ("prompt", "prefixes", "completions", "log Z", "policy")
    table = _table("exact, by enumeration", *head, *_EXACT)
    for prompt in assessment.prompts:
        log_z = _number(prompt.log_z, ".4f") if prompt.enumerable else "not enumerable"
        cells = [escape(prompt.title), str(prompt.nodes), str(prompt.completions), log_z]
        for name, report in _policies(prompt, policy, beside_base):
            left_out = max(report.left_out_q, prompt.left_out_p)
            table.add_row(*cells, name, f"{left_out:.1e}", *_figures(dict(report)))
            cells = [""] * len(cells)
    shares = f"{assessment.enumerated} of {len(assessment.prompts)}"
    means = _figures(assessment.policy)
    table.add_row("mean", shares, "", "", escape(policy), "", *means, style="bold")
    if beside_base:
        means = _figures(assessment.base)
        table.add_row("", "", "", "", "base", "", *means, style="bold")
    return table


def _figures(figures: Mapping[str, Any]) -> Iterator[str]:
    for name in ("tv", "kl_q_p", "kl_p_q", "jsd", "log_z_error"):
        yield _number(figures[name], ".4f")
    yield _number(figures["valid"], ".3%")


def _bounds(prompts: Sequence[PromptReport], policy: str, beside_base: bool) -> Table:
    reports = [report for prompt in prompts for report in (prompt, prompt.base)]
    sizes = sorted({k for report in reports if report.bounds for k in report.bounds.iwae})
    lower = ("ELBO", *(f"IWAE {k}" for k in sizes), "log Z from q")
    upper = ("EUBO", "KL(q‖p) within", "ESS share")
    head = ("prompt", "log Z from texts", "policy")
    table = _table("bounds of log Z, with 95 % intervals", *head, *lower, *upper)
    for prompt in prompts:
        none_fits = prompt.texts and prompt.log_z_of_texts is None
        of_texts = f"none of {prompt.texts} fits" if none_fits else _interval(prompt.log_z_of_texts)
        cells = [escape(prompt.title), of_texts]
        for name, report in _policies(prompt, policy, beside_base):
            table.add_row(*cells, name, *_bound_cells(report.bounds, sizes))
            cells = [""] * len(cells)
    return table


def _bound_cells(bounds: Bounds | None, sizes: Sequence[int]) -> Iterator[str]:
    if bounds is None:
        yield "no bounds: a sampled completion has no reward"
        return
    yield _interval(bounds.elbo)
    yield from (_interval(bounds.iwae.get(k)) for k in sizes)
    yield _interval(bounds.log_z)
    yield _interval(bounds.eubo) or f"{bounds.posterior_samples} samples: too few"
    most = bounds.kl_q_p_at_most
    upper = "?" if most is None else f"{most.high:.3f}"
    yield f"{max(bounds.kl_q_p_at_least.low, 0.0):.3f} – {upper}"
    yield _interval(bounds.posterior_ess_share or bounds.ess_share)


def _strings(prompts: Sequence[PromptReport]) -> Table:
    columns = ("prompt", "sampled too often", "q", "p", "too rarely", "q", "p")
    table = _table("completions most amiss, of the policy", *columns)
    for prompt in prompts:
        label = escape(prompt.title)
        for often, rarely in zip_longest(prompt.oversampled, prompt.undersampled):
            table.add_row(label, *_share(often), *_share(rarely))
            label = ""
    return table


def _share(one: StringShare | None) -> tuple[str, str, str]:
    return ("", "", "") if one is None else (escape(repr(one.text)), f"{one.q:.2e}", f"{one.p:.2e}")


def _policies(
    prompt: PromptReport, policy: str, beside_base: bool
) -> Iterator[tuple[str, PolicyReport]]:
    yield escape(policy), prompt
    if beside_base:
        yield "base", prompt.base


def _number(value: float | None, reads: str) -> str:
    return "" if value is None else f"{value:{reads}}"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
