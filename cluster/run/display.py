"""How figures of a run are named and written for people: the same live, in status and in plots."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cluster.run.directory import RunState

INSPECTOR_HOST, INSPECTOR_PORT = "127.0.0.1", 8000  # the port, where none is asked for
# What the driver adds to the learner's own metrics.
TRAJECTORIES = "rollouts/trajectories"
TRAJECTORIES_PER_S = "rollouts/trajectories_per_s"
BUFFER_SIZE = "buffer/trajectories"
TIME_LEFT_S = "time/left_s"
ELAPSED_S = "time/elapsed_s"
# The learner's.
LOSS = "loss/value"
LOG_REWARD = "reward/log_mean_nats"
CORRECT = "reward/correct_fraction"
POLICY_AGE = "policy/age_mean_versions"
ELBO = "posterior/elbo_nats"
IWAE_GAP = "posterior/iwae_gap_nats"


class Figure(NamedTuple):
    """A metric and how it is shown."""

    key: str
    label: str
    write: Callable[[float], str]


FIGURES = (
    Figure(TRAJECTORIES_PER_S, "trajectories/s", "{:.1f}".format),
    Figure(LOG_REWARD, "log reward", "{:.2f} nats".format),
    Figure(CORRECT, "correct", "{:.1%}".format),
    Figure(LOSS, "loss", "{:.3g}".format),
    Figure(ELBO, "ELBO", "{:.2f} nats".format),
    Figure(BUFFER_SIZE, "buffer", "{:.0f}".format),
    Figure(POLICY_AGE, "policy age", "{:.1f} versions".format),
    Figure(TIME_LEFT_S, "left", lambda value: duration(value)),
)


def known(state: RunState) -> Iterator[tuple[str, str]]:
    """The figures that say something of the run as it is: outside of training no time is left, and
    where the learner imitates, nobody rolls out."""
    hidden = {TIME_LEFT_S} if state.phase != "training" else set()
    if state.desired and not any(state.desired.values()):
        hidden |= {TRAJECTORIES_PER_S, BUFFER_SIZE}
    for figure in FIGURES:
        if figure.key in state.metrics and figure.key not in hidden:
            yield figure.label, figure.write(state.metrics[figure.key])


def facts(state: RunState) -> Iterator[tuple[str, str]]:
    """Label and value of how far the run is, and of its figures."""
    yield "phase", phase(state)
    yield "step", f"{state.step} of {state.steps}"
    yield "version", str(state.version)
    if told := parts(state):
        yield "parts", told
    yield from known(state)


def parts(state: RunState) -> str:
    """Parts that run of those wanted, such as 'actors 1/2, replicas 1/1'; empty where none do."""
    wanted = {} if state.ended else {kind: n for kind, n in state.desired.items() if n}
    return ", ".join(f"{kind} {state.actual.get(kind, 0)}/{n}" for kind, n in wanted.items())


def phase(state: RunState) -> str:
    """The phase; says so where the driver is gone without a good-bye."""
    if state.ended or state.driver() is not None:
        return state.phase
    heard = f"last heard from {state.host} {silence(state)} ago"
    return f"{state.phase}? (no driver on this machine; {heard})"


def silence(state: RunState) -> str:
    """How long ago the driver wrote it."""
    return duration(max(0.0, time.time() - state.heartbeat_s))


def inspector_address(run: str, port: int = INSPECTOR_PORT) -> str:
    """Where `amortize inspect` shows a run, on the machine that it is called on."""
    return f"http://{INSPECTOR_HOST}:{port}/inspect/{run}/"


def duration(seconds: float) -> str:
    """Seconds as people read them: 48 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text: enough for an event, the rest is in the log."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
