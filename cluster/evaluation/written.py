"""Sentences that a policy writes to be measured, by one of the ways of decoding."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from actors.policy import SamplingPolicy
from actors.prompts import Prompt
from cluster.config.schema import RunConfig
from cluster.evaluation.evaluated_policy import evaluated_policy
from lm.decoding import BeamSearch
from lm.model import load_base
from lm.sampling import Request
from tasks.evaluation.few_shot import worked_examples
from tasks.log_reward import log_reward_of
from tasks.posterior.weights import log_rewards
from tasks.sentences.continuation import Continuation
from tasks.sentences.infilling import Infilling

_Tokens = tuple[int, ...]


class Sentence(NamedTuple):
    """What was written for a prompt; nats."""

    text: str
    log_reward: float  # under the frozen LM, untempered
    log_q: float  # under the policy at temperature 1, stop included, however it was decoded


class _Draft(NamedTuple):
    tokens: _Tokens  # stop token excluded
    log_q: float


def write_sentences(
    config: RunConfig,
    task: Infilling | Continuation,
    prompts: Sequence[Prompt],
    adapter: Path | None,
) -> list[list[Sentence]]:
    """For each prompt `evaluation.samples` sentences, fewer where beams find no more.

    Of more `candidates`, the likeliest that differ. The base LM (no adapter) reads
    `evaluation.shots` worked examples first.

    Raises:
        TooFewDemonstrations: more worked examples than the task has.
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
    """
    settings = config.evaluation
    frozen = load_base(config.lm)
    policy = evaluated_policy(config, load_base(config.lm), task, adapter)
    shots: _Tokens = ()
    if adapter is None and settings.shots:
        shots = worked_examples(task, frozen.tokenizer, count=settings.shots, seed=config.seed)
    groups = _decode(config, policy, task, [(*shots, *prompt.prompt) for prompt in prompts])
    log_reward = log_reward_of(task, frozen.model, config.reward.token_budget)
    decode = frozen.tokenizer.decode
    written = []
    for prompt, group in zip(prompts, groups, strict=True):
        several = settings.candidates > 1
        drafts = list({draft.tokens: draft for draft in group}.values()) if several else group
        completions = [draft.tokens for draft in drafts]
        log_r = log_rewards(completions, prompt, task.reward_query, log_reward).tolist()
        sentences = [
            Sentence(decode(list(draft.tokens)).strip(), value, draft.log_q)
            for draft, value in zip(drafts, log_r, strict=True)
        ]
        if several:
            sentences.sort(key=lambda sentence: -sentence.log_reward)
        written.append(sentences[: settings.samples])
    return written


def _decode(
    config: RunConfig,
    policy: SamplingPolicy,
    task: Infilling | Continuation,
    prompts: Sequence[_Tokens],
) -> list[list[_Draft]]:
    """`samples` x `candidates` completions for each prompt."""
    settings = config.evaluation
    number = settings.samples * settings.candidates
    if settings.decoding != "sample":
        search = BeamSearch(
            policy.model,
            task.actions,
            beams=number,
            groups=number if settings.decoding == "diverse_beam" else 1,
            penalty=settings.diversity_penalty,
            max_rows=settings.max_rows,
        )
        return [
            [_Draft(one.tokens, one.log_q) for one in found] for found in search.search(prompts)
        ]
    drawn = policy.sample(
        [
            Request(prompt=prompt, temperature=settings.temperature, top_p=settings.top_p)
            for prompt in prompts
            for _ in range(number)
        ]
    )
    drafts = [_Draft(tuple(one.tokens.tolist()), one.log_q) for one in drawn]
    return [drafts[at : at + number] for at in range(0, len(drafts), number)]
