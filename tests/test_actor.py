"""The rollout actor: what it overlaps, what it owns, what it refuses."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.actor import LearnerStalled, RolloutActor
from actors.config import ActorConfig
from actors.demonstrations import (
    Demonstration,
    Hint,
    hinted_demonstrations,
    seed_demonstrations,
)
from actors.prompts import Prompt, PromptStream
from actors.protocols import RolloutEngine
from actors.reward_query import RewardQuery
from actors.rollout import plan_groups
from actors.weight_sources import PublishedWeights
from buffer.config import BufferConfig
from buffer.redis_store import RedisStore
from buffer.replay import DrawRequest, ReplayBuffer
from buffer.trajectory import Trajectory
from lm.actions import ActionSpace, IllegalCompletion
from lm.adapter import AdapterMismatch, checksum
from lm.sampling import Completion, Ended, Request
from lm.tools import ToolFault
from reward.request import ScoreItem
from tests.buffer_toy import serving

PROMPTS = [
    Prompt(key="a", text="a", prompt=(1, 2), answer=(9,), weight=1.0),
    Prompt(key="b", text="b", prompt=(3,), answer=(8, 8), weight=3.0),
]
CONFIG = ActorConfig(
    group_size=3, groups_per_batch=2, max_unstored=12, max_ready_groups=100, pace_timeout_s=0.2
)
QUERY = RewardQuery(kind="suffix", stop_token=0, context=(7,))


class ScriptedPolicy:
    """Completes a prompt by its own first token, twice; remembers which weights it holds."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.submitted = 0
        self._under_way: list[tuple[int, Request]] = []

    def submit(self, requests: Sequence[Request]) -> list[int]:
        first = self.submitted
        self.submitted += len(requests)
        self._under_way += enumerate(requests, first)
        return list(range(first, self.submitted))

    def poll(self) -> list[Ended]:
        ended, self._under_way = self._under_way, []
        return [(number, self.ended(number, request)) for number, request in ended]

    def ended(self, number: int, request: Request) -> Completion | ToolFault:
        return Completion(
            tokens=np.array([request.prompt[0]] * 2, dtype=np.int32),
            from_tool=np.zeros(2, dtype=np.bool_),
            log_q_token=np.full(2, -1.0, dtype=np.float32),
            stops=np.array([1, 2], dtype=np.int32),
            log_q_stop=np.array([-2.0, 0.0], dtype=np.float32),
        )

    def load(self, adapter: bytes) -> None:
        self.loaded.append(adapter)


class ArithmeticScores:
    """log R = -(first context token) - t, so that mixed-up items are seen."""

    def __init__(self) -> None:
        self.submitted = 0
        self.fetched = 0
        self.quick = False  # scores are there as soon as they are asked for
        self.failure: Exception | None = None

    def submit(self, items: Sequence[ScoreItem]) -> "ArithmeticScores.Pending":
        self.submitted += 1
        return self.Pending(self, list(items))

    class Pending:
        def __init__(self, scorer: "ArithmeticScores", items: list[ScoreItem]) -> None:
            self._scorer, self._items = scorer, items

        def done(self) -> bool:
            return self._scorer.quick

        def result(self, timeout_s: float) -> list[NDArray[np.float32]]:
            self._scorer.fetched += 1
            if self._scorer.failure is not None:
                raise self._scorer.failure
            return [
                (-float(item.context[0]) - item.stops).astype(np.float32) for item in self._items
            ]


class ListBuffer:
    """Keeps groups; `depth` counts those not drawn."""

    def __init__(self) -> None:
        self.groups: list[list[Trajectory]] = []
        self.seeded: list[Trajectory] = []

    def add(self, group: Sequence[Trajectory]) -> None:
        self.groups.append(list(group))

    def seed(self, trajectories: Sequence[Trajectory]) -> None:
        self.seeded.extend(trajectories)

    def depth(self) -> int:
        return len(self.groups)


class Shelf:
    """Weights as a test puts them there."""

    def __init__(self) -> None:
        self.newest: PublishedWeights | None = None

    def newer_than(self, version: int) -> PublishedWeights | None:
        newest = self.newest
        return newest if newest is not None and newest.version > version else None


def make_actor(**replaced: Any) -> tuple[RolloutActor, dict[str, Any]]:
    parts: dict[str, Any] = {
        "policy": ScriptedPolicy(),
        "scorer": ArithmeticScores(),
        "buffer": ListBuffer(),
        "weights": Shelf(),
        "prompts": PromptStream(PROMPTS, np.random.default_rng(0)),
        "config": CONFIG,
    } | replaced
    actor = RolloutActor(
        name="actor-0",
        task_name="toy",
        query=QUERY,
        is_correct=lambda prompt, tokens: tokens[0] == 1,
        rng=np.random.default_rng(1),
        **parts,
    )
    return actor, parts


def test_the_next_batch_is_sampled_while_one_is_being_scored() -> None:
    actor, parts = make_actor()
    actor.step()
    assert (parts["scorer"].submitted, parts["scorer"].fetched) == (1, 0)
    actor.step()
    assert (parts["scorer"].submitted, parts["scorer"].fetched) == (2, 1)
    assert len(parts["buffer"].groups) == 2


def test_every_sampled_group_reaches_the_buffer_with_its_own_scores() -> None:
    actor, parts = make_actor()
    steps = iter(range(6))
    actor.run(lambda: next(steps, None) is None)
    groups = parts["buffer"].groups
    assert 3 * len(groups) == 3 * actor.stats.groups == parts["policy"].submitted > 12
    for group in groups:
        assert len(group) == 3
        assert len({t.prompt_key for t in group}) == 1
        for trajectory in group:
            assert trajectory.log_reward.tolist() == [-7.0 - 1, -7.0 - 2]
            assert trajectory.completion[0] == trajectory.prompt[0]
            assert trajectory.correct is bool(trajectory.prompt[0] == 1)
            assert (trajectory.behaviour == "on_policy") == (trajectory.temperature == 1.0)
    assert actor.stats.trajectories == 3 * len(groups)
    assert actor.stats.correct == sum(t.correct for group in groups for t in group)


def test_equal_groups_of_one_batch_are_two_groups(tmp_path: Path) -> None:
    """The buffer takes equal bytes for one group sent twice; a peaked policy samples them often."""
    with serving(tmp_path) as (_, client):
        buffer = ReplayBuffer(RedisStore(client, run="test"), config=BufferConfig())
        actor, _ = make_actor(
            buffer=buffer,
            prompts=PromptStream(PROMPTS[:1], np.random.default_rng(0)),
            config=CONFIG.model_copy(update={"on_policy_share": 1.0}),
        )
        actor.step()
        actor.flush()
        assert actor.stats.groups == buffer.depth() == 2
        assert actor.stats.trajectories == buffer.stats().counters.offered == 6
        groups = buffer.draw(
            DrawRequest(
                num_groups=2, num_replayed=0, version=0, rng=np.random.default_rng(0), timeout_s=0.0
            )
        )
        first, second = ([t.completion.tolist() for t in group.fresh] for group in groups)
        assert first == second == [[1, 1]] * 3


def test_a_failed_score_is_an_error_and_stores_nothing() -> None:
    scorer = ArithmeticScores()
    scorer.failure = RuntimeError("replica broke")
    actor, parts = make_actor(scorer=scorer)
    actor.step()
    with pytest.raises(RuntimeError, match="replica broke"):
        actor.step()
    assert parts["buffer"].groups == []
    scorer.failure = None
    actor.flush()  # the batch still belonged to the actor
    assert len(parts["buffer"].groups) == 4


def test_new_weights_are_taken_between_batches_and_label_what_they_sample() -> None:
    shelf = Shelf()
    actor, parts = make_actor(weights=shelf)
    actor.step()
    shelf.newest = PublishedWeights(version=5, data=b"five", checksum=checksum(b"five"))
    actor.step()
    actor.step()
    actor.flush()
    versions = [group[0].policy_version for group in parts["buffer"].groups]
    assert versions == [0, 0, 5, 5, 5, 5]
    assert parts["policy"].loaded == [b"five"]


def test_weights_with_a_wrong_checksum_are_refused() -> None:
    shelf = Shelf()
    shelf.newest = PublishedWeights(version=5, data=b"torn", checksum=checksum(b"whole"))
    actor, parts = make_actor(weights=shelf)
    with pytest.raises(AdapterMismatch, match="actor-0: weights of version 5"):
        actor.step()
    assert parts["policy"].loaded == []


def test_a_full_buffer_that_nobody_draws_from_ends_in_a_named_error() -> None:
    buffer = ListBuffer()
    buffer.groups = [[]] * 100
    actor, parts = make_actor(buffer=buffer)
    with pytest.raises(LearnerStalled, match=r"actor-0: the buffer has held 100 groups"):
        actor.run(lambda: False)
    assert parts["scorer"].submitted == 0


def test_prompts_come_in_proportion_to_their_weights() -> None:
    stream = PromptStream(PROMPTS, np.random.default_rng(0))
    drawn = [prompt.key for prompt in stream.take(4000)]
    assert abs(drawn.count("b") / 4000 - 0.75) < 0.02


def test_behaviour_is_mixed_in_the_configured_shares() -> None:
    config = ActorConfig(on_policy_share=0.25, temperature_low=0.5, temperature_high=2.0)
    plans = plan_groups(PROMPTS * 2000, config, np.random.default_rng(0))
    temperatures = np.array([plan.temperature for plan in plans])
    assert abs((temperatures == 1.0).mean() - 0.25) < 0.02
    tempered = temperatures[temperatures != 1.0]
    assert 0.5 <= tempered.min() < 0.51 and 1.99 < tempered.max() <= 2.0


def test_a_draw_behind_a_hint_that_a_tool_ended_is_left_out() -> None:
    class Failing(ScriptedPolicy, RolloutEngine):
        def __init__(self, sound: int) -> None:
            super().__init__()
            self.sound = sound

        def ended(self, number: int, request: Request) -> Completion | ToolFault:
            if number >= self.sound:
                return ToolFault(KeyError("nine"))
            return super().ended(number, request)

    hints = [Hint(prompt=PROMPTS[0], shown=(token,)) for token in (3, 4, 5)]
    found = hinted_demonstrations(hints, Failing(4), draws=2)
    assert [one.completion for one in found] == [(3, 3), (4, 4)]
    with pytest.raises(KeyError, match="nine"):
        hinted_demonstrations(hints, Failing(0), draws=2)
    with pytest.raises(KeyError, match="nine"):  # too many in a row
        hinted_demonstrations(hints[:1], Failing(1), draws=40)

    class Recovering(Failing):
        def ended(self, number: int, request: Request) -> Completion | ToolFault:
            return super().ended(0 if number >= 6 else number, request)

    again = hinted_demonstrations(hints, Recovering(4), draws=2)
    assert [one.completion for one in again] == [(3, 3), (4, 4), (5, 5)]


def test_demonstrations_are_scored_and_seeded_with_their_stop_states() -> None:
    demonstration = Demonstration(
        prompt=PROMPTS[0], completion=(4, 5, 6), from_tool=(False, True, False)
    )
    buffer = ListBuffer()
    arguments: dict[str, Any] = {
        "task": "toy",
        "query": QUERY,
        "is_correct": lambda prompt, tokens: True,
        "scorer": ArithmeticScores(),
        "buffer": buffer,
        "token_budget": 99,
        "timeout_s": 1.0,
    }
    actions = ActionSpace(stop_token=0, legal_tokens=(4, 6), min_len=0, max_len=5)
    assert seed_demonstrations([demonstration], actions=actions, **arguments) == 1
    (stored,) = buffer.seeded
    assert stored.stops.tolist() == [0, 2, 3]
    assert stored.log_reward.tolist() == [-7.0, -9.0, -10.0]
    assert (stored.behaviour, stored.policy_version) == ("demonstration", 0)

    narrow = ActionSpace(stop_token=0, legal_tokens=(4,), min_len=0, max_len=5)
    with pytest.raises(IllegalCompletion, match="not a legal token"):
        seed_demonstrations([demonstration], actions=narrow, **arguments)


class SlowScores(ArithmeticScores):
    """A second for each 12 tokens of a request, or no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def submit(self, items: Sequence[ScoreItem]) -> "ArithmeticScores.Pending":
        self.sizes.append(len(items))
        tokens = sum(
            i.context.size + i.completion.size + i.stops.size * i.answer.size for i in items
        )
        self.failure = TimeoutError(f"{tokens} tokens in a second") if tokens > 12 else None
        return super().submit(items)


def test_any_number_of_demonstrations_is_scored_within_the_time_for_one_portion() -> None:
    shown = [
        Demonstration(prompt=PROMPTS[0], completion=(4,) * (n % 3), from_tool=(False,) * (n % 3))
        for n in range(40)
    ]
    scorer, buffer = SlowScores(), ListBuffer()
    stored = seed_demonstrations(
        shown,
        task="toy",
        actions=ActionSpace(stop_token=0, legal_tokens=(4,), min_len=0, max_len=5),
        query=QUERY,
        is_correct=lambda prompt, tokens: None,
        scorer=scorer,
        buffer=buffer,
        token_budget=12,
        timeout_s=1.0,
    )
    assert stored == len(buffer.seeded) == sum(scorer.sizes) == 40
    assert [len(t.completion) for t in buffer.seeded] == [n % 3 for n in range(40)]
    assert max(scorer.sizes) > 1, "portions of one each would be slow"


def test_groups_with_a_completion_that_no_verifier_judged_are_dropped_and_counted() -> None:
    class Unjudged(ArithmeticScores):
        def submit(self, items: Sequence[ScoreItem]) -> Any:
            scores = super().submit(items).result(1.0)
            scores[4] = np.empty(0, dtype=np.float32)
            return SimpleNamespace(done=lambda: True, result=lambda timeout_s: scores)

    actor, parts = make_actor(scorer=Unjudged())
    actor.step()
    saved = actor.save()
    actor.flush()
    later, _ = make_actor(scorer=Unjudged())
    later.restore(saved)
    later.flush()
    assert later.stats.unscored == 3 and later.stats.groups == 1
    (kept,) = parts["buffer"].groups
    assert len(kept) == actor.stats.unscored == 3
    assert [t.log_reward.tolist() for t in kept] == [[-7.0 - 1, -7.0 - 2]] * 3
    assert actor.stats.groups == 1 and actor.stats.sampled == 6
