"""Models that timm saved with their configuration: in a repository on the hub, or in a folder."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from sphereify.errors import UsageError, first_line
from sphereify.hub import download, is_hub_name, repository_of

LOCAL_DIR = "local-dir:"
"""The beginning of the name of a folder that timm saved a model in."""

CONFIG = "config.json"


def is_saved_by_timm(spec: str) -> bool:
    """True for the name of a repository or of a folder, in which timm may have saved a model.

    >>> is_saved_by_timm("hf-hub:timm/resnet18.a1_in1k"), is_saved_by_timm("resnet18")
    (True, False)
    """
    return is_hub_name(spec) or spec.startswith(LOCAL_DIR)


def config_of(spec: str) -> dict[str, Any]:
    """The configuration that timm wrote beside a model that it saved: its architecture, and how to build it.

    Raises:
        UsageError: there is no model of timm's.
        ArtifactError: the hub does not have it, or cannot be reached.
    """
    import timm

    if is_hub_name(spec):
        others = f"it holds neither an artifact of sphereify (conversion.json) nor a model of timm ({CONFIG})"
        folder = download(repository_of(spec), [CONFIG], others=others)
    else:
        folder = Path(spec.removeprefix(LOCAL_DIR))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"model {spec!r}: there is no {CONFIG} in {folder}, as timm.models.save_for_hf writes"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"model {spec!r}: its {CONFIG} cannot be read ({first_line(error)})") from None
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        what = f"names {architecture!r}" if architecture else "names no architecture"
        raise UsageError(f"model {spec!r}: its {CONFIG} {what}, expected an architecture of this timm's")
    return config  # type: ignore[no-any-return]


def registered(spec: str, arguments: dict[str, Any], model: nn.Module) -> tuple[str, dict[str, Any]]:
    """A name of timm's own registry, and the arguments with which it gives the same architecture.

    Args:
        spec: the name by which the model was built.
        arguments: with which it was built.
        model: the model.
    """
    import timm

    config = config_of(spec)
    name, tag = config["architecture"], (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    if tag and f"{name}.{tag}" in timm.list_pretrained(f"{name}.*"):
        name = f"{name}.{tag}"
    own = {**(config.get("model_args") or {}), **arguments}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        own["num_classes"] = classes
    return name, own
