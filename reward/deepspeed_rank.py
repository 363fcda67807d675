"""One rank of the frozen LM: the only place of reward/ that knows DeepSpeed.

DeepSpeed chooses its accelerator at import: a launcher that wants the CPU on a machine with a GPU
sets DS_ACCELERATOR=cpu in the environment of the process.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from numpy.typing import NDArray

from lm.model import CausalLM
from reward.packed import edge_log_probs, score_limits
from reward.packing import MicroBatch
from reward.request import ScoreLimits


class RankLost(ConnectionError):
    """Another rank of the replica did not take its part in time, or is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one replica meet. Rank 0 listens on the address."""

    address: str
    port: int
    rank: int
    num_ranks: int
    timeout_s: float  # of the meeting, and of every later wait for another rank


class RewardRank:
    """Holds 1/W of every parameter of the frozen LM; layers are gathered as a pass reaches them.

    Every pass is a collective: all ranks must be given equally many micro-batches, in any sizes.
    A rank that has lost a peer is of no further use and must be replaced, with all of its replica.
    The process group is the process's default one, so a process holds one rank.
    """

    def __init__(self, model: CausalLM, rendezvous: Rendezvous) -> None:
        """Join the other ranks and give up the parameters that are theirs.

        Raises:
            RankLost: the ranks did not meet within the rendezvous's timeout.
        """
        self.limits: ScoreLimits = score_limits(model)
        self._meeting = rendezvous
        self._model = model.eval().requires_grad_(False)
        start_s = monotonic()
        try:
            _join(rendezvous, model.device)
            # One gather for a whole layer instead of one for each of its matrices.
            set_z3_leaf_modules(model, list(model._no_split_modules))
            deepspeed.initialize(
                model=self._model, config=_zero3_config(model), dist_init_required=False
            )
        except (dist.DistError, RuntimeError) as error:
            raise self._named("rendezvous", start_s, error) from error

    def forward(self, share: Sequence[MicroBatch]) -> list[NDArray[np.float32]]:
        """Log-probabilities of all edges of each micro-batch.

        Raises:
            RankLost: a peer died or did not come within the timeout.
        """
        start_s = monotonic()
        try:
            return [edge_log_probs(self._model, batch) for batch in share]
        except (dist.DistError, RuntimeError) as error:
            raise self._named("forward", start_s, error) from error

    @property
    def num_held(self) -> int:
        """Parameters that this rank holds between passes."""
        return sum(p.ds_tensor.numel() for p in self._model.parameters())

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()

    def _named(self, phase: str, start_s: float, error: Exception) -> Exception:
        """RankLost where the error is one of communication, else the error itself."""
        # Gloo raises plain RuntimeErrors, which only their text tells from the model's own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            return error
        where = self._meeting
        return RankLost(
            f"reward rank {where.rank} of {where.num_ranks} at {where.address}:{where.port} lost "
            f"its peers in {phase} after {monotonic() - start_s:.1f} s "
            f"(deadline {where.timeout_s} s): {error}"
        )


def _join(rendezvous: Rendezvous, device: torch.device) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Else DeepSpeed compiles this extension at start: a minute, and no start without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed insists on this variable. A rank sees its own GPU only, which is its number 0.
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{rendezvous.address}:{rendezvous.port}",
        rank=rendezvous.rank,
        world_size=rendezvous.num_ranks,
        timeout=timedelta(seconds=rendezvous.timeout_s),
    )
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)


def _zero3_config(model: CausalLM) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            # By default DeepSpeed keeps parameters below 100 000 elements whole on every rank,
            # which of a small model is all of them.
            "stage3_param_persistence_threshold": 0,
            # Release every layer after its use instead of keeping it for the next pass.
            "stage3_max_reuse_distance": 0,
        },
        "steps_per_print": 2**31,
    }
