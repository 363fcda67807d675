"""A task whose posterior can be written down: a few letters after a prompt, under a random LM.

X 'ab?', Z up to five letters, Y '-d'. Nothing in it means anything; what counts is that
every Z can be enumerated, so that the posterior p(Z | X, Y) is known exactly and whatever a run
ends with can be held against it.
"""

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from tasks.config import ToyConfig
from tasks.custom import PlainTask
from tasks.task import Tokenizer, TokenizerUnfit
from tasks.toy.letters import LETTERS, LetterSum

# X, Y. No Z holds the question mark that ends X, or one prompt with the beginning of a completion
# would read as another prompt, and the policy could not be right for both. Nor does a Z hold the
# dash that Y begins with, so that X Z Y can be read in one way only.
QUESTIONS = (("a?", "-b"), ("b?", "-ca"), ("ab?", "-d"), ("da?", "-cb"))


def build_toy(config: ToyConfig, tokenizer: Tokenizer) -> PlainTask:
    """The toy in the tokens of `tokenizer`; raises TokenizerUnfit unless it spells letters so."""
    letters = [_single(letter, tokenizer) for letter in LETTERS]
    stop = tokenizer.eos_token_id
    if stop is None:
        raise TokenizerUnfit("this tokenizer has no end-of-text token (eos_token)")
    tool = LetterSum(letters, trigger=_single("=", tokenizer)) if config.tool else None
    return PlainTask(
        name="toy",
        actions=ActionSpace(
            stop_token=stop,
            legal_tokens=(*letters, *(tool.triggers if tool is not None else ())),
            min_len=config.min_len,
            max_len=config.max_len,
        ),
        tool=tool,
        prompts=tuple(
            Prompt(
                key=f"{question} {answer}",
                text=question,
                prompt=tuple(tokenizer.encode(question, add_special_tokens=False)),
                answer=tuple(tokenizer.encode(answer, add_special_tokens=False)),
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
