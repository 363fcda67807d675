"""One rank of the frozen LM: the only place of reward/ that knows DeepSpeed.

It chooses its accelerator at import: DS_ACCELERATOR=cpu in the environment keeps it off a GPU.
"""

from collections.abc import Callable, Iterator, Sequence

import deepspeed
import numpy as np
import torch
from deepspeed.utils import set_z3_leaf_modules
from numpy.typing import NDArray
from torch import nn

from lm.config import LMConfig
from lm.model import device_of, load_shard
from lm.process_group import Gathering, Rendezvous, join_ranks, waiting_for_ranks
from lm.weight_files import weight_files
from reward.packed import edge_log_probs, score_limits
from reward.packing import MicroBatch
from reward.request import ScoreLimits

_MOST_AHEAD = 50_000_000  # elements, DeepSpeed's own choice: many layers of a small model


class RewardRank:
    """Holds 1/W of every parameter of the frozen LM; layers are gathered as a pass reaches them.

    Every pass is a collective: all ranks need equally many micro-batches, in any sizes. Once a rank
    has lost a peer, the whole replica must be replaced.
    """

    def __init__(self, config: LMConfig, meet: Callable[[], Rendezvous]) -> None:
        """Join the other ranks, else RankLost, and load the shards that are this one's.

        Raises as load_base.

        Args:
            meet: says where; rank 0 then listens there at once.
        """
        device, dtype = device_of(config), getattr(torch, config.dtype)
        self._rendezvous = place = meet()
        gathering = Gathering(place, part="reward")
        with gathering.phase("fetching"):
            files = weight_files(config)
        with waiting_for_ranks(place, part="reward", phase="rendezvous"):
            join_ranks(place, device, gathering.store)
            # Else DeepSpeed compiles this at start: a minute, and no start without a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(
                dist_init_required=False, auto_mpi_discovery=False, verbose=False
            )
        with gathering.phase("loading"):
            partitioned = deepspeed.zero.Init(config_dict_or_path=_zero3_config(dtype))

            def shard(parameter: nn.Parameter) -> nn.Parameter:
                parameter.requires_grad_(False).data = parameter.data.to(device, dtype)
                partitioned._convert_to_zero_parameters([parameter])
                return parameter

            self.model = load_shard(config, files, shard).to(device)
        with waiting_for_ranks(place, part="reward", phase="loading"):
            # One gather for a whole layer instead of one for each of its matrices.
            layers = set_z3_leaf_modules(self.model, list(self.model._no_split_modules))
            sizes = [sum(p.ds_numel for p in layer.parameters()) for layer in layers]
            settings = _zero3_config(dtype, ahead=min(_MOST_AHEAD, max(sizes)))
            deepspeed.initialize(model=self.model, config=settings, dist_init_required=False)
        self.limits: ScoreLimits = score_limits(self.model)

    def forward(self, share: Sequence[MicroBatch]) -> Iterator[NDArray[np.float32]]:
        """Log p of all edges of each micro-batch; raises RankLost for a dead or stalled peer."""
        for batch in share:
            with waiting_for_ranks(self._rendezvous, part="reward", phase="forward"):
                edges = edge_log_probs(self.model, batch)
            yield edges


def _zero3_config(dtype: torch.dtype, ahead: int = _MOST_AHEAD) -> dict[str, object]:
    """`ahead`: elements to gather before they are needed."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            # By default DeepSpeed keeps parameters below 100 000 elements whole on every rank,
            # which of a small model is all of them.
            "stage3_param_persistence_threshold": 0,
            # Release every layer after its use instead of keeping it for the next pass.
            "stage3_max_reuse_distance": 0,
            # Gathered in one buffer, from which they are copied; it is held while any is in use.
            "stage3_prefetch_bucket_size": ahead,
        },
        "steps_per_print": 2**31,
    }
