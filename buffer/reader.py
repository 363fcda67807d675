"""Reading what the store holds, when any of it may be damaged."""

from collections.abc import Callable
from dataclasses import dataclass

from buffer.store import Store
from buffer.trajectory import MalformedTrajectory, Trajectory, unpack, unpack_group

KEPT_EVIDENCE = 100


@dataclass(frozen=True, slots=True)
class StoredPrompt:
    """The replay of one prompt as of one revision; worst first."""

    revision: bytes
    trajectories: dict[str, Trajectory]  # by id
    log_reward: dict[str, float]  # by id: the terminal log-reward it is ranked by, nats


class Reader:
    """Decodes stored bytes; what cannot be decoded is reported, counted and moved to quarantine.

    A damaged payload must cost one trajectory, not the learner.
    """

    def __init__(self, store: Store, *, warn: Callable[[str], None]) -> None:
        self._store = store
        self._warn = warn

    def prompt(self, prompt: str) -> StoredPrompt:
        """Everything readable in the replay of one prompt."""
        revision, ranked, payloads = self._store.call("read", prompt)
        trajectories, log_reward = {}, {}
        for id, score, payload in zip(ranked[::2], ranked[1::2], payloads, strict=True):
            trajectory = self.item(id.decode(), prompt, payload)
            if trajectory is not None:
                trajectories[id.decode()] = trajectory
                log_reward[id.decode()] = float(score)
        return StoredPrompt(revision, trajectories, log_reward)

    def item(self, id: str, prompt: str, payload: bytes | None) -> Trajectory | None:
        """One replay payload, None if it went into quarantine."""
        try:
            if payload is None:
                raise MalformedTrajectory("its payload is missing")
            return unpack(payload)
        except MalformedTrajectory as error:
            self._store.call("quarantine", "item", id, prompt, KEPT_EVIDENCE)
            self._warn(f"quarantined trajectory {id} of prompt {prompt!r}: {error}")
            return None

    def group(self, seq: bytes, payload: bytes) -> tuple[Trajectory, ...] | None:
        """One fresh group, None if it went into quarantine, which one bad member suffices for."""
        try:
            return unpack_group(payload)
        except MalformedTrajectory as error:
            self._store.call("quarantine", "group", seq, payload, KEPT_EVIDENCE)
            self._warn(f"quarantined fresh group {seq.decode()}: {error}")
            return None
