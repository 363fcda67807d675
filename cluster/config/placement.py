"""Where the processes of a run go: on which Ray cluster, how many, and what each claims there."""

import os
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from cluster.config.project import UserError
from lm.config import Frozen

# A node with this label is kept for the parts that it names: actor, reward, learner or evaluator.
PART_LABEL = "amortize-part"
_Wanted = Annotated[str, Field(pattern=r"^!?(in\([\w., -]+\)|[\w.-]+)$")]


class Placement(Frozen):
    """What one process claims of its node."""

    cpus: float = Field(0.25, ge=0, description="Ray CPUs; how many fit on a node.")
    gpus: NonNegativeFloat = 0.0
    """Ray GPUs; a fraction shares one and caps memory; 0 sees none."""
    threads: int = Field(1, ge=1, description="Threads of its matrix products.")
    labels: dict[str, _Wanted] = Field(
        {},
        description="Labels of its node, as Ray selects by them: `a`, `!a`, `in(a, b)` or "
        f"`!in(a, b)`. Where nodes have {PART_LABEL}, no part goes to one kept for another.",
    )

    @model_validator(mode="after")
    def _check_claim(self) -> Self:
        if self.cpus == 0 and self.gpus == 0:
            raise ValueError("cpus and gpus are both 0: a place must be a share of something")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus ({self.gpus:g}) must be whole above 1; only one can be shared")
        return self


class GroupPlacement(Placement):
    """What one rank claims, and how the ranks of one worker group lie among the nodes."""

    strategy: Literal["PACK", "STRICT_PACK", "SPREAD"] = "PACK"
    """Ranks of one worker group: on as few nodes as there is room on, on one node or not at all, or
    on as many as there are."""


class ClusterConfig(Frozen):
    """The `[cluster]` section: how many processes, where, and how long they may be silent."""

    address: str | None = None
    """A running Ray cluster (host:port, ray://..., auto); None starts one here."""
    cpus: int | None = Field(None, ge=1)
    """CPUs that a Ray started here offers; None: its cores."""
    dashboard: bool = Field(False, description="Start Ray's dashboard, on loopback.")
    actors: int = Field(2, ge=1, description="Rollout actors.")
    actor_placement: Placement = Placement()
    reward_placement: GroupPlacement = GroupPlacement()
    learner_placement: GroupPlacement = GroupPlacement()
    time_limit_s: PositiveFloat | None = None
    """Training ends after this time even if steps are left."""
    max_restarts: int = Field(5, ge=0, description="Times that one part may die and be replaced.")
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait of one part for a place while no node joins the cluster, and then for its start
    to come further (what it reads and holds). Who needs it waits longer by both."""
    silence_timeout_s: PositiveFloat = 120.0
    """Longest that a running part may leave a call unanswered."""
    answer_timeout_s: PositiveFloat = 30.0
    """Longest wait for the weight store or replica registry."""
    stop_timeout_s: PositiveFloat = 60.0
    """Longest orderly stop, of the run or of a part that is scaled away; what still runs then is
    killed."""

    def ray_address(self, given: str | None = None) -> str | None:
        """The Ray cluster to join: the one given, else the configured one, else RAY_ADDRESS.

        None: there is none yet. Raises UserError where it can be no cluster's address.
        """
        address = given or self.address or os.environ.get("RAY_ADDRESS") or None
        if address is not None and "://" in address and not address.startswith("ray://"):
            raise UserError(
                f"{address!r} is no address of a Ray cluster: write host:port, ray://host:port or "
                "auto (http:// is a dashboard's, for 'ray job submit')"
            )
        return address
