"""What a measurement of a policy found; each figure says how it is called, written and compared."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from lm.config import Frozen


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that there are; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class Metric(Frozen):
    """One figure, with all that is needed to show it."""

    label: str = Field(description="For people, with its unit.")
    value: float | None = Field(description="None: none of these items could be measured.")
    format: str = Field(".3f", description="Python's format specification of the value.")
    better: Literal["higher", "lower"] | None
    """None: it says nothing of how good the policy is, and is not compared."""
    items: int = Field(description="Questions, prompts, ... that the value is the mean over.")
    samples: int | None = Field(None, description="Completions drawn for each of them.")
    looked_at: int | None = None
    """Items, where not each of them could be measured."""
    group: str = Field("", description="Of the items, such as a number of operands.")
    shown: Literal["chart", "table", "comparison"] = "table"
    """In chart and table of a run, its table, or comparisons alone."""

    @classmethod
    def mean(
        cls,
        label: str,
        values: Iterable[float | None],
        format: str = ".3f",
        better: Literal["higher", "lower"] = "higher",
        **more: Any,
    ) -> "Metric":
        """Of the values that there are; None where there are none."""
        return cls(label=label, value=mean_of(values), format=format, better=better, **more)

    @property
    def sample_size(self) -> str:
        """Such as '40', '3 of 4' or '300 x 10'."""
        parts = (("", self.items), (" of ", self.looked_at), (" x ", self.samples))
        return "".join(f"{sign}{number}" for sign, number in parts if number is not None)


class Example(Frozen):
    """One question with a rationale that was sampled for it."""

    question: str
    rationale: str
    answer: str
    truth: str
    right: bool | None  # None: nobody can tell


class Evaluation(Frozen):
    """Everything that was measured of one policy."""

    task: str
    temperature: float = Field(description="T of the posterior that the policy is held against.")
    step: int | None = None
    """Optimizer steps of the policy; 0: the base LM; None: unknown."""
    seconds: float | None = Field(None, description="That measuring took.")
    groups: str = Field("", description="What groups are numbers of, such as 'operands'.")
    metrics: dict[str, Metric] = Field(description="By a short name that scripts can use.")
    note: str = Field("", description="What must be known beside the figures.")
    examples: tuple[Example, ...] = ()

    def value(self, name: str) -> float | None:
        """Of a metric; None where it was not measured."""
        metric = self.metrics.get(name)
        return None if metric is None else metric.value

    def label(self, name: str) -> str:
        """Of a metric, with its group: '3 operands, all items'."""
        metric = self.metrics[name]
        group = " ".join(part for part in (metric.group, self.groups) if part)
        return f"{group}, {metric.label}" if metric.group else metric.label

    def with_metrics(self, more: Mapping[str, Metric]) -> "Evaluation":
        """The same, with further metrics behind those there are."""
        return self.model_copy(update={"metrics": {**self.metrics, **more}})


class Scores(Frozen):
    """`scores.json`: what was measured of a run before training and after it, as far as it was."""

    before: Evaluation | None = None
    after: Evaluation | None = None
