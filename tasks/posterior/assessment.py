"""Measuring how far policies are from the posterior: exactly where it can be enumerated, by bounds
of log Z where it cannot."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.prompts import Prompt
from lm.adapter import adapter_off
from lm.model import vocab_size
from lm.next_action import NextLogits, Prefix
from lm.sampling import Completion, Request
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation
from tasks.posterior.bounds import UnusableWeights, bound_log_z
from tasks.posterior.ceiling import ceiling_of
from tasks.posterior.divergence import coverage, divergence
from tasks.posterior.enumeration import ExactPosterior, LogWeight, PrefixTree, exact_posterior
from tasks.posterior.records import Assessment, Picture, PolicyReport, PromptReport, StringShare
from tasks.posterior.rejection import PosteriorSamples, posterior_samples
from tasks.posterior.weights import (
    LogReward,
    draw_log_weights,
    log_reward_of,
    log_rewards,
    log_weights,
)
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

    `tasks.posterior.divergence` says what the figures mean where something is left out.

    Raises FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
    """
    shared, adapter = context.language_model, context.adapter
    distinct: dict[tuple[Prefix, Prefix], Prompt] = {}
    for prompt in task.prompts:
        distinct.setdefault((prompt.prompt, prompt.answer), prompt)
    chosen = list(itertools.islice(distinct.values(), context.posterior.prompts))
    found = []
    with nullcontext(shared.base.model) if adapter is None else shared.beside(adapter) as model:
        policies = [NextLogits(model)]
        if adapter is not None:
            policies.append(NextLogits(model, partial(adapter_off, model)))
        assessor = _Assessor(
            task=task,
            context=context,
            policies=policies,
            decode=shared.tokenizer.decode,
            score=log_reward_of(task, policies[-1].model, context.token_budget, context.terms),
        )
        for number, prompt in enumerate(chosen, start=1):
            found.append(assessor.assess(prompt, f"prompt {number} of {len(chosen)}"))
    return Assessment(
        task=task.name,
        temperature=context.temperature,
        prompts=tuple(report for report, _ in found),
        pictures=tuple(picture for _, picture in found),
    )


@dataclass(frozen=True, kw_only=True)
class _Assessor:
    """One task and its policies, of which the last is the frozen base LM."""

    task: Task
    context: EvaluationContext
    policies: Sequence[NextLogits]
    decode: Callable[[list[int]], str]
    score: LogReward

    @property
    def base(self) -> NextLogits:
        return self.policies[-1]

    def assess(self, prompt: Prompt, place: str) -> tuple[PromptReport, Picture | None]:
        """Everything about one prompt; a picture only where it can be enumerated."""
        self.context.progress(f"{place}: walking through its completions")
        scored = 0

        def log_weight(completions: Sequence[Prefix]) -> NDArray[np.float64]:
            nonlocal scored
            scored += len(completions)
            self.context.progress(f"{place}: {scored} completions")
            with self.base.active():
                log_r = log_rewards(completions, prompt, self.task.reward_query, self.score)
            return log_r / self.context.temperature

        posterior = self.enumerate(prompt, log_weight)
        enumerable = posterior.within(self.context.posterior.tolerance, policy=0)
        samples = self.posterior_samples(prompt)
        reports = [
            self.report(number, prompt, log_weight, posterior if enumerable else None, samples)
            | {"left_out_q": float(left_out_q)}
            for number, left_out_q in enumerate(posterior.support.left_out_q_K)
        ]
        report = PromptReport(
            **reports[0],
            prompt=prompt.text,
            answer=self.decode(list(prompt.answer)),
            enumerable=enumerable,
            nodes=posterior.support.nodes,
            completions=len(posterior.support.completions),
            left_out_p=posterior.left_out_p,
            log_z=posterior.log_z if enumerable else None,
            texts=0 if samples is None else samples.draws,
            log_z_of_texts=None if samples is None else samples.log_z,
            base=PolicyReport(**reports[-1]),
        )
        if not enumerable:
            return report, None
        texts = [self.decode(list(z)) for z in posterior.support.completions]
        return report, Picture(posterior=posterior, texts=texts, valid_N=self.valid(posterior))

    def enumerate(self, prompt: Prompt, log_weight: LogWeight) -> ExactPosterior:
        task, context, size = self.task, self.context, vocab_size(self.base.model)
        temperature, terms = context.temperature, context.terms
        ceiling = ceiling_of(
            task, prompt, self.base, vocab_size=size, temperature=temperature, terms=terms
        )
        tree = PrefixTree(
            prompt.prompt,
            task.actions,
            task.tool,
            self.policies,
            ceiling,
            vocab_size=size,
            max_nodes=context.posterior.max_nodes,
        )
        return exact_posterior(tree, log_weight, tolerance=context.posterior.tolerance)

    def posterior_samples(self, prompt: Prompt) -> PosteriorSamples | None:
        """None where the LM's own texts are no samples of the posterior, or none are wanted."""
        query, draws = self.task.reward_query, self.context.posterior.draws
        free = query.kind == "function" or bool(query.rival_penalty)
        if free or self.context.temperature != 1 or not draws:
            return None
        if self.context.terms is not None:
            return None
        model = self.base.model
        with self.base.active():
            return posterior_samples(
                model,
                prompt,
                actions=self.task.actions,
                tool=self.task.tool,
                query=query,
                draws=draws,
                max_rows=self.context.settings.max_rows,
                generator=torch.Generator(device=model.device).manual_seed(self.context.seed),
            )

    def report(
        self,
        number: int,
        prompt: Prompt,
        log_weight: LogWeight,
        posterior: ExactPosterior | None,
        samples: PosteriorSamples | None,
    ) -> dict[str, Any]:
        """Fields of a PolicyReport; without a posterior those that need no enumeration."""
        policy, context, actions = self.policies[number], self.context, self.task.actions
        draw = context.drawing(policy.model, actions, self.task.tool, seed=context.seed)

        def policy_draw(requests: Sequence[Request]) -> list[Completion]:
            with policy.active():
                return draw(requests)

        log_weight_N = draw_log_weights(policy_draw, prompt, context.posterior.samples, log_weight)
        more: dict[str, Any] = {}
        if samples is not None and samples.completions:
            more["posterior_draw_M"] = samples.draw_M
            with policy.active():
                more["log_posterior_weight_M"] = log_weights(
                    policy.model, actions, prompt, samples.completions, log_weight
                )
        rng = np.random.default_rng([context.seed, number])
        bounds = None  # where a completion that the policy draws has no reward at all
        with suppress(UnusableWeights):
            sizes = context.posterior.iwae_sizes
            bounds = bound_log_z(log_weight_N, sizes=sizes, rng=rng, **more)
        log_z = float(np.logaddexp.reduce(log_weight_N)) - math.log(len(log_weight_N))
        found = {"log_z_estimate": log_z, "bounds": bounds}
        if posterior is None:
            return found
        return found | self.exact(number, posterior) | {"log_z_error": abs(log_z - posterior.log_z)}

    def exact(self, number: int, posterior: ExactPosterior) -> dict[str, Any]:
        """What only an enumeration can say of a policy."""
        log_q_N, log_p_N = posterior.support.log_q_KN[number], posterior.log_p_N
        distance = divergence(
            log_q_N,
            log_p_N,
            left_out_q=float(posterior.support.left_out_q_K[number]),
            left_out_p=posterior.left_out_p,
        )
        q_N, p_N = np.exp(log_q_N), np.exp(log_p_N)
        order_N = np.argsort(p_N - q_N)
        over, under = order_N[:_TOLD], order_N[::-1][:_TOLD]

        def told(chosen: NDArray[np.intp]) -> tuple[StringShare, ...]:
            texts = {at: list(posterior.support.completions[at]) for at in chosen}
            return tuple(
                StringShare(text=self.decode(text), p=float(p_N[at]), q=float(q_N[at]))
                for at, text in texts.items()
            )

        return {
            **asdict(distance),
            "coverage": coverage(log_q_N, log_p_N),
            "valid": float(q_N[self.valid(posterior)].sum()),
            "oversampled": told(over[q_N[over] > p_N[over]]),
            "undersampled": told(under[p_N[under] > q_N[under]]),
        }

    def valid(self, posterior: ExactPosterior) -> NDArray[np.bool_]:
        """[N] whether the task means each completion."""
        valid = (self.task.valid(z) for z in posterior.support.completions)
        return np.fromiter(valid, dtype=np.bool_)
