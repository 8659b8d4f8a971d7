"""Plain models by name: of timm, of torchvision, or from a factory of your own."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sphereify.annotations import IMAGE_CONFIG, PRETRAINED_BASE, SOURCE
from sphereify.convert.sites import is_site
from sphereify.errors import ArtifactError, SphereifyError, UsageError, first_line, invalid, option
from sphereify.hub import PREFIX, is_hub_name, repository_of
from sphereify.imports import import_file
from sphereify.timm_folders import LOCAL_DIR, config_of, is_saved_by_timm, registered
from sphereify.weights.loading import load_weights as load_weights  # part of opening a model by name
from sphereify.weights.loading import note_untrained, with_new_classifier

FORMS = (
    f"a timm name, {PREFIX}USER/NAME, {LOCAL_DIR}FOLDER, torchvision:NAME, package.module:factory, "
    "path/to/file.py:factory"
)
"""The forms of a plain model's name."""


@dataclass(frozen=True)
class Source:
    """The origin of a model: enough to build it again, without its weights."""

    library: str
    """One of timm, torchvision, factory."""
    name: str
    """A model name of the library, or "package.module:function", or "path/to/file.py:function"."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the builder; JSON values."""

    def __str__(self) -> str:
        return self.name if self.library != "torchvision" else f"torchvision:{self.name}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ------------------------------------------------------------------------------------------------------------ models


def find_model(spec: str, *, num_classes: int | None = None, in_chans: int | None = None) -> Source:
    """The source that a name stands for.

    Args:
        spec: a timm name, a model of timm on the hub or in a folder ("hf-hub:user/name", "local-dir:folder"),
            "torchvision:NAME", "package.module:factory" or "path/to/file.py:factory".
        num_classes, in_chans: arguments of the builder; None leaves them to it.

    Raises:
        UsageError: no such model, with the nearest names; or an argument below 1.
        ArtifactError: the hub does not have it, or cannot be reached.
    """
    arguments = {k: v for k, v in {"num_classes": num_classes, "in_chans": in_chans}.items() if v is not None}
    for name, value in arguments.items():
        if value < 1:
            raise invalid(name, value, "a number of at least 1")
    if spec.startswith("torchvision:"):
        return _find_torchvision(spec.removeprefix("torchvision:"), arguments)
    if is_saved_by_timm(spec):
        config_of(spec)  # an unknown name fails now
        return Source("timm", spec, arguments)
    if ":" in spec:
        _import_factory(spec)
        return Source("factory", spec, arguments)
    if Path(spec).suffix == ".py":
        raise UsageError(f"model {spec!r}: a file may hold several; add the function that builds it, {spec}:NAME")
    import timm

    if not timm.is_model(spec):
        raise _unknown_model(spec, timm.list_models())
    return Source("timm", spec, arguments)


def accepts(spec: str, argument: str) -> bool:
    """True if the builder of a model may take this argument; timm and torchvision decide it when they build."""
    if ":" not in spec or spec.startswith("torchvision:") or is_saved_by_timm(spec):
        return True
    parameters = inspect.signature(_import_factory(spec)).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build_model(source: Source, *, pretrained: bool = False) -> nn.Module:
    """A new model on the CPU, which carries its source.

    Raises:
        UsageError: the builder does not take an argument, or has no pretrained weights.
        ArtifactError: pretrained weights cannot be downloaded.
    """
    builder = {"timm": _build_timm, "torchvision": _build_torchvision, "factory": _build_own}[source.library]
    try:
        model = builder(source, pretrained)
    except TypeError as error:
        raise UsageError(f"{source}: cannot be built with {source.arguments or 'no arguments'}: {error}") from error
    except OSError as error:
        if not pretrained and not is_saved_by_timm(source.name):
            raise
        raise ArtifactError(
            f"{source}: its pretrained weights could not be fetched ({error}). Download them where there is a network "
            f"and pass the file with {option('weights')}."
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{source}: returned {type(model).__name__}, expected a torch.nn.Module")
    if is_saved_by_timm(source.name):  # from now on it needs neither the hub nor the folder
        SOURCE.write(model, Source("timm", *registered(source.name, source.arguments, model)))
    else:
        SOURCE.write(model, source)
    if pretrained:
        PRETRAINED_BASE.write(model, _published_name(model, source))
    return model


def base_of(model: nn.Module) -> dict[str, str | None]:
    """The pretrained model that a model started from, and the licence that its library names for these weights.

    Either is None where it is not known: a model does not tell whether its weights are pretrained ones, except where it
    was built by name.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    licence = config.get("license") if isinstance(config, dict) else None
    return {"model": PRETRAINED_BASE.of(model), "license": licence or None}


def _published_name(model: nn.Module, source: Source) -> str:
    """The name of pretrained weights on the hub, or else of the model."""
    if is_hub_name(source.name):
        return repository_of(source.name).name
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("hf_hub_id") if source.library == "timm" else None
    if not name:
        return str(source)
    return f"{name}{config['architecture']}.{config['tag']}" if name.endswith("/") else str(name)


def _find_torchvision(name: str, arguments: dict[str, Any]) -> Source:
    import torchvision

    names = torchvision.models.list_models()
    if name not in names:
        raise _unknown_model(f"torchvision:{name}", [f"torchvision:{n}" for n in names])
    if "in_chans" in arguments:
        raise UsageError(
            f"torchvision:{name}: torchvision's builders have no {option('in_chans')}; take a timm model for that"
        )
    return Source("torchvision", name, arguments)


def _unknown_model(spec: str, names: list[str]) -> UsageError:
    near = difflib.get_close_matches(spec, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists the names."
    return UsageError(f"model {spec!r}: not found; {hint} Accepted are {FORMS}, or the folder of a saved artifact.")


def _build_timm(source: Source, pretrained: bool) -> nn.Module:
    import timm

    try:
        model = timm.create_model(source.name, pretrained=pretrained, **source.arguments)
    except RuntimeError as error:
        if pretrained:
            raise UsageError(f"{source}: {error}") from error
        raise
    config: Any = model.pretrained_cfg or {}
    trained, classes = config.get("num_classes"), source.arguments.get("num_classes")
    if pretrained and classes is not None and trained not in (None, classes):
        new = [name for name, _ in model.named_parameters() if name.startswith(tuple(_classifiers(model)))]
        note_untrained(model, new, f"the pretrained weights are for {trained} classes, not {classes}")
    return model


def _classifiers(model: nn.Module) -> list[str]:
    """The names of a timm model's classifiers, each with a dot."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [f"{name}." for name in ([names] if isinstance(names, str) else names)]


def _build_torchvision(source: Source, pretrained: bool) -> nn.Module:
    model = _torchvision_model(source, pretrained)
    if config := _torchvision_config(source.name, source.arguments):
        IMAGE_CONFIG.write(model, config)
    return model


def _torchvision_config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The preparation of images for the default weights of a classifier, in the keys of timm's `pretrained_cfg`."""
    from torchvision import models

    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    images: Any = weights.transforms() if weights is not None else None
    if not hasattr(images, "crop_size"):
        return {}
    crop, resized = images.crop_size[0], images.resize_size[0]
    names = list(weights.meta.get("categories") or ())  # type: ignore[union-attr]
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(images.mean),
        "std": tuple(images.std),
        "interpolation": images.interpolation.value,
        "crop_pct": crop / (resized + 1e-3),  # timm rounds the size before the crop down
        "crop_mode": "center",
        "num_classes": len(names) if arguments.get("num_classes", len(names)) == len(names) else None,
        "label_names": names,
    }


def _torchvision_model(source: Source, pretrained: bool) -> nn.Module:
    from torchvision import models

    arguments = dict(source.arguments)
    if not pretrained:
        return _plain_torchvision(source.name, arguments)
    classes = arguments.pop("num_classes", None)
    weights = models.get_model_weights(source.name).DEFAULT
    model = models.get_model(source.name, weights=weights, **arguments)
    trained = len(weights.meta.get("categories") or ())
    if classes is None or classes == trained:
        return model
    fresh = _plain_torchvision(source.name, {**arguments, "num_classes": classes}, auxiliary=True)
    if not (new := with_new_classifier(model, fresh, classes)):
        raise UsageError(
            f"{source}: its pretrained weights are for {trained} classes, and more than a classifier depends on them; "
            f"drop {option('num_classes')}"
        )
    note_untrained(model, new, f"the pretrained weights are for {trained} classes, not {classes}")
    return model


def _plain_torchvision(name: str, arguments: dict[str, Any], auxiliary: bool = False) -> nn.Module:
    """A model of torchvision with new weights.

    Args:
        auxiliary: with the second classifier of a segmentation network, which pretrained ones have.
    """
    from torchvision import models

    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # Segmentation and detection builders fetch a backbone unless told not to; two old ones warn about their init.
    if "weights_backbone" in parameters:
        arguments = {**arguments, "weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        arguments = {**arguments, "init_weights": True}
    if auxiliary and "aux_loss" in parameters:
        arguments = {**arguments, "aux_loss": True}
    return models.get_model(name, weights=None, **arguments)


def _build_own(source: Source, pretrained: bool) -> nn.Module:
    arguments = dict(source.arguments)
    if pretrained:
        arguments["pretrained"] = True
    factory = _import_factory(source.name)
    try:
        return factory(**arguments)
    except TypeError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        raise SphereifyError(f"{source}: failed with {first_line(error)}") from error


def _import_factory(spec: str) -> Callable[..., nn.Module]:
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            file = Path(place)
            if not file.is_file():
                raise UsageError(f"model {spec!r}: there is no file {place}")
            module = import_file(file)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")  # as `python -m` does: the user's own module lies in the working directory
            module = importlib.import_module(place)
    except UsageError:
        raise
    except Exception as error:  # importing runs the user's code
        raise UsageError(f"model {spec!r}: importing {place} failed: {first_line(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        near = difflib.get_close_matches(name, [n for n in dir(module) if _makes_models(getattr(module, n))], n=1)
        hint = f"; did you mean {place}:{near[0]}?" if near else ""
        raise UsageError(f"model {spec!r}: {place} has no function {name!r}{hint}")
    return factory  # type: ignore[no-any-return]


def _makes_models(thing: Any) -> bool:
    return inspect.isfunction(thing) or (inspect.isclass(thing) and issubclass(thing, nn.Module))


def recognise(model: nn.Module) -> list[Source]:
    """Sources that may have built a plain or converted model, the likeliest first; none of them has been checked."""
    own = SOURCE.of(model)
    return [*([own] if own else []), *_recognised(model)]


def _recognised(model: nn.Module) -> list[Source]:
    if type(model).__module__.startswith("timm."):
        return _recognise_timm(model)
    if type(model).__module__.startswith("torchvision.models."):
        return _recognise_torchvision(model)
    return []


def _recognise_timm(model: nn.Module) -> list[Source]:
    config = getattr(model, "pretrained_cfg", None) or {}
    if "architecture" not in config:
        return []
    tag = config.get("tag")
    name = f"{config['architecture']}.{tag}" if tag else config["architecture"]
    arguments: dict[str, Any] = {}
    if isinstance(classes := getattr(model, "num_classes", None), int) and classes != config.get("num_classes"):
        arguments["num_classes"] = classes
    first = next((m for m in model.modules() if is_site(m)), None)
    channels = first.weight.shape[1] * getattr(first, "groups", 1) if first is not None else 3  # type: ignore[union-attr, index, operator]
    if channels != (config.get("input_size") or (3,))[0]:
        arguments["in_chans"] = channels
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    sized = {**arguments, "img_size": list(size)} if size else arguments
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    pooled = [{**a, "global_pool": pool} for a in (arguments, sized)] if isinstance(pool, str) else []
    return [Source("timm", name, a) for a in (arguments, sized, *pooled)]


def _recognise_torchvision(model: nn.Module) -> list[Source]:
    from torchvision import models

    home = sys.modules[type(model).__module__]
    names = [n for n in models.list_models() if models.get_model_builder(n).__module__ == home.__name__]
    sites = [m for m in model.modules() if is_site(m)]
    classes = int(sites[-1].weight.shape[0]) if sites else None  # type: ignore[union-attr, index, arg-type]
    options: list[dict[str, Any]] = [{}, {"num_classes": classes}]
    return [Source("torchvision", name, arguments) for arguments in options for name in names]


def versions() -> dict[str, str]:
    """Installed versions of the libraries that a converted model depends on."""
    from importlib.metadata import PackageNotFoundError, version

    installed = {}
    for package in ("sphereify", "torch", "torchvision", "timm"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
