"""A converted model on disk: a folder with model.safetensors and conversion.json. Nothing is pickled.

conversion.json says where the model comes from, how it was converted and by which versions, and how its images are
prepared. The header of model.safetensors repeats it, so that the tensors alone are complete: both files are written
aside and moved into place one after the other, and a crash between the two moves leaves new tensors with their own
description next to an old JSON, which `load` recognises by its id and ignores.
"""

import json
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sphereify.annotations import (
    CALIBRATED,
    CALIBRATION_FIT,
    FOLDING,
    LOADED_FINGERPRINT,
    PLAN,
    PRETRAINED_BASE,
    TRAINING_RECORD,
)
from sphereify.convert.plan import ConversionPlan
from sphereify.convert.rewrite import apply_plan
from sphereify.convert.sites import class_name, is_site, weight_of
from sphereify.deployment.folded_layers import FoldedLayer
from sphereify.deployment.folding import Folding, apply_folding
from sphereify.devices import find_device
from sphereify.errors import ArtifactError, SphereifyWarning, UsageError, option, wrong_type
from sphereify.files import as_path, replacing
from sphereify.fingerprint import fingerprint
from sphereify.hub import download, has_file, is_hub_name, repository_of
from sphereify.model_images import preparation_of, set_preparation
from sphereify.nn import AngularHead
from sphereify.nn.decoupled import check_complete
from sphereify.nn.layers import AngularLayer
from sphereify.nn.modules import check_module
from sphereify.nn.precision import CHANNELS_LAST, is_channels_last
from sphereify.nn.quantized import is_quantized
from sphereify.preparation import Preparation
from sphereify.rebuilding import proven_source
from sphereify.sources import Source, base_of, build_model, versions
from sphereify.timm_folders import is_saved_by_timm

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
DOCUMENT = "conversion.json"


def save(
    model: nn.Module,
    path: str | Path,
    *,
    training: dict[str, Any] | None = None,
    preparation: Preparation | None = None,
) -> Path:
    """Write a converted model to the folder `path`, which is made if it is missing.

    Args:
        model: from `sphereify` or `apply_plan`, trained further or not, folded or not, on any device.
        path: a folder. An artifact in it is replaced: at any moment it holds the old one or the new one.
        training: JSON values to store with it, such as the name of the data and the accuracy.
        preparation: how an image becomes an input, with the names of the classes; default: what the model knows of it,
            by its training, its artifact or the configuration of its library.

    Returns:
        The folder.

    Raises:
        UsageError: the model was not converted, or has state that is not a tensor.
        ArgumentTypeError: the model is no module, or the preparation none.
        SphereifyWarning: a model of timm or torchvision that cannot be built again by name.
        ArtifactError: the folder cannot be written.
    """
    check_module(model)
    plan = PLAN.of(model)
    if plan is None:
        raise UsageError(f"{type(model).__name__} was not converted; save takes what sphereify(model) returns")
    check_complete(model, "save")
    folder = as_path("path", path)
    folding = FOLDING.of(model)
    _check_unchanged(model, plan, folding)
    tensors, tied = _tensors(model)
    source = proven_source(model, plan, folding)
    if source is None and type(model).__module__.startswith(("timm.", "torchvision.")):
        warning = SphereifyWarning(
            f"{path}: {type(model).__name__} was built with arguments that cannot be read off the model, so loading it "
            f"will need {option('factory')}=…, a function that builds the plain model"
        )
        warnings.warn(warning, stacklevel=2)
    if preparation is not None and not isinstance(preparation, Preparation):
        raise wrong_type("preparation", preparation, "a Preparation")
    prepared = preparation or preparation_of(model, training)
    document = {
        "format_version": FORMAT_VERSION,
        "id": uuid.uuid4().hex,
        "versions": versions(),
        "source": source.to_json() if source else None,
        "plan": json.loads(plan.to_json()),
        "folding": folding.to_json() if folding else None,
        "tied": tied,
        "channels_last": [
            name for name, tensor in tensors.items() if is_channels_last(tensor) and not tensor.is_contiguous()
        ],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "buffers": {name: str(b.dtype).removeprefix("torch.") for name, b in _unsaved_buffers(model).items()},
        "calibrated": bool(CALIBRATED.of(model)),
        "calibration": CALIBRATION_FIT.of(model),
        "base": base_of(model),
        "preparation": prepared.to_json() if prepared is not None else None,
        "training": training,
        "fingerprint": fingerprint(tensors),
    }
    try:
        _write(folder, document, tensors)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error
    return folder


def load(
    path: str | Path,
    *,
    factory: Callable[[], nn.Module] | None = None,
    objects: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    token: str | None = None,
) -> nn.Module:
    """The converted model that `save` wrote, in eval mode, with bit-identical weights; folded if it was.

    Tensors and JSON are read, and nothing that comes with them is executed.

    Args:
        path: the folder, or an artifact on the Hugging Face Hub: "hf-hub:user/name", "hf-hub:user/name@revision".
        factory: returns the plain model, unconverted; needed for a model that is neither timm's nor torchvision's.
        objects: operator objects of your own by their class name, if the conversion used any.
        device: where the model goes.
        token: for a private repository on the hub; default: HF_TOKEN, or the login on this machine.

    Raises:
        ArtifactError: missing, damaged, of a newer format, or tensors that do not fit, with name and both shapes; or a
            repository that cannot be read (`HubError`).
        UsageError: a factory is needed, or torch does not have the device.
    """
    target = find_device(device)
    if factory is not None and not callable(factory):
        raise wrong_type("factory", factory, "a function that returns the plain model")
    folder = located(path, token=token)
    document = _read_document(folder, path)
    plan = ConversionPlan.from_json(json.dumps(document["plan"]))
    plan.objects.update(objects or {})
    model = apply_plan(_plain_model(path, document, factory), plan, inplace=True)
    if document.get("folding") is not None:
        apply_folding(model, _folding(document["folding"], path))
    _fill(model, folder / TENSORS, document)
    if document.get("calibrated"):
        CALIBRATED.write(model, True)
    if document.get("calibration") is not None:
        CALIBRATION_FIT.write(model, document["calibration"])
    if (base := (document.get("base") or {}).get("model")) is not None:
        PRETRAINED_BASE.write(model, base)
    if "preparation" in document:  # earlier versions did not write it
        set_preparation(model, stored_preparation(document, path))
    if document.get("fingerprint") is not None:
        LOADED_FINGERPRINT.write(model, document["fingerprint"])
    if document["training"] is not None:
        TRAINING_RECORD.write(model, document["training"])
    return model.to(target).eval()


def located(path: str | Path, *, token: str | None = None) -> Path:
    """The folder of an artifact; of one on the hub, that in which its two files were downloaded.

    Raises:
        HubError: a repository that cannot be read, or holds no artifact.
        UsageError: a name on the hub of another form.
    """
    if not is_hub_name(path):
        return as_path("path", path)
    others = f"an artifact has {DOCUMENT} and {TENSORS}"
    return download(repository_of(path), [DOCUMENT, TENSORS], token=token, others=others)


def stored_preparation(document: dict[str, Any], path: str | Path) -> Preparation | None:
    """The preparation of images in the content of conversion.json; None if there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    plain = document.get("preparation")
    try:
        return None if plain is None else Preparation.from_json(plain)
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged, its part 'preparation' is of another form ({error})") from None


def read_document(path: str | Path) -> dict[str, Any]:
    """The content of conversion.json, checked against the tensors beside it.

    Args:
        path: as for `load`.

    Raises:
        ArtifactError: as `load`.
    """
    return _read_document(located(path), path)


def _read_document(folder: Path, path: str | Path) -> dict[str, Any]:
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


_OPTIONAL = (dict, type(None))
_PARTS: dict[str, Any] = {
    "id": str,
    "source": _OPTIONAL,
    "plan": dict,
    "tied": dict,
    "channels_last": list,
    "frozen": list,
    "buffers": dict,
    "training": _OPTIONAL,
}
"""Each part of a document, with its type."""


def _checked(document: Any, place: Path) -> dict[str, Any]:
    """The document, if it has all its parts and its format is not newer than this version's."""
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
    """True if `path` is a folder or a repository on the hub with a file of an artifact in it, sound or damaged.

    Raises:
        ArtifactError: the hub cannot be asked.
    """
    if is_hub_name(path):
        return has_file(repository_of(path), DOCUMENT)
    return any((Path(path) / name).is_file() for name in (DOCUMENT, TENSORS))


# ------------------------------------------------------------------------------------------------------------ saving


def _check_unchanged(model: nn.Module, plan: ConversionPlan, folding: Folding | None) -> None:
    """Refuse a model with a layer that was replaced after the conversion: loading would not restore it."""
    folded_layers = folding.layers if folding is not None else {}
    for decision in plan.decisions:
        if not decision.type:
            continue  # a functional call, which has no layer
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
    """The state by name with each tensor once, and for every further name of a tensor its first name."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"{name}: state of type {type(tensor).__name__} cannot be saved, only tensors can")
        if is_quantized(tensor):
            raise UsageError(
                f"{name}: is quantized ({type(tensor).__name__}), and an artifact holds plain numbers. Save the model "
                f"before it is quantized, and quantize what load returns; export writes a quantized model to one file"
            )
        if id(tensor) in names:
            tied[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        # Two tensors over the same memory are stored as two.
        own = tensor.untyped_storage().data_ptr() not in storages
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.detach() if own else tensor.detach().clone()
    return tensors, tied


def _unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point buffers that the constructor makes and the state does not contain."""
    saved = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name not in saved and b.is_floating_point()}


def _write(folder: Path, document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    text = json.dumps(document, indent=1)
    # The move of the tensors is what makes the new artifact: a new folder gets its description before it, an old one
    # after it, when the header of the tensors already speaks for them.
    is_new = not (folder / TENSORS).exists()
    first, second = (DOCUMENT, TENSORS) if is_new else (TENSORS, DOCUMENT)
    try:
        with replacing(folder / second) as second_aside, replacing(folder / first) as first_aside:
            aside = {first: first_aside, second: second_aside}
            save_file({name: t.contiguous() for name, t in tensors.items()}, aside[TENSORS], {"conversion": text})
            aside[DOCUMENT].write_text(text + "\n", encoding="utf-8")
            aside[TENSORS].chmod(aside[DOCUMENT].stat().st_mode)  # safetensors writes for the owner only
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        if not (folder / TENSORS).exists():
            (folder / DOCUMENT).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- loading


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return _checked(json.loads((file.metadata() or {})["conversion"]), path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: truncated or damaged, or not written by sphereify ({error})") from error


def _folding(plain: Any, path: str | Path) -> Folding:
    try:
        return Folding(**plain)
    except TypeError as error:
        raise ArtifactError(f"{path}: damaged, its part 'folding' is of another form ({error})") from None


def _plain_model(path: str | Path, document: dict[str, Any], factory: Callable[[], nn.Module] | None) -> nn.Module:
    source = Source(**document["source"]) if document["source"] else None
    if factory is not None:
        return factory()
    if source is None or source.library == "factory":
        reason = f"it was made by {source.name}" if source else "no builder of timm or torchvision gives the same one"
        raise UsageError(
            f"{path}: holds a {document['plan']['model']} that cannot be built by name ({reason}); "
            f"give {option('factory')}=…, a function that returns the plain model"
        )
    if is_saved_by_timm(source.name):  # `save` writes none; reading an artifact must not fetch what it names
        raise ArtifactError(f"{path}: damaged, its source {source.name} is no model of {source.library}'s own")
    return build_model(source)


def _fill(model: nn.Module, path: Path, document: dict[str, Any]) -> None:
    """Copy the stored tensors into the model, in their own dtype and memory format, and tie those that were tied."""
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
                value = value.contiguous(memory_format=CHANNELS_LAST[value.dim()])
            if id(tensor) in filled and name not in tied:
                _set_parameter(model, name, nn.Parameter(value))  # tied by the builder, but not when it was saved
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
