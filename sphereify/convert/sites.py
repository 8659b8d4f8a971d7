"""Sites: the places in a model where a convolution or a linear map happens, as a module or as a functional call."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sphereify.convert.model_inputs import evaluating
from sphereify.nn import AngularHead

Role = Literal["input", "hidden", "shortcut", "classifier", "auxiliary"]

KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
    nn.ConvTranspose1d: "conv-transpose1d",
    nn.ConvTranspose2d: "conv-transpose2d",
    nn.ConvTranspose3d: "conv-transpose3d",
    nn.Bilinear: "bilinear",
    nn.RNNBase: "recurrent",
    nn.RNNCellBase: "recurrent",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding",
    AngularHead: "linear",
}
"""Modules that are sites, subclasses included. Those that are no convolution or linear map are always kept, and the
plan says why."""

SWAPPED: dict[type[nn.Module], str] = {t: KINDS[t] for t in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)}
"""Exact types that an angular twin replaces. A subclass may compute something else, so its inner call counts."""

EQUIVALENTS = {
    # Casts to the input's dtype when scripted, and does nothing else.
    "timm.layers.linear.Linear": "linear",
    # An nn.Linear under a name that torch's quantization skips.
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": "linear",
}
"""Subclasses, by qualified name, that compute exactly what their base class does."""

ATTENTION = nn.MultiheadAttention
"""A module that hands its weights to one function and never calls the layer that holds the last of them."""

UNANSWERABLE = {
    "product": "its weight is multiplied by other means (einsum, bmm, W @ x)",
    "own-backward": "its weight is used inside an autograd.Function, whose backward is its own",
    "beneath": "its weight is used by torch.ops or in a scripted function",
    "experts": "its weight is one of several in a parameter, chosen while it runs",
}
"""Kinds of calls that cannot be answered with an angle -> the reason to keep the layer that holds the weight."""


@dataclass(frozen=True)
class Call:
    """A convolution or linear map that a forward makes by calling a function. Plain data."""

    owner: str
    """Innermost module whose forward makes the call; "" is the model."""
    kind: str
    """conv1d, conv2d, conv3d, linear, or a key of `UNANSWERABLE`."""
    parameter: str | None
    """Qualified name of the weight; None if it is computed from parameters."""
    shape: tuple[int, ...]
    """Shape of the weight, filters first."""
    has_bias: bool
    nth: int = 0
    """Position among the calls with a computed weight that one forward pass of the owner makes."""
    groups: int = 1
    """Number of groups of a convolution."""
    transposed: bool = False
    """True if the filters are the columns of the parameter, as in `torch.addmm(bias, x, weight)`."""
    part: str = ""
    """Name of the slice of another module's or a combined parameter that a computed weight is: `qkv_weight.slice0`."""


@dataclass(frozen=True)
class Site:
    """One convolution or linear map of a model: a module, or a functional call."""

    name: str
    """Qualified name of the module, the first one if it is shared; for a functional call the name of the module that
    holds the weight, or of the weight."""
    kind: str
    shape: tuple[int, ...]
    """Shape of the weight, filters first."""
    module: nn.Module | None = field(repr=False, default=None)
    aliases: tuple[str, ...] = ()
    """Further names of a shared module."""
    role: Role = "hidden"
    norm: str | None = None
    """Name of the normalization with an affine part that directly follows."""
    foreign_norm: str | None = None
    """Name of a normalization that directly follows, but along other channels than the filters of the site."""
    norm_seen: bool = False
    """True if a trace shows that this normalization alone reads the output of the site, and does not change it."""
    owns_norm: bool = False
    """True if this normalization follows nothing else, and this site in one place only, channel by filter."""
    called: bool | None = None
    """True if the forward calls the site; None if neither a trace nor a forward pass can tell."""
    reader: str = ""
    """Name of a function that is called with the weight, for a module whose forward need not be called."""
    call: Call | None = None
    """Functional call to make angular, if the site is one."""
    attention: str | None = None
    """Name of the module that hands this projection to `F.multi_head_attention_forward`; nn.MultiheadAttention does."""
    fixed: bool = False
    """True for a functional call whose weight is not learned."""
    unclear: str = ""
    """Reason why the functional call cannot be answered; empty if it can."""
    angular: bool = False
    """True if the site is angular already."""
    direct: bool | None = None
    """True if its product is an output of the model, with nothing in between; None if no forward pass succeeded."""
    processed: bool = False
    """True for a classifier whose scores are processed further, in more than ways that leave each channel its class."""
    causal: str = ""
    """Sign that a convolution must not look at later positions; empty if there is none."""
    output_shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the model's outputs that are made of its product, for a classifier; empty if none was seen."""
    heads: int = 0
    """Number of separate outputs of the model that end in a site, for a classifier."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the site, the first one first."""
        return (self.name, *self.aliases)

    @property
    def is_depthwise(self) -> bool:
        """True for a convolution of several groups of one channel each."""
        groups = self.call.groups if self.call is not None else getattr(self.module, "groups", 1)
        return self.kind.startswith("conv") and groups > 1 and self.shape[1] == 1

    @property
    def fan_in(self) -> int:
        """Number of inputs that one filter multiplies."""
        return math.prod(self.shape[1:])


def is_site(module: nn.Module) -> bool:
    """True if a module is a convolution, a linear map or of another kind that the plan accounts for."""
    return isinstance(module, tuple(KINDS))


def kind_of(module: nn.Module) -> str:
    """The kind of a module that is a site."""
    return next(kind for base, kind in KINDS.items() if isinstance(module, base))


def is_swapped(module: nn.Module) -> bool:
    """True if a twin can replace this module: its exact class is a known one, and its forward is that class's."""
    has_known_class = type(module) in SWAPPED or class_name(module) in EQUIVALENTS
    return has_known_class and "forward" not in vars(module)


def is_affine_norm(module: nn.Module) -> bool:
    """True for a normalization, of torch, torchvision, timm or the user, that has a scale of its own."""
    named = "norm" in type(module).__name__.lower() and not is_site(module)
    return named and attribute_of(module, "weight") is not None


def has_statistics(norm: Any) -> bool:
    """True for a BatchNorm of torch or timm that normalizes by running statistics in evaluation."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None


def number_of_channels(norm: Any) -> int | None:
    """The number of channels that a normalization scales, each by its own factor; None where there is no telling."""
    scales = (attribute_of(norm, "weight"), getattr(norm, "running_mean", None))
    return next((scale.numel() for scale in scales if isinstance(scale, Tensor)), None)


def class_name(thing: Any) -> str:
    """The qualified name of a class, or of an object's class."""
    cls = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


def weight_of(module: nn.Module) -> Any:
    """The weight whose shape describes a site; recurrent layers have several, of which this is the first."""
    recurrent = {nn.RNNBase: "weight_ih_l0", nn.RNNCellBase: "weight_ih"}
    return attribute_of(module, next((name for base, name in recurrent.items() if isinstance(module, base)), "weight"))


def attribute_of(module: nn.Module, name: str) -> Any:
    """An attribute of a module, read without changing it; None if there is none.

    Reading a parametrized tensor computes it, and that may change buffers in training: spectral norm goes on iterating.
    """
    if not is_parametrized(module):
        return getattr(module, name, None)
    with evaluating(module), torch.no_grad():
        return getattr(module, name, None)


def site_modules(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """The modules of a model that are sites: first name -> the module and its further names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_site(module):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return {all_names[0]: (modules[key], tuple(all_names[1:])) for key, all_names in names.items()}


def compiled_sites(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """The sites in parts that torch.jit has compiled: name -> kind, shape, and name of the part.

    Such a part shows its layers by the names of their classes. One that shows none is itself the site.
    """
    kinds = {base.__name__: kind for base, kind in KINDS.items()}
    sites: dict[str, tuple[str, tuple[int, ...], str]] = {}
    parts: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or any(name.startswith(f"{part}.") for part in parts):
            continue
        parts.append(name)
        layers = {
            f"{name}.{own}".rstrip("."): (kinds[layer.original_name], tuple(layer.weight.shape), name)
            for own, layer in module.named_modules()
            if getattr(layer, "original_name", "") in kinds and isinstance(getattr(layer, "weight", None), torch.Tensor)
        }
        sites |= layers or {name: ("compiled", (), name)}
    return sites


def in_order(sites: Iterable[Any], order: list[str]) -> list[Any]:
    """Sites, or decisions about them, in the order in which their modules or weights first come in `order`."""
    positions: dict[str, int] = {}
    for position, name in enumerate(order):
        positions.setdefault(name, position)

    def first(site: Any) -> int:
        weight = (site.call.parameter or f"{site.call.owner}.computed",) if site.call else ()
        return min(positions.get(name, len(order)) for name in (site.name, *site.aliases, *weight))

    return sorted(sites, key=first)
