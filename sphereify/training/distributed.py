"""One process, or several that torchrun started: their sums, and which of them writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sphereify.torchrun import local_rank, world_size


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    """Its number, from 0."""
    world: int
    """Number of processes."""
    device: torch.device

    @property
    def writes(self) -> bool:
        """True if this process writes files and reports."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True if `flag` is true in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0) if self.world > 1 else flag

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Copy the buffers of the first process to all: each has gathered BatchNorm's averages by itself."""
        for buffer in model.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


def local_device(device: torch.device) -> torch.device:
    """The device of this process: where torchrun started several, a GPU of its own unless one is named."""
    if world_size() > 1 and device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank())
    return device


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """The processes of torchrun, which sets their ranks and address in the environment; without it, this one alone."""
    world = world_size()
    if world == 1:
        yield Processes(0, 1, device)
        return
    own = local_device(device)
    if own != device:
        torch.cuda.set_device(own)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), own)
    finally:
        if ours:
            dist.destroy_process_group()
