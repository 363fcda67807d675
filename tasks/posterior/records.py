"""What a comparison with the posterior found, prompt by prompt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic_core import to_json

from lm.config import Frozen
from tasks.evaluation.evaluation import Evaluation, Metric, mean_of
from tasks.posterior.bounds import Bounds, Interval
from tasks.posterior.enumeration import ExactPosterior


class StringShare(Frozen):
    """A completion with its probabilities."""

    text: str
    p: float = Field(description="Under the posterior.")
    q: float = Field(description="Under the policy.")


class PolicyReport(Frozen):
    """One policy on one prompt. Exact figures are None where the prompt cannot be enumerated."""

    tv: float | None = None
    kl_q_p: float | None = None
    kl_p_q: float | None = None
    jsd: float | None = None
    log_z_error: float | None = Field(None, description="Of `log_z_estimate`, absolute, nats.")
    valid: float | None = Field(None, description="Mass on completions the task means.")
    coverage: float | None = None
    """Posterior mass that the policy covers: see tasks.posterior."""
    left_out_q: float = Field(description="Mass that was not enumerated.")
    log_z_estimate: float = Field(description="Log of the mean weight of the policy's samples.")
    bounds: Bounds | None = Field(description="None where a sampled completion has no reward.")
    oversampled: tuple[StringShare, ...] = ()
    undersampled: tuple[StringShare, ...] = ()


class PromptReport(PolicyReport):
    """One prompt: the policy's figures, and the base LM's beside them."""

    prompt: str
    answer: str
    enumerable: bool
    nodes: int = Field(description="Prefixes visited.")
    completions: int = Field(description="Enumerated.")
    left_out_p: float = Field(description="Share of the posterior not enumerated, at most.")
    log_z: float | None = Field(description="Exact, nats.")
    texts: int = Field(description="Written freely by the base LM, to find posterior samples in.")
    log_z_of_texts: Interval | None
    """Log of the samples per text, nats; None where there are none."""
    base: PolicyReport

    @property
    def title(self) -> str:
        return " → ".join(text for text in (self.prompt, self.answer.strip()) if text)


@dataclass(frozen=True, eq=False, kw_only=True)
class Picture:
    """What a prompt's plot is drawn from."""

    posterior: ExactPosterior  # of the policy and the base LM, or of the base LM alone
    texts: Sequence[str]  # of its N completions
    valid_N: NDArray[np.bool_]  # whether the task means them


@dataclass(frozen=True, eq=False, kw_only=True)
class Assessment:
    """All prompts of one comparison."""

    task: str
    temperature: float  # T: R enters as R^(1/T)
    prompts: tuple[PromptReport, ...]
    pictures: tuple[Picture | None, ...]  # None where a prompt cannot be enumerated

    @property
    def enumerated(self) -> int:
        """Prompts for which there are exact figures."""
        return sum(prompt.enumerable for prompt in self.prompts)

    @property
    def policy(self) -> dict[str, float | None]:
        """Means of FIGURES over the prompts that were enumerated, and of the ELBO over all."""
        return self._means(self.prompts)

    @property
    def base(self) -> dict[str, float | None]:
        """The same of the base LM."""
        return self._means([prompt.base for prompt in self.prompts])

    @property
    def left_out(self) -> float:
        """Largest share of the policy or of a posterior that was not enumerated."""
        return max(max(prompt.left_out_q, prompt.left_out_p) for prompt in self.prompts)

    def evaluation(self) -> Evaluation:
        """The policy's means as metrics; none of what could not be measured."""
        exact, means = self.enumerated, self.policy
        metrics = {}
        for name, (label, read_as, better) in _METRICS.items():
            if (value := means[name]) is None:
                continue
            overall = name == "elbo"
            metrics[f"elbo_T{self.temperature:g}" if overall else name] = Metric(
                label=label,
                value=value,
                format=read_as,
                better=better,
                items=len(self.prompts) if overall else exact,
                looked_at=None if overall else len(self.prompts),
            )
        return Evaluation(task=self.task, temperature=self.temperature, metrics=metrics)

    def _means(self, reports: Sequence[PolicyReport]) -> dict[str, float | None]:
        pairs = zip(self.prompts, reports, strict=True)
        enumerated = [report for prompt, report in pairs if prompt.enumerable]
        means = {name: mean_of(getattr(one, name) for one in enumerated) for name in FIGURES}
        known = (report.bounds for report in reports if report.bounds is not None)
        return {**means, "elbo": mean_of(bounds.elbo.value for bounds in known)}


FIGURES = ("tv", "kl_q_p", "kl_p_q", "jsd", "log_z_error", "valid", "coverage")
# Name -> label, format, direction; in the order of tables.
_METRICS: dict[str, tuple[str, str, Literal["higher", "lower"]]] = {
    "tv": ("total variation to the posterior", ".4f", "lower"),
    "kl_q_p": ("KL(policy || posterior), nats", ".5f", "lower"),
    "kl_p_q": ("KL(posterior || policy), nats", ".5f", "lower"),
    "jsd": ("Jensen-Shannon divergence, nats", ".5f", "lower"),
    "log_z_error": ("error of the policy's log Z, nats", ".4f", "lower"),
    "valid": ("valid completions", ".3%", "higher"),
    "coverage": ("posterior mass that the policy covers", ".3%", "higher"),
    "elbo": ("ELBO of log Z, all prompts, nats", ".3f", "higher"),
}


def mean_bounds(bounds: Sequence[Bounds | None]) -> dict[str, float | dict[int, float] | None]:
    """Means of the estimates over prompts, by name; intervals stay with the prompts."""
    known = [one for one in bounds if one is not None]

    def mean(intervals: Iterable[Interval | None]) -> float | None:
        return mean_of(one.value for one in intervals if one is not None)

    means: dict[str, float | dict[int, float] | None] = {
        field.name: mean(getattr(one, field.name) for one in known)
        for field in fields(Bounds)
        if field.name not in ("iwae", "samples", "posterior_samples")
    }
    by_size = {k: mean(one.iwae.get(k) for one in known) for one in known for k in sorted(one.iwae)}
    means["iwae"] = {k: value for k, value in sorted(by_size.items()) if value is not None}
    return means


def as_json(assessment: Assessment, *, run: str | None) -> str:
    """One JSON object; what is not a finite number is null."""
    content = {
        "task": assessment.task,
        "run": run,
        "temperature": assessment.temperature,
        **{name: assessment.policy[name] for name in FIGURES},
        "left_out": assessment.left_out,
        "base": {
            "prompts": len(assessment.prompts),
            "enumerated": assessment.enumerated,
            **{name: assessment.base[name] for name in FIGURES},
        },
        "bounds": mean_bounds([prompt.bounds for prompt in assessment.prompts]),
        "prompts": assessment.prompts,
    }
    return to_json(content, inf_nan_mode="null").decode()
