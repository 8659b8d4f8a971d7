"""The identity of a variant's run: all that its result depends on, by which a folder holds this run or another one."""

import json
import re
from typing import Any

import torch
from torch import nn

from sphereify.datasets import Data
from sphereify.errors import UsageError, option
from sphereify.files import write_text
from sphereify.fingerprint import checksum
from sphereify.training.run_folder import RunFolder
from sphereify.training.same_data import identity_of, is_same
from sphereify.training.settings import WITHOUT_EFFECT, Settings
from sphereify.training.variant import Variant

ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
"""The part of a repr that is another one in each process."""


def variant_identity(model: nn.Module, data: Data, variant: Variant, settings: Settings) -> dict[str, Any]:
    """All that the result of a run depends on, as plain JSON values."""
    options = repr(variant.options)
    lasting = {name: value for name, value in settings.to_json().items() if name not in WITHOUT_EFFECT}
    identity = {
        **lasting,
        "data": identity_of(data),
        "classes": data.classes,
        "image_size": data.image_size,
        "transform": ADDRESS.sub("", str(getattr(data.train, "transform", ""))),
        "conversion": ADDRESS.sub("", options),
        "model": checksum(model.state_dict()),
        **({"operator": _curves(model)} if ADDRESS.search(options) else {}),
    }
    return json.loads(json.dumps(identity))  # type: ignore[no-any-return]


def _curves(model: nn.Module) -> list[str]:
    """Values of the operators that are functions or plain objects, whose names do not say what they compute."""
    operators = (getattr(module, "operator", None) for module in model.modules())
    cos = torch.linspace(-1, 1, 9, device="cpu").unsqueeze(1)
    with torch.no_grad():
        curves = [g(cos).flatten().tolist() for g in operators if callable(g) and not isinstance(g, nn.Module)]
    return sorted({" ".join(f"{value:.4f}" for value in curve) for curve in curves})


def check_same_variant(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Make sure that a folder holds this run or none, and write there which one it is."""
    before = json.loads(folder.variant.read_text()) if folder.variant.is_file() else identity
    data = before["data"] if isinstance(before.get("data"), dict) else {"name": before.get("data")}
    if is_same(data, identity["data"]):
        before["data"] = identity["data"]
    if before != identity:
        names = {**before, **identity}
        changed = ", ".join(name for name in names if before.get(name) != identity.get(name))
        raise UsageError(f"{folder}: holds a run with another {changed}; take another {option('output')}, or remove it")
    if not folder.variant.is_file():
        write_text(folder.variant, json.dumps(identity, indent=1) + "\n")
