"""Training with parameters, gradients and optimizer state in shards, one on each process.

PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`) through Lightning's `ModelParallelStrategy`.
Checkpoints are those of any other run: whole, and in the same order, so that a run goes on with or
without shards, and all verbs read them.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

MOST_SECONDS = 10**8


class Sharded(ModelParallelStrategy):
    """Every process holds a part of each parameter, its gradient and its optimizer state.

    For networks that do not fit into the memory of one device with all of these. The whole network
    is there only while a validation, test or prediction runs.

    Args:
        process_group_backend: As nccl or gloo; null: what suits the device.
        timeout_seconds: How long processes wait for each other.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout_seconds: float = 1800
    ) -> None:
        if not 0 < timeout_seconds <= MOST_SECONDS:
            raise ValueError(
                f"timeout_seconds={timeout_seconds} of Sharded must be above 0 and at most "
                f"{MOST_SECONDS:,}"
            )
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if not isinstance(self.model, FSDPModule):
            raise ValueError(
                f"strategy Sharded cannot shard a {type(self.model).__name__}: it is for the tasks "
                "of this package, or a module whose configure_model() calls sharding.shard()"
            )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state of the module, on the first process."""
        assert self.model is not None
        found = whole(self.model.state_dict(), keep=self.is_global_zero)
        assert isinstance(found, dict)
        return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimizer, on the first process."""
        found = whole(optimizer.state_dict(), keep=self.is_global_zero)
        assert isinstance(found, dict)
        return found

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let the trainer restore optimizers when all hooks have seen the checkpoint."""
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a whole checkpoint; each process keeps its shards of the weights."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert self.model is not None
        assert isinstance(checkpoint, dict)
        self.model.load_state_dict(_like(self.model.state_dict(), checkpoint["state_dict"]))
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process keeps its shards of the optimizer's state."""
        for optimizer, state in zip(
            self.optimizers, checkpoint.get("optimizer_states", []), strict=False
        ):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shards = {
                index: _like(dict.fromkeys(values, parameters[index]), values)
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a module: each of its layers, gathered when it is computed, and all that is left.

    Args:
        module: What is called in training; layers stand in lists named `layers`.
        mesh: The processes.
    """
    if isinstance(module, FSDPModule):
        return
    for name, layers in list(module.named_modules()):
        if name.split(".")[-1] == "layers" and isinstance(layers, nn.ModuleList):
            for layer in layers:
                fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def gather(module: nn.Module) -> None:
    """Give every process the whole parameters until `scatter`, so that it can go on by itself.

    Without this each forward pass is an exchange among all processes, and evaluation has different
    numbers of them on each.
    """
    if isinstance(module, FSDPModule):
        # Before any forward pass; else the first layer to be called takes itself for the root.
        module._get_fsdp_state()._lazy_init()
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def scatter(module: nn.Module) -> None:
    """Undo `gather`."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def whole(tree: Any, *, keep: bool = True) -> Any:
    """Containers of tensors, with shards made whole, on the CPU.

    Args:
        tree: All processes must call this with theirs.
        keep: Whether this process needs the result; otherwise it is not kept in memory.
    """

    def made_whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map(made_whole, tree)


def _like(shards: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as shards where they have the shape of one."""
    found = dict(values)
    for name, value in values.items():
        shard = shards.get(name)
        if isinstance(shard, DTensor) and isinstance(value, Tensor) and value.shape == shard.shape:
            placed = value.to(shard.device, copy=True)
            found[name] = distribute_tensor(
                placed, shard.device_mesh, shard.placements, src_data_rank=None
            )
    return found
