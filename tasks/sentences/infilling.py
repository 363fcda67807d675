"""Story infilling: the fourth sentence of five (Hu et al. 2024, section 4.2).

X is the beginning, three sentences, Y the ending, Z the sentence between. The policy is shown both
in one prompt; the frozen LM scores the story as it is told: log p_LM(Z Y | X). Z stops by the full
stop, the first token of Y.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from actors.prompts import Prompt, key_of
from actors.reward_query import RewardQuery
from lm.spelling import ANY_WORD, check_spelling, spell, spell_after
from tasks.config import InfillingConfig
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation, Example, Metric
from tasks.held_out import Split, read_splits
from tasks.sentences.actions import STOP_TEXT, demonstrate, sentence_actions
from tasks.sentences.evaluation import (
    Sentence,
    SentenceTask,
    likeness_of,
    sentence_metrics,
    write_sentences,
)
from tasks.sentences.files import Story, load_stories
from tasks.sentences.metrics import Likeness, bleu4, gleu4
from tasks.task import TestItem, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryItem(TestItem):
    """A story to evaluate on, with its true middle."""

    middle: str  # without the full stop
    ending: str
    met: bool  # the middle is one of a training story too, word for word


@dataclass(frozen=True, kw_only=True)
class Infilling(SentenceTask):
    """See tasks.task.Task. Many middles are right; those of test stories are known."""

    held_out: Mapping[Split, Sequence[Sequence[StoryItem]]]

    def evaluate_held_out(self, context: EvaluationContext) -> Evaluation:
        """Middles of held-out stories against the true ones."""
        items = context.items(self.held_out)
        prompts = [item.prompt for item in items]
        written = write_sentences(self, context, prompts)
        likeness = likeness_of(self.embedder)
        shared = sentence_metrics(self, context, prompts, written, likeness)
        return Evaluation(
            task=self.name,
            temperature=context.temperature,
            metrics={**_truth_metrics(items, written, likeness), **shared},
            note=f"{sum(item.met for item in items)} of the {len(items)} true sentences stand word "
            "for word in training stories too.",
            examples=tuple(
                Example(
                    question=item.prompt.text,
                    rationale=group[0].text,
                    answer=item.ending,
                    truth=item.middle,
                    right=True if group[0].text == item.middle else None,
                )
                for item, group in zip(items[: context.settings.examples], written, strict=False)
            ),
        )


def _truth_metrics(
    items: Sequence[StoryItem], written: Sequence[Sequence[Sentence]], likeness: Likeness | None
) -> dict[str, Metric]:
    """How near the sentences are to the true ones, how likely, and how many they are."""
    pairs = [
        (sentence.text, item.middle)
        for item, group in zip(items, written, strict=True)
        for sentence in group
    ]

    samples = max(len(group) for group in written)
    mean = partial(Metric.mean, items=len(items), samples=samples)
    bleu, gleu = [bleu4(*pair) for pair in pairs], [gleu4(*pair) for pair in pairs]
    metrics = {
        "bleu4": mean("BLEU-4 against the true sentence", bleu, ".1%"),
        "gleu4": mean("GLEU-4 against the true sentence", gleu, ".1%"),
        "exact": mean("the true sentence itself", [z == true for z, true in pairs], ".1%"),
    }
    if likeness is not None:
        alike = likeness(*map(list, zip(*pairs, strict=True)))
        metrics["similarity"] = mean("cosine to the true sentence", alike)
    log_r = [sentence.log_reward for group in written for sentence in group]
    distinct = [len({sentence.text for sentence in group}) for group in written]
    metrics["log_reward"] = mean("log reward, nats", log_r, ".2f")
    metrics["distinct"] = mean("different sentences of a story", distinct, ".2f")
    return metrics


def build_infilling(config: InfillingConfig, tokenizer: Tokenizer) -> Infilling:
    """Load the stories and encode them; raises DataError, TokenizerUnfit."""
    actions = sentence_actions(tokenizer, config)
    told: dict[str, tuple[Prompt, Story]] = {}
    splits = read_splits(config, load_stories(config.stories), load_stories, _asked)
    for story in splits.training:
        prompt = prompt_of(story, tokenizer)
        told.setdefault(prompt.key, (prompt, story))
    middles = {story.middle for _, story in told.values()}
    first = list(told.values())[: config.demonstrations]
    shown = (demonstrate(prompt, story.middle, actions, tokenizer) for prompt, story in first)
    return Infilling(
        name="infilling",
        embedder=config.embedder,
        actions=actions,
        prompts=tuple(prompt for prompt, _ in told.values()),
        demonstrations=tuple(filter(None, shown)),
        held_out=splits.made(
            lambda story: StoryItem(
                prompt=prompt_of(story, tokenizer),
                middle=story.middle.removesuffix(STOP_TEXT),
                ending=story.ending,
                met=story.middle in middles,
            )
        ),
        reward_query=RewardQuery(kind="suffix", stop_token=actions.stop_token),
    )


def exercise_prompt(beginning: str, ending: str) -> str:
    """How a story without its middle asks for it; ' ' and the middle follow."""
    return f"Beginning: {beginning}\nEnding: {ending}\nMiddle:"


def _asked(story: Story) -> str:
    return exercise_prompt(story.beginning, story.ending)


def prompt_of(story: Story, tokenizer: Tokenizer) -> Prompt:
    """The policy reads beginning and ending, the frozen LM the beginning alone."""
    shown = _asked(story)
    ending = f"{STOP_TEXT} {story.ending}"
    scored, answer = spell(tokenizer, story.beginning), spell_after(tokenizer, ANY_WORD, ending)
    middle = spell_after(tokenizer, story.beginning, ANY_WORD)
    check_spelling(tokenizer, [(story.beginning, scored), (ANY_WORD, middle), (ending, answer)])
    return Prompt(
        key=key_of(shown),
        text=shown,
        prompt=spell(tokenizer, shown),
        answer=answer,
        scored=scored,
    )
