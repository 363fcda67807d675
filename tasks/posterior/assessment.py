"""Measuring how far policies are from the posterior: exactly where it can be enumerated, by bounds
of log Z where it cannot."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.prompts import Prompt
from lm.actions import ActionSpace
from lm.adapter import adapter_off
from lm.model import CausalLM, vocab_size
from lm.next_action import NextLogits, Prefix
from lm.sampling import Completion, Request
from reward.request import ScoreItem
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation
from tasks.posterior.bounds import Bounds, UnusableWeights, bound_log_z
from tasks.posterior.ceiling import ceiling_of
from tasks.posterior.divergence import coverage, divergence
from tasks.posterior.enumeration import PrefixTree
from tasks.posterior.exact import ExactPosterior, exact_posterior
from tasks.posterior.records import Assessment, Picture, PolicyReport, PromptReport, StringShare
from tasks.posterior.rejection import PosteriorSamples, posterior_samples
from tasks.posterior.weights import draw_log_weights, log_reward_of, log_rewards, log_weights
from tasks.task import Task

# Completions told of a prompt, of those sampled too often and of those sampled too rarely.
_TOLD = 5


def evaluate_posterior(task: Task, context: EvaluationContext) -> Evaluation:
    """The policy's distance to the posterior; of an M-step that of the LM that it left."""
    if context.answering is not None:
        context = replace(context, language_model=context.answering, adapter=None, answering=None)
    return assess(task, context).evaluation()


def assess(task: Task, context: EvaluationContext) -> Assessment:
    """Compare the policy, with the base LM beside it, with the posterior of `context.temperature`.

    See `tasks.posterior.divergence` for what the figures mean where something is left out.

    Raises:
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
    """
    shared, adapter = context.language_model, context.adapter
    distinct: dict[tuple[Prefix, Prefix], Prompt] = {}
    for prompt in task.prompts:
        distinct.setdefault((prompt.prompt, prompt.answer), prompt)
    chosen = list(itertools.islice(distinct.values(), context.posterior.prompts))
    found = []
    with nullcontext(shared.base.model) if adapter is None else shared.beside(adapter) as model:
        policies = [_Policy(model, nullcontext)]
        if adapter is not None:
            policies.append(_Policy(model, partial(adapter_off, model)))
        assessor = _Assessor(task, context, policies, shared.tokenizer.decode)
        for number, prompt in enumerate(chosen, start=1):
            context.progress(f"prompt {number} of {len(chosen)} against the posterior")
            found.append(assessor.assess(prompt))
    return Assessment(
        task=task.name,
        temperature=context.temperature,
        prompts=tuple(report for report, _ in found),
        pictures=tuple(picture for _, picture in found),
    )


class _Policy(NextLogits):
    """A model as one of the policies that it can be.

    Args:
        active: inside, the model computes what this policy does.
    """

    def __init__(self, model: CausalLM, active: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(model)
        self.model = model
        self.active = active

    def action_log_probs(
        self, actions: ActionSpace, prefixes: Sequence[Prefix], may_stop: Sequence[bool]
    ) -> Tensor:
        """See NextLogits."""
        with self.active():
            return super().action_log_probs(actions, prefixes, may_stop)

    def token_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """See NextLogits."""
        with self.active():
            return super().token_log_probs(prefixes)


class _Assessor:
    """One task and its policies, of which the last is the frozen base LM."""

    def __init__(
        self,
        task: Task,
        context: EvaluationContext,
        policies: Sequence[_Policy],
        decode: Callable[[list[int]], str],
    ) -> None:
        self._task = task
        self._context = context
        self._settings = context.posterior
        self._temperature = context.temperature
        self._policies = policies
        self._base = policies[-1]
        self._decode = decode
        self._score = log_reward_of(task, self._base.model, context.token_budget)

    def _log_reward(self, items: Sequence[ScoreItem]) -> list[NDArray[np.float32]]:
        with self._base.active():
            return self._score(items)

    def assess(self, prompt: Prompt) -> tuple[PromptReport, Picture | None]:
        """Everything about one prompt; a picture only where it can be enumerated."""
        posterior = self._enumerate(prompt)
        enumerable = posterior.within(self._settings.tolerance, policy=0)
        samples = self._posterior_samples(prompt)
        reports = [
            self._report(number, prompt, posterior, enumerable, samples)
            for number in range(len(self._policies))
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
        size = vocab_size(self._base.model)
        task, temperature = self._task, self._temperature
        ceiling = ceiling_of(task, prompt, self._base, vocab_size=size, temperature=temperature)
        tree = PrefixTree(
            prompt.prompt,
            task.actions,
            task.tool,
            self._policies,
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
        model = self._base.model
        with self._base.active():
            return posterior_samples(
                model,
                prompt,
                actions=self._task.actions,
                tool=self._task.tool,
                query=query,
                draws=draws,
                max_rows=self._context.settings.max_rows,
                generator=torch.Generator(device=model.device).manual_seed(self._context.seed),
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
        task, policy = self._task, self._policies[number]
        draw = self._context.drawing(policy.model, task.actions, task.tool, seed=self._context.seed)

        def policy_draw(requests: Sequence[Request]) -> list[Completion]:
            with policy.active():
                return draw(requests)

        return draw_log_weights(
            policy_draw,
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
            policy = self._policies[number]
            with policy.active():
                found["log_posterior_weight_M"] = log_weights(
                    policy.model,
                    self._task.actions,
                    prompt,
                    samples.completions,
                    query=self._task.reward_query,
                    log_reward=self._log_reward,
                    temperature=self._temperature,
                )
        rng = np.random.default_rng([self._context.seed, number])
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
