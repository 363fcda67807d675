"""What the objectives need and mean. Imports no torch: configurations read it too.

Code asks for the trait that it depends on, never for an objective by name, so that another
objective is a class beside this file, a line here, and a name in `ObjectiveName`.
"""

from dataclasses import dataclass
from typing import Literal

ObjectiveName = Literal["subtb", "tb", "db", "raptb", "ppo", "sft", "joint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """Of one objective; every class in this folder has those of its own as `traits`."""

    imitates: bool = False  # learns from what it is shown: no actors, no rewards, no gate
    on_policy: bool = False  # learns from the policy's own samples alone, neither old nor tempered
    needs_base: bool = False  # compares with the base LM, at one more forward pass
    uses_log_z: bool = False  # its loss holds log Z(X), which may be learned
    balances_states: bool = False  # ties stop states to one another, the bare prompt among them
    has_terms: bool = False  # several residuals a trajectory, which `normalisation` weighs
    has_pairs: bool = False  # pairs of stop states, which `subtb_lambda` weighs
    trains_model: bool = False  # its result is a language model rather than a policy


TRAITS: dict[ObjectiveName, Traits] = {
    "subtb": Traits(uses_log_z=True, balances_states=True, has_terms=True, has_pairs=True),
    "tb": Traits(uses_log_z=True),
    "db": Traits(uses_log_z=True, balances_states=True, has_terms=True),
    "raptb": Traits(uses_log_z=True, has_terms=True),
    "ppo": Traits(on_policy=True, needs_base=True),
    "sft": Traits(imitates=True),
    "joint": Traits(imitates=True, trains_model=True),
}
