"""One trajectory in full: its stop states with their flows, and what else its prompt has.

All as recorded: log q as the actor's version gave it, log R as the reward replica gave it. The
learner computes log q afresh under its current weights, so its loss is another number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from buffer.browser import ReplayBrowser
from buffer.trajectory import Trajectory
from cluster.inspector.rows import Row, row_of, tool_spans
from lm.spelling import Decode, split_text


class Gone(LookupError):
    """No trajectory is stored under this id."""


class Prefix(NamedTuple):
    """One stop state, the prefix of `length` tokens; all in nats."""

    length: int
    log_reward: float  # untempered
    log_path: float  # log q of getting here: its tokens, without a stop
    log_q_stop: float
    potential: float
    residual: float | None  # potential less that of the stop state before; None for the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """A trajectory and what stands around it."""

    row: Row
    steps: Sequence[tuple[Prefix, str]]  # stop states with the text since the one before
    group: Sequence[Row]  # all that is stored for its prompt, best first, itself included
    log_z: float  # of its prompt, nats, estimated from the group
    temperature: float  # T, of the learner's present step
    tool_spans: Sequence[tuple[int, int]]  # prefix lengths between which a tool wrote
    version: int  # the learner's


def read_detail(
    browser: ReplayBrowser, id: str, decode: Decode, *, temperature: float, version: int
) -> Detail:
    """As it is stored now, at the learner's T and version; raises Gone, BufferUnreachable."""
    trajectory = next(browser.trajectories([id]), None)
    if trajectory is None:
        raise Gone(id)
    (ids,) = browser.ids([trajectory.prompt_key])
    # The buffer may have replaced it since the line above.
    group = {t.id: t for t in browser.trajectories(ids)} | {id: trajectory}
    tallies = browser.tallies_of(list(group))
    rows = {t.id: row_of(t, decode, tallies[t.id]) for t in group.values()}
    log_z = estimate_log_z(list(group.values()), temperature=temperature)
    prefixes = prefixes_of(trajectory, temperature=temperature, log_z=log_z)
    texts = split_text(trajectory.completion.tolist(), [p.length for p in prefixes], decode)
    return Detail(
        row=rows[id],
        steps=list(zip(prefixes, texts, strict=True)),
        group=sorted(rows.values(), key=lambda row: (-row.log_reward, row.id)),
        log_z=log_z,
        temperature=temperature,
        tool_spans=tool_spans(trajectory.from_tool.tolist()),
        version=version,
    )


def prefixes_of(trajectory: Trajectory, *, temperature: float, log_z: float) -> tuple[Prefix, ...]:
    """Every stop state, shortest first; `log_z` is what `estimate_log_z` says of the prompt.

    The residual is the difference of neighbouring potentials; SubTB (Hu et al. 2024, eq. 3) is the
    squares of the differences of all pairs. Where the bare prompt is no stop state, the root
    stands before the first one, with its flow Z as its potential: phi = -log Z.
    """
    potential_S = potentials(trajectory, temperature=temperature)
    root = -log_z if trajectory.stops[0] > 0 else np.nan
    residuals = np.diff(potential_S, prepend=root).tolist()
    columns = (
        trajectory.stops,
        trajectory.log_reward,
        path_log_probs(trajectory),
        trajectory.behaviour_log_stop,
        potential_S,
    )
    return tuple(
        Prefix._make((*row, None if math.isnan(residual) else residual))
        for *row, residual in zip(*(column.tolist() for column in columns), residuals, strict=True)
    )


def path_log_probs(trajectory: Trajectory) -> NDArray[np.float64]:
    """log q of the tokens up to each stop state, [S] nats; a tool's tokens have probability 1."""
    steps_L = np.cumsum(trajectory.behaviour_log_prob, dtype=np.float64)
    return np.concatenate([[0.0], steps_L])[trajectory.stops]


def potentials(trajectory: Trajectory, *, temperature: float) -> NDArray[np.float64]:
    """phi_t = log q(z_1:t) + log q(stop | z_1:t) - log R(z_1:t stop) / T of each stop state.

    [S] nats; at the optimum all of a prompt equal -log Z.
    """
    log_q_S = path_log_probs(trajectory) + trajectory.behaviour_log_stop
    return log_q_S - trajectory.log_reward.astype(np.float64) / temperature


def estimate_log_z(trajectories: Sequence[Trajectory], *, temperature: float) -> float:
    """log Z of a prompt from some of its trajectories, nats: the mean of log R / T - log q.

    VarGrad's estimate (Richter et al. 2020), here from recorded log q of several versions.
    Demonstrations, which no policy sampled, do not count; NaN of them alone.
    """
    sampled = [t for t in trajectories if t.behaviour != "demonstration"]
    return float(np.mean([t.log_weight(temperature) for t in sampled])) if sampled else math.nan
