"""The driver of one run: steps it, shows it, records it, and ends it, whatever happens."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.run.directory import (
    RunDirectory,
    RunPhase,
    ScaleAnswer,
    ScaleRequest,
    first_state,
    read_scores,
    take_scale_request,
    write_whole,
)
from cluster.run.display import first_line
from cluster.run.metrics_log import MetricsLog
from cluster.run.own_buffer import RunBuffer
from cluster.run.progress import Progress
from cluster.run.session import PendingMeasurement, Run, Session
from cluster.run.terminal import Terminal
from tasks.evaluation.evaluation import Evaluation, Scores

_TICK_S = 0.1
_STATE_EVERY_S = 1.0
_TELL_EVERY_S = 10.0  # how far a measurement is


class Stopped(BaseException):
    """What was being done, and was ended on request at once, for nothing is lost by that."""


class Audience(Protocol):
    """Who is told a run's figures besides its own folder; nothing that it does holds the run up."""

    def row(self, row: Mapping[str, float]) -> None:
        """A row of `metrics.jsonl`, once it is written."""

    def scores(self, scores: Scores) -> None:
        """What has been measured so far, whenever there is more of it."""


class Driver:
    """Drives a run from `open` to the last word in `state.json`."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        session: Session,
        terminal: Terminal,
        buffer: RunBuffer,
        audience: Audience,
    ) -> None:
        self._config = config
        self._directory = directory
        self._session = session
        self._terminal = terminal
        self._buffer = buffer
        self._audience = audience
        self._state = first_state(directory.name, steps=config.learner.steps)
        if last := directory.state():  # until the learner is up, the run is where it was left
            reached = {"step": last.step, "version": last.version}
            self._state = self._state.model_copy(update=reached)
        self._progress = Progress(config.learner.steps, config.cluster.time_limit_s)
        self._state_written_s = float("-inf")
        self._stop_requested = False
        self._alone = ""  # what this process does by itself, and a request ends at once
        self._told_s = float("-inf")
        self._unwritten: list[dict[str, float]] = []
        self._disk_errors: set[str] = set()
        self._scores = read_scores(directory, terminal.event)

    def request_stop(self) -> None:
        """Checkpoint and end as soon as the step under way is done; before the first, and once all
        are, at once: this raises Stopped, in the thread that works."""
        self._stop_requested = True
        if self._alone and threading.current_thread() is threading.main_thread():
            raise Stopped(self._alone)

    def drive(self) -> Scores:
        """Measure the base, train, measure the policy; what was measured.

        A run that was stopped on request is not measured (again): it may be resumed. What is raised
        ended it, after all that had come up was stopped, with a checkpoint where that could be.
        """
        try:
            self._enter("starting")
            self._session.open()
            self._train()
            self._end(measured=self._measure())
            return self._scores
        except Stopped as stopped:
            message = f"stopped on request while {stopped}: --resume begins that anew"
            self._enter("stopped", message=message)
            return self._scores
        except BaseException as error:
            self._enter("failed", message=first_line(error))
            raise
        finally:
            self._session.close()

    def _end(self, *, measured: bool) -> None:
        """Enter the last phase, and say why where steps are left."""
        at = f"at step {self._state.step} of {self._state.steps}"
        if not measured:
            self._enter("stopped", message=f"stopped on request {at}")
        elif self._state.step < self._state.steps:
            limit = f"cluster.time_limit_s = {self._config.cluster.time_limit_s:g}"
            self._enter("out of time", message=f"{limit} was over {at}: --resume goes on")
        else:
            self._enter("done")

    def _train(self) -> None:
        """Bring the run up, step it to its end, stop it in order; meanwhile measure the base."""
        before = None
        if self._scores.before is None:
            self._event("measuring the base language model, before training")
            with self._ended_at_once("measuring the base language model"):
                before = self._session.evaluate(None, self._event, self._hear, step=0)
                before = self._kept_if_done(before)
        parts = {"actors": self._config.rollout_actors, "replicas": self._config.reward_replicas}
        wanted = ["learner 1", *(f"{kind} {number}" for kind, number in parts.items() if number)]
        self._event(f"waiting until every part has loaded the model: {', '.join(wanted)}")
        with self._ended_at_once("loading the model"):
            run = self._session.start(self._event, self._asked_to_stop)
        with MetricsLog(self._directory.metrics_file) as log:
            try:
                while not (run.finished or self._should_end()):
                    self._scale_on_request(run)
                    run.tick()
                    if self._state.phase == "starting" and _is_up(run):
                        self._enter("training")
                        self._progress.begin()
                    before = self._kept_if_done(before)
                    self._watch(run, log)
            finally:
                if not run.finished:
                    self._enter("stopping")
                killed = tuple(run.stop(self._config.cluster.stop_timeout_s))
                self._change(at_once=True, killed=killed)  # with the last figures
                self._watch(run, log)
        self._forget_older_policy()
        if before is not None and not self._stop_requested:
            self._enter("evaluating")
            if self._waited_for(before):
                self._keep_before(before)

    def _measure(self) -> bool:
        """Measure the policy; False where the run was stopped instead."""
        if self._stop_requested:
            return False
        self._enter("evaluating")
        self._event("measuring the policy")
        with self._ended_at_once("measuring the policy"):
            pending = self._session.evaluate(
                self._directory.adapter, self._event, self._hear, step=self._state.step
            )
        if not self._waited_for(pending):
            return False
        self._keep(after=pending.result())
        return True

    @contextmanager
    def _ended_at_once(self, doing: str) -> Iterator[None]:
        """Within, a request to stop ends what this process does by raising Stopped."""
        self._alone = doing if self._session.in_process else ""
        try:
            self._hear("")
            yield
        finally:
            self._alone = ""

    def _hear(self, stage: str) -> None:
        """Be told what is being done, however often: it is shown now and then, and may be ended."""
        if self._asked_to_stop() and self._alone:
            raise Stopped(self._alone)
        now = time.monotonic()
        if not stage:
            self._told_s = now
        elif now - self._told_s >= _TELL_EVERY_S:
            self._told_s = now
            self._event(f"... {stage}")
        if self._alone:  # else whoever waits shows the state, with the run's figures
            self._show()

    def _forget_older_policy(self) -> None:
        """Keep no measurement of a policy that has learned on since."""
        after = self._scores.after
        if after is not None and (after.step is None or after.step < self._state.step):
            self._keep(after=None)

    def _scale_on_request(self, run: Run) -> None:
        """Take a request to scale, and answer it in the state, which is written next."""
        try:
            if request := take_scale_request(self._directory):
                self._change(at_once=True, scale=self._scale(run, request))
        except UserError as error:
            self._event(str(error))

    def _scale(self, run: Run, request: ScaleRequest) -> ScaleAnswer:
        wanted = ", ".join(f"{number} {kind}" for kind, number in request.numbers.items())
        try:
            run.scale(**request.numbers)
        except UserError as error:
            self._event(f"not scaled to {wanted}: {error}")
            return ScaleAnswer(id=request.id, outcome="refused", error=str(error))
        self._event(f"scaling to {wanted}")
        return ScaleAnswer(id=request.id, outcome="under way")

    def _asked_to_stop(self) -> bool:
        if self._directory.stop_request.exists():
            self._stop_requested = True
        return self._stop_requested

    def _should_end(self) -> bool:
        if self._progress.time_is_up:
            self._event(f"time limit of {self._config.cluster.time_limit_s:g} s is over")
        return self._asked_to_stop() or self._progress.time_is_up

    def _watch(self, run: Run, log: MetricsLog) -> None:
        """Record new rows, keep the buffer alive, show and write the state."""
        if event := self._buffer.revived():
            self._event(event)
        status = run.learner_status
        step = int(status.get("step", self._state.step))
        totals, counts = run.actor_totals(), run.counts()
        self._progress.observe(trajectories=totals.get("trajectories", 0.0), step=step)
        self._unwritten += [
            self._progress.row(row, step=int(row["progress/step"])) for row in run.learner_rows
        ]
        run.learner_rows.clear()
        self._write_rows(log)
        self._change(
            step=step,
            version=int(status.get("version", self._state.version)),
            address=self._session.address,
            scale=self._scale_so_far(run),
            desired=counts["desired"],
            actual=counts["actual"],
        )
        self._show(run)

    def _scale_so_far(self, run: Run) -> ScaleAnswer | None:
        answer = self._state.scale
        if answer is None or answer.outcome == "refused":
            return answer
        outcome = "given up" if run.given_up else "done" if run.settled else "under way"
        return answer.model_copy(update={"outcome": outcome, "error": run.given_up})

    def _waited_for(self, pending: PendingMeasurement) -> bool:
        """Wait until it is done; False where the run is stopped before."""
        while not pending.done():
            if self._asked_to_stop():
                return False
            self._show()
            time.sleep(_TICK_S)
        return True

    def _kept_if_done(self, before: PendingMeasurement | None) -> PendingMeasurement | None:
        """What is still to be waited for."""
        if before is None or not before.done():
            return before
        self._keep_before(before)
        return None

    def _keep_before(self, pending: PendingMeasurement) -> None:
        """Keep the base's results; training is worth more than they are, so it goes on without."""
        try:
            self._keep(before=pending.result())
        except Exception as error:
            self._event(
                f"the base LM could not be measured: {type(error).__name__}: {first_line(error)}"
            )

    def _keep(self, **measured: Evaluation | None) -> None:
        self._scores = self._scores.model_copy(update=measured)
        write_whole(self._directory.scores_file, self._scores.model_dump_json(indent=2))
        self._audience.scores(self._scores)

    def _enter(self, phase: RunPhase, *, message: str = "") -> None:
        self._change(at_once=True, phase=phase, message=message or self._state.message)
        self._show()

    def _event(self, text: str) -> None:
        self._terminal.event(text)
        self._change(message=text)

    def _change(self, *, at_once: bool = False, **fields: object) -> None:
        """Change the state; it is written at the next look, or when a second is over."""
        self._state = self._state.model_copy(update=fields)
        if at_once:
            self._state_written_s = float("-inf")

    def _show(self, run: Run | None = None) -> None:
        """Show and write the state where that is due; with a run, its figures too."""
        now = time.monotonic()
        if now - self._state_written_s < _STATE_EVERY_S:
            return
        self._state_written_s = now
        self._change(heartbeat_s=time.time())
        if run is not None:
            buffer = self._buffer.stats()
            metrics = self._progress.shown(buffer_size=buffer.replay_size)
            run.record_metrics(metrics, buffer)
            self._change(metrics=metrics)
        try:
            self._directory.write_state(self._state)
        except OSError as error:
            self._bear_with(error)
        else:
            if not self._unwritten:
                self._disk_errors.clear()
        self._terminal.show(self._state)

    def _write_rows(self, log: MetricsLog) -> None:
        try:
            while self._unwritten:
                log.write(self._unwritten[0])
                self._audience.row(self._unwritten.pop(0))
        except OSError as error:
            self._bear_with(error)

    def _bear_with(self, error: OSError) -> None:
        """Report what a disk does not take, once; it is written when the disk takes it again."""
        if (text := f"{error.filename}: {error.strerror}") not in self._disk_errors:
            self._disk_errors.add(text)
            self._event(f"could not write {text}; the run goes on and tries again")


def _is_up(run: Run) -> bool:
    counts = run.counts()
    return counts["actual"] == counts["desired"] and bool(run.learner_status)
