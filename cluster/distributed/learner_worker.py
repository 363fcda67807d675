"""The process of one rank of the learner."""

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import nn

from actors.weight_sources import Published, PublishedWeights
from cluster.distributed.worker import Meeting, Worker
from cluster.run import assembly
from cluster.run.directory import check_seen, check_shared
from learner.config import LearnerConfig
from learner.engine import Engine
from learner.learner import WeightSink

_log = logging.getLogger(__name__)


class Outbox(deque[Any]):
    """Items for a reader in another thread that says how many it has; those are forgotten."""

    total = 0  # that there have been

    def append(self, item: Any) -> None:
        self.total += 1  # before, so that the reader forgets none that it has not read
        super().append(item)

    def after(self, count: int) -> list[Any]:
        while len(self) > self.total - count:
            self.popleft()
        return list(self)


class BackgroundPublisher:
    """A `WeightSink` that publishes in a thread, one version at a time.

    While one is under way the newest of the others waits; older ones are passed over. An error
    is raised by a later `publish` or `check`, or by `finish`.
    """

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink
        self._thread = ThreadPoolExecutor(1, "publisher")
        self._newest: deque[PublishedWeights] = deque(maxlen=1)
        self._sent: deque[Future[None]] = deque()

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        """Returns at once."""
        self.check()
        self._newest.append(Published(version, data, checksum))
        self._sent.append(self._thread.submit(self._send))

    def check(self) -> None:
        """Raise the error of a publication that has failed by now."""
        while self._sent and self._sent[0].done():
            self._sent.popleft().result()

    def finish(self) -> None:
        """Wait until the newest version is published."""
        while self._sent:
            self._sent.popleft().result()

    def _send(self) -> None:
        try:
            newest = self._newest.popleft()
        except IndexError:  # it went in place of an older one
            return
        self._sink.publish(newest.data, version=newest.version, checksum=newest.checksum)


class LearnerWorker(Worker):
    """One rank of the learner; rank 0 draws, publishes, checkpoints and reports."""

    def _build(self, meeting: Meeting) -> None:
        """Build policy and engine, join the other ranks, go back to the last checkpoint if any."""
        context, config = self._context, self._config
        check_shared(context.directory.path, node=self._node)
        if not any(context.directory.checkpoints.glob("step-*")):  # which have the last word
            check_seen("learner.start_from", config.learner.start_from, node=self._node)
        if config.learner.traits.trains_model:
            check_seen("em.policy", config.em.policy, node=self._node)
        self._waited_s = 0.0
        self._reports = {"rows": Outbox(), "events": Outbox()}
        self._base, task = context.parts.learner_base(config)

        def make_engine(model: nn.Module, settings: LearnerConfig) -> Engine:
            return context.parts.engine(
                config, model, settings, lambda: self._meet(meeting, settings.collective_timeout_s)
            )

        self._buffer = self._connect_buffer()
        self._publisher = BackgroundPublisher(self._weight_store())
        self._learner = assembly.build_learner(
            config,
            base=self._base,
            task=task,
            directory=context.directory,
            make_engine=make_engine,
            buffer=self._buffer,
            weights=self._publisher,
            warn=self._warn,
            gated=context.parts.gated,
        )

    def run(self) -> dict[str, Any]:
        """Learn until the configured steps are done or until stopped; then leave the adapter."""
        self._learner.run(self._config.learner.steps, self._must_stop, self._keep_row)
        if self._member.rank == 0:
            adapter = self._context.directory.adapter
            assembly.save_result(self._config, self._learner, self._base, adapter)
        self._publisher.finish()
        return self.status()

    def status(self) -> dict[str, Any]:
        """Steps taken, version published, and the numbers of reports that there have been."""
        totals = {kind: outbox.total for kind, outbox in self._reports.items()}
        return {
            "step": self._learner.completed_steps,
            "version": self._learner.version,
            **totals,
        }

    def reports_since(self, kind: str, count: int) -> list[Any]:
        """Rows of metrics or events (texts) after the first `count` of this process."""
        return self._reports[kind].after(count)

    def _must_stop(self) -> bool:
        """Asked while groups are waited for, too: without new weights there may come none."""
        self._publisher.check()
        return self._stopping.is_set()

    def _keep_row(self, row: dict[str, float]) -> None:
        waited_s = self._buffer.waited_s
        self._reports["rows"].append(row | {"time/draw_wait_s": waited_s - self._waited_s})
        self._waited_s = waited_s

    def _warn(self, text: str) -> None:
        _log.warning(text)
        self._reports["events"].append(text)
