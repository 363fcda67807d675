"""The random-number task: what is valid, what it is worth, and that its reward needs no LM."""

import itertools
import math

import numpy as np
import pytest
from pydantic import ValidationError

from actors.reward_query import DirectScorer
from cluster.config.file import PROJECT_ROOT, load_config
from lm.config import LMConfig
from lm.model import load_base
from reward.request import ScoreItem
from tasks.config import RandomNumberConfig
from tasks.random_number import RandomNumber, build_random_number


@pytest.fixture(scope="module")
def task() -> RandomNumber:
    model = str(PROJECT_ROOT / "seed_lm/model")
    tokenizer = load_base(LMConfig(model=model, device="cpu")).tokenizer
    return build_random_number(RandomNumberConfig(name="random_number"), tokenizer)


def item_of(task: RandomNumber, tokens: tuple[int, ...], stops: list[int]) -> ScoreItem:
    return task.reward_query.item(task.prompts[0], tokens, np.array(stops, dtype=np.int32))


def test_each_integer_of_the_range_is_valid_in_one_spelling(task: RandomNumber) -> None:
    assert sorted(task.numbers.values()) == list(range(101))
    assert all(task.valid(tokens) for tokens in task.numbers)
    [seven] = [tokens for tokens, number in task.numbers.items() if number == 7]
    [ten] = [tokens for tokens, number in task.numbers.items() if number == 10]
    for wrong in ((), (*seven, *seven), (*ten, ten[1], ten[1]), ten[1:], seven + ten):
        assert not task.valid(wrong)


def test_every_prefix_is_worth_what_stopping_there_would_be(task: RandomNumber) -> None:
    [ten] = [tokens for tokens, number in task.numbers.items() if number == 10]
    tokens = (*ten, task.reward_query.stop_token + 1, ten[1])  # ' 10', then something, then '0'
    assert not task.valid(tokens[:3])
    scores = task.log_reward(item_of(task, tokens, [1, 2, 3, 4]))
    assert scores.tolist() == [0.0, 0.0, -3 * task.penalty_nats, -4 * task.penalty_nats]
    assert scores.dtype == np.float32


def test_all_invalid_texts_together_are_worth_next_to_nothing(task: RandomNumber) -> None:
    """The posterior's own share of invalid texts, from their number and price."""
    choices = len(task.actions.legal_tokens or ())
    masses = [
        math.exp(length * (math.log(choices) - task.penalty_nats))
        for length in range(1, task.actions.max_len + 1)
    ]
    assert choices == 20  # ' 0' to ' 9' and '0' to '9'
    assert sum(masses) / len(task.numbers) < 1e-4


def test_no_completion_is_worth_more_than_its_ceiling(task: RandomNumber) -> None:
    tokens = sorted({token for z in task.numbers for token in z})[:6]
    for length in range(1, 4):
        for z in itertools.product(tokens, repeat=length):
            worth = float(task.log_reward(item_of(task, z, [length]))[0])
            for start in range(length + 1):
                assert worth <= task.log_reward_ceiling(z[:start], length)


def test_a_direct_scorer_answers_as_the_task_does(task: RandomNumber) -> None:
    items = [item_of(task, tokens, [1, len(tokens)][-len(tokens) :]) for tokens in task.numbers]
    scores = DirectScorer(task.log_reward).submit(items).result(1.0)
    assert [score.tolist() for score in scores] == [task.log_reward(i).tolist() for i in items]


def test_its_run_needs_no_reward_replica() -> None:
    assert load_config("tasks/random_number.toml").reward_replicas == 0
    assert load_config("tasks/toy.toml").reward_replicas == 1


def test_a_crossed_range_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"low \(9\) must not exceed high \(3\)"):
        RandomNumberConfig(name="random_number", low=9, high=3)


class _Letters:
    """A tokenizer whose tokens are single characters, so that a space is a token of its own."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 128

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))


def test_a_space_that_is_a_token_of_its_own_may_be_chosen() -> None:
    task = build_random_number(RandomNumberConfig(name="random_number"), _Letters())
    for tokens in task.numbers:
        task.actions.check(tokens, (False,) * len(tokens))
    assert len(task.actions.legal_tokens or ()) == 11
    assert not task.valid((ord(" "),))
