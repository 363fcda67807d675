"""The reward replica with one rank, in one process."""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from time import sleep

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lm.process_group import RankLost
from reward.lockstep import UnshardedRank, deal
from reward.packed import suffix_log_rewards
from reward.packing import MicroBatch, lay_out
from reward.replica import RewardReplica, ScoreFailed
from reward.request import BadItem, ScoreItem
from tests.reward_toy import CONFIG, assert_same, make_items, make_model, replace_config
from tests.tiny_lm import VOCAB_SIZE


class GatedRank:
    """A rank that waits at a gate in every forward, counts its passes, and may fail."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.limits = UnshardedRank(model).limits
        self.entered, self.gate = Event(), Event()
        self.error: Exception | None = None
        self.num_forwards = 0
        self._rank = UnshardedRank(model)

    def forward(self, share: Sequence[MicroBatch]) -> Iterable[NDArray[np.float32]]:
        self.num_forwards += 1
        self.entered.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return self._rank.forward(share)


class SlowRank(UnshardedRank):
    """A rank that takes 1.5 s for each micro-batch, of a clock that nothing else moves."""

    now_s = 0.0

    def forward(self, share: Sequence[MicroBatch]) -> Iterator[NDArray[np.float32]]:
        for edges in super().forward(share):
            self.now_s += 1.5
            yield edges


def test_many_callers_each_get_their_own_scores() -> None:
    model = make_model("gpt2")
    replica = RewardReplica(UnshardedRank(model), [], CONFIG, name="r0")
    requests = [make_items(3, seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as callers:
        answers = list(callers.map(replica.score, requests))
    replica.close(5.0)
    for items, scores in zip(requests, answers, strict=True):
        assert_same(scores, suffix_log_rewards(model, items, 1000))
    stats = replica.stats()
    assert (stats.answered_requests, stats.answered_items) == (12, 36)
    assert stats.computed_items == 36 and stats.queued_requests == 0
    assert stats.tokens_per_s > 0 and stats.waiting_s > 0


def test_requests_that_wait_are_merged_into_one_round() -> None:
    rank = GatedRank(make_model("gpt2"))
    replica = RewardReplica(rank, [], replace_config(token_budget=100_000), name="r0")
    first = replica.submit(make_items(1))
    assert rank.entered.wait(10)
    rest = [replica.submit(make_items(2, seed)) for seed in range(5)]
    assert replica.stats().queued_items == 10
    sleep(0.2)
    rank.gate.set()
    for pending in (first, *rest):
        pending.result(10.0)
    assert rank.num_forwards == 2
    # The five waited for as long, the first not at all.
    assert 1.0 <= replica.stats().queued_s < 10.0
    replica.close(5.0)


def test_an_item_is_computed_once_however_often_it_is_asked_for() -> None:
    replica = RewardReplica(UnshardedRank(make_model("gpt2")), [], CONFIG, name="r0")
    [one] = make_items(1)
    first = replica.score([one, one])
    again = replica.score([one])
    assert replica.stats().computed_items == 1 and replica.stats().answered_items == 3
    assert_same([*first, first[0]], [*again * 2, first[1]])
    replica.close(5.0)


def test_the_memory_forgets_what_was_not_used_longest() -> None:
    config = replace_config(cache_items=2)
    replica = RewardReplica(UnshardedRank(make_model("gpt2")), [], config, name="r0")
    a, b, c = make_items(3)
    for one in (a, b, a, c, a, b):  # c drives out b, and b is then computed again
        replica.score([one])
    assert replica.stats().computed_items == 4
    replica.close(5.0)


def test_a_bad_item_fails_its_own_request_only() -> None:
    replica = RewardReplica(UnshardedRank(make_model("gpt2")), [], CONFIG, name="r0")
    good, bad = make_items(2)
    bad = replace(bad, answer=np.array([VOCAB_SIZE], dtype=np.int32))
    with pytest.raises(BadItem, match=r"item 1 of 2: answer\[0\] is token 31, outside"):
        replica.score([good, bad])
    assert len(replica.score([good])) == 1 and replica.healthy()
    replica.close(5.0)


def test_a_score_that_is_not_finite_fails_its_own_request_only() -> None:
    model = make_model("gpt2")
    with torch.no_grad():  # token 30 poisons every text that it is read in
        model.transformer.wte.weight[30] = torch.nan
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, 32))
    rank = GatedRank(model)
    replica = RewardReplica(rank, [], replace_config(token_budget=100_000), name="r0")
    tokens = np.array([1, 2, 3], dtype=np.int32)
    good = ScoreItem(context=tokens, completion=tokens, stops=tokens, answer=tokens)
    blocker = replica.submit([good])
    assert rank.entered.wait(10)
    poisoned = replace(good, context=np.array([30], dtype=np.int32))
    fine, not_fine = replica.submit([replace(good, answer=tokens[:1])]), replica.submit([poisoned])
    rank.gate.set()
    with pytest.raises(BadItem, match=r"item 0 of 1: the model gives it .*nan.* not all finite"):
        not_fine.result(10.0)
    assert np.isfinite(fine.result(10.0)[0]).all() and np.isfinite(blocker.result(10.0)[0]).all()
    assert replica.healthy()
    replica.close(5.0)


def test_a_late_answer_is_a_named_timeout_and_the_replica_recovers() -> None:
    rank = GatedRank(make_model("gpt2"))
    replica = RewardReplica(rank, [], replace_config(deadline_s=3.0), name="r7")
    stuck = replica.submit(make_items(1))
    assert rank.entered.wait(10)
    queued = replica.submit(make_items(1, seed=1))
    with pytest.raises(ScoreFailed, match=r"r7: no scores for 1 items after 3\.0 s.*phase pass"):
        stuck.result(3.0)
    with pytest.raises(ScoreFailed, match="phase queue"):
        queued.result(0.1)
    assert not replica.healthy()  # the pass has outlasted its deadline
    rank.gate.set()
    with pytest.raises(ScoreFailed, match=r"spent the deadline of 3\.0 s in phase queue"):
        queued.result(10.0)
    assert len(replica.score(make_items(1, seed=2))) == 1
    assert replica.healthy() and replica.stats().expired_requests == 1
    replica.close(5.0)


def test_a_replica_that_scores_on_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    config, rank = replace_config(deadline_s=2.0, token_budget=60), SlowRank(make_model("gpt2"))
    monkeypatch.setattr("reward.replica.monotonic", lambda: rank.now_s)
    replica = RewardReplica(rank, [], config, name="r0")
    slow, queued = replica.submit(make_items(9)), replica.submit(make_items(1, seed=1))
    assert len(slow.result(2.0)) == 9 and len(queued.result(2.0)) == 1
    assert rank.now_s > 8.0
    assert replica.healthy() and replica.stats().expired_requests == 0
    rank.now_s += 3.0
    assert replica.healthy() and replica.stats().unmoved_s == 3.0  # nothing was asked of it
    replica.close(5.0)


def test_a_failed_pass_breaks_the_replica_at_once() -> None:
    rank = GatedRank(make_model("gpt2"))
    rank.error = RuntimeError("out of memory")
    replica = RewardReplica(rank, [], CONFIG, name="r3")
    pending = replica.submit(make_items(1))
    assert rank.entered.wait(10)
    queued = replica.submit(make_items(1))
    rank.gate.set()
    for failed in (pending, queued):
        with pytest.raises(ScoreFailed, match=r"r3 broke in a pass over 1 ranks.*out of memory"):
            failed.result(10.0)
    assert not replica.healthy()
    with pytest.raises(ScoreFailed, match="out of memory"):
        replica.submit(make_items(1))
    replica.close(5.0)


def test_closing_fails_what_is_queued() -> None:
    rank = GatedRank(make_model("gpt2"))
    replica = RewardReplica(rank, [], CONFIG, name="r0")
    replica.submit(make_items(1))
    assert rank.entered.wait(10)
    queued = replica.submit(make_items(1))
    with pytest.raises(ScoreFailed, match="still under way"):
        replica.close(0.05)
    with pytest.raises(ScoreFailed, match="closed"):
        queued.result(5.0)
    rank.gate.set()
    replica.close(5.0)


def test_shares_have_equal_length_and_lose_nothing() -> None:
    batches = lay_out(make_items(9), 60).batches
    for num_ranks in (1, 2, 3, 4):
        shares = deal(batches, num_ranks)
        assert len({len(share) for share in shares}) == 1
        dealt = [batch for passes in zip(*shares, strict=True) for batch in passes]
        assert dealt[: len(batches)] == batches
        assert len(dealt) - len(batches) < num_ranks


def test_errors_and_shares_travel() -> None:
    for error in (ScoreFailed("x"), BadItem("x"), RankLost("x")):
        assert repr(pickle.loads(pickle.dumps(error))) == repr(error)
    batch = lay_out(make_items(3), 1000).batches[0]
    model = make_model("gpt2")
    [sent] = UnshardedRank(model).forward([batch])
    [received] = UnshardedRank(model).forward([pickle.loads(pickle.dumps(batch))])
    np.testing.assert_array_equal(sent, received)
