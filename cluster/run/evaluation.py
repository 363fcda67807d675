"""Measuring the policy of a run: what its configuration says to its task."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.config.schema import RunConfig
from cluster.run.directory import merged_folder
from lm.shared import SharedModel
from reward.probe import check_base
from reward.terms import build_terms
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation
from tasks.registry import build_task


def evaluate(
    config: RunConfig,
    *,
    adapter: Path | None,
    step: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    language_model: SharedModel | None = None,
) -> Evaluation:
    """Measure the base LM (None) or an adapter on it; of an M-step the LM that it left.

    Where labels are given, an M-step's policy goes on to give the reasons, and the LM that the step
    left answers behind them.

    Args:
        step: optimizer steps that the policy has taken; None: all.
        progress: is told what is being done.
        language_model: of the configuration, where this process has it; None: it is loaded.

    Raises FileNotFoundError, AdapterMismatch, DataError, NothingToMeasure.
    """
    started_s = time.monotonic()
    progress("loading the language model")
    context = evaluation_context(config, adapter, step=step, progress=progress)
    if language_model is not None:
        context = replace(context, language_model=language_model)
    if adapter is not None and config.learner.traits.trains_model:
        context = replace(
            context,
            adapter=Path(str(config.em.policy)),
            answering=SharedModel(config.changed({"lm.model": str(merged_folder(adapter))}).lm),
        )
    task = build_task(config.task, context.language_model.tokenizer, seed=config.seed)
    found = task.evaluate(context)
    seconds = time.monotonic() - started_s
    return found.model_copy(update={"step": step, "seconds": seconds})


def evaluation_context(
    config: RunConfig,
    adapter: Path | None,
    *,
    step: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> EvaluationContext:
    """What the task of a run is given to measure the base LM (None) or an adapter with."""
    traits = config.learner.traits
    return EvaluationContext(
        language_model=SharedModel(config.lm, check_base),
        adapter=adapter,
        imitates=adapter is not None and traits.imitates and not traits.trains_model,
        settings=config.evaluation,
        posterior=config.posterior,
        temperature=config.learner.trained_temperature(step),
        seed=config.seed,
        token_budget=config.reward.token_budget,
        terms=build_terms(config.reward, config.lm),
        progress=progress,
    )
