"""What `amortize posterior` says in a terminal."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.posterior.bounds import Bounds, Interval
from tasks.posterior.records import FIGURES, Assessment, PolicyReport, PromptReport, StringShare

_EXACT = ("left out", "TV", "KL(q‖p)", "KL(p‖q)", "JSD", "log Z error", "valid")


def show(assessment: Assessment, *, policy: str, beside_base: bool, console: Console) -> None:
    """Tables of exact figures, of bounds, and of the strings that are most amiss."""
    console.print(
        f"[bold]{escape(assessment.task)}[/bold]: {escape(policy)} against the posterior "
        f"∝ R^(1/T), T = {assessment.temperature:g} (where training ends); nats"
    )
    console.print(_exact(assessment, policy, beside_base))
    console.print(_bounds(assessment, policy, beside_base))
    told = _strings(assessment.prompts)
    if told.row_count:
        console.print(told)


def _exact(assessment: Assessment, policy: str, beside_base: bool) -> Table:
    table = Table("prompt", "prefixes", "completions", "log Z", "policy", *_EXACT, box=None)
    table.title, table.title_justify = "exact, by enumeration", "left"
    for prompt in assessment.prompts:
        head = [
            escape(prompt.title),
            str(prompt.nodes),
            str(prompt.completions),
            _number(prompt.log_z, ".4f") if prompt.enumerable else "not enumerable",
        ]
        for name, report in _policies(prompt, policy, beside_base):
            left_out = max(report.left_out_q, prompt.left_out_p)
            table.add_row(*head, name, f"{left_out:.1e}", *_figures(_named(report)))
            head = [""] * len(head)
    overall = [("mean", assessment.policy, policy)]
    if beside_base:
        overall.append(("", assessment.base, "base"))
    for label, means, name in overall:
        shares = f"{assessment.enumerated} of {len(assessment.prompts)}" if label else ""
        table.add_row(label, shares, "", "", escape(name), "", *_figures(means), style="bold")
    return table


def _named(report: PolicyReport) -> dict[str, float | None]:
    return {name: getattr(report, name) for name in FIGURES}


def _figures(figures: Mapping[str, float | None]) -> Iterator[str]:
    for name in ("tv", "kl_q_p", "kl_p_q", "jsd", "log_z_error"):
        yield _number(figures[name], ".4f")
    yield _number(figures["valid"], ".3%")


def _bounds(assessment: Assessment, policy: str, beside_base: bool) -> Table:
    sizes = sorted(
        {
            k
            for prompt in assessment.prompts
            for report in (prompt, prompt.base)
            for k in (report.bounds.iwae if report.bounds is not None else ())
        }
    )
    lower = ("ELBO", *(f"IWAE {k}" for k in sizes), "log Z from q")
    upper = ("EUBO", "KL(q‖p) within", "ESS share")
    table = Table("prompt", "log Z from texts", "policy", *lower, *upper, box=None)
    table.title = "bounds of log Z, with 95 % intervals"
    table.title_justify = "left"
    for prompt in assessment.prompts:
        head = [escape(prompt.title), _of_texts(prompt)]
        for name, report in _policies(prompt, policy, beside_base):
            table.add_row(*head, name, *_bound_cells(report.bounds, sizes))
            head = [""] * len(head)
    return table


def _of_texts(prompt: PromptReport) -> str:
    """What the base LM's own texts say of log Z."""
    if prompt.texts and prompt.log_z_of_texts is None:
        return f"none of {prompt.texts} fits"
    return _interval(prompt.log_z_of_texts)


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
    seen = bounds.posterior_ess_share
    yield _interval(bounds.ess_share if seen is None else seen)


def _strings(prompts: Sequence[PromptReport]) -> Table:
    table = Table("prompt", "sampled too often", "q", "p", "too rarely", "q", "p", box=None)
    table.title = "completions most amiss, of the policy"
    table.title_justify = "left"
    for prompt in prompts:
        label = escape(prompt.title)
        for at in range(max(len(prompt.oversampled), len(prompt.undersampled))):
            table.add_row(label, *_share(prompt.oversampled, at), *_share(prompt.undersampled, at))
            label = ""
    return table


def _share(shares: Sequence[StringShare], at: int) -> tuple[str, str, str]:
    if at >= len(shares):
        return "", "", ""
    one = shares[at]
    return escape(repr(one.text)), f"{one.q:.2e}", f"{one.p:.2e}"


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
