"""A gang that a run needs no longer: asked to stop, and given a while to finish what it holds."""

import time

from cluster.distributed.worker_group import Gang, Phase


class Leaving:
    """Ends in order, or is killed at its deadline.

    An actor stores what it has in flight, a replica answers the calls that it holds. A gang that
    does not run yet holds nothing and is ended at once.
    """

    def __init__(self, gang: Gang, *, timeout_s: float) -> None:
        self.gang = gang
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._runs = gang.phase is Phase.RUNNING
        if self._runs:
            gang.ask_to_stop()
        else:
            gang.kill()

    def poll(self) -> str | None:
        """How it ended, for people, once it has; it is gone then."""
        gang = self.gang
        if self._runs and gang.poll() is Phase.RUNNING:
            if time.monotonic() < self._deadline:
                return None
            gang.kill()
            return (
                f"{gang.name} did not stop within {self._timeout_s:.0f} s "
                f"(cluster.stop_timeout_s) and was killed"
            )
        if self._runs:
            gang.kill()
        if gang.phase is Phase.FAILED:
            return f"{gang.cause}; it was leaving"
        return f"{gang.name} has left"
