"""The device that a name stands for. Imports torch only when one is chosen."""

from typing import TYPE_CHECKING

from sphereify.errors import UsageError, first_line, option

if TYPE_CHECKING:
    import torch


def find_device(name: "str | torch.device") -> "torch.device":
    """The device of a name; for "auto" the GPU where there is one, else the CPU.

    Raises:
        UsageError: torch does not have this device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(name).split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"{option('device')}: got {str(name)!r}, but torch sees no CUDA device. Leave it out, or take 'cpu'.",
            option="device",
            value=str(name),
        )
    try:
        device = torch.device(name)
        # A device that is there may be busy: of a GPU, only the number is looked at.
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        raise UsageError(
            f"{option('device')}: got {name!r}: {first_line(error)}", option="device", value=name
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"{option('device')}: got {str(name)!r}, but torch sees {torch.cuda.device_count()} GPUs only",
            option="device",
            value=str(name),
        )
    return device
