"""Opens everything of one run that the pages show: its buffer, metrics, state and tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

from buffer.browser import ReplayBrowser
from buffer.connection import connect
from cluster.config.schema import RunConfig
from cluster.inspector.catalogue import Catalogue
from cluster.inspector.curves import MetricsTail
from cluster.inspector.detail import Detail, detail_of
from cluster.run.directory import RunDirectory
from lm.hub import load_tokenizer

# A person waits for a page, not a run: short.
_REDIS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Run, buffer and token that a process on this machine shows a run with."""

    config: RunConfig
    run: str
    root: Path  # of all runs
    buffer_url: str
    buffer_password: str | None = field(repr=False)
    token: str = field(repr=False)


class Gone(LookupError):
    """No trajectory is stored under this id."""


class Sources:
    """A run's buffer, metrics and state; safe to share between threads.

    Raises:
        BufferUnreachable, WrongPassword, NotOurRedis: about its Redis.
        ModelNotFound, ModelUnusable: about its tokenizer.
    """

    def __init__(self, target: Target) -> None:
        directory = RunDirectory(target.run, root=target.root)
        self.state = directory.state
        self.metrics = MetricsTail(directory.metrics_file)
        self._temperature_at = target.config.learner.reward_temperature.at
        self._decode = load_tokenizer(target.config.lm).decode
        password, timeout_s = target.buffer_password, _REDIS_TIMEOUT_S
        client = connect(target.buffer_url, password=password, timeout_s=timeout_s)
        self._browser = ReplayBrowser(client, run=target.run)
        self.catalogue = Catalogue(self._browser, self._decode)

    def detail(self, id: str) -> Detail:
        """One trajectory, read now; raises Gone, BufferUnreachable."""
        trajectory = next(self._browser.trajectories([id]), None)
        if trajectory is None:
            raise Gone(id)
        (ids,) = self._browser.ids([trajectory.prompt_key])
        # The buffer may have replaced it since the line above.
        group = {t.id: t for t in self._browser.trajectories(ids)} | {id: trajectory}
        state = self.state()
        return detail_of(
            trajectory,
            list(group.values()),
            self._browser.tallies_of(list(group)),
            self._decode,
            temperature=self._temperature_at(0 if state is None else state.step),
            version=self.catalogue.listing().stats.version,
        )
