"""What a comparison with the posterior found, prompt by prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from cluster.evaluation.measurement import Distance
from tasks.posterior.bounds import Bounds, Interval
from tasks.posterior.exact import ExactPosterior


class StringShare(BaseModel):
    """A completion with its probabilities."""

    model_config = ConfigDict(frozen=True)

    text: str
    p: float = Field(description="Under the posterior.")
    q: float = Field(description="Under the policy.")


class PolicyReport(BaseModel):
    """One policy on one prompt. Exact figures are None where the prompt cannot be enumerated."""

    model_config = ConfigDict(frozen=True)

    tv: float | None = None
    kl_q_p: float | None = None
    kl_p_q: float | None = None
    jsd: float | None = None
    log_z_error: float | None = Field(
        default=None, description="Of `log_z_estimate`, absolute, nats."
    )
    valid: float | None = Field(default=None, description="Mass on completions the task means.")
    coverage: float | None = Field(
        default=None, description="Posterior mass that the policy covers: see tasks.posterior."
    )
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
    log_z_of_texts: Interval | None = Field(
        description="Log of the samples per text, nats; None where there are none."
    )
    base: PolicyReport

    @property
    def title(self) -> str:
        """X and Y."""
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
    def policy(self) -> Distance:
        """Means over the prompts that were enumerated; the ELBO's is over all."""
        return self._overall(self.prompts)

    @property
    def base(self) -> Distance:
        """The same of the base LM."""
        return self._overall([prompt.base for prompt in self.prompts])

    @property
    def left_out(self) -> float:
        """Largest share of the policy or of a posterior that was not enumerated."""
        return max(max(prompt.left_out_q, prompt.left_out_p) for prompt in self.prompts)

    def _overall(self, reports: Sequence[PolicyReport]) -> Distance:
        pairs = zip(self.prompts, reports, strict=True)
        enumerated = [report for prompt, report in pairs if prompt.enumerable]
        means = {name: mean(getattr(one, name) for one in enumerated) for name in FIGURES}
        return Distance(
            prompts=len(self.prompts),
            enumerated=len(enumerated),
            elbo=mean(one.bounds.elbo.value for one in reports if one.bounds is not None),
            **means,
        )


FIGURES = ("tv", "kl_q_p", "kl_p_q", "jsd", "log_z_error", "valid", "coverage")


def mean(values: Iterator[float | None]) -> float | None:
    """Of the values that there are; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mean_bounds(bounds: Sequence[Bounds | None]) -> dict[str, float | dict[int, float] | None]:
    """Means of the estimates over prompts, by name; intervals stay with the prompts."""
    known = [one for one in bounds if one is not None]
    sizes = sorted({k for one in known for k in one.iwae})
    means: dict[str, float | dict[int, float] | None] = {
        field.name: mean(_value(getattr(one, field.name)) for one in known)
        for field in fields(Bounds)
        if field.name not in ("iwae", "samples", "posterior_samples")
    }
    means["iwae"] = {k: value for k in sizes if (value := mean(_of_size(known, k))) is not None}
    return means


def _of_size(bounds: Sequence[Bounds], k: int) -> Iterator[float | None]:
    return (_value(one.iwae.get(k)) for one in bounds)


def _value(interval: Interval | None) -> float | None:
    return None if interval is None else interval.value


def as_json(assessment: Assessment, *, run: str | None) -> str:
    """One JSON object; what is not a finite number is null."""
    figures = {"prompts", "enumerated", *FIGURES}
    content = {
        "task": assessment.task,
        "run": run,
        "temperature": assessment.temperature,
        **assessment.policy.model_dump(include=set(FIGURES)),
        "left_out": assessment.left_out,
        "base": assessment.base.model_dump(include=figures),
        "bounds": mean_bounds([prompt.bounds for prompt in assessment.prompts]),
        "prompts": assessment.prompts,
    }
    return to_json(content, inf_nan_mode="null").decode()
