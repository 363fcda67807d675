"""Everything of one run that the pages show, opened for reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from buffer.browser import ReplayBrowser, Tally
from buffer.connection import connect
from buffer.trajectory import Trajectory
from cluster.config.schema import RunConfig
from cluster.inspector.catalogue import Catalogue
from cluster.inspector.curves import MetricsTail
from cluster.inspector.prefixes import Prefix, estimate_log_z, prefixes_of
from cluster.inspector.rows import Row, row_of, split_text, texts_of, tool_spans
from cluster.run.directory import RunDirectory, RunState
from learner.schedule import reward_temperature
from lm.hub import load_tokenizer

# A person waits for a page, not a run: short.
_REDIS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a process on this machine needs in order to look at a run."""

    config: RunConfig
    run: str
    root: Path  # of all runs
    buffer_url: str
    buffer_password: str | None
    token: str


class Gone(LookupError):
    """No trajectory is stored under this id."""


class Step(NamedTuple):
    """A stop state and the text that leads to it from the one before."""

    prefix: Prefix
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """A trajectory and what stands around it."""

    row: Row
    steps: Sequence[Step]
    group: Sequence[Row]  # all that is stored for its prompt, best first, itself included
    log_z: float  # of its prompt, nats, estimated from the group
    temperature: float  # T, of the learner's present step
    tool_spans: Sequence[tuple[int, int]]  # prefix lengths between which a tool wrote
    version: int  # the learner's


class Sources:
    """A run's buffer, metrics and state; safe to share between threads.

    Raises:
        BufferUnreachable, WrongPassword, NotOurRedis: about its Redis.
        ModelNotFound, ModelUnusable: about its tokenizer.
    """

    def __init__(self, target: Target) -> None:
        self.directory = RunDirectory(target.run, root=target.root)
        self.metrics = MetricsTail(self.directory.metrics_file)
        self._config = target.config
        self._decode = load_tokenizer(target.config.lm).decode
        client = connect(
            target.buffer_url, password=target.buffer_password, timeout_s=_REDIS_TIMEOUT_S
        )
        self._browser = ReplayBrowser(client, run=target.run)
        self.catalogue = Catalogue(self._browser, self._decode)

    def state(self) -> RunState | None:
        """What the driver last wrote."""
        return self.directory.state()

    def detail(self, id: str) -> Detail:
        """One trajectory, read now; raises Gone, BufferUnreachable."""
        trajectory = next(self._browser.trajectories([id]), None)
        if trajectory is None:
            raise Gone(id)
        (ids,) = self._browser.ids([trajectory.prompt_key])
        # The buffer may have replaced it since the line above.
        group = {t.id: t for t in self._browser.trajectories(ids)} | {id: trajectory}
        tallies = self._browser.tallies_of(list(group))
        temperature = self._temperature()
        log_z = estimate_log_z(list(group.values()), temperature=temperature)
        rows = {key: self._row(t, tallies[key]) for key, t in group.items()}
        return Detail(
            row=rows[id],
            steps=self._steps(trajectory, temperature=temperature, log_z=log_z),
            group=sorted(rows.values(), key=lambda row: (-row.log_reward, row.id)),
            log_z=log_z,
            temperature=temperature,
            tool_spans=tool_spans(trajectory.from_tool.tolist()),
            version=self.catalogue.listing().stats.version,
        )

    def _row(self, trajectory: Trajectory, tally: Tally) -> Row:
        return row_of(trajectory, texts_of(trajectory, self._decode), tally)

    def _steps(self, trajectory: Trajectory, *, temperature: float, log_z: float) -> Sequence[Step]:
        prefixes = prefixes_of(trajectory, temperature=temperature, log_z=log_z)
        ends = [prefix.length for prefix in prefixes]
        texts = split_text(trajectory.completion.tolist(), ends, self._decode)
        return [Step(prefix, text) for prefix, text in zip(prefixes, texts, strict=True)]

    def _temperature(self) -> float:
        state = self.state()
        step = 0 if state is None else state.step
        return reward_temperature(step, self._config.learner.reward_temperature)
