"""log Z(X), learned: a linear head on the policy's own state behind the prompt."""

import torch
from torch import Tensor, nn

from learner.config import LearnerConfig
from learner.engine import Engine
from lm.actions import ActionSpace
from lm.scoring import prompt_state_size

NAME = "log_z"  # of the head inside the trained module
# How much faster than an adapter's parameter one of the head moves under Adam. log Z is tens of
# nats wide; a tenth of a nat is what a step at the usual learning rates then makes.
SPEED = 10.0


class LogZUnused(ValueError):
    """A learned log Z was asked for where no term of the loss has it."""


class LogZ(nn.Module):
    """log Z(X) = SPEED (w · h / |h| + b), h the last hidden state of the prompt, in nats.

    The state is given detached. Where the answer Y is not in the prompt, two answers to one X get
    the same log Z, and the group's own estimate is better. It is 0 until `start`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, state_BH: Tensor) -> Tensor:
        """[B] nats, float32."""
        unit_BH = nn.functional.normalize(state_BH.float(), dim=-1)
        slow_B = unit_BH @ self.weight + self.bias
        # Amplified in value and not in gradient. To Adam that is all the same, and the adapter's
        # gradient is not clipped for the sake of the head's.
        return slow_B + (SPEED - 1) * slow_B.detach()

    def start(self, engine: Engine, log_z: float) -> None:
        """Let the head answer `log_z` for every prompt, on all ranks. Collective.

        From 0, a policy would first lower the probability of everything it is shown.
        """
        state = engine.state()
        state[f"parameter/{NAME}.bias"] = torch.tensor([log_z / SPEED])
        engine.load_state(state)


def attach_log_z(model: nn.Module) -> LogZ:
    """Make a head part of the trained module, before an engine is built around that.

    Engines train and save whatever in it wants a gradient; adapter bytes hold only what is LoRA's.
    """
    head = LogZ(prompt_state_size(model)).to(next(model.parameters()).device)
    model.add_module(NAME, head)
    return head


def check_log_z(config: LearnerConfig, actions: ActionSpace) -> None:
    """Raise LogZUnused when log Z is to be learned and the objective would not hold it.

    SubTB and DB have the root only where the bare prompt is no stop state: otherwise its flow is
    R(⊤) / q(⊤), which nobody need learn.
    """
    known = config.traits.balances_states and actions.stop_states([], []).item()
    if config.log_z == "learned" and known:
        raise LogZUnused(
            f'learner.log_z = "learned" with learner.objective = "{config.objective}": this task '
            "may stop right behind the prompt, whose flow the objective then knows; use "
            'learner.log_z = "group", or objective "tb" or "raptb"'
        )
