"""Story infilling: the fourth sentence of five (Hu et al. 2024, section 4.2).

X is the beginning, three sentences, Y the ending, Z the sentence between. The policy is shown both
in one prompt; the frozen LM scores the story as it is told: log p_LM(Z Y | X). Z stops by the full
stop, the first token of Y.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from actors.demonstrations import Demonstration
from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from tasks.config import InfillingConfig
from tasks.sentences.actions import STOP_TEXT, demonstrate, encode, sentence_actions
from tasks.sentences.story_files import Story, load_stories
from tasks.task import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryItem:
    """A story to evaluate on: what is asked, and its true middle without the full stop."""

    prompt: Prompt
    middle: str
    ending: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Infilling:
    """See tasks.task.Task."""

    actions: ActionSpace
    prompts: tuple[Prompt, ...]
    demonstrations: tuple[Demonstration, ...]
    tests: tuple[StoryItem, ...]
    reward_query: RewardQuery
    tool: None = None
    log_reward: None = None
    name: str = "infilling"

    @property
    def test_prompts(self) -> tuple[Prompt, ...]:
        """See tasks.task.MeasuredTask."""
        return tuple(item.prompt for item in self.tests)

    def verdict(self, prompt: Prompt, completion: Sequence[int]) -> None:
        """Many middles are right."""
        return None

    def valid(self, completion: Sequence[int]) -> bool:
        """All that can be sampled is one sentence."""
        return True


def build_infilling(config: InfillingConfig, tokenizer: Tokenizer) -> Infilling:
    """Load the stories and encode them; raises DataError, TokenizerUnfit."""
    actions = sentence_actions(tokenizer, min_len=config.min_len, max_len=config.max_len)
    told: dict[str, tuple[Prompt, Story]] = {}
    for story in load_stories(config.stories):
        prompt = prompt_of(story, tokenizer)
        told.setdefault(prompt.key, (prompt, story))
    return Infilling(
        actions=actions,
        prompts=tuple(prompt for prompt, _ in told.values()),
        demonstrations=tuple(
            demonstration
            for prompt, story in list(told.values())[: config.demonstrations]
            if (demonstration := demonstrate(prompt, story.middle, actions, tokenizer)) is not None
        ),
        tests=tuple(
            StoryItem(
                prompt=prompt_of(story, tokenizer),
                middle=story.middle.removesuffix(STOP_TEXT),
                ending=story.ending,
            )
            for path in config.tests
            for story in load_stories(path)
        ),
        reward_query=RewardQuery(kind="suffix", stop_token=actions.stop_token),
    )


def exercise_prompt(beginning: str, ending: str) -> str:
    """How a story without its middle asks for it; ' ' and the middle follow."""
    return f"Beginning: {beginning}\nEnding: {ending}\nMiddle:"


def prompt_of(story: Story, tokenizer: Tokenizer) -> Prompt:
    """The policy reads beginning and ending, the frozen LM the beginning alone."""
    shown = exercise_prompt(story.beginning, story.ending)
    return Prompt(
        key=hashlib.blake2b(shown.encode(), digest_size=16).hexdigest(),
        text=shown,
        prompt=encode(tokenizer, shown),
        answer=encode(tokenizer, f"{STOP_TEXT} {story.ending}"),
        scored=encode(tokenizer, story.beginning),
    )
