"""Whether a run fits: what cannot be placed is refused, and the refusal says what is missing."""

import pytest
from pydantic import ValidationError

from cluster.config.file import load_config
from cluster.config.placement import GroupPlacement, Placement
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.run.resources import Node, check_fit, describe


def toy(*overrides: str) -> RunConfig:
    return load_config("tasks/toy.toml", overrides)


def test_a_run_fits_exactly() -> None:
    # 2 actors, 1 reward rank, 1 learner rank and the evaluator at a quarter each.
    check_fit(toy(), [Node(1.0, 0.0), Node(0.25, 0.0)])
    with pytest.raises(UserError, match=r"needs 1\.25 CPU .*there are 1\.2, 0\.05 too few"):
        check_fit(toy(), [Node(1.2, 0.0)])


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
