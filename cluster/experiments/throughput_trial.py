"""One measurement of a throughput experiment: a whole run over Ray, watched for some steps."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.file import resolved_toml
from cluster.config.schema import RunConfig
from cluster.distributed.parts import Parts
from cluster.distributed.session import RaySession
from cluster.distributed.supervisor import Supervisor
from cluster.experiments.throughput_records import Counts
from cluster.run.directory import RunDirectory, write_whole
from cluster.run.own_buffer import buffer_server


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one measurement saw after its warm-up."""

    rows: list[dict[str, float]]  # the learner's, one for each step
    before: Counts
    after: Counts


def measure_run(
    config: RunConfig,
    directory: RunDirectory,
    *,
    warm_up: int,
    steps: int,
    parts: Parts,
    synchronous: bool,
    report: Callable[[str], None],
) -> Trial:
    """Start the run of `config`, watch it, end it, and remove what it wrote.

    Ray must have been joined; it goes on.

    Args:
        warm_up, steps: optimizer steps that are passed over, and then counted.
        report: takes a line for people now and then.

    Raises:
        StartFailed, RunFailed: a part did not come up, or died.
    """
    with _running(config, directory, parts, synchronous, report) as supervisor:
        _watch_until(supervisor, warm_up)
        before = _counts(supervisor, config)
        first = len(supervisor.learner_rows)
        _watch_until(supervisor, first + steps)
        rows = supervisor.learner_rows[first : first + steps]
        return Trial(rows=rows, before=before, after=_counts(supervisor, config))


@contextmanager
def _running(
    config: RunConfig,
    directory: RunDirectory,
    parts: Parts,
    synchronous: bool,
    report: Callable[[str], None],
) -> Iterator[Supervisor]:
    directory.begin(resume=False)
    try:
        write_whole(directory.config_file, resolved_toml(config))
        with buffer_server(config, directory) as buffer:
            session = RaySession(
                config,
                directory,
                buffer.address,
                address=config.cluster.address,
                parts=parts,
                synchronous=synchronous,
            )
            session.open()
            try:
                supervisor = session.start(report)
                try:
                    yield supervisor
                finally:
                    supervisor.stop(config.cluster.stop_timeout_s)
            finally:
                session.end_services()
    finally:
        directory.end()
        shutil.rmtree(directory.path, ignore_errors=True)


def _watch_until(supervisor: Supervisor, steps: int) -> None:
    """Tick until all parts run and the learner has done its steps; what fails ends it."""
    while not supervisor.running or len(supervisor.learner_rows) < steps:
        supervisor.tick()


def _counts(supervisor: Supervisor, config: RunConfig) -> Counts:
    """Counters as last heard, at most a moment ago; each process's belong together."""

    def total(prefix: str, key: str) -> float:
        statuses: list[Mapping[str, Any]] = [
            group.status for name, group in supervisor.groups.items() if name.startswith(prefix)
        ]
        return float(sum(status.get(key, 0.0) for status in statuses))

    return Counts(
        tokens=total("actor-", "tokens"),
        sampled=total("actor-", "sampled"),
        sampling_s=total("actor-", "sampling_s"),
        stored=total("actor-", "trajectories"),
        storing_s=total("actor-", "storing_s"),
        scored=total("reward-", "answered_requests") * batch_size(config),
        scoring_s=total("reward-", "computing_s"),
    )


def batch_size(config: RunConfig) -> int:
    """Trajectories that an actor samples at once, and asks the rewards of in one request."""
    return config.actors.groups_per_batch * config.actors.group_size


def trial_directory(root: Path, name: str) -> RunDirectory:
    """Where one measurement writes; its name also tells its Ray actors from another's."""
    return RunDirectory(f"{root.name}-{name}", root=root)
