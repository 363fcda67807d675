"""Measuring how far policies are from the posterior: exactly where it can be enumerated, by bounds
of log Z where it cannot."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.prompts import Prompt
from cluster.config.schema import RunConfig
from cluster.evaluation.posterior_records import (
    Assessment,
    Picture,
    PolicyReport,
    PromptReport,
    StringShare,
)
from lm.adapter import load_adapter
from lm.model import CausalLM, load_base, vocab_size
from lm.next_action import NextLogits, Prefix
from lm.sampling import Completion, Request, Sampler
from tasks.log_reward import log_reward_of
from tasks.posterior.bounds import Bounds, UnusableWeights, bound_log_z
from tasks.posterior.ceiling import ceiling_of
from tasks.posterior.divergence import coverage, divergence
from tasks.posterior.enumeration import PrefixTree
from tasks.posterior.exact import ExactPosterior, exact_posterior
from tasks.posterior.rejection import PosteriorSamples, posterior_samples
from tasks.posterior.weights import draw_log_weights, log_rewards, log_weights
from tasks.registry import build_task
from tasks.task import Task

# Completions told of a prompt, of those sampled too often and of those sampled too rarely.
_TOLD = 5


def assess(config: RunConfig, *, adapter: Path | None) -> Assessment:
    """Compare the base LM (None), or an adapter with the base beside it, with the posterior.

    T is that of the end of training. See `tasks.posterior.divergence` for what the figures mean
    where something is left out.

    Raises:
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        DataError: a data file of the task is missing or malformed.
    """
    base = load_base(config.lm)
    task = build_task(config.task, base.tokenizer)
    models: list[CausalLM] = [base.model]
    if adapter is not None:
        models.insert(0, load_adapter(load_base(config.lm), adapter))
    distinct: dict[tuple[Prefix, Prefix], Prompt] = {}
    for prompt in task.prompts:
        distinct.setdefault((prompt.prompt, prompt.answer), prompt)
    assessor = _Assessor(config, task, models, base.tokenizer.decode)
    chosen = itertools.islice(distinct.values(), config.posterior.prompts)
    found = [assessor.assess(prompt) for prompt in chosen]
    return Assessment(
        task=task.name,
        temperature=config.learner.reward_temperature.end,
        prompts=tuple(report for report, _ in found),
        pictures=tuple(picture for _, picture in found),
    )


class _Drawer:
    """Draws from a model that does not change."""

    def __init__(self, sampler: Sampler, generator: torch.Generator) -> None:
        self._sampler = sampler
        self._generator = generator

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        return self._sampler.sample(requests, self._generator)


class _Assessor:
    """One task and its policies, of which the last is the frozen base LM."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        models: Sequence[CausalLM],
        decode: Callable[[list[int]], str],
    ) -> None:
        self._config = config
        self._settings = config.posterior
        self._temperature = config.learner.reward_temperature.end
        self._task = task
        self._models = models
        self._base = models[-1]
        self._next = [NextLogits(model) for model in models]
        self._decode = decode
        self._log_reward = log_reward_of(task, self._base, config.reward.token_budget)

    def assess(self, prompt: Prompt) -> tuple[PromptReport, Picture | None]:
        """Everything about one prompt; a picture only where it can be enumerated."""
        posterior = self._enumerate(prompt)
        enumerable = posterior.within(self._settings.tolerance, policy=0)
        samples = self._posterior_samples(prompt)
        reports = [
            self._report(number, prompt, posterior, enumerable, samples)
            for number in range(len(self._models))
        ]
        report = PromptReport(
            **dict(reports[0]),
            prompt=prompt.text,
            answer=self._decode(list(prompt.answer)),
            enumerable=enumerable,
            nodes=posterior.support.nodes,
            completions=len(posterior.support.completions),
            left_out_p=posterior.left_out_p,
            log_z=posterior.log_z if enumerable else None,
            texts=0 if samples is None else samples.draws,
            log_z_of_texts=None if samples is None else samples.log_z,
            base=reports[-1],
        )
        return report, self._picture(posterior) if enumerable else None

    def _enumerate(self, prompt: Prompt) -> ExactPosterior:
        size = vocab_size(self._base)
        task, temperature = self._task, self._temperature
        ceiling = ceiling_of(task, prompt, self._next[-1], vocab_size=size, temperature=temperature)
        tree = PrefixTree(
            prompt.prompt,
            task.actions,
            task.tool,
            self._next,
            ceiling,
            vocab_size=size,
            max_nodes=self._settings.max_nodes,
        )

        def log_weight(completions: Sequence[Prefix]) -> NDArray[np.float64]:
            log_r = log_rewards(completions, prompt, task.reward_query, self._log_reward)
            return log_r / temperature

        return exact_posterior(tree, log_weight, tolerance=self._settings.tolerance)

    def _posterior_samples(self, prompt: Prompt) -> PosteriorSamples | None:
        """None where the LM's own texts are no samples of the posterior, or none are wanted."""
        query, draws = self._task.reward_query, self._settings.draws
        if query.kind == "function" or self._temperature != 1 or not draws:
            return None
        return posterior_samples(
            self._base,
            prompt,
            actions=self._task.actions,
            tool=self._task.tool,
            query=query,
            draws=draws,
            max_rows=self._config.evaluation.max_rows,
            generator=self._generator(),
        )

    def _report(
        self,
        number: int,
        prompt: Prompt,
        posterior: ExactPosterior,
        enumerable: bool,
        samples: PosteriorSamples | None,
    ) -> PolicyReport:
        log_weight_N = self._draw_log_weights(number, prompt)
        log_z_estimate = float(np.logaddexp.reduce(log_weight_N)) - math.log(len(log_weight_N))
        exact = {}
        if enumerable:
            exact = self._exact(number, posterior)
            exact["log_z_error"] = abs(log_z_estimate - posterior.log_z)
        return PolicyReport(
            **exact,
            left_out_q=float(posterior.support.left_out_q_K[number]),
            log_z_estimate=log_z_estimate,
            bounds=self._bounds(number, prompt, log_weight_N, samples),
        )

    def _exact(self, number: int, posterior: ExactPosterior) -> dict[str, Any]:
        """What only an enumeration can say of a policy."""
        log_q_N = posterior.support.log_q_KN[number]
        distance = divergence(
            log_q_N,
            posterior.log_p_N,
            left_out_q=float(posterior.support.left_out_q_K[number]),
            left_out_p=posterior.left_out_p,
        )
        q_N, p_N = np.exp(log_q_N), np.exp(posterior.log_p_N)
        order_N = np.argsort(p_N - q_N)
        over, under = order_N[:_TOLD], order_N[::-1][:_TOLD]
        return {
            **asdict(distance),
            "coverage": coverage(log_q_N, posterior.log_p_N),
            "valid": float(q_N[self._valid(posterior)].sum()),
            "oversampled": self._told(posterior, over[q_N[over] > p_N[over]], q_N, p_N),
            "undersampled": self._told(posterior, under[p_N[under] > q_N[under]], q_N, p_N),
        }

    def _told(
        self,
        posterior: ExactPosterior,
        chosen: NDArray[np.intp],
        q_N: NDArray[np.float64],
        p_N: NDArray[np.float64],
    ) -> tuple[StringShare, ...]:
        completions = posterior.support.completions
        return tuple(
            StringShare(
                text=self._decode(list(completions[at])), p=float(p_N[at]), q=float(q_N[at])
            )
            for at in chosen
        )

    def _draw_log_weights(self, number: int, prompt: Prompt) -> NDArray[np.float64]:
        task = self._task
        sampler = Sampler(
            self._models[number],
            task.actions,
            task.tool,
            max_rows=self._config.evaluation.max_rows,
        )
        return draw_log_weights(
            _Drawer(sampler, self._generator()),
            prompt,
            count=self._settings.samples,
            query=task.reward_query,
            log_reward=self._log_reward,
            temperature=self._temperature,
        )

    def _bounds(
        self,
        number: int,
        prompt: Prompt,
        log_weight_N: NDArray[np.float64],
        samples: PosteriorSamples | None,
    ) -> Bounds | None:
        """None where a completion that the policy draws has no reward at all."""
        found: dict[str, Any] = {}
        if samples is not None and samples.completions:
            found["posterior_draw_M"] = samples.draw_M
            found["log_posterior_weight_M"] = log_weights(
                self._models[number],
                self._task.actions,
                prompt,
                samples.completions,
                query=self._task.reward_query,
                log_reward=self._log_reward,
                temperature=self._temperature,
            )
        rng = np.random.default_rng([self._config.seed, number])
        try:
            return bound_log_z(log_weight_N, sizes=self._settings.iwae_sizes, rng=rng, **found)
        except UnusableWeights:
            return None

    def _picture(self, posterior: ExactPosterior) -> Picture:
        texts = [self._decode(list(z)) for z in posterior.support.completions]
        return Picture(posterior=posterior, texts=texts, valid_N=self._valid(posterior))

    def _valid(self, posterior: ExactPosterior) -> NDArray[np.bool_]:
        valid = (self._task.valid(z) for z in posterior.support.completions)
        return np.fromiter(valid, dtype=np.bool_)

    def _generator(self) -> torch.Generator:
        generator = torch.Generator(device=self._base.device)
        return generator.manual_seed(self._config.seed)
