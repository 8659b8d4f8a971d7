"""A converted model on disk: a folder with model.safetensors and conversion.json. Nothing is pickled.

conversion.json says where the model comes from, how it was converted and by which versions. The same text is kept in
the header of model.safetensors, so that the tensors alone are complete: both files are written aside and moved into
place one after the other, and a crash between the two moves leaves new tensors with their own description, next to an
old JSON that `load` then sees through.
"""

import json
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sphereify.convert.graph import class_name, is_site, weight_of
from sphereify.convert.plan import ConversionPlan
from sphereify.convert.rewrite import PLAN_ATTRIBUTE, apply_plan
from sphereify.deployment.folded_layers import FoldedLayer
from sphereify.deployment.folding import FOLDING_ATTRIBUTE, Folding, apply_folding
from sphereify.errors import ArtifactError, UsageError
from sphereify.nn import AngularHead
from sphereify.nn.layers import AngularLayer
from sphereify.sources import Source, build_model, recognise, versions

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
DOCUMENT = "conversion.json"


def save(model: nn.Module, path: str | Path, *, training: dict[str, Any] | None = None) -> Path:
    """Write a converted model to the folder `path`, which is made if it is missing.

    Args:
        model: from `sphereify` or `apply_plan`, trained further or not, folded or not, on any device.
        path: a folder. An artifact in it is replaced: at any moment it holds the old one or the new one.
        training: plain JSON values to keep along, such as the data and the accuracy.

    Returns:
        The folder.

    Raises:
        UsageError: the model was not converted, or has state that is no tensor.
        UserWarning: a model of timm or torchvision that cannot be built again by name.
        ArtifactError: the folder cannot be written.
    """
    plan: ConversionPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise UsageError(f"{type(model).__name__} was not converted; save takes what sphereify(model) returns")
    folding: Folding | None = getattr(model, FOLDING_ATTRIBUTE, None)
    _check_unchanged(model, plan, folding)
    tensors, tied = _tensors(model)
    source = _verified_source(model, plan, folding)
    if source is None and type(model).__module__.startswith(("timm.", "torchvision.")):
        warnings.warn(
            f"{path}: {type(model).__name__} was built with arguments that cannot be read off the model, so load(path) "
            f"will ask for factory=…, a function that builds the plain model",
            stacklevel=2,
        )
    document = {
        "format_version": FORMAT_VERSION,
        "id": uuid.uuid4().hex,
        "versions": versions(),
        "source": source.to_json() if source else None,
        "plan": json.loads(plan.to_json()),
        "folding": folding.to_json() if folding else None,
        "tied": tied,
        "channels_last": [name for name, tensor in tensors.items() if _is_channels_last(tensor)],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "buffers": {name: str(b.dtype).removeprefix("torch.") for name, b in _unsaved_buffers(model).items()},
        "training": training,
    }
    try:
        _write(Path(path), document, tensors)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error
    return Path(path)


def load(
    path: str | Path,
    *,
    factory: Callable[[], nn.Module] | None = None,
    objects: dict[str, Any] | None = None,
) -> nn.Module:
    """The converted model that `save` wrote, on the CPU, in eval mode, with bit-identical outputs; folded if it was.

    Args:
        path: the folder.
        factory: makes the plain model, unconverted, for a model that is neither timm's nor torchvision's.
        objects: operator objects of your own by their class name, if the conversion used any.

    Raises:
        ArtifactError: missing, damaged, of a newer format, or tensors that do not fit, with name and both shapes.
        UsageError: a factory is needed.
    """
    document = read_document(path)
    plan = ConversionPlan.from_json(json.dumps(document["plan"]))
    plan.objects.update(objects or {})
    model = apply_plan(_plain_model(path, document, factory), plan, inplace=True)
    if document.get("folding") is not None:
        apply_folding(model, _folding(document["folding"], path))
    _fill(model, Path(path) / TENSORS, document)
    return model.eval()


def _folding(plain: Any, path: str | Path) -> Folding:
    try:
        return Folding(**plain)
    except TypeError as error:
        raise ArtifactError(f"{path}: damaged, its part 'folding' is of another form ({error})") from None


def read_document(path: str | Path) -> dict[str, Any]:
    """What conversion.json says, checked against the tensors beside it.

    Raises:
        ArtifactError: as `load`.
    """
    folder = Path(path)
    for name in (DOCUMENT, TENSORS):
        if not (folder / name).is_file():
            what = f"there is no {name} in it" if folder.is_dir() else "there is no such folder"
            raise ArtifactError(f"{path}: {what}; an artifact is a folder with {DOCUMENT} and {TENSORS}")
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{folder / DOCUMENT}: damaged, not the JSON of a conversion ({error})") from error
    document = _checked(document, folder / DOCUMENT)
    embedded = _read_header(folder / TENSORS)
    return document if embedded["id"] == document["id"] else embedded


_MAYBE = (dict, type(None))
_PARTS: dict[str, Any] = {"id": str, "source": _MAYBE, "plan": dict, "tied": dict, "channels_last": list,
                          "frozen": list, "buffers": dict, "training": _MAYBE}  # fmt: skip


def _checked(document: Any, place: Path) -> dict[str, Any]:
    """The document if it has all its parts and is not from the future."""
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{place}: damaged, there is no format_version in it")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{place}: format version {version} is newer than {FORMAT_VERSION}, which this sphereify reads. "
            f"Upgrade with: pip install --upgrade sphereify"
        )
    for part, kind in _PARTS.items():
        if part not in document or not isinstance(document[part], kind):
            raise ArtifactError(f"{place}: damaged, its part {part!r} is missing or of another type")
    return document  # type: ignore[no-any-return]


def is_artifact(path: str | Path) -> bool:
    """Whether `path` looks like an artifact, sound or not."""
    return any((Path(path) / name).is_file() for name in (DOCUMENT, TENSORS))


# ------------------------------------------------------------------------------------------------------------ saving


def _check_unchanged(model: nn.Module, plan: ConversionPlan, folding: Folding | None) -> None:
    """The model has what its plan made of it: a layer replaced since then would not come back."""
    folded_layers = folding.layers if folding is not None else {}
    for decision in plan.decisions:
        if not decision.type:
            continue  # a functional call, known by its weight
        swapped = decision.action == "convert" and decision.call is None
        expected = (AngularHead if decision.head else AngularLayer) if swapped else nn.Module
        expected = FoldedLayer if decision.name in folded_layers else expected
        module = next((m for n, m in model.named_modules() if n == decision.name), None)
        shape = tuple(getattr(weight_of(module), "shape", ())) if module is not None and is_site(module) else None
        if not isinstance(module, expected) or shape != decision.shape:
            what = "gone" if module is None else f"a {class_name(module)} with weight {shape}"
            raise UsageError(
                f"{decision.name}: was planned with weight {decision.shape} and is now {what}. Convert the model again "
                f"after changing its layers: sphereify(model, inplace=True)"
            )


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state by name, each tensor once, and for the names left out the name that stands for them."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"{name}: state of type {type(tensor).__name__} cannot be saved, only tensors can")
        if id(tensor) in names:
            tied[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        # Memory that two tensors share without being one is stored twice.
        own = tensor.untyped_storage().data_ptr() not in storages
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.detach() if own else tensor.detach().clone()
    return tensors, tied


def _unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point buffers that are made by the constructor and not part of the state."""
    saved = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name not in saved and b.is_floating_point()}


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )  # fmt: skip


def _verified_source(model: nn.Module, plan: ConversionPlan, folding: Folding | None) -> Source | None:
    """The source that, built again, converted by the plan and folded, gives the same network; None if there is none."""
    wanted = _fingerprint(model)
    return next((s for s in recognise(model) if _rebuilds(s, plan, folding, wanted)), None)


def _rebuilds(source: Source, plan: ConversionPlan, folding: Folding | None, wanted: list[Any]) -> bool:
    for device in ("meta", "cpu"):  # some builders cannot work without real tensors
        try:
            with torch.device(device), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                model = apply_plan(build_model(source), plan, inplace=True)
                rebuilt = _fingerprint(apply_folding(model, folding) if folding else model)
                return len(rebuilt) == len(wanted) and all(map(_is_as, rebuilt, wanted))
        except Exception:  # a builder may refuse these arguments in its own way
            continue
    return False


def _fingerprint(model: nn.Module) -> list[Any]:
    """What tells two networks apart besides their values: each module's class and settings, each tensor's shape."""
    described: list[Any] = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    for name, module in model.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _NO_SETTING and _is_plain(value)
        }
        described.append((name, class_name(module), module.extra_repr(), settings))
    return described


def _is_as(rebuilt: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Equality, where a list may stand in place of a None: a forward pass has filled it in, the scales of a pyramid."""
    if not isinstance(rebuilt[-1], dict) or not isinstance(wanted[-1], dict):
        return rebuilt == wanted
    filled = {k for k, v in rebuilt[-1].items() if v is None and isinstance(wanted[-1].get(k, []), (list, tuple))}
    settings = [{k: v for k, v in side[-1].items() if k not in filled} for side in (rebuilt, wanted)]
    return rebuilt[:-1] == wanted[:-1] and settings[0] == settings[1]


_NO_SETTING = {"training", "grad_checkpointing", "output_read_only"}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _write(folder: Path, document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    aside = {name: folder / f".{name}.{document['id']}" for name in (TENSORS, DOCUMENT)}
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, aside[TENSORS], {"conversion": text})
        aside[DOCUMENT].write_text(text + "\n", encoding="utf-8")
        aside[TENSORS].chmod(aside[DOCUMENT].stat().st_mode)  # safetensors writes for the owner only
        # The move of the tensors is what makes the new artifact: a new folder gets its description before it, an old
        # one after it, when the header of the tensors already speaks for them.
        anew = not (folder / TENSORS).exists()
        for name in (DOCUMENT, TENSORS) if anew else (TENSORS, DOCUMENT):
            _to_disk(aside[name])
            os.replace(aside[name], folder / name)
        _to_disk(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        for leftover in aside.values():
            leftover.unlink(missing_ok=True)
        if not (folder / TENSORS).exists():
            (folder / DOCUMENT).unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """What was written survives a power cut from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------------------------- loading


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return _checked(json.loads((file.metadata() or {})["conversion"]), path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: truncated or damaged, or not written by sphereify ({error})") from error


def _plain_model(path: str | Path, document: dict[str, Any], factory: Callable[[], nn.Module] | None) -> nn.Module:
    source = Source(**document["source"]) if document["source"] else None
    if factory is not None:
        return factory()
    if source is None or source.library == "factory":
        made = f"it was made by {source.name}" if source else "no builder of timm or torchvision gives it as it was"
        raise UsageError(
            f"{path}: holds a {document['plan']['model']} that cannot be built by name ({made}). "
            f"Pass load(path, factory=…), or --factory on the command line, with what returns the plain model."
        )
    return build_model(source)


def _fill(model: nn.Module, path: Path, document: dict[str, Any]) -> None:
    """Copy the tensors in, in their own dtype and memory format, and tie what was tied."""
    tied, channels_last = document["tied"], set(document["channels_last"])
    state = model.state_dict(keep_vars=True)
    filled: set[int] = set()
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys()) | set(tied)
        _check_names(path, set(state), stored)
        for name, tensor in state.items():
            # A copy, since the file's own addresses may be odd, and torch picks its kernels by alignment too.
            value = file.get_tensor(tied.get(name, name)).clone()
            if value.shape != tensor.shape:
                raise ArtifactError(
                    f"{path}: tensor {name} has shape {tuple(value.shape)}, the model expects {tuple(tensor.shape)}"
                )
            if name in channels_last:
                value = value.contiguous(memory_format=torch.channels_last)
            if id(tensor) in filled and name not in tied:
                _set_parameter(model, name, nn.Parameter(value))  # tied by the builder, and no longer when it was saved
                continue
            filled.add(id(tensor))
            tensor.data = value
    for name, first in tied.items():
        _set_parameter(model, name, _attribute(model, first))
    for name, buffer in _unsaved_buffers(model).items():
        buffer.data = buffer.to(getattr(torch, document["buffers"].get(name, "float32")))
    frozen = set(document["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _check_names(path: Path, expected: set[str], stored: set[str]) -> None:
    for what, names in (("lacks", expected - stored), ("has, unknown to the model,", stored - expected)):
        if names:
            raise ArtifactError(f"{path}: {what} {len(names)} tensors, such as {sorted(names)[0]}")


def _attribute(model: nn.Module, name: str) -> Any:
    owner, _, own = name.rpartition(".")
    return getattr(model.get_submodule(owner), own)


def _set_parameter(model: nn.Module, name: str, value: Any) -> None:
    owner, _, own = name.rpartition(".")
    if _attribute(model, name) is not value:
        setattr(model.get_submodule(owner), own, value)
