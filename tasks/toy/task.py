"""A task whose posterior can be written down: a few letters after a prompt, under a random LM.

X 'ab?', Z up to five letters, Y '-d'. Nothing in it means anything; what counts is that
every Z can be enumerated, so that the posterior p(Z | X, Y) is known exactly and whatever a run
ends with can be held against it.
"""

from collections.abc import Sequence

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.spelling import TokenizerUnfit, spell
from tasks.config import ToyConfig
from tasks.custom import PlainTask
from tasks.stop_rule import end_of_text, narrowed
from tasks.task import Tokenizer

LETTERS = "abcd"
# X, Y. No Z holds the question mark that ends X, or one prompt with the beginning of a completion
# would read as another prompt, and the policy could not be right for both. Nor does a Z hold the
# dash that Y begins with, so that X Z Y can be read in one way only.
QUESTIONS = (("a?", "-b"), ("b?", "-ca"), ("ab?", "-d"), ("da?", "-cb"))


class LetterSum:
    """Writes the sum of the letters so far behind '=', a = 0 to d = 3, modulo 4.

    Keeps silent where no letter precedes. Args are token ids.
    """

    def __init__(self, letters: Sequence[int], *, trigger: int) -> None:
        self._letters = list(letters)
        self.triggers = frozenset((trigger,))

    def output(self, completion: Sequence[int]) -> list[int]:
        """One letter, or nothing; see lm.tools.Tool."""
        values = [self._letters.index(token) for token in completion if token in self._letters]
        return [self._letters[sum(values) % len(self._letters)]] if values else []


def build_toy(config: ToyConfig, tokenizer: Tokenizer) -> PlainTask:
    """The toy in the tokens of `tokenizer`; raises TokenizerUnfit unless it spells letters so."""
    letters = [_single(letter, tokenizer) for letter in LETTERS]
    stop = end_of_text(tokenizer)
    tool = LetterSum(letters, trigger=_single("=", tokenizer)) if config.tool else None
    actions = ActionSpace(
        stop_token=stop,
        legal_tokens=(*letters, *(tool.triggers if tool is not None else ())),
        min_len=config.min_len,
        max_len=config.max_len,
    )
    return PlainTask(
        name="toy",
        actions=narrowed(actions, config, tokenizer),
        tool=tool,
        prompts=tuple(
            Prompt(
                key=f"{question} {answer}",
                text=question,
                prompt=spell(tokenizer, question),
                answer=spell(tokenizer, answer),
            )
            for question, answer in QUESTIONS
        ),
        reward_query=RewardQuery(kind="suffix", stop_token=stop),
    )


def _single(text: str, tokenizer: Tokenizer) -> int:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1 or tokenizer.decode(tokens) != text:
        raise TokenizerUnfit(
            f"the toy needs {text!r} as one token; this tokenizer spells it as {len(tokens)}: "
            "use lm.model = 'tasks/toy/model'"
        )
    return tokens[0]
