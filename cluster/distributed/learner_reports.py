"""What the learner has measured and what it has to say, taken over by the driver as it comes."""

from collections.abc import Callable

import ray

from cluster.distributed.worker_group import Gang, Phase

_LAST_WORDS_S = 5.0  # for a process whose work has failed to answer all the same


class LearnerReports:
    """Rows of metrics of all learners that the run has had, one after the other.

    Args:
        report: takes one line for people.
        timeout_s: longest wait for the learner's answer.
    """

    def __init__(self, report: Callable[[str], None], *, timeout_s: float) -> None:
        self.rows: list[dict[str, float]] = []
        self._report = report
        self._timeout_s = timeout_s
        self.begin()

    def begin(self) -> None:
        """From now on another process is asked, which has said nothing yet."""
        self._rows_taken = self._events_taken = 0

    def collect(self, learner: Gang) -> None:
        """Ask for what it has more than was taken.

        One that failed may have more than its status said; often its process still lives.
        """
        failed = learner.phase is Phase.FAILED
        timeout_s = _LAST_WORDS_S if failed else self._timeout_s
        try:
            if failed or learner.status.get("rows", 0) > self._rows_taken:
                rows = ray.get(
                    learner.leader.rows_since.remote(self._rows_taken), timeout=timeout_s
                )
                self._rows_taken += len(rows)
                self.rows.extend(rows)
            if failed or learner.status.get("events", 0) > self._events_taken:
                events = ray.get(
                    learner.leader.events_since.remote(self._events_taken), timeout=timeout_s
                )
                self._events_taken += len(events)
                for event in events:
                    self._report(f"learner: {event}")
        except Exception as error:  # its death is the gang's to report
            if not failed:
                self._report(f"learner metrics not read: {type(error).__name__}")
