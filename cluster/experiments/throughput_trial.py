"""One measurement of a throughput experiment: a whole run over Ray, watched for some steps."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack

from cluster.config.file import resolved_toml
from cluster.config.schema import RunConfig
from cluster.distributed.parts import Parts
from cluster.distributed.session import RaySession
from cluster.distributed.supervisor import Supervisor
from cluster.experiments.throughput_records import Counts, Trial
from cluster.run.directory import RunDirectory, write_whole
from cluster.run.own_buffer import buffer_server


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
    directory.begin(resume=False)
    try:
        write_whole(directory.config_file, resolved_toml(config))
        with buffer_server(config, directory) as buffer, ExitStack() as ends:
            session = RaySession(
                config,
                directory,
                buffer.address,
                cluster=config.cluster.address,
                parts=parts,
                synchronous=synchronous,
            )
            session.open()
            ends.callback(session.end_services)
            supervisor = session.start(report)
            ends.callback(supervisor.stop, config.cluster.stop_timeout_s)
            _watch_until(supervisor, warm_up)
            before = _counts(supervisor, config)
            first = len(supervisor.learner_rows)
            _watch_until(supervisor, first + steps)
            rows = supervisor.learner_rows[first : first + steps]
            return Trial(rows=rows, counts=_counts(supervisor, config).since(before))
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
        groups = [group for name, group in supervisor.groups.items() if name.startswith(prefix)]
        return float(sum(group.status.get(key, 0.0) for group in groups))

    return Counts(
        tokens=total("actor-", "tokens"),
        sampled=total("actor-", "sampled"),
        sampling_s=total("actor-", "sampling_s"),
        stored=total("actor-", "trajectories"),
        storing_s=total("actor-", "storing_s"),
        scored=total("reward-", "answered_requests") * config.actors.batch_size,
        scoring_s=total("reward-", "computing_s"),
    )
