"""A place on the cluster for the ranks of one gang: a Ray placement group."""

from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config.schema import Placement


class Place:
    """Asked for when made, taken by all ranks or by none, and held until `give_up`.

    The group goes with the driver too, however that ends.

    Args:
        name: of the gang, in Ray's dashboard and in messages.
        claim: of each rank.
        strategy: Ray's; a group of one goes to the node that has most of its claim to spare.
    """

    def __init__(self, name: str, claim: Placement, *, num_ranks: int, strategy: str) -> None:
        bundle = {"CPU": claim.cpus, "GPU": claim.gpus}
        self._claim = claim
        self._group = placement_group(
            [{key: value for key, value in bundle.items() if value}] * num_ranks,
            strategy=strategy,
            name=name,
        )
        self.ready = self._group.ready()
        each = f"{claim.cpus:g} CPU, {claim.gpus:g} GPU"
        self.wanted = each if num_ranks == 1 else f"{num_ranks} ranks x ({each}), {strategy}"

    def options(self, rank: int) -> dict[str, Any]:
        """Options of the Ray actor that is this rank."""
        return {
            "num_cpus": self._claim.cpus,
            "num_gpus": self._claim.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=rank
            ),
        }

    def give_up(self) -> None:
        """Let others have it; ends what still runs in it."""
        remove_placement_group(self._group)
