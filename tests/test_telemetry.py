"""What Prometheus gets of a run: every metric has a source, a panel shows it, and Ray offers it."""

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import ray
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from actors.actor import ActorStats
from buffer.stats import Counters, ReplayStats
from cluster.config.project import PROJECT_ROOT
from cluster.distributed.clients import RemoteRegistry, RemoteScorer
from cluster.distributed.services import ReplicaRegistry
from cluster.distributed.telemetry import INSTRUMENTS, Source, Telemetry
from reward.replica import ReplicaStats
from tests.light_failures import Failing
from tests.light_worker import Answering

ALL = [each for group in INSTRUMENTS.values() for each in group]
DASHBOARD = json.loads((PROJECT_ROOT / "cluster/grafana.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
Samples = dict[tuple[str, str], float]


def names(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in fields(kind)}


def test_every_metric_is_read_from_a_figure_that_there_is() -> None:
    sources = {
        Source.ACTOR: names(ActorStats) | {"scoring_retries", "verifier_failures"},
        Source.REPLICA: names(ReplicaStats),
        Source.BUFFER: names(ReplayStats, Counters),
    }
    for source, figures in sources.items():
        assert {each.key for each in INSTRUMENTS[source]} <= figures


def test_names_are_of_one_metric_each_and_end_in_a_unit() -> None:
    assert not [name for name, count in Counter(each.name for each in ALL).items() if count > 1]
    assert all(each.description.endswith(".") for each in ALL)
    timed = [each for each in ALL if each.key.endswith("_s")]
    assert timed and all(each.name.endswith("_seconds") for each in timed)
    assert all(each.name.endswith("_nats") for each in ALL if each.key.endswith("_nats"))
    assert all(each.name.endswith("_versions") for each in ALL if each.key.endswith("_versions"))


def test_the_dashboard_shows_every_metric_and_asks_for_no_other() -> None:
    asked = {name for query in QUERIES for name in re.findall(r"ray_\w+", query)}
    assert asked == {f"ray_{each.name}{'_total' * each.is_counter}" for each in ALL}
    assert "label_values(ray_amortize_desired_parts, run)" in json.dumps(DASHBOARD["templating"])


def test_queries_are_of_the_chosen_runs_and_sum_over_processes() -> None:
    for query in QUERIES:
        assert query.count('{run=~"$run"}') == query.count("ray_amortize_"), query
        # A part that is replaced, or a run that is resumed, has a series for each process.
        assert query.count("by (run") == query.count("ray_amortize_"), query


def test_panels_have_room_and_a_description() -> None:
    taken = Counter(
        (x, y)
        for panel in DASHBOARD["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    )
    assert max(taken.values()) == 1 and max(x for x, _ in taken) < 24
    assert all(panel["description"] for panel in PANELS)


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    config = yaml.safe_load((PROJECT_ROOT / "cluster/prometheus.yml").read_text(encoding="utf-8"))
    [job] = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


@pytest.fixture(scope="module")
def node() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, namespace="telemetry")
        yield ray.nodes()[0]
        ray.shutdown()


def scraped(node: dict[str, Any], run: str) -> Samples:
    """Values by name and part that the node offers of a run."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples: Samples = {}
    for line in lines:
        if line.startswith("ray_amortize_") and f'run="{run}"' in line:
            name, _, rest = line.partition("{")
            part = re.search(r'part="([^"]*)"', rest)
            assert part is not None and (name, part[1]) not in samples
            samples[name, part[1]] = float(rest.rpartition(" ")[2])
    return samples


@pytest.mark.slow
def test_a_node_offers_what_was_told(node: dict[str, Any]) -> None:
    telemetry = Telemetry("first")
    expected: Samples = {
        ("ray_amortize_actor_tokens_total", "actor-0"): 70.0,  # 50, and 20 of its next incarnation
        ("ray_amortize_actor_tokens_total", "actor-1"): 5.0,
        ("ray_amortize_actor_policy_version", "actor-0"): 3.0,
        ("ray_amortize_learner_log_reward_nats", "learner"): -2.5,
    }
    seen: Samples = {}
    deadline = time.monotonic() + 60
    while seen != expected and time.monotonic() < deadline:
        telemetry.record(Source.ACTOR, {"tokens": 30, "version": 1}, part="actor-0")
        telemetry.record(Source.ACTOR, {"tokens": 50, "version": 2}, part="actor-0")
        telemetry.record(Source.ACTOR, {"tokens": 20, "version": 3}, part="actor-0", incarnation=1)
        telemetry.record(Source.ACTOR, {"tokens": 5}, part="actor-1")
        telemetry.record(Source.LEARNER, {"reward/log_mean_nats": -2.5, "?": 1.0}, part="learner")
        time.sleep(0.5)
        seen = scraped(node, "first")
    assert seen == expected
    # What is told no more is a part that is gone: totals stay, values of the moment do not.
    totals = {key: value for key, value in expected.items() if key[0].endswith("_total")}
    deadline = time.monotonic() + 60
    while seen != totals and time.monotonic() < deadline:
        time.sleep(0.5)
        seen = scraped(node, "first")
    assert seen == totals


@pytest.mark.slow
def test_scorings_that_are_asked_for_again_are_counted(node: dict[str, Any]) -> None:
    light = {"num_cpus": 0}
    registry = RemoteRegistry(ray.remote(ReplicaRegistry).options(**light).remote(), timeout_s=60)
    kept = [
        ray.remote(kind).options(name=name, **light).remote()
        for name, kind in (("fails", Failing), ("answers", Answering))
    ]
    registry.announce(("fails", "answers"))
    scorer = RemoteScorer(
        registry, namespace="telemetry", attempt_s=60, handover_s=60, stop=lambda: False
    )
    assert scorer.submit([]).result(60) == ["scores"] and scorer.retries == 1
    assert scorer.submit([]).result(60) == ["scores"] and scorer.retries == 2
    del kept
