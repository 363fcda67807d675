"""What a measurement of a policy found, and a run's measurements before training and after it."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Example(BaseModel):
    """One question with a rationale that was sampled for it."""

    model_config = ConfigDict(frozen=True)

    group: str
    question: str
    rationale: str
    answer: str
    truth: str
    right: bool


class Spread(BaseModel):
    """What the policy itself draws for a question, at temperature 1; means over questions."""

    model_config = ConfigDict(frozen=True)

    items: int
    right: float = Field(description="Share of rationales that lead to the right answer.")
    distinct_right: float = Field(description="Different right rationales of one question.")
    edit_distance: float | None = Field(
        description="Between two rationales of one question, as a share of the longer one."
    )


class Votes(BaseModel):
    """Answers to test questions, by group of questions (number of operands); shares in [0, 1]."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["votes"] = "votes"
    accuracy: dict[str, float] = Field(description="Right by vote, of all items.")
    unseen: dict[str, float | None] = Field(description="... of those not in the training data.")
    items: dict[str, int]
    unseen_items: dict[str, int]
    unparsable: dict[str, float] = Field(description="Share of sampled answers that are none.")
    distinct_right: dict[str, float] = Field(description="Different right rationales, mean.")
    spread: dict[str, Spread] = Field(default={}, description="On some items of each group.")
    examples: tuple[Example, ...] = ()


class Distance(BaseModel):
    """How far the policy is from the exact posterior: means over the prompts enumerated."""

    model_config = ConfigDict(frozen=True)
    examples: ClassVar[tuple[Example, ...]] = ()

    kind: Literal["distance"] = "distance"
    prompts: int = Field(description="Looked at.")
    enumerated: int = Field(description="Of them; the figures below are None where none was.")
    tv: float | None = Field(description="Total variation, in [0, 1].")
    kl_q_p: float | None = Field(description="KL(policy || posterior), nats.")
    kl_p_q: float | None = Field(description="KL(posterior || policy), nats.")
    jsd: float | None = Field(description="Jensen-Shannon divergence, nats.")
    log_z_error: float | None = Field(description="Of the policy's own estimate, nats.")
    valid: float | None = Field(description="Share of the policy's mass on valid completions.")
    elbo: float | None = Field(
        default=None,
        description="Lower bound of log Z, by samples of every prompt, nats: log Z less "
        "KL(policy || posterior).",
    )
    coverage: float | None = Field(
        default=None,
        description="Posterior mass of the completions that the policy draws at least a tenth as "
        "often as it should.",
    )


class _Sentences(BaseModel):
    """What is measured of sentences whatever they are for."""

    model_config = ConfigDict(frozen=True)

    seen: int = Field(default=0, description="Of the test prompts, those trained on too.")
    self_bleu4: float | None = Field(
        default=None,
        description="How far the sentences of a prompt repeat one another, in [0, 1]; None of one.",
    )
    elbo: float | None = Field(
        default=None,
        description="Of log Z of the test prompts, by as many sentences drawn of the policy at "
        "temperature 1, nats: log Z less KL(policy || posterior). None where they are decoded "
        "otherwise.",
    )
    ess_share: float | None = Field(
        default=None,
        description="Effective share of these sentences as importance samples of the posterior.",
    )


class Infills(_Sentences):
    """Missing sentences of test stories: means over all that were written."""

    kind: Literal["infills"] = "infills"
    stories: int
    samples: int = Field(description="Sentences written for each.")
    bleu4: float = Field(description="Against the true sentence, in [0, 1].")
    gleu4: float = Field(description="Against the true sentence, in [0, 1].")
    exact: float = Field(description="Share that is the true sentence.")
    similarity: float | None = Field(description="Cosine of embeddings; None without an encoder.")
    log_reward: float = Field(description="log p_LM(Z Y | X), nats.")
    distinct: float = Field(description="Different sentences of a story.")
    diversity: float | None = Field(
        default=None, description="Mean distance of two sentences of a story, as of Continuations."
    )
    examples: tuple[Example, ...] = ()


class Continuations(_Sentences):
    """Next sentences of test prompts: means over the prompts."""

    examples: ClassVar[tuple[Example, ...]] = ()

    kind: Literal["continuations"] = "continuations"
    prompts: int
    samples: int = Field(description="Sentences written for each.")
    max_log_likelihood: float = Field(description="log p_LM(Z stop | X) of the likeliest, nats.")
    mean_log_likelihood: float = Field(description="... of all, nats.")
    diversity: float = Field(description="Mean distance of two sentences of a prompt.")
    diversity_by: Literal["words", "embeddings"] = Field(
        description="Edit distance in words, or 1 - cosine."
    )


class Labels(BaseModel):
    """Labels of test reviews; shares in [0, 1]."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["labels"] = "labels"
    items: int
    samples: int = Field(description="Reasons drawn for each; 1 where none is.")
    answered_by: Literal["reasons", "label"] = Field(description="What `accuracy` is of.")
    accuracy: float = Field(description="Right by all reasons of a review together.")
    single: float | None = Field(description="... by one reason; None where none is drawn.")
    bare: float = Field(description="... by the likelier label without a reason.")
    distinct: float | None = Field(description="Different reasons of a review, mean.")
    examples: tuple[Example, ...] = ()


Measurement = Annotated[
    Votes | Distance | Infills | Continuations | Labels, Field(discriminator="kind")
]


class Scores(BaseModel):
    """`scores.json`: a run's measurements, as far as they are made."""

    model_config = ConfigDict(frozen=True)

    before: Measurement | None = None
    after: Measurement | None = None
