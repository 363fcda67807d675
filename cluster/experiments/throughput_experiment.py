"""The throughput experiment: which measurements are made, and what follows from them."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from cluster.config.placement import Placement
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.distributed.parts import Parts
from cluster.distributed.ray_cluster import (
    connect_ray,
    join_cluster,
    leave_cluster,
    living_nodes,
    may_grow,
    namespace_of,
)
from cluster.experiments.simulation import (
    SimulatedParts,
    load_simulated_task,
    simulated_lora,
)
from cluster.experiments.throughput_records import (
    Comparison,
    Row,
    bottleneck_of,
    duration,
    fresh,
    overhead_of,
    rate_of,
    stages_of,
    tokens_per_trajectory,
    window_rates,
)
from cluster.experiments.throughput_trial import batch_size, measure_run, trial_directory
from cluster.run.directory import RUNS, RunDirectory, new_name
from cluster.run.preflight import check_before_start
from cluster.run.resources import check_fit, demands_of

_NEVER = 10**9  # steps, and seconds
_PIPELINE_STEPS = 3  # until sampling, scoring and learning overlap
_START_S, _START_S_PER_PART = 120.0, 30.0  # on a small machine parts start one after another
Report = Callable[[str], None]


class Experiment:
    """Measurements of one configuration with real or simulated models.

    Args:
        replicas: of the reward model; None: as configured.
        address: of a Ray cluster; None: one on this machine, for the experiment.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        actors: Sequence[int],
        replicas: int | None,
        simulated: bool,
        address: str | None,
        report: Report,
    ) -> None:
        if config.rollout_actors == 0:
            raise UserError(
                f'learner.objective "{config.learner.objective}" starts no rollout actors: there '
                f"is nothing to measure; choose another objective"
            )
        self._counts = actors
        self._simulated = simulated
        self._parts = SimulatedParts() if simulated else Parts()
        self._report = report
        self._root = RUNS / new_name(f"throughput-{config.task_name}")
        self._config = self._prepared(config, replicas, address)

    def run(self) -> tuple[list[Row], Comparison]:
        """Every number of actors, then both modes.

        Raises:
            UserError: the cluster cannot hold the largest number.
            StartFailed, RunFailed: a part did not come up, or died.
        """
        largest = self._config.changed({"cluster.actors": max(self._counts)})
        directory = RunDirectory(self._root.name)
        if self._simulated:
            load_simulated_task(largest)
        else:
            check_before_start(
                largest,
                directory,
                resume=False,
                address=largest.cluster.address,
                local=False,
            )
        self._config = self._on_ray(directory.name)
        try:
            if not may_grow():
                check_fit(largest, living_nodes())
            rows: list[Row] = []
            for actors in self._counts:
                rows.append(self._row(actors, rows[0].rate.median if rows else None))
            return rows, self._comparison()
        finally:
            leave_cluster()
            shutil.rmtree(self._root, ignore_errors=True)

    def _prepared(self, config: RunConfig, replicas: int | None, address: str | None) -> RunConfig:
        """No checkpoints, no end, no replacing of what dies, and a Redis of its own."""
        parts = max(self._counts) + config.reward.replicas * config.reward.ranks
        start_s = _START_S + _START_S_PER_PART * (parts + config.learner.ranks)
        config = config.changed(
            {
                "cluster.address": address,
                "cluster.max_restarts": 0,
                "cluster.start_timeout_s": max(config.cluster.start_timeout_s, start_s),
                "learner.steps": _NEVER,
                "learner.checkpoint_every_steps": _NEVER,
                "learner.checkpoint_every_s": float(_NEVER),
                "buffer.url": None,
                "buffer.password_file": None,
                "reward.replicas": replicas or config.reward.replicas,
            }
        )
        return self._waiting(config) if self._simulated else config

    def _waiting(self, config: RunConfig) -> RunConfig:
        """Processes that only wait need no GPU, and as many as were asked for fit on any core."""
        changes: dict[str, Any] = {
            "learner.log_z": "group",
            "lora": simulated_lora(config.throughput.simulation),
            "cluster.actors": max(self._counts),
        }
        for part in ("actor_placement", "reward_placement", "learner_placement"):
            claim: Placement = getattr(config.cluster, part)
            changes |= {f"cluster.{part}.gpus": 0.0, f"cluster.{part}.cpus": claim.cpus or 0.25}
        config = config.changed(changes)
        if config.cluster.address is not None:
            return config
        needed = math.ceil(sum(part.number * part.claim.cpus for part in demands_of(config)))
        offered = config.cluster.cpus or os.cpu_count() or 1
        if needed > offered:
            self._report(
                f"Ray is told of {needed} CPUs (there are {offered}): simulated parts wait more "
                f"than they compute"
            )
        return config.changed({"cluster.cpus": max(needed, offered)})

    def _on_ray(self, name: str) -> RunConfig:
        namespace, address = namespace_of(name), self._config.cluster.address
        if address is not None:
            return join_cluster(self._config, address, namespace)
        connect_ray(self._config, None, namespace)
        return self._config

    def _row(self, actors: int, rate_of_one: float | None) -> Row:
        settings = self._config.throughput
        config = self._config.changed({"cluster.actors": actors})
        batch, replicas = batch_size(config), config.reward_replicas
        # Steps of the learner in which every actor delivers one batch.
        turn = math.ceil(actors * config.actors.groups_per_batch / config.learner.groups_per_step)
        self._report(f"measuring {actors} actor{'s' if actors > 1 else ''}")
        trial = measure_run(
            config,
            trial_directory(self._root, f"actors-{actors}"),
            warm_up=turn * settings.warm_up_batches,
            steps=turn * settings.batches * settings.repeats,
            parts=self._parts,
            synchronous=False,
            report=self._report,
        )
        rate = rate_of(window_rates(trial.rows, windows=settings.repeats))
        stages = stages_of(
            trial.rows,
            trial.before,
            trial.after,
            actors=actors,
            replicas=replicas,
            rate=rate.median,
        )
        bottleneck = bottleneck_of(stages)
        overhead = None
        if self._simulated and bottleneck == "sampling":
            overhead = overhead_of(
                actors=actors,
                batch=batch,
                rate=rate.median,
                compute_s=sampling_s(config, settings.simulation.decode_step_ms),
            )
        return Row(
            actors=actors,
            reward_replicas=replicas,
            rate=rate,
            tokens_per_s=rate.median * tokens_per_trajectory(trial.before, trial.after),
            efficiency=rate.median / (actors * (rate_of_one or rate.median)),
            stages=stages,
            bottleneck=bottleneck,
            overhead=overhead,
        )

    def _comparison(self) -> Comparison:
        """One actor, in both modes, each step learning from one batch of it."""
        config = self._config.changed(
            {
                "cluster.actors": 1,
                "actors.groups_per_batch": self._config.learner.groups_per_step,
                "actors.lag_versions": 0,
                "learner.publish_every_steps": 1,
            }
        )
        if self._simulated:
            balanced_ms = config.throughput.simulation.balanced_ms
            waits = {
                "decode_step_ms": balanced_ms / sampling_s(config, 1e3),
                "score_call_ms": balanced_ms,
                "update_ms": balanced_ms,
            }
            config = config.changed({f"throughput.simulation.{k}": v for k, v in waits.items()})
        seconds, trajectories = {}, {}
        for mode in ("asynchronous", "synchronous"):
            synchronous = mode == "synchronous"
            self._report(f"measuring 1 actor, {mode}")
            in_flight = 1 if synchronous else config.actors.max_in_flight
            trial = measure_run(
                config.changed({"actors.max_in_flight": in_flight}),
                trial_directory(self._root, mode),
                warm_up=_PIPELINE_STEPS,
                steps=config.throughput.comparison_steps,
                parts=self._parts,
                synchronous=synchronous,
                report=self._report,
            )
            seconds[mode] = sum(map(duration, trial.rows))
            trajectories[mode] = round(sum(map(fresh, trial.rows)))
        return Comparison(
            steps=config.throughput.comparison_steps,
            trajectories=trajectories["synchronous"],
            synchronous_s=seconds["synchronous"],
            asynchronous_s=seconds["asynchronous"],
        )


def sampling_s(config: RunConfig, decode_step_ms: float) -> float:
    """Seconds that a simulated policy waits for a batch."""
    waves = math.ceil(batch_size(config) / config.actors.max_rows)
    return waves * load_simulated_task(config).actions.max_len * decode_step_ms / 1e3
