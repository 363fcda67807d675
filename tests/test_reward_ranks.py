"""The reward replica over two real gloo ranks, each a process of its own."""

import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from buffer.endpoint import free_port
from lm.config import LMConfig
from lm.process_group import RankLost, Rendezvous
from reward.deepspeed_rank import RewardRank
from reward.lockstep import Edges
from reward.packed import suffix_log_rewards
from reward.packing import MicroBatch
from reward.replica import RewardReplica, ScoreFailed
from tests.reward_toy import CONFIG, assert_same, make_items, make_model, replace_config
from tests.tiny_lm import save_model


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
    with tempfile.TemporaryDirectory() as folder:
        saved = save_model(make_model(architecture), Path(folder))
        return RewardRank(LMConfig(model=saved, device="cpu"), lambda: meeting)


def serve_rank_one(pipe: Connection, architecture: str, timeout_s: float) -> None:
    pipe.send("up")
    rank = join(architecture, pipe.recv(), 1, 2, timeout_s)
    while True:
        pipe.send(list(rank.forward(pipe.recv())))


def agree_on_port(pipe: Connection) -> int:
    """Wait until rank 1 is up; a port that was free then, for rank 0 to listen on."""
    assert pipe.poll(60) and pipe.recv() == "up", "rank 1 did not come"
    port = free_port("127.0.0.1")
    pipe.send(port)
    return port


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
    context.set_forkserver_preload(["reward.deepspeed_rank", "reward.replica", "tests.reward_toy"])
    near, far = context.Pipe()
    mine, verdict = context.Pipe()
    one = context.Process(target=serve_rank_one, args=(far, architecture, timeout_s))
    one.start()
    zero = context.Process(
        target=run_rank_zero,
        args=(verdict, scenario, near, one.pid, architecture, timeout_s),
    )
    zero.start()
    try:
        assert mine.poll(90), "no verdict after 90 s"
        assert mine.recv() is None
    finally:
        for process in (zero, one):
            process.kill()
            process.join(10)


def num_held(rank: RewardRank) -> int:
    """Parameters that a rank holds between passes."""
    return sum(parameter.ds_tensor.numel() for parameter in rank.model.parameters())


def check_sharded(pipe: Connection, peer_pid: int, architecture: str, timeout_s: float) -> None:
    whole = make_model(architecture)
    rank = join(architecture, agree_on_port(pipe), 0, 2, timeout_s)
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert total / 2 <= num_held(rank) <= total / 2 + 100, (num_held(rank), total)
    replica = RewardReplica(rank, [PipePeer(pipe)], replace_config(deadline_s=timeout_s), name="r")
    for count in (1, 2, 3, 8):  # one item leaves rank 1 a filler; then uneven shares
        items = make_items(count, seed=count)
        assert_same(replica.score(items), suffix_log_rewards(whole, items, 1000))
    assert num_held(rank) <= total / 2 + 100  # what a pass gathered has been given up
    requests = [make_items(3, seed) for seed in range(20, 26)]
    with ThreadPoolExecutor(3) as callers:
        for items, scores in zip(requests, callers.map(replica.score, requests), strict=True):
            assert_same(scores, suffix_log_rewards(whole, items, 1000))
    lose_peer(replica, peer_pid, signal.SIGKILL, within_s=timeout_s)


def check_stalled(pipe: Connection, peer_pid: int, architecture: str, timeout_s: float) -> None:
    rank = join(architecture, agree_on_port(pipe), 0, 2, timeout_s)
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
    dist.destroy_process_group()


def check_nobody_came(pipe: Connection, *_: object) -> None:
    start = time.monotonic()
    with pytest.raises(RankLost, match=r"reward rank 1 of 2 at 127.0.0.1:1 .* in rendezvous"):
        join("gpt2", 1, 1, 2, 1.0)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("scenario", [check_alone, check_nobody_came])
def test_a_sharded_rank_alone(scenario: Callable[..., None]) -> None:
    two_ranks(scenario, "gpt2", timeout_s=1.0)
