"""The posterior p(Z | X, Y) ∝ R(Z ⊤)^(1/T) of one prompt by enumeration: its prefix tree, expanded
in batches, the heaviest prefixes first.

A completion is reached where the policy stops, and once only, because what a tool says follows from
the tokens before it. The others begin with a prefix of the frontier, whose masses add up to what is
left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.actions import ActionSpace
from lm.next_action import NextLogits, Prefix
from lm.tools import Tool, insertion
from tasks.posterior.ceiling import Ceiling

# Prefixes of one batch: few at first, when the heaviest are still to be found.
_SMALLEST_BATCH, _LARGEST_BATCH = 64, 1024
_BATCH_SHARE = 0.25  # of those visited so far
_LARGEST_TABLE = 1 << 22  # of prefixes by actions: bounds memory


@dataclass(frozen=True, eq=False, kw_only=True)
class Support:
    """N completions of one prompt, with what each of K policies says of them; nats, float64."""

    completions: tuple[Prefix, ...]  # tokens, tool text included, stop token excluded
    from_tool: tuple[tuple[bool, ...], ...]
    log_q_KN: NDArray[np.float64]  # log q_k(Z ⊤ | X)
    left_out_q_K: NDArray[np.float64]  # mass of q_k on completions that were not reached
    log_left_out_reward: float  # log of a bound on their sum of R^(1/T); inf where none is known
    nodes: int  # prefixes that were visited


@dataclass(frozen=True, slots=True)
class _Node:
    tokens: Prefix
    from_tool: tuple[bool, ...]
    pending: Prefix  # what the tool has yet to say here


@dataclass(frozen=True, slots=True, eq=False)
class _Frontier:
    """M children of visited nodes that were not visited themselves."""

    parent_M: NDArray[np.int64]  # number of the visited node
    token_M: NDArray[np.int64]
    log_q_KM: NDArray[np.float64]
    log_bound_M: NDArray[np.float64]  # of the reward below; inf where none is known

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> "_Frontier":
        return _Frontier(*(column[..., chosen] for column in self._columns))

    def join(self, *others: "_Frontier") -> "_Frontier":
        columns = zip(*(one._columns for one in (self, *others)), strict=True)
        return _Frontier(*(np.concatenate(same, axis=-1) for same in columns))

    @property
    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.parent_M, self.token_M, self.log_q_KM, self.log_bound_M

    def log_weight(self, log_scale: float) -> NDArray[np.float64]:
        """[M] the largest share of any policy, or of the posterior, that may lie below."""
        known_M = np.where(np.isinf(self.log_bound_M), -np.inf, self.log_bound_M - log_scale)
        return np.maximum(self.log_q_KM.max(axis=0), known_M)


@dataclass(eq=False)
class PrefixTree:
    """Completions of one prompt X, by and by, under K policies."""

    prompt: Prefix
    actions: ActionSpace
    tool: Tool | None
    policies: Sequence[NextLogits]
    ceiling: Ceiling | None  # bounds the reward of what is left out; None where nothing does
    _: KW_ONLY
    vocab_size: int
    max_nodes: int  # prefixes that are visited at most

    def __post_init__(self) -> None:
        columns = self.actions.columns(self.vocab_size)
        self._stop_column = int(np.searchsorted(columns, self.actions.stop_token))
        self._token_C = np.delete(columns, self._stop_column)  # what Z can grow by
        self._nodes: list[_Node] = []
        self._completions: list[Prefix] = []
        self._from_tool: list[tuple[bool, ...]] = []
        self._log_q: list[NDArray[np.float64]] = []  # [K] each
        # The root is the only child of nothing.
        self._frontier = _Frontier(
            np.full(1, -1),
            np.full(1, -1),
            np.zeros((len(self.policies), 1)),
            np.full(1, np.inf if self.ceiling is None else self.ceiling.of_everything),
        )
        self._never_q_K = np.zeros(len(self.policies))
        self._log_never = -np.inf

    @property
    def completions(self) -> Sequence[Prefix]:
        """All that were reached, in the order in which they were."""
        return self._completions

    @property
    def exhausted(self) -> bool:
        """No prefix is left, or none that may be visited."""
        return not len(self._frontier.token_M) or len(self._nodes) >= self.max_nodes

    @property
    def left_out_q_K(self) -> NDArray[np.float64]:
        """Mass of each policy on completions that were not reached."""
        return np.exp(self._frontier.log_q_KM).sum(axis=1) + self._never_q_K

    @property
    def log_left_out_reward(self) -> float:
        """Log of a bound on their sum of R^(1/T); inf where none is known."""
        return float(np.logaddexp.reduce(np.append(self._frontier.log_bound_M, self._log_never)))

    def support(self) -> Support:
        return Support(
            completions=tuple(self._completions),
            from_tool=tuple(self._from_tool),
            log_q_KN=np.array(self._log_q).reshape(-1, len(self.policies)).T,
            left_out_q_K=self.left_out_q_K,
            log_left_out_reward=self.log_left_out_reward,
            nodes=len(self._nodes),
        )

    def expand(self, log_scale: float) -> None:
        """Visit the heaviest prefixes of the frontier, one batch.

        Args:
            log_scale: log of the sum of R^(1/T) to which rewards left out are compared.
        """
        log_weight_M = self._frontier.log_weight(log_scale)
        count = min(self._batch_size(), len(log_weight_M))
        order_M = np.argpartition(-log_weight_M, count - 1)
        visited = self._frontier.take(order_M[:count])
        self._frontier = self._frontier.take(order_M[count:])
        first = len(self._nodes)
        self._nodes += [
            self._child(parent, token)
            for parent, token in zip(visited.parent_M, visited.token_M.tolist(), strict=True)
        ]
        nodes = self._nodes[first:]
        ended_N = np.array(
            [not node.pending and self.actions.must_stop(len(node.tokens)) for node in nodes]
        )
        for number in np.flatnonzero(ended_N):  # ⊤ is forced
            self._reach(nodes[number], visited.log_q_KM[:, number])
        if not ended_N.all():
            self._grow(first + np.flatnonzero(~ended_N), visited.take(~ended_N))
        self._forget(log_scale)

    def _batch_size(self) -> int:
        wanted = max(_SMALLEST_BATCH, round(_BATCH_SHARE * len(self._nodes)))
        most = min(_LARGEST_BATCH, max(1, _LARGEST_TABLE // len(self._token_C)))
        return min(wanted, most, self.max_nodes - len(self._nodes))

    def _child(self, parent: int, token: int) -> _Node:
        if parent < 0:
            return _Node((), (), ())
        node = self._nodes[parent]
        tokens = (*node.tokens, token)
        if node.pending:
            return _Node(tokens, (*node.from_tool, True), node.pending[1:])
        from_tool = (*node.from_tool, False)
        return _Node(tokens, from_tool, tuple(insertion(self.tool, tokens, from_tool)))

    def _grow(self, number_N: NDArray[np.intp], visited: _Frontier) -> None:
        """Put the children of visited nodes into the frontier; reach where they may stop."""
        nodes = [self._nodes[number] for number in number_N]
        speaking_N = np.array([bool(node.pending) for node in nodes])
        may_stop_N = ~speaking_N & [
            bool(self.actions.stop_states(node.tokens, node.from_tool)[-1]) for node in nodes
        ]
        prefixes = [(*self.prompt, *node.tokens) for node in nodes]
        log_q_KNC = np.stack(
            [
                policy.action_log_probs(self.actions, prefixes, may_stop_N.tolist()).cpu().numpy()
                for policy in self.policies
            ]
        ).astype(np.float64)
        log_q_KNC += visited.log_q_KM[:, :, None]
        for at in np.flatnonzero(may_stop_N):
            self._reach(nodes[at], log_q_KNC[:, at, self._stop_column])
        at_B, free_B = np.flatnonzero(speaking_N), np.flatnonzero(~speaking_N)
        said_B = np.array([nodes[at].pending[0] for at in at_B], dtype=np.int64)
        token_NC = np.tile(self._token_C, (len(nodes), 1))
        token_NC[at_B] = said_B[:, None]
        bound_NC = np.full(token_NC.shape, np.inf)
        if self.ceiling is not None:
            tokens = [node.tokens for node in nodes]
            bound_NC = self.ceiling.of_children(tokens, visited.log_bound_M, token_NC)
        choices = len(self._token_C)
        spoken = _Frontier(number_N[at_B], said_B, visited.log_q_KM[:, at_B], bound_NC[at_B, 0])
        chosen = _Frontier(
            np.repeat(number_N[free_B], choices),
            np.tile(self._token_C, len(free_B)),
            np.delete(log_q_KNC[:, free_B], self._stop_column, axis=2).reshape(
                len(self.policies), -1
            ),
            bound_NC[free_B].reshape(-1),
        )
        self._frontier = self._frontier.join(spoken, chosen)

    def _reach(self, node: _Node, log_q_K: NDArray[np.float64]) -> None:
        self._completions.append(node.tokens)
        self._from_tool.append(node.from_tool)
        self._log_q.append(log_q_K)

    def _forget(self, log_scale: float) -> None:
        """Keep no more of the frontier than may still be visited; the rest counts as left out."""
        room = self.max_nodes - len(self._nodes)
        if len(self._frontier.token_M) <= room:
            return
        order_M = np.argpartition(-self._frontier.log_weight(log_scale), room)
        never = self._frontier.take(order_M[room:])
        self._frontier = self._frontier.take(order_M[:room])
        self._never_q_K += np.exp(never.log_q_KM).sum(axis=1)
        self._log_never = float(np.logaddexp.reduce([*never.log_bound_M, self._log_never]))


# log R(Z ⊤) / T of completions, nats.
LogWeight = Callable[[Sequence[Prefix]], NDArray[np.float64]]
# Before anything is known of Z(X), rewards left out are compared to less and less.
_UNKNOWN_STEP_NATS = 5.0


@dataclass(frozen=True, eq=False, kw_only=True)
class ExactPosterior:
    """The posterior among the N completions that were enumerated."""

    support: Support
    log_weight_N: NDArray[np.float64]  # log R / T
    log_p_N: NDArray[np.float64]  # normalised over the N
    log_z: float  # log of their sum of R^(1/T): log Z(X), less what is left out
    left_out_p: float  # the share of the whole posterior that is left out, at most

    def within(self, tolerance: float, *, policy: int) -> bool:
        """Whether neither the posterior nor this policy leaves out more than `tolerance`."""
        return max(self.left_out_p, float(self.support.left_out_q_K[policy])) <= tolerance


def exact_posterior(tree: PrefixTree, log_weight: LogWeight, *, tolerance: float) -> ExactPosterior:
    """Enumerate until every policy and the posterior leave out at most `tolerance`, or the tree
    comes to its end before: ask `within`."""
    log_weights: list[NDArray[np.float64]] = []
    scored, log_z, log_scale = 0, -math.inf, 0.0
    while True:
        while not tree.exhausted and _wanting(tree, log_scale, tolerance):
            tree.expand(log_scale)
        fresh = tree.completions[scored:]
        scored += len(fresh)
        if fresh:
            log_weights.append(log_weight(fresh))
            log_z = float(np.logaddexp.reduce([log_z, *log_weights[-1]]))
        log_scale = log_z if math.isfinite(log_z) else log_scale - _UNKNOWN_STEP_NATS
        if tree.exhausted or not _wanting(tree, log_scale, tolerance):
            break
    log_weight_N = np.concatenate([np.zeros(0), *log_weights])
    return ExactPosterior(
        support=tree.support(),
        log_weight_N=log_weight_N,
        log_p_N=log_weight_N - log_z if math.isfinite(log_z) else log_weight_N,
        log_z=log_z,
        left_out_p=_share(tree.log_left_out_reward, log_z),
    )


def _wanting(tree: PrefixTree, log_scale: float, tolerance: float) -> bool:
    left_out_p = _share(tree.log_left_out_reward, log_scale)
    return left_out_p > tolerance or bool((tree.left_out_q_K > tolerance).any())


def _share(log_part: float, log_rest: float) -> float:
    """part / (part + rest); 1 where the part is unknown or the rest nothing."""
    if log_part == math.inf or log_rest == -math.inf:
        return 1.0
    return math.exp(log_part - float(np.logaddexp(log_part, log_rest)))
