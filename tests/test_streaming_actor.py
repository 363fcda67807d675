"""The actor that takes places as they become free."""

import time
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from actors.actor import RolloutActor
from actors.reward_query import DirectScorer
from actors.weight_sources import PublishedWeights, TakingTurns
from buffer.trajectory import Trajectory
from cluster.config.file import load_config
from cluster.run.assembly import build_actor, load_task, model_policy
from lm.adapter import adapter_bytes, checksum, load_adapter_bytes
from lm.config import LoRAConfig
from lm.model import attach_adapter, load_base
from lm.sampling import Completion, Ended, Request
from lm.scoring import completion_log_probs
from lm.tools import ToolFault
from tests.test_actor import CONFIG, ArithmeticScores, ListBuffer, ScriptedPolicy, Shelf, make_actor

STREAMING = CONFIG.model_copy(update={"max_rows": 6, "max_unstored": 100})


class Ragged(ScriptedPolicy):
    """Ends requests after 1, 2, 3, 1, 2, 3 ... polls; the first one never, while it is held."""

    held = True

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[int, tuple[int, Request]] = {}
        self.rows: list[int] = []  # under way at each poll
        self.loaded_at: list[int] = []  # rows under way at each load

    def submit(self, requests: Sequence[Request]) -> list[int]:
        numbers = super().submit(requests)
        for number, request in zip(numbers, requests, strict=True):
            self.left[number] = number % 3 + 1, request
        return numbers

    def poll(self) -> list[Ended]:
        self.rows.append(len(self.left))
        ended: list[Ended] = []
        for number, (polls, request) in list(self.left.items()):
            self.left[number] = polls - 1, request
            if polls <= 1 and not (number == 0 and self.held):
                del self.left[number]
                ended.append((number, self.ended(number, request)))
        return ended

    def load(self, adapter: bytes) -> None:
        super().load(adapter)
        self.loaded_at.append(len(self.left))


def quick() -> ArithmeticScores:
    scorer = ArithmeticScores()
    scorer.quick = True
    return scorer


def running(polls: int, **replaced: Any) -> tuple[RolloutActor, dict[str, Any]]:
    """After so many turns of an actor that runs, with nothing under way any more."""
    actor, parts = make_actor(**({"config": STREAMING, "scorer": quick()} | replaced))
    turns = count()
    policy = parts["policy"]

    def stop() -> bool:
        policy.held = next(turns) < polls
        return not policy.held

    actor.run(stop)
    return actor, parts


def test_no_place_waits_for_the_longest_row() -> None:
    policy = Ragged()
    _, parts = running(40, policy=policy)
    groups = parts["buffer"].groups
    assert min(policy.rows[:40]) >= 6, "places stay empty"
    assert len(groups) * 3 == policy.submitted > 100
    # The group of the held row ended last; all others did not wait for it.
    assert groups[-1][0].created_s == max(group[0].created_s for group in groups)
    assert len({group[0].created_s for group in groups}) == len(groups)


def test_a_completion_is_of_one_version_and_says_which() -> None:
    shelf, policy = Shelf(), Ragged()

    class Publishing(ArithmeticScores):
        """A learner that publishes with every tenth scoring."""

        quick = True

        def submit(self, items: Any) -> Any:
            if self.submitted % 10 == 9:
                version = self.submitted
                data = b"%d" % version
                shelf.newest = PublishedWeights(version, data, checksum(data))
            return super().submit(items)

    policy.held = False
    actor, parts = make_actor(config=STREAMING, weights=shelf, policy=policy, scorer=Publishing())
    turns = count()
    actor.run(lambda: next(turns) >= 200)
    groups = parts["buffer"].groups
    versions = [group[0].policy_version for group in groups]
    assert policy.loaded_at == [0] * len(policy.loaded) and len(policy.loaded) > 5
    assert sorted(set(versions)) == [0, *(int(data) for data in policy.loaded)]
    assert min(map(versions.count, versions[:-6])) >= STREAMING.groups_per_batch
    assert len(groups) * 3 == policy.submitted


@pytest.mark.parametrize("in_turns", [False, True])
def test_an_actor_that_awaits_weights_samples_nothing_before_there_are_some(in_turns: bool) -> None:
    shelf, policy = Shelf(), Ragged()
    policy.held, turns = False, count()

    def stop() -> bool:
        if (turn := next(turns)) == 3:
            assert policy.submitted == 0
            shelf.newest = PublishedWeights(1, b"start", checksum(b"start"))
        assert turn < 19 or policy.submitted > 0  # of version 1, though no other was published
        return turn >= 20

    config = STREAMING.model_copy(update={"max_rows": 12})
    weights = TakingTurns(shelf, stop) if in_turns else shelf
    parts = {"weights": weights, "policy": policy, "scorer": quick(), "config": config}
    actor, made = make_actor(awaits_weights=True, **parts)
    actor.run(stop, in_turns=in_turns)
    assert policy.loaded == [b"start"] and policy.submitted > 6
    assert {t.policy_version for group in made["buffer"].groups for t in group} == {1}
    turns, shelf.newest, parts["weights"] = count(), None, shelf
    unused = make_actor(awaits_weights=True, **(parts | {"policy": Ragged()}))[1]["policy"]
    make_actor(awaits_weights=True, **(parts | {"policy": unused}))[0].run(lambda: next(turns) > 2)
    assert unused.submitted == 0


def test_max_unstored_counts_completions() -> None:
    policy = Ragged()
    config = STREAMING.model_copy(update={"max_unstored": 9})
    actor, parts = make_actor(config=config, policy=policy)
    policy.held = False
    turns = count()
    most = 0

    def stop() -> bool:
        nonlocal most
        most = max(most, sum(scoring.size for scoring in actor._in_flight))
        return next(turns) >= 60

    actor.run(stop)
    # Rows under way then may still end.
    assert 9 <= most <= 9 + 6 + 3
    assert len(parts["buffer"].groups) * 3 == policy.submitted > 60


def test_a_paced_actor_asks_with_the_weights_that_are_newest_after_the_pause() -> None:
    shelf = Shelf()

    class Drawn(ListBuffer):
        """Full until the sixth look; the learner publishes before it draws."""

        looks = 0

        def depth(self) -> int:
            self.looks += 1
            if self.looks == 5:
                shelf.newest = PublishedWeights(3, b"three", checksum(b"three"))
            return 100 if self.looks < 6 else 0

    config = STREAMING.model_copy(update={"pace_timeout_s": 60.0})
    _, parts = running(30, policy=Ragged(), buffer=Drawn(), weights=shelf, config=config)
    assert {group[0].policy_version for group in parts["buffer"].groups} == {3}


def test_a_row_that_does_not_end_holds_no_stop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.actor._DRAIN_S", 0.1)
    policy, turns = Ragged(), count()
    actor, parts = make_actor(config=STREAMING, scorer=quick(), policy=policy)
    actor.run(lambda: next(turns) >= 20)
    assert len(parts["buffer"].groups) * 3 == policy.submitted - 3 > 20


def test_only_a_buffer_that_was_seen_full_all_the_time_is_a_stalled_learner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.actor._UNSEEN_S", 0.1)
    actor, parts = make_actor()  # pace_timeout_s = 0.2
    parts["buffer"].groups = [[]] * 100
    assert not actor._has_room()
    time.sleep(0.3)
    assert not actor._has_room()


def test_storing_while_the_buffer_is_full_is_no_pause() -> None:
    class Sluggish(ListBuffer):
        def add(self, group: Sequence[Trajectory]) -> None:
            time.sleep(0.2)

    config = CONFIG.model_copy(update={"pace_timeout_s": 60.0})
    actor, parts = make_actor(config=config, scorer=quick(), buffer=Sluggish())
    actor.step()
    parts["buffer"].groups = [[]] * 100
    assert not actor._has_room()
    actor._advance()
    assert not actor._has_room()
    assert actor.stats.storing_s >= 0.4 and 0.02 <= actor.stats.paced_s < 0.3


class Faulty(Ragged):
    """A tool fails in every `every`-th completion."""

    every = 5

    def ended(self, number: int, request: Request) -> Completion | ToolFault:
        if number % self.every == 0:
            return ToolFault(KeyError("nine"))
        return super().ended(number, request)


def test_a_group_that_a_tool_ended_is_dropped_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = Faulty()
    actor, parts = running(60, policy=policy)
    faults = len([number for number in range(policy.submitted) if number % 5 == 0])
    stats, groups = actor.stats, parts["buffer"].groups
    assert stats.tool_failures == faults and "KeyError: 'nine'" in caplog.text
    assert stats.sampled == policy.submitted - faults == stats.trajectories + stats.unscored
    assert len(groups) == stats.groups == policy.submitted // 3 - faults
    assert all(len(group) == 3 for group in groups)


def test_a_tool_that_always_fails_ends_the_actor_with_what_it_said() -> None:
    policy = Faulty()
    policy.every = 1
    with pytest.raises(KeyError, match="nine"):
        running(1000, policy=policy)
    assert policy.submitted < 100


def test_log_q_of_a_streaming_engine_is_that_of_the_version_it_names() -> None:
    config = load_config(
        "tasks/toy.toml",
        [
            "task.tool=true",
            *("actors.group_size=3", "actors.groups_per_batch=2", "actors.max_rows=8"),
            "actors.max_ready_groups=9999",
        ],
    )
    base, task = load_task(config)
    adapters = [perturbed(config.lora, seed) for seed in range(4)]
    shelf, buffer = Shelf(), ListBuffer()
    actor = build_actor(
        config,
        policy=model_policy(config, load_base(config.lm), task, steady=False),
        task=task,
        name="actor-0",
        seed=(0,),
        buffer=buffer,
        scorer=DirectScorer(lambda item: np.zeros(len(item.stops), np.float32)),
        weights=shelf,
    )
    turns = count()

    def stop() -> bool:
        if (turn := next(turns)) % 25 == 0 and turn < 100:
            data = adapters[turn // 25]
            shelf.newest = PublishedWeights(turn // 25 + 1, data, checksum(data))
        return turn == 120

    actor.run(stop)
    assert {group[0].policy_version for group in buffer.groups} == {1, 2, 3, 4}
    learned = attach_adapter(base, config.lora, seed=0)
    for version, adapter in enumerate(adapters, start=1):
        load_adapter_bytes(learned, adapter)
        drawn = [t for group in buffer.groups for t in group if t.policy_version == version]
        assert len(drawn) > 12
        with torch.no_grad():
            scored = completion_log_probs(
                learned,
                task.actions,
                [tuple(t.prompt.tolist()) for t in drawn],
                [t.completion.tolist() for t in drawn],
                [t.from_tool.tolist() for t in drawn],
            )
        for b, t in enumerate(drawn):
            log_pf = scored.log_pf_BT[b, : len(t.completion)].numpy()
            assert np.abs(log_pf - t.behaviour_log_prob).max(initial=0.0) < 1e-4
            log_stop = scored.log_stop_BS[b].numpy()[t.stops]
            assert np.abs(log_stop - t.behaviour_log_stop).max() < 1e-4


def perturbed(lora: LoRAConfig, seed: int) -> bytes:
    """An adapter of the toy's that is not the identity."""
    model = attach_adapter(load_base(load_config("tasks/toy.toml").lm), lora, seed=0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.3)
    return adapter_bytes(model)
