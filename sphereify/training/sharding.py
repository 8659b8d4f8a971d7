"""FSDP2: a network whose parameters, gradients and optimizer state are spread over the processes."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.nn import AngularHead
from sphereify.training.distributed import Processes


class Shards:
    """A model in shards. It is spread in place, block by block, so that no device ever holds the whole.

    The layers of the model's ModuleLists and Sequentials are gathered and freed one after another; all else, and with
    it an angular head, whose loss needs its weights after the forward pass, is gathered once a pass.

    Args:
        model: on the CPU.
        processes: two or more.
    """

    def __init__(self, model: nn.Module, processes: Processes):
        from torch.distributed.checkpoint.state_dict import StateDictOptions
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.model, self.processes = model, processes
        self.shell = copy.deepcopy(model) if processes.writes else None  # artifacts are saved from it
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for unit in _units(model):
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(processes.device))
        self.options = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def state(self) -> dict[str, Tensor]:
        """The whole state dict, on the CPU of the process that writes; all processes must ask."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        self.processes.share_buffers(self.model)
        return get_model_state_dict(self.model, options=self.options)  # type: ignore[return-value]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state of the optimizer by the names of the parameters, on the CPU of the process that writes; all
        processes must ask."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return get_optimizer_state_dict(self.model, optimizer, options=self.options)  # type: ignore[return-value]

    def restore(self, optimizer: torch.optim.Optimizer, model_state: Any, optimizer_state: Any) -> None:
        """Take back what `state` and `optimizer_state` returned; every process must have read it."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        set_model_state_dict(self.model, model_state, options=self.options)
        if optimizer_state is None:  # the checkpoint was written before the first step
            return
        set_optimizer_state_dict(self.model, optimizer, optimizer_state, options=self.options)

    def whole(self) -> nn.Module | None:
        """The model with what it has learned, on the CPU of the process that writes; all processes must ask."""
        state = self.state()
        if self.shell is not None:
            self.shell.load_state_dict(state)
        return self.shell


def _units(model: nn.Module) -> list[nn.Module]:
    """The outermost layers of ModuleLists and Sequentials, those with an angular head left out."""
    units: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for parent in model.modules():
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or parent in inside:
            continue
        for child in parent.children():
            parts = set(child.modules())
            heads = any(isinstance(part, AngularHead) for part in parts)
            if not heads and not parts & inside and any(True for _ in child.parameters()):
                units.append(child)
                inside |= parts
    return units
