"""The state of networks while a calibration runs: their device, and tensors that come back after an error."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from sphereify.devices import find_device
from sphereify.errors import refused


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give the model's tensors their old values back if the block ends with an error."""
    copies = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(copies[name])
        raise


@contextlib.contextmanager
def on_device(device: str | torch.device | None, *networks: nn.Module) -> Iterator[torch.device | None]:
    """Move networks to a device, and back to their own at the end. None leaves them where they are.

    Yields:
        The device; "auto" is the GPU if there is one, else the CPU.

    Raises:
        UsageError: torch does not have the device, or a network is spread over several.
    """
    if device is None:
        yield None
        return
    homes = []
    for network in networks:
        devices = {tensor.device for tensor in [*network.parameters(), *network.buffers()]}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise refused("device", f"the model is spread over {names}; leave the device out")
        homes.append(next(iter(devices), torch.device("cpu")))
    target = find_device(device)
    try:
        for network in networks:
            network.to(target)
        yield target
    finally:
        for network, home in zip(networks, homes, strict=True):
            network.to(home)
