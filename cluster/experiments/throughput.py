"""The verb `throughput`: how a run's rate grows with its rollout actors, and what holds it back."""

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.config.file import load_config
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
    decode_steps,
    load_simulated_task,
    simulated_lora,
)
from cluster.experiments.throughput_records import (
    Comparison,
    Row,
    Trial,
    bottleneck_of,
    duration_s,
    fresh,
    overhead_of,
    rate_of,
    stages_of,
    window_rates,
)
from cluster.experiments.throughput_report import draw_throughput, show
from cluster.experiments.throughput_trial import measure_run
from cluster.run.directory import RUNS, RunDirectory, new_name
from cluster.run.preflight import check_before_start
from cluster.run.resources import check_fit, demands_of

_NEVER = 10**9  # steps, and seconds
_PIPELINE_STEPS = 3  # until sampling, scoring and learning overlap
_START_S, _START_S_PER_PART = 120.0, 30.0  # on a small machine parts start one after another


def run(arguments: argparse.Namespace) -> int:
    """Measure, draw, print; what happens meanwhile goes to standard error."""
    config = load_config(arguments.config, arguments.overrides)
    progress = Console(stderr=True)
    rows, comparison = Experiment(
        config=config,
        engines=arguments.engine or (config.actors.engine,),
        actors=arguments.actors,
        replicas=arguments.reward_replicas,
        simulated=arguments.simulate,
        address=config.cluster.ray_address(),
        report=lambda text: progress.print(Text(text), soft_wrap=True),
    ).run()
    plot = Path(arguments.output or RUNS / f"throughput-{config.task_name}.png").absolute()
    plot.parent.mkdir(parents=True, exist_ok=True)
    draw_throughput(rows, plot)
    if not arguments.json:
        console = Console()
        show(config, rows, comparison, simulated=arguments.simulate, console=console)
        console.print(f"plot: {plot}", soft_wrap=True, markup=False)
        return 0
    found = {
        "task": config.task_name,
        "simulated": config.throughput.simulation.model_dump() if arguments.simulate else None,
        "rows": [asdict(row) for row in rows],
        "async_over_sync": comparison.async_over_sync,
        "comparison": asdict(comparison),
        "load_average": os.getloadavg(),
        "plot": str(plot),
    }
    print(json.dumps(found))
    return 0


@dataclass(kw_only=True)
class Experiment:
    """Measurements of one configuration with real or simulated models."""

    config: RunConfig
    engines: Sequence[str]  # of the rollout actors, each measured with every number of them
    actors: Sequence[int]
    replicas: int | None  # of the reward model; None: as configured
    simulated: bool
    address: str | None  # of a Ray cluster; None: one on this machine, for the experiment
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        config = self.config
        if config.rollout_actors == 0:
            raise UserError(
                f'learner.objective "{config.learner.objective}" starts no rollout actors: there '
                f"is nothing to measure; choose another objective"
            )
        if self.simulated and len(self.engines) > 1:
            raise UserError("--simulate takes the place of any engine: compare them without it")
        self._root = RUNS / new_name(f"throughput-{config.task_name}")
        self.config = self._prepared()

    def run(self) -> tuple[list[Row], Comparison]:
        """Every engine with every number of actors, then both modes with the first.

        Raises:
            UserError: the cluster cannot hold the largest number.
            StartFailed, RunFailed: a part did not come up, or died.
        """
        largest = self.config.changed({"cluster.actors": max(self.actors)})
        directory, address = RunDirectory(self._root.name), largest.cluster.address
        if self.simulated:
            load_simulated_task(largest)
        else:
            for engine in self.engines:
                used = largest.changed({"actors.engine": engine})
                check_before_start(used, directory, resume=False, address=address, local=False)
        namespace = namespace_of(directory.name)
        if address is None:
            connect_ray(self.config, None, namespace)
        else:
            self.config = join_cluster(self.config, address, namespace)
        try:
            if not may_grow():
                check_fit(largest, living_nodes())
            rows: list[Row] = []
            for engine in self.engines:
                of_engine: list[Row] = []
                for actors in self.actors:
                    rate_of_one = of_engine[0].trajectories_per_s if of_engine else None
                    of_engine.append(self._row(engine, actors, rate_of_one))
                rows += of_engine
            return rows, self._comparison()
        finally:
            leave_cluster()
            shutil.rmtree(self._root, ignore_errors=True)

    def _prepared(self) -> RunConfig:
        """No checkpoints, no end, no replacing of what dies, and a Redis of its own."""
        config = self.config
        parts = max(self.actors) + config.reward.replicas * config.reward.ranks
        start_s = _START_S + _START_S_PER_PART * (parts + config.learner.ranks)
        config = config.changed(
            {
                "cluster.address": self.address,
                "cluster.max_restarts": 0,
                "cluster.start_timeout_s": max(config.cluster.start_timeout_s, start_s),
                "learner.steps": _NEVER,
                "learner.checkpoint_every_steps": _NEVER,
                "learner.checkpoint_every_s": float(_NEVER),
                "buffer.url": None,
                "buffer.password_file": None,
                "reward.replicas": self.replicas or config.reward.replicas,
            }
        )
        return self._waiting(config) if self.simulated else config

    def _waiting(self, config: RunConfig) -> RunConfig:
        """Processes that only wait need no GPU, and as many as were asked for fit on any core."""
        changes = {
            "learner.log_z": "group",
            "lora": simulated_lora(config.throughput.simulation),
            "cluster.actors": max(self.actors),
        }
        for part in ("actor_placement", "reward_placement", "learner_placement"):
            cpus = getattr(config.cluster, part).cpus or 0.25
            changes |= {f"cluster.{part}.gpus": 0.0, f"cluster.{part}.cpus": cpus}
        config = config.changed(changes)
        if config.cluster.address is not None:
            return config
        needed = math.ceil(sum(part.number * part.claim.cpus for part in demands_of(config)))
        offered = config.cluster.cpus or os.cpu_count() or 1
        if needed > offered:
            self.report(
                f"Ray is told of {needed} CPUs (there are {offered}): simulated parts wait more "
                f"than they compute"
            )
        return config.changed({"cluster.cpus": max(needed, offered)})

    def _measure(
        self, config: RunConfig, name: str, *, warm_up: int, steps: int, synchronous: bool = False
    ) -> Trial:
        return measure_run(
            config,
            # Its name also tells its Ray actors from another's.
            RunDirectory(f"{self._root.name}-{name}", root=self._root),
            warm_up=warm_up,
            steps=steps,
            parts=SimulatedParts() if self.simulated else Parts(),
            synchronous=synchronous,
            report=self.report,
        )

    def _row(self, engine: str, actors: int, rate_of_one: float | None) -> Row:
        settings, replicas = self.config.throughput, self.config.reward_replicas
        config = self.config.changed({"cluster.actors": actors, "actors.engine": engine})
        # Steps of the learner in which every actor delivers one batch.
        turn = math.ceil(actors * config.actors.groups_per_batch / config.learner.groups_per_step)
        self.report(f"measuring {actors} actor{'s' if actors > 1 else ''} ({engine})")
        trial = self._measure(
            config,
            f"{engine}-{actors}",
            warm_up=turn * settings.warm_up_batches,
            steps=turn * settings.batches * settings.repeats,
        )
        rate = rate_of(window_rates(trial.rows, windows=settings.repeats))
        stages = stages_of(trial, actors=actors, replicas=replicas, rate=rate.median)
        bottleneck = bottleneck_of(stages)
        overhead = None
        if self.simulated and bottleneck == "sampling":
            overhead = overhead_of(
                actors=actors,
                batch=config.actors.batch_size,
                rate=rate.median,
                compute_s=decode_steps(config) * settings.simulation.decode_step_ms / 1e3,
            )
        return Row(
            engine=engine,
            actors=actors,
            reward_replicas=replicas,
            trajectories_per_s=rate.median,
            trajectories_per_s_low=rate.low,
            trajectories_per_s_high=rate.high,
            interval_coverage=rate.coverage,
            tokens_per_s=rate.median * trial.counts.tokens_per_trajectory,
            efficiency=rate.median / (actors * (rate_of_one or rate.median)),
            stages=stages,
            bottleneck=bottleneck,
            overhead=overhead,
        )

    def _comparison(self) -> Comparison:
        """One actor, in both modes, each step learning from one batch of it."""
        config = self.config.changed(
            {
                "cluster.actors": 1,
                "actors.engine": self.engines[0],
                "actors.groups_per_batch": self.config.learner.groups_per_step,
                "actors.lag_versions": 0,
                "learner.publish_every_steps": 1,
            }
        )
        if self.simulated:
            balanced_ms = config.throughput.simulation.balanced_ms
            waits = {
                "decode_step_ms": balanced_ms / decode_steps(config),
                "score_call_ms": balanced_ms,
                "update_ms": balanced_ms,
            }
            config = config.changed({f"throughput.simulation.{k}": v for k, v in waits.items()})
        steps = config.throughput.comparison_steps
        rows = {}
        for mode in ("asynchronous", "synchronous"):
            synchronous = mode == "synchronous"
            self.report(f"measuring 1 actor, {mode}")
            unstored = 1 if synchronous else config.actors.max_unstored
            config = config.changed({"actors.max_unstored": unstored})
            rows[mode] = self._measure(
                config, mode, warm_up=_PIPELINE_STEPS, steps=steps, synchronous=synchronous
            ).rows
        return Comparison(
            steps=steps,
            trajectories=round(fresh(rows["synchronous"])),
            synchronous_s=duration_s(rows["synchronous"]),
            asynchronous_s=duration_s(rows["asynchronous"]),
        )
