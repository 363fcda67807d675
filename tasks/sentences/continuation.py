"""Sentence continuation (Hu et al. 2024, section 4.1): likely next sentences, and many of them.

X is a prompt of one to three sentences, Z the next sentence, ⊤ its full stop; there is no Y. The
reward is p_LM(Z ⊤ | X)^(1/T) with T below 1. At max_len the stop is forced: the policy's log q(⊤)
is 0 there, while the reward still asks the LM how likely the full stop is.
"""

from dataclasses import dataclass
from functools import partial

from actors.prompts import Prompt, key_of
from actors.reward_query import RewardQuery
from lm.spelling import spell
from tasks.config import ContinuationConfig
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation, Metric
from tasks.held_out import read_splits
from tasks.sentences.actions import demonstrate, sentence_actions
from tasks.sentences.evaluation import SentenceTask, likeness_of, sentence_metrics, write_sentences
from tasks.sentences.files import load_continued, load_prompts
from tasks.task import TestItem, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Continuation(SentenceTask):
    """See tasks.task.Task. No continuation is right or wrong."""

    def evaluate_held_out(self, context: EvaluationContext) -> Evaluation:
        """Next sentences of held-out prompts: how likely, and how different."""
        prompts = [item.prompt for item in context.items(self.held_out)]
        written = write_sentences(self, context, prompts)
        log_r = [[sentence.log_reward for sentence in group] for group in written]

        mean = partial(Metric.mean, items=len(prompts), samples=context.settings.samples)
        likeliest, every = [max(group) for group in log_r], [v for group in log_r for v in group]
        own = {
            "max_log_likelihood": mean("log-likelihood of the likeliest, nats", likeliest, ".2f"),
            "mean_log_likelihood": mean("log-likelihood of all, nats", every, ".2f"),
        }
        likeness = likeness_of(self.embedder)
        shared = sentence_metrics(self, context, prompts, written, likeness)
        return Evaluation(
            task=self.name, temperature=context.temperature, metrics={**own, **shared}
        )


def build_continuation(config: ContinuationConfig, tokenizer: Tokenizer) -> Continuation:
    """Load the prompts and encode them; raises DataError, TokenizerUnfit."""
    actions = sentence_actions(tokenizer, config)
    pairs = () if config.demonstrations is None else load_continued(config.demonstrations)
    splits = read_splits(config, load_prompts(config.data), load_prompts, str)
    validated = {text for file in splits.held_out["validation"] for text in file}
    told = dict.fromkeys(pair for pair in pairs if pair[0] not in validated)
    shown = (demonstrate(_prompt(x, tokenizer), z, actions, tokenizer) for x, z in told)
    return Continuation(
        name="continuation",
        embedder=config.embedder,
        actions=actions,
        prompts=tuple(_prompt(text, tokenizer) for text in dict.fromkeys(splits.training)),
        held_out=splits.made(lambda text: TestItem(prompt=_prompt(text, tokenizer))),
        demonstrations=tuple(filter(None, shown)),
        reward_query=RewardQuery(kind="stop", stop_token=actions.stop_token),
    )


def _prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    return Prompt(
        key=key_of(text),
        text=text,
        prompt=spell(tokenizer, text),
        answer=(),
    )
