"""The ranks that share one model, as torch's process group: how they meet, and how one is missed.

The group is the process's default one, so a process is one rank of one model.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic

import torch
import torch.distributed as dist


class RankLost(ConnectionError):
    """Another rank did not take its part in time, or is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one model meet. Rank 0 listens on the address."""

    address: str
    port: int
    rank: int
    num_ranks: int
    timeout_s: float  # of the meeting, and of every later wait for another rank


def join_ranks(rendezvous: Rendezvous, device: torch.device) -> None:
    """Meet the other ranks, over NCCL on CUDA and gloo on CPU, in a process that DeepSpeed joins.

    Call it, and everything that waits for other ranks, inside `waiting_for_ranks`.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed insists on this variable. A rank sees its own GPU only, which is its number 0.
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{rendezvous.address}:{rendezvous.port}",
        rank=rendezvous.rank,
        world_size=rendezvous.num_ranks,
        timeout=timedelta(seconds=rendezvous.timeout_s),
    )


@contextmanager
def waiting_for_ranks(rendezvous: Rendezvous, *, part: str, phase: str) -> Iterator[None]:
    """Turn an error of communication inside into RankLost, which names part, phase and seconds."""
    start_s = monotonic()
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        # Gloo raises plain RuntimeErrors, which only their text tells from the model's own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        where = rendezvous
        raise RankLost(
            f"{part} rank {where.rank} of {where.num_ranks} at {where.address}:{where.port} lost "
            f"its peers in {phase} after {monotonic() - start_s:.1f} s "
            f"(deadline {where.timeout_s} s): {error}"
        ) from error
