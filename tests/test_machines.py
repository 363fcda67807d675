"""Every part lands on the machine that is meant for it, as Ray's own autoscaler decides."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.distributed import launcher

ROOT = Path(__file__).resolve().parent.parent
# What AWS says of the machines; Ray asks it and fills their resources in.
SIZES = {
    "m7i.2xlarge": {"CPU": 0},  # the file says so
    "g6.2xlarge": {"CPU": 8, "GPU": 1},  # L4, 24 GB
    "g6.12xlarge": {"CPU": 48, "GPU": 4},
    "g6e.2xlarge": {"CPU": 8, "GPU": 1},  # L40S, 48 GB
}
PARTS = {"actor-0": "actor", "reward-0": "reward", "learner": "learner", "evaluator-1": "actor"}
WHOLE = [f"cluster.{part}_placement.gpus=1" for part in ("actor", "reward", "learner")]


@pytest.fixture
def machines() -> AutoscalingConfig:
    table = yaml.safe_load((ROOT / "cluster/gpu.yaml").read_text())
    for kind in table["available_node_types"].values():
        kind["resources"] = SIZES[kind["node_config"]["InstanceType"]]
    return AutoscalingConfig(table, skip_content_hash=True)


def demand_of(config: RunConfig, part: str, patch: pytest.MonkeyPatch) -> GangResourceRequest:
    """The placement group that the launcher asks for, as Ray hands it to its autoscaler."""
    asked: dict[str, Any] = {}

    class Group:
        def ready(self) -> None:
            """Never."""

    def placement_group(bundles: list[dict[str, float]], **options: Any) -> Group:
        asked.update(options, bundles=bundles)
        return Group()

    patch.setattr(launcher, "placement_group", placement_group)
    nothing: Any = None
    launcher.Launcher(config, "").launch(nothing, part, incarnation=0)
    requests = [
        ResourceRequestUtil.make(bundle, label_selectors=[list(constraints(selector))])
        for bundle, selector in zip(asked["bundles"], asked["bundle_label_selector"], strict=True)
    ]
    return GangResourceRequest(requests=requests, details=part)


def constraints(selector: dict[str, str]) -> Iterator[tuple[str, int, list[str]]]:
    for key, text in selector.items():
        operator = "NOT_IN" if text.startswith("!") else "IN"
        values = re.findall(r"[\w.-]+", text.lstrip("!").removeprefix("in("))
        yield key, LabelSelectorOperator.Value(f"LABEL_OPERATOR_{operator}"), values


def started(machines: AutoscalingConfig, *demands: GangResourceRequest) -> dict[str, int]:
    """Machines that Ray would start, by type."""
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=machines.get_node_type_configs(),
        max_num_nodes=12,
        gang_resource_requests=list(demands),
    )
    events = AutoscalerEventLogger(logging.getLogger("tests"))
    reply = ResourceDemandScheduler(events).schedule(request)
    assert not reply.infeasible_gang_resource_requests
    counts: Counter[str] = Counter()
    for launch in reply.to_launch:
        counts[launch.instance_type] += launch.count
    return counts - Counter({"head": 1})


@pytest.mark.parametrize("shares", [[], WHOLE])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_papers_arithmetic_starts_the_machine_that_is_meant_for_it(
    part: str, shares: list[str], machines: AutoscalingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("tasks/paper/arithmetic.toml", shares)
    assert started(machines, demand_of(config, part, monkeypatch)) == {PARTS[part]: 1}


def test_all_parts_together_start_no_more_than_they_need(
    machines: AutoscalingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("tasks/paper/arithmetic.toml", [*WHOLE, "reward.ranks=4"])
    demands = [demand_of(config, part, monkeypatch) for part in (*PARTS, "actor-1")]
    assert started(machines, *demands) == {"actor": 3, "reward": 1, "learner": 1}


def test_labels_of_ones_own_are_asked_for_too(
    machines: AutoscalingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        "tasks/paper/arithmetic.toml",
        [*WHOLE, 'cluster.learner_placement.labels={amortize-part = "in(reward, actor)"}'],
    )
    assert started(machines, demand_of(config, "learner", monkeypatch)) == {"actor": 1}
