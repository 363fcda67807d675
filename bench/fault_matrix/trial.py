"""One fault in a run: how it is found, how the run goes on, and what became of the data."""

import time
from dataclasses import dataclass

from bench.fault_matrix import ledger
from bench.fault_matrix.job import START_S, GaveUp, Job
from bench.fault_matrix.ledger import Ledger
from bench.fault_matrix.strikes import PARTS, SIGNS, UNNOTICED, Arsenal, strike
from bench.posterior import title

RECOVERY_S = 300.0  # longest that is waited for a run to be whole again
STATE_S = 2.5  # in which the driver has written what it knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a fault did."""

    part: str
    fault: str
    detected_s: float | None  # None: nothing was replaced, and nobody told
    recovered_s: float | None  # None: it did not
    acknowledged: int
    lost: int
    duplicated: int
    ended: str


class Trial:
    """Watches a run from the moment of a fault on."""

    def __init__(self, job: Job, part: str, fault: str) -> None:
        self._job = job
        self._part = part
        self._silent = (part, fault) in UNNOTICED
        self._hits_learner = part in ("learner rank", "Ray node")
        self._learner_events = 0
        self._steps = job.steps()
        self._since = job.log.stat().st_size
        self._known = {each.pid for each in job.processes(PARTS[part].title)}
        self._began = time.monotonic()
        self._news_after_s = time.time() + STATE_S
        self.detected_s: float | None = None

    def seconds(self) -> float:
        """Since the fault."""
        return time.monotonic() - self._began

    def fault_is_over(self) -> None:
        """What the run says from now on, it says without the fault."""
        self._news_after_s = time.time() + STATE_S

    def is_whole_again(self) -> bool:
        """Whether the fault was noticed, all parts run, and the learner has stepped since."""
        job, state = self._job, self._job.state()
        if self.detected_s is None and (self._was_told() or self._has_successor()):
            self.detected_s = self.seconds()
            self._news_after_s = time.time() + STATE_S
        noticed = self._silent or self.detected_s is not None
        news = state is not None and state.heartbeat_s > self._news_after_s
        stands = self._learner_stands()
        if not (noticed and news and stands and job.is_whole() and job.steps() >= self._steps + 2):
            return False
        return self._part != "evaluator" or self._has_successor()

    def _learner_stands(self) -> bool:
        """Whether no learner is missing; of one that came up, steps are counted anew.

        Rows of steps that a learner took before its death may come after it.
        """
        events = [line for line in self._said() if "learner: " in line or "learner is up" in line]
        events = [line for line in events if "replacing" in line or "is up" in line]
        if len(events) > self._learner_events:
            self._learner_events, self._steps = len(events), self._job.steps()
        return "is up" in events[-1] if events else not self._hits_learner

    def error(self) -> str:
        """The first line of the error that ended the run."""
        errors = [line for line in self._said() if line.startswith("amortize")]
        return errors[-1] if errors else f"killed ({self._job.process.returncode})"

    def _said(self) -> list[str]:
        return self._job.said(self._since)

    def _was_told(self) -> bool:
        said = [line for line in self._said() if PARTS[self._part].name in line]
        return any(sign in line for line in said for sign in SIGNS)

    def _has_successor(self) -> bool:
        """Whether there is a process of the part that was not there before the fault."""
        if self._part in ("driver", "Ray node"):
            return False
        return any(
            each.pid not in self._known for each in self._job.processes(PARTS[self._part].title)
        )


def measure(job: Job, books: Ledger, part: str, fault: str, arsenal: Arsenal) -> Row:
    """Strike once and see what comes of it; the run is whole again afterwards.

    Raises GaveUp: the run was not whole before, or could not be made so afterwards.
    """
    if part == "evaluator":
        wait_until_measuring(job)
    else:
        job.wait_until_stepping()
    before = books.look()
    trial = Trial(job, part, fault)
    fault_now = strike(job, part, fault, arsenal)
    under_way = True

    def end_when_due() -> bool:
        nonlocal under_way
        if under_way and fault_now.lasts_s is not None and trial.seconds() > fault_now.lasts_s:
            fault_now.end()
            trial.fault_is_over()
            under_way = False
        whole = trial.is_whole_again()
        return whole and not (under_way and fault_now.lasts_s is not None)

    detected_s, recovered_s, ended = None, None, "went on"
    try:
        lives = job.wait(end_when_due, timeout_s=RECOVERY_S, or_end=True)
        recovered_s = trial.seconds() if lives else None
        detected_s = trial.detected_s if lives else trial.seconds()
        ended = "went on" if lives else trial.error()
    except GaveUp:
        detected_s, ended = trial.detected_s, f"not whole again within {RECOVERY_S:.0f} s"
    if recovered_s is None:
        fault_now.end()
        job.resume()
        job.wait_until_stepping()
        if ended.startswith(("killed", "amortize")):
            recovered_s, ended = trial.seconds(), f"{ended}; --resume went on"
    lost, duplicated = books.judge(before)
    return Row(
        part=part,
        fault=fault,
        detected_s=None if detected_s is None else round(detected_s, 1),
        recovered_s=None if recovered_s is None else round(recovered_s, 1),
        acknowledged=ledger.offered(before),
        lost=lost,
        duplicated=duplicated,
        ended=ended,
    )


def wait_until_measuring(job: Job, *, sittings: int = 4) -> None:
    """Wait until the base LM is measured, anew in further sittings.

    Raises GaveUp.
    """

    def measuring() -> bool:
        # While it starts it has the longer time of a start, which is not what is tried. Ray
        # writes into a title what its process was called for last.
        found = job.processes(PARTS["evaluator"].title)
        at_work.update(each.pid for each in found if ".run" in title(each))
        return any(each.pid in at_work for each in found)

    at_work: set[int] = set()
    seen: list[bool] = []

    def seen_or_over() -> bool:
        seen.append(measuring())
        return seen[-1] or job.directory.scores_file.exists()

    for _ in range(sittings):
        job.wait(seen_or_over, timeout_s=START_S)
        if seen[-1]:
            return
        job.stop()
        job.directory.scores_file.unlink()
        job.resume()
    raise GaveUp("no evaluator was seen at work")
