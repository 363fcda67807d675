"""How gradients become one optimizer step, in one process or shared by several."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from learner.config import LearnerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps per parameter


class NonFiniteUpdate(FloatingPointError):
    """A gradient is NaN or infinite."""


class StateMismatch(ValueError):
    """A saved state belongs to another set of parameters."""


class Engine(Protocol):
    """One optimizer over the trainable parameters of a model, held by `num_ranks` processes.

    Every method is collective: all ranks call it in the same order.
    """

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def update(self, losses: Sequence[Callable[[], Tensor]], *, learning_rate: float) -> float:
        """Step along the gradient of the sum of all losses of all ranks, which pass equally many.

        Each callable builds one micro-batch's graph; only one is alive at a time. Returns the
        gradient norm before clipping; raises NonFiniteUpdate on all ranks alike.
        """

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, in the order of ranks; equally many on each."""

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank; what the others pass is ignored."""

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer moments, whole on every rank whatever the number of ranks."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave, also from an engine of another kind or number of ranks."""

    def close(self) -> None:
        """Leave the other ranks in order."""


class TorchEngine:
    """The engine of one process: AdamW as torch has it."""

    rank = 0
    num_ranks = 1

    def __init__(self, model: nn.Module, config: LearnerConfig) -> None:
        self._parameters = trainable_parameters(model)
        self._optimizer = make_optimizer(self._parameters, config)
        self._clip_norm = config.clip_norm

    def update(self, losses: Sequence[Callable[[], Tensor]], *, learning_rate: float) -> float:
        self._optimizer.zero_grad()
        for loss in losses:
            loss().backward()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._clip_norm).item()
        check_finite(norm)
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        return norm

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values)]

    def broadcast(self, data: bytes) -> bytes:
        return data

    def state(self) -> dict[str, Tensor]:
        tensors = {"optimizer_steps": torch.zeros(())}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            tensors["optimizer_steps"] = moments.get("step", tensors["optimizer_steps"])
            tensors[f"parameter/{name}"] = parameter
            for key in MOMENTS:
                tensors[f"{key}/{name}"] = moments.get(key, torch.zeros_like(parameter))
        return {name: t.detach().float().cpu().clone() for name, t in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        check_state(state, self._parameters)
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(state[f"parameter/{name}"])
            moments = {key: state[f"{key}/{name}"].to(parameter, copy=True) for key in MOMENTS}
            self._optimizer.state[parameter] = moments | {"step": state["optimizer_steps"].clone()}

    def close(self) -> None:
        return


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a step changes, by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("the model has no trainable parameter: attach an adapter to it first")
    return named


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: LearnerConfig
) -> torch.optim.Optimizer:
    """AdamW; its learning rate is set before every step."""
    return torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def check_finite(norm: float) -> None:
    if not math.isfinite(norm):
        raise NonFiniteUpdate(
            f"gradient norm is {norm}: this step was refused; the last checkpoint is good"
        )


def check_state(state: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Raise StateMismatch unless the state names exactly these parameters, in these shapes."""
    saved = {n.partition("/")[2]: t.shape for n, t in state.items() if n.startswith("parameter/")}
    wanted = {name: parameter.shape for name, parameter in parameters.items()}
    if saved == wanted:
        return
    name = next(n for n in sorted(saved | wanted) if saved.get(n) != wanted.get(n))
    raise StateMismatch(
        f"parameter {name!r}: saved as {saved.get(name, 'absent')}, the model has "
        f"{wanted.get(name, 'none')}; restore with the adapter settings it was saved with"
    )
