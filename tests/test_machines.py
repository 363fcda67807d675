"""Which machine each part of a run lands on, as Ray's own autoscaler decides; that one GPU does."""

import logging
import re
import shutil
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
from transformers import GPT2Config, GPTJConfig, PretrainedConfig

from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.distributed import launcher
from cluster.run.plan import check_memory, plan_run
from cluster.run.resources import Node, check_fit

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
L40S_MB = 46_068.0
# Task of tasks/paper -> the shape of its model.
SHAPES = {
    "random_number": GPTJConfig(),
    "continuation": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "infilling": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "subjectivity": GPTJConfig(),
    "arithmetic": GPTJConfig(),
}


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


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tasks/paper").glob("*.toml")), ids=lambda f: f.stem
)
def test_one_gpu_has_shares_for_all_parts_of_the_papers_runs(file: Path) -> None:
    assert file.stem in SHAPES
    config = load_config(str(file))
    check_fit(config, [Node(4.0, 1.0)])
    cluster = config.cluster
    assert min(cluster.actor_placement.gpus, cluster.learner_placement.gpus) > 0
    assert bool(cluster.reward_placement.gpus) == bool(config.reward_replicas)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "shape"), SHAPES.items(), ids=list(SHAPES))
def test_one_gpu_of_48_gb_has_memory_for_all_parts_of_the_papers_runs(
    task: str, shape: PretrainedConfig, tmp_path: Path
) -> None:
    shape.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "seed_lm/model" / name, tmp_path)
    overrides = [f"lm.model={tmp_path}"]
    if task in ("continuation", "infilling"):
        overrides.append("task.embedder=")
    check_memory(plan_run(load_config(f"tasks/paper/{task}.toml", overrides), on_gpu=True), L40S_MB)
