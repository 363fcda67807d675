"""Waiting for another process, always with a deadline and an error that says for whom."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster.run.display import first_line


class PeerTimeout(TimeoutError):
    """A process did not answer in time."""


class PeerDied(RuntimeError):
    """A process died before it answered."""


def wait_for(ref: "ray.ObjectRef[Any]", *, peer: str, phase: str, timeout_s: float) -> Any:
    """The value behind `ref`.

    Raises:
        PeerTimeout, PeerDied: naming peer, phase and seconds.
        Exception: whatever the peer itself raised, as its own class.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise PeerTimeout(f"{peer}: no answer to {phase} within {timeout_s:.0f} s") from error
    except RayActorError as error:
        raise PeerDied(f"{peer}: died during {phase}: {first_line(error)}") from error
    except RayTaskError as error:
        raise error.as_instanceof_cause() from error


def error_line(error: BaseException) -> str:
    """Class and first line of what a remote process raised, without the remote traceback."""
    cause = cause_of(error)
    return f"{type(cause).__name__}: {first_line(cause)}"


def cause_of(error: BaseException) -> BaseException:
    """What a remote process raised, as it raised it; any other error as it is."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, BaseException) else error
