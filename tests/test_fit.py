"""Whether a run fits: what cannot be placed is refused, and the refusal says what is missing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cluster.config.file import load_config
from cluster.config.placement import GroupPlacement, Placement
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.distributed import worker
from cluster.distributed.launcher import process_environment
from cluster.distributed.worker import cap_memory
from cluster.run.resources import (
    Node,
    check_fit,
    describe,
    has_place_for_evaluator,
    unclaimed_gpus,
    with_gpu_shares,
)
from tests.light_run import context


def toy(*overrides: str) -> RunConfig:
    return load_config("tasks/toy.toml", overrides)


def test_a_run_fits_exactly() -> None:
    # 2 actors, 1 reward rank and 1 learner rank at a quarter each.
    check_fit(toy(), [Node(0.75, 0.0), Node(0.25, 0.0)])
    with pytest.raises(UserError, match=r"needs 1 CPU .*there are 0\.95, 0\.05 too few"):
        check_fit(toy(), [Node(0.95, 0.0)])


def test_the_evaluator_may_wait_for_a_place_that_becomes_free_and_must_have_one_then() -> None:
    assert has_place_for_evaluator(toy(), [Node(1.0, 0.0), Node(0.25, 0.0)])
    assert not has_place_for_evaluator(toy(), [Node(1.0, 0.0)])
    alone = toy('learner.objective="sft"', "cluster.actor_placement.cpus=2")
    check_fit(alone, [Node(2.0, 0.0)])
    with pytest.raises(UserError, match="each of the evaluator must have 2 CPU"):
        check_fit(alone, [Node(1.0, 0.0)])


def test_fractions_of_a_gpu_add_up() -> None:
    half = [f"cluster.{part}_placement.gpus=0.5" for part in ("reward", "learner")]
    check_fit(toy(*half), [Node(2.0, 1.0)])
    with pytest.raises(UserError, match=r"1 reward ranks x 0\.5, 1 learner ranks x 0\.5"):
        check_fit(toy(*half), [Node(2.0, 0.5)])


def test_a_rank_that_no_node_can_hold_is_named_with_what_the_nodes_have() -> None:
    config = toy("cluster.learner_placement.cpus=3")
    with pytest.raises(UserError, match=r"each of the learner ranks must have 3 CPU") as caught:
        check_fit(config, [Node(2.0, 0.0), Node(2.0, 0.0)])
    assert "2 nodes with 2 CPU, 0 GPU" in str(caught.value)


def test_ranks_that_must_share_a_node() -> None:
    ranks = ["reward.ranks=4", "cluster.reward_placement.cpus=1"]
    nodes = [Node(3.0, 0.0), Node(3.0, 0.0)]
    check_fit(toy(*ranks), nodes)
    with pytest.raises(UserError, match=r"4 reward ranks together \(STRICT_PACK\)"):
        check_fit(toy(*ranks, "cluster.reward_placement.strategy=STRICT_PACK"), nodes)


def test_equal_nodes_are_described_together() -> None:
    assert describe([Node(2, 0), Node(8, 1), Node(8, 1)]) == (
        "1 node with 2 CPU, 0 GPU; 2 nodes with 8 CPU, 1 GPU"
    )
    assert describe([]) == "no nodes"


def test_a_claim_that_ray_cannot_place_is_refused() -> None:
    with pytest.raises(ValidationError, match="both 0"):
        Placement(cpus=0)
    with pytest.raises(ValidationError, match="whole above 1"):
        GroupPlacement(gpus=1.5)
    assert Placement(cpus=0, gpus=0.5).gpus == 0.5


def gpus_of(config: RunConfig) -> tuple[float, float, float]:
    cluster = config.cluster
    placements = (cluster.actor_placement, cluster.reward_placement, cluster.learner_placement)
    return placements[0].gpus, placements[1].gpus, placements[2].gpus


@pytest.mark.parametrize(
    ("overrides", "gpus", "shares"),
    [
        ([], 0, (0, 0, 0)),
        (["lm.device=cpu"], 1, (0, 0, 0)),
        ([], 1, (0.25, 0.25, 0.25)),  # 2 actors, 1 reward rank, 1 learner rank
        ([], 2, (0.5, 0.5, 0.5)),
        ([], 3, (0.5, 0.5, 0.5)),  # thirds would leave one of four without a place
        ([], 8, (1, 1, 1)),
        (["learner.ranks=2"], 3, (0.33, 0.33, 1)),
        (["cluster.learner_placement.gpus=0.5"], 1, (0, 0, 0.5)),
    ],
)
def test_where_no_part_claims_a_gpu_they_share_the_machines(
    overrides: list[str], gpus: int, shares: tuple[float, float, float]
) -> None:
    config = with_gpu_shares(toy(*overrides), gpus)
    assert gpus_of(config) == shares
    if any(shares):
        check_fit(config, [Node(8.0, gpus)])


def test_ranks_that_compute_together_have_a_gpu_each_or_are_refused() -> None:
    with pytest.raises(UserError, match=r"more than this machine's 2: lower learner\.ranks"):
        with_gpu_shares(toy("learner.ranks=2"), 2)


def test_gpus_of_a_cluster_that_nobody_claims_are_told() -> None:
    nodes = [Node(8.0, 0.0), Node(8.0, 4.0)]
    assert unclaimed_gpus(toy(), nodes, grows=False).endswith(
        "actor, reward, learner; where that is meant, set lm.device=cpu, else "
        "cluster.actor_placement.gpus, cluster.reward_placement.gpus, "
        "cluster.learner_placement.gpus"
    )
    one = unclaimed_gpus(toy("cluster.learner_placement.gpus=1"), nodes, grows=False)
    assert one.startswith("the nodes that are up have 4 GPUs: these parts claim none")
    assert "CPUs: actor, reward; where" in one
    assert not unclaimed_gpus(toy("lm.device=cpu"), nodes, grows=True)
    assert not unclaimed_gpus(toy(), nodes[:1], grows=False)


def test_of_nodes_that_may_come_it_is_told_that_nobody_asks_for_gpus() -> None:
    said = unclaimed_gpus(toy(), [Node(8.0, 0.0)], grows=True)
    assert said.startswith("no node that is up has a GPU, and the autoscaler starts none for who")
    claims = [f"cluster.{part}_placement.gpus=1" for part in ("actor", "reward", "learner")]
    assert not unclaimed_gpus(toy(*claims), [], grows=True)


def test_a_process_that_claims_no_gpu_sees_none() -> None:
    assert process_environment(Placement())["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in process_environment(Placement(gpus=0.5))


@pytest.mark.parametrize(
    ("share", "cap"), [(0.5, 0.45), (0.06, 0.03), (0.0, None), (1.0, None), (2.0, None)]
)
def test_a_share_of_a_gpu_caps_the_memory_of_its_process(
    share: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    caps: list[tuple[float, int]] = []
    card = SimpleNamespace(total_memory=10_000 * 2**20)  # CUDA keeps 500 MB of it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: caps.append(given)
    )
    cap_memory(share)
    assert caps == ([] if cap is None else [(pytest.approx(cap), 0)])


def test_a_worker_caps_its_memory_before_it_builds_its_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(worker.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(worker, "check_source", lambda *_, **__: None)
    monkeypatch.setattr(worker, "pin_interface", lambda _: None)
    monkeypatch.setattr(worker, "cap_memory", done.append)
    monkeypatch.setattr(worker.Worker, "_build", lambda *_: done.append("model"))
    nobody: Any = None
    of_gpu = worker.Member(name="actor-0", gpus=0.25)
    worker.Worker(context(toy(), nobody), of_gpu).start(nobody)
    assert done == [0.25, "model"]
