"""A policy to be measured: the base LM, or the base with an adapter folded in."""

from collections.abc import Sequence
from pathlib import Path

from actors.policy import SamplingPolicy
from cluster.config.schema import RunConfig
from lm.adapter import read_adapter
from lm.embedding import SentenceEmbedder
from lm.model import LanguageModel
from tasks.sentences.metrics import Likeness
from tasks.task import Task


def evaluated_policy(
    config: RunConfig,
    base: LanguageModel,
    task: Task,
    adapter: Path | None,
    *,
    seed: int | None = None,
) -> SamplingPolicy:
    """Samples as `config.evaluation` says; `base` becomes its own.

    Args:
        seed: of its draws; None: the evaluation's.

    Raises FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
    """
    policy = SamplingPolicy(
        base,
        task.actions,
        task.tool,
        lora=config.lora,
        max_rows=config.evaluation.max_rows,
        seed=config.evaluation.seed if seed is None else seed,
    )
    if adapter is not None:
        policy.load(read_adapter(adapter, base.fingerprint))
    return policy


def likeness_of(embedder: str | None) -> Likeness | None:
    """Cosine of sentence vectors; None where no encoder is named. Raises ModelNotFound."""
    if embedder is None:
        return None
    encoder = SentenceEmbedder(embedder)

    def likeness(ones: Sequence[str], others: Sequence[str]) -> list[float]:
        cosine_N = (encoder.embed(ones) * encoder.embed(others)).sum(dim=-1)
        return [float(cosine) for cosine in cosine_N]

    return likeness
