"""The reward replica: in one process with one rank, and over two real gloo ranks."""

import multiprocessing as mp
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from threading import Event

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from reward.config import RewardConfig
from reward.item import BadItem, ScoreItem
from reward.layout import MicroBatch, plan
from reward.lockstep import Edges, deal
from reward.packed import suffix_log_rewards
from reward.rank import RankLost, Rendezvous, RewardRank
from reward.replica import RewardReplica, ScoreFailed, ScoreTimeout
from reward.whole import WholeRank
from tests.conftest import VOCAB_SIZE, tiny_config

CONFIG = RewardConfig(token_budget=150, deadline_s=30.0)


def make_model(architecture: str) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def make_items(count: int, seed: int = 0) -> list[ScoreItem]:
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        length = int(rng.integers(0, 15))
        items.append(
            ScoreItem(
                context=rng.integers(0, VOCAB_SIZE, rng.integers(1, 12)).astype(np.int32),
                completion=rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
                stops=np.arange(length + 1, dtype=np.int32),
                answer=rng.integers(0, VOCAB_SIZE, rng.integers(1, 5)).astype(np.int32),
            )
        )
    return items


def assert_same(got: Sequence[NDArray], expected: Sequence[NDArray]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


class GatedRank:
    """A rank that waits at a gate in every forward, counts its passes, and may fail."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.limits = WholeRank(model).limits
        self.entered, self.gate = Event(), Event()
        self.error: Exception | None = None
        self.num_forwards = 0
        self._rank = WholeRank(model)

    def forward(self, share: Sequence[MicroBatch]) -> Edges:
        self.num_forwards += 1
        self.entered.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return self._rank.forward(share)


# One rank, one process


def test_many_callers_each_get_their_own_scores() -> None:
    model = make_model("gpt2")
    replica = RewardReplica(WholeRank(model), [], CONFIG, name="r0")
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
    rank.gate.set()
    for pending in (first, *rest):
        pending.result(10.0)
    assert rank.num_forwards == 2
    replica.close(5.0)


def test_an_item_is_computed_once_however_often_it_is_asked_for() -> None:
    replica = RewardReplica(WholeRank(make_model("gpt2")), [], CONFIG, name="r0")
    [one] = make_items(1)
    first = replica.score([one, one])
    again = replica.score([one])
    assert replica.stats().computed_items == 1 and replica.stats().answered_items == 3
    assert_same([*first, first[0]], [*again * 2, first[1]])
    replica.close(5.0)


def test_the_memory_forgets_what_was_not_used_longest() -> None:
    config = replace_config(cache_items=2)
    replica = RewardReplica(WholeRank(make_model("gpt2")), [], config, name="r0")
    a, b, c = make_items(3)
    for one in (a, b, a, c, a, b):  # c drives out b, and b is then computed again
        replica.score([one])
    assert replica.stats().computed_items == 4
    replica.close(5.0)


def replace_config(**changes: float) -> RewardConfig:
    return RewardConfig.model_validate({**CONFIG.model_dump(), **changes})


def test_a_bad_item_fails_its_own_request_only() -> None:
    replica = RewardReplica(WholeRank(make_model("gpt2")), [], CONFIG, name="r0")
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
    replica = RewardReplica(rank, [], replace_config(deadline_s=0.3), name="r7")
    stuck = replica.submit(make_items(1))
    assert rank.entered.wait(10)
    queued = replica.submit(make_items(1, seed=1))
    with pytest.raises(ScoreTimeout, match=r"r7: no scores for 1 items after 0.3 s.*phase pass"):
        stuck.result(0.3)
    with pytest.raises(ScoreTimeout, match="phase queue"):
        queued.result(0.1)
    assert not replica.healthy()  # the pass has outlasted its deadline
    rank.gate.set()
    with pytest.raises(ScoreTimeout, match=r"spent the deadline of 0.3 s in phase queue"):
        queued.result(10.0)
    assert len(replica.score(make_items(1, seed=2))) == 1
    assert replica.healthy() and replica.stats().expired_requests == 1
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
    with pytest.raises(ScoreTimeout, match="still under way"):
        replica.close(0.05)
    with pytest.raises(ScoreFailed, match="closed"):
        queued.result(5.0)
    rank.gate.set()
    replica.close(5.0)


def test_shares_have_equal_length_and_lose_nothing() -> None:
    batches = plan(make_items(9), 60).batches
    for num_ranks in (1, 2, 3, 4):
        shares = deal(batches, num_ranks)
        assert len({len(share) for share in shares}) == 1
        dealt = [batch for passes in zip(*shares, strict=True) for batch in passes]
        assert dealt[: len(batches)] == batches
        assert len(dealt) - len(batches) < num_ranks


def test_errors_and_shares_travel() -> None:
    for error in (ScoreFailed("x"), ScoreTimeout("x"), BadItem("x"), RankLost("x")):
        assert repr(pickle.loads(pickle.dumps(error))) == repr(error)
    batch = plan(make_items(3), 1000).batches[0]
    model = make_model("gpt2")
    [sent] = WholeRank(model).forward([batch])
    [received] = WholeRank(model).forward([pickle.loads(pickle.dumps(batch))])
    np.testing.assert_array_equal(sent, received)


# Two ranks, each a process of its own


class PipePeer:
    """A rank behind a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def forward(self, share: Sequence[MicroBatch]) -> "PipePeer":
        self._connection.send(share)
        return self

    def result(self, timeout: float) -> Edges:
        if not self._connection.poll(timeout):
            raise TimeoutError
        return self._connection.recv()


def join(architecture: str, port: int, rank: int, num_ranks: int, timeout_s: float) -> RewardRank:
    meeting = Rendezvous(
        address="127.0.0.1", port=port, rank=rank, num_ranks=num_ranks, timeout_s=timeout_s
    )
    return RewardRank(make_model(architecture), meeting)


def serve_rank_one(pipe: Connection, architecture: str, port: int, timeout_s: float) -> None:
    rank = join(architecture, port, 1, 2, timeout_s)
    while True:
        pipe.send(rank.forward(pipe.recv()))


def run_rank_zero(
    verdict: Connection, scenario: Callable[..., None], pipe: Connection, *args: object
) -> None:
    try:
        scenario(pipe, *args)
        verdict.send(None)
    except BaseException as error:
        verdict.send(repr(error))
        raise


def two_ranks(scenario: Callable[..., None], architecture: str, timeout_s: float) -> None:
    """Run the scenario in a process that becomes rank 0, beside one that serves as rank 1."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["reward.rank", "reward.replica", "tests.conftest"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    near, far = context.Pipe()
    mine, verdict = context.Pipe()
    one = context.Process(target=serve_rank_one, args=(far, architecture, port, timeout_s))
    one.start()
    zero = context.Process(
        target=run_rank_zero,
        args=(verdict, scenario, near, one.pid, architecture, port, timeout_s),
    )
    zero.start()
    try:
        assert mine.poll(90), "no verdict after 90 s"
        assert mine.recv() is None
    finally:
        for process in (zero, one):
            process.kill()
            process.join(10)


def check_sharded(
    pipe: Connection, peer_pid: int, architecture: str, port: int, timeout_s: float
) -> None:
    whole = make_model(architecture)
    rank = join(architecture, port, 0, 2, timeout_s)
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert total / 2 <= rank.num_held <= total / 2 + 100, (rank.num_held, total)
    replica = RewardReplica(rank, [PipePeer(pipe)], replace_config(deadline_s=timeout_s), name="r")
    for count in (1, 2, 3, 8):  # one item leaves rank 1 a filler; then uneven shares
        items = make_items(count, seed=count)
        assert_same(replica.score(items), suffix_log_rewards(whole, items, 1000))
    assert rank.num_held <= total / 2 + 100  # what a pass gathered has been given up
    requests = [make_items(3, seed) for seed in range(20, 26)]
    with ThreadPoolExecutor(3) as callers:
        for items, scores in zip(requests, callers.map(replica.score, requests), strict=True):
            assert_same(scores, suffix_log_rewards(whole, items, 1000))
    lose_peer(replica, peer_pid, signal.SIGKILL, within_s=timeout_s)


def check_stalled(
    pipe: Connection, peer_pid: int, architecture: str, port: int, timeout_s: float
) -> None:
    rank = join(architecture, port, 0, 2, timeout_s)
    replica = RewardReplica(rank, [PipePeer(pipe)], replace_config(deadline_s=60.0), name="r")
    replica.score(make_items(2))
    lose_peer(replica, peer_pid, signal.SIGSTOP, within_s=timeout_s + 10)


def lose_peer(replica: RewardReplica, pid: int, how: signal.Signals, within_s: float) -> None:
    os.kill(pid, how)
    start = time.monotonic()
    with pytest.raises(ScoreFailed, match=r"r broke in a pass over 2 ranks.*rank 0 of 2.*lost"):
        replica.score(make_items(4, seed=99))
    assert time.monotonic() - start < within_s
    assert not replica.healthy()
    with pytest.raises(ScoreFailed):
        replica.submit(make_items(1))


def test_two_ranks_score_as_one_and_a_dead_rank_is_an_error() -> None:
    two_ranks(check_sharded, "llama", timeout_s=30.0)


def test_two_ranks_hold_tied_embeddings_too() -> None:
    two_ranks(check_sharded, "gpt2", timeout_s=30.0)


def test_a_stalled_rank_ends_in_an_error_at_the_deadline() -> None:
    two_ranks(check_stalled, "gpt2", timeout_s=5.0)


def check_alone(pipe: Connection, *_: object) -> None:
    rank = join("gpt2", 0, 0, 1, 30.0)
    items = make_items(4)
    replica = RewardReplica(rank, [], CONFIG, name="r")
    assert_same(replica.score(items), suffix_log_rewards(make_model("gpt2"), items, 1000))
    rank.close()


def check_nobody_came(pipe: Connection, *_: object) -> None:
    start = time.monotonic()
    with pytest.raises(RankLost, match=r"reward rank 1 of 2 at 127.0.0.1:1 .* in rendezvous"):
        join("gpt2", 1, 1, 2, 1.0)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("scenario", [check_alone, check_nobody_came])
def test_a_sharded_rank_alone(scenario: Callable[..., None]) -> None:
    two_ranks(scenario, "gpt2", timeout_s=1.0)
