"""The engine of M ranks: DeepSpeed ZeRO stage 2, over gloo on CPU and NCCL on CUDA.

DeepSpeed chooses its accelerator at import: a launcher that wants the CPU on a machine with a GPU
sets DS_ACCELERATOR=cpu in the environment of the process.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed import utils
from torch import Tensor, nn

from learner.config import LearnerConfig
from learner.engine import (
    MOMENTS,
    check_finite,
    check_state,
    make_optimizer,
    set_learning_rate,
    trainable_parameters,
)
from lm.process_group import Rendezvous, join_ranks, waiting_for_ranks


class _Trainable(nn.Module):
    """What DeepSpeed gets to see: the trainable parameters, and a forward that builds a loss.

    The frozen base stays outside: DeepSpeed would demand it in float32 and walk over all of it.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.shared = nn.ParameterList(parameters.values())

    def forward(self, loss: Callable[[], Tensor]) -> Tensor:
        return loss()


class DeepSpeedEngine:
    """Optimizer state and gradients sharded over the ranks; parameters whole on each.

    One per process and lifetime of the process: DeepSpeed keeps its groups in globals.

    Raises:
        RankLost: the ranks did not meet in time; from every method, that one went missing.
    """

    def __init__(self, model: nn.Module, config: LearnerConfig, rendezvous: Rendezvous) -> None:
        self.rank = rendezvous.rank
        self.num_ranks = rendezvous.num_ranks
        self._rendezvous = rendezvous
        self._parameters = trainable_parameters(model)
        self._device = next(iter(self._parameters.values())).device
        with self._waiting("rendezvous"):
            _join(rendezvous, self._device)
            optimizer = make_optimizer(self._parameters, config)
            self._engine, *_ = deepspeed.initialize(
                model=_Trainable(self._parameters),
                optimizer=optimizer,
                config=_deepspeed_config(config, self.num_ranks),
                dist_init_required=False,
            )
        self._zero: Any = self._engine.optimizer
        self._prime_moments(torch.zeros((), dtype=torch.float32))

    def update(self, losses: Sequence[Callable[[], Tensor]], *, learning_rate: float) -> float:
        set_learning_rate(self._zero.optimizer, learning_rate)
        with self._waiting("update"):
            for number, loss in enumerate(losses, start=1):
                self._engine.set_gradient_accumulation_boundary(number == len(losses))
                # DeepSpeed averages over ranks; the losses of all ranks are to be summed.
                self._engine.backward(self._engine(loss) * self.num_ranks)
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        check_finite(norm)
        return norm

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        everyones = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        with self._waiting("gather"):
            dist.all_gather(everyones, mine)
        return [tensor.tolist() for tensor in everyones]

    def broadcast(self, data: bytes) -> bytes:
        length = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        with self._waiting("broadcast"):
            dist.broadcast(length, src=0)
            payload = torch.empty(int(length), dtype=torch.uint8, device=self._device)
            if self.rank == 0:
                payload.copy_(torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)))
            dist.broadcast(payload, src=0)
        return payload.cpu().numpy().tobytes()

    def state(self) -> dict[str, Tensor]:
        partition = self._zero.single_partition_of_fp32_groups[0]
        steps = self._zero.optimizer.state[partition]["step"]
        tensors = {"optimizer_steps": steps.detach()}
        with self._waiting("state"):
            for name, parameter in self._parameters.items():
                tensors[f"parameter/{name}"] = utils.safe_get_full_fp32_param(parameter)
                for key in MOMENTS:
                    tensors[f"{key}/{name}"] = utils.safe_get_full_optimizer_state(parameter, key)
            return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        check_state(state, self._parameters)
        self._prime_moments(state["optimizer_steps"])
        for name, parameter in self._parameters.items():
            value = state[f"parameter/{name}"].to(self._device)
            with torch.no_grad():
                parameter.copy_(value)
            utils.safe_set_full_fp32_param(parameter, value.float())
            for key in MOMENTS:
                utils.safe_set_full_optimizer_state(parameter, state[f"{key}/{name}"].float(), key)

    def close(self) -> None:
        self._engine.destroy()
        dist.destroy_process_group()

    def _prime_moments(self, steps: Tensor) -> None:
        """Create AdamW's state, which torch makes in the first step only, so it can be set."""
        for partition in self._zero.single_partition_of_fp32_groups:
            moments = self._zero.optimizer.state[partition]
            moments["step"] = steps.clone()
            for key in MOMENTS:
                moments.setdefault(key, torch.zeros_like(partition))
        self._zero._lazy_init_hp_params_optimizer_state()

    def _waiting(self, phase: str) -> AbstractContextManager[None]:
        return waiting_for_ranks(self._rendezvous, part="learner", phase=phase)


def _join(rendezvous: Rendezvous, device: torch.device) -> None:
    join_ranks(rendezvous, device)
    # Else DeepSpeed compiles this extension at start: a minute, and no start without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    timeout = timedelta(seconds=rendezvous.timeout_s)
    # DeepSpeed talks over a copy of the group, made with torch's deadline of half an hour.
    dist.distributed_c10d._set_pg_timeout(timeout, utils.groups._clone_world_group())


def _deepspeed_config(config: LearnerConfig, num_ranks: int) -> dict[str, Any]:
    return {
        # Batches are counted by the learner; DeepSpeed only wants numbers that agree.
        "train_batch_size": num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
