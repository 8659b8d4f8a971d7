"""Inputs for a model that came without any: what its declarations, its signature and its first layers suggest.

The candidates are tensors on the meta device, which stand for their shapes; `input_values.filled` gives them values.
They are tried in turn, so that a name or a layer that suggests something wrong costs a pass on the meta device and no
more.
"""

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import ModelArguments
from sphereify.convert.input_values import filled, named_parameters
from sphereify.errors import UsageError, first_line

BATCH = 2
LENGTH = 16
"""Length of a sequence of ids or features, if nothing says otherwise."""
IMAGE_SIZES = (224, 299, 32, 28, 64, 96, 128, 256, 384, 512)
"""Heights and widths of images, the usual one first; an Inception needs 299 in training."""
VOLUME_SIZES = ((16, 112, 112), (16, 224, 224), (64, 64, 64), (32, 32, 32), (96, 96, 96), (128, 128, 128))
SIGNAL_LENGTHS = (224, 16000, 3000)
"""Lengths of signals: of features over time, of a second of sound, and of thirty seconds of its spectrogram."""
ID_LENGTHS = (LENGTH, 8, 32, 77, 64, 128, 256, 512)
PATCH_SIZES = (16, 32, 14, 8, 4, 2, 7, 28, 64)
DECLARED = ("example_input_array", "dummy_inputs")
"""Attributes under which Lightning's and Hugging Face's models carry inputs that they take."""


def assumed_inputs(model: nn.Module) -> list[ModelArguments]:
    """Candidates for the arguments of a model, the likeliest first, as tensors on the meta device.

    Inputs that the model carries itself come first. Then each argument that a forward needs, or the main ones where all
    are optional, gets what its name says (`input_ids`, `pixel_values`, `timestep`, …), or else what the first layers
    take: images, volumes, signals, ids or features.
    """
    facts = _ModelFacts(model)
    candidates = [*_declared_inputs(model, facts), *_by_signature(facts)]
    return list({candidate.described(): candidate for candidate in candidates}.values())


def first_that_runs(
    candidates: Iterable[ModelArguments], run: Callable[[ModelArguments], tuple[Any, list[str]]]
) -> tuple[ModelArguments | None, Any, list[str]]:
    """The first of the candidates with which a model runs, the result, and what the failed ones said.

    Args:
        candidates: the arguments to try.
        run: gives a result that is true where the model ran, and what was raised.

    Of candidates that differ in sizes alone, no further one is tried after three that failed in the same words.
    """
    errors: list[str] = []
    said: dict[Any, list[str]] = {}
    for candidate in candidates:
        form = tuple((name, value.dim(), value.dtype) for name, value in candidate.items() if isinstance(value, Tensor))
        earlier = said.setdefault(form, [])
        if len(earlier) > 2 and len(set(earlier[-3:])) == 1:
            continue
        result, raised = run(candidate)
        if result:
            return candidate, result, errors
        errors += raised
        earlier.append(" ".join(raised))
    return None, None, errors


def runnable_inputs(model: nn.Module, batch: int = BATCH) -> ModelArguments:
    """Inputs with values, of the first usual shape with which a model runs, on its device and in its dtype.

    Raises:
        UsageError: the model runs with none of them.
    """

    def run(candidate: ModelArguments) -> tuple[ModelArguments | None, list[str]]:
        sized = candidate.map(lambda tensor: torch.empty((batch, *tensor.shape[1:]), dtype=tensor.dtype, device="meta"))
        arguments = filled(sized, model)
        try:
            arguments.run(model)
        except Exception as error:  # a forward may raise anything
            return None, [first_line(error)]
        return arguments, []

    _, arguments, errors = first_that_runs(assumed_inputs(model), run)
    if arguments is None:
        raise UsageError(f"{type(model).__name__} does not run on inputs of a usual shape ({errors[0]})")
    return arguments  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------- declarations and signature


def _declared_inputs(model: nn.Module, facts: "_ModelFacts") -> Iterator[ModelArguments]:
    """Inputs that the model carries itself, if its forward takes arguments of these names."""
    for attribute in DECLARED:
        inputs = None
        with contextlib.suppress(Exception):  # a property of the user's may raise anything
            inputs = getattr(model, attribute, None)
        if not isinstance(inputs, (Tensor, tuple, Mapping)):
            continue
        arguments = ModelArguments.of(inputs)
        if arguments.tensors() and set(arguments.kwargs) <= {p.name for p in facts.parameters}:
            yield arguments


def _by_signature(facts: "_ModelFacts") -> Iterator[ModelArguments]:
    """Arguments for the parameters that a forward needs, by their names and by the first layers."""
    needed = [p for p in facts.parameters if p.default is p.empty]
    if needed:
        seen = [p for p in facts.parameters if p in needed or facts.is_content(p.name)]
        told = [p for p in facts.parameters if p in seen or facts.kind(p.name) in ("moment", "labels", "context")]
        for choice in (seen, needed, told):
            yield from facts.arguments(choice)
        return
    content = [p for p in facts.parameters if facts.is_content(p.name)]
    main = [p for p in facts.parameters if p.name == getattr(facts.model, "main_input_name", None)]
    choices = [content, main, *([p] for p in content), facts.parameters[:1]]
    for choice in choices:
        if choice:
            yield from facts.arguments(choice)
    if not facts.parameters:  # forward(*args)
        yield from (ModelArguments((value,)) for value in facts.by_layers())


class _Kind(NamedTuple):
    """A kind of argument, by a pattern over names."""

    name: str
    pattern: str
    is_content: bool = False
    """True for what a model looks at, false for what is said about it."""


KINDS = (
    _Kind("mask", r"mask"),
    _Kind("types", r"type_ids|position"),
    _Kind("moment", r"^t$|^time$|time_?steps?$|^sigmas?$|noise_level"),
    _Kind("lengths", r"lengths?$|_lens?$"),
    _Kind("labels", r"labels?$|^y$|^targets?$|class_ids?$"),
    _Kind("context", r"encoder_hidden_states|^context$"),
    _Kind("edges", r"edge_index"),
    _Kind("images", r"pixel_values|images?$|^imgs?$|pixels", True),
    _Kind("signals", r"input_values|wave|audio|speech|^wavs?$", True),
    _Kind("signals", r"input_features|spectrogram|^mels?$|fbank", True),
    _Kind("ids", r"input_ids|token_ids|(^|_)tokens?$|^ids$|^idx$|^texts?$|^src$|^tgt$|caption", True),
)
"""Meanings of the usual names of arguments; the first that matches counts."""


# ------------------------------------------------------------------------------------------------------------ the model


class _ModelFacts:
    """Facts that can be read off a model without running it, and tensors for its arguments."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.parameters = named_parameters(model)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.layers = _first_layers(model)

    def arguments(self, chosen: list[inspect.Parameter]) -> Iterator[ModelArguments]:
        """Arguments for the chosen parameters: by their names, and by the first layers where a name says nothing."""
        kinds = [self.kind(p.name) for p in chosen]
        options = {kind: self.of_kind(kind) for kind in kinds}
        options[""] = self.by_layers()
        for named in [kinds, [""] * len(chosen)] if any(kinds) else [kinds]:
            named = [kind if options[kind] else "" for kind in named]
            for tensors in _varied({kind: options[kind] for kind in named}):
                yield _passed(self.parameters, chosen, [tensors[kind] for kind in named])

    def kind(self, name: str) -> str:
        """The kind of an argument of that name; empty if the name says nothing."""
        kind = next((one.name for one in KINDS if re.search(one.pattern, name.lower())), "")
        return "" if kind == "ids" and nn.Embedding not in self.layers else kind

    def is_content(self, name: str) -> bool:
        """True if an argument of that name is what the model looks at."""
        kind = self.kind(name)
        return any(kind == one.name and one.is_content for one in KINDS)

    def of_kind(self, kind: str) -> list[Tensor]:
        """Candidates for an argument of a kind."""
        if kind in ("mask", "types"):
            return [_empty(BATCH, LENGTH, dtype=torch.int64)]
        if kind in ("moment", "lengths", "labels"):
            return [_empty(BATCH, dtype=torch.int64)]
        if kind == "edges":
            return [_empty(2, 8, dtype=torch.int64)]
        if kind == "context":
            width = self.declared("cross_attention_dim", "encoder_hid_dim", "context_dim", "hidden_size")
            return [self.numbers(LENGTH, width[-1])] if width else []
        if kind == "ids":
            own = self.declared("context_length", "block_size", "max_seq_len")[:1]
            lengths = dict.fromkeys((ID_LENGTHS[0], *own, *ID_LENGTHS))
            return [_empty(BATCH, length, dtype=torch.int64) for length in lengths]
        if kind == "images":
            return self.images() if nn.Conv2d in self.layers else [*self.volumes(), *self.images()]
        if kind == "signals":
            return self.signals()
        return []

    def by_layers(self) -> list[Tensor]:
        """Candidates for the first argument by the first layer of each type, in the order of the layers."""
        makers: dict[type, Callable[[], list[Tensor]]] = {
            nn.Conv2d: self.images,
            nn.Conv1d: self.signals,
            nn.Conv3d: self.volumes,
            nn.Embedding: lambda: self.of_kind("ids"),
            nn.Linear: self.features,
            nn.RNNBase: lambda: [self.numbers(LENGTH, self.layers[nn.RNNBase].input_size)],
            nn.MultiheadAttention: lambda: [self.numbers(LENGTH, self.layers[nn.MultiheadAttention].embed_dim)],
        }
        usual = [tensor for kind in self.layers for tensor in makers[kind]()] or self.images()
        return [*usual, *self.rows_of_own_layers()]

    def rows_of_own_layers(self) -> list[Tensor]:
        """Rows for the first layer of another class that holds a matrix, filters first or last."""
        for module in self.model.modules():
            own = [p for p in module.parameters(recurse=False) if p.dim() == 2]
            if own and not isinstance(module, LAYERS):
                return [self.numbers(own[0].shape[1]), self.numbers(own[0].shape[0])]
        return []

    def numbers(self, *shape: int) -> Tensor:
        """A batch of numbers in the dtype of the model."""
        return _empty(BATCH, *shape, dtype=self.dtype)

    def images(self) -> list[Tensor]:
        """Images of the size that the model names, else of the usual ones, for its first convolution."""
        config = (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size") or ()
        named = self.declared("img_size", "image_size", "sample_size")
        own = (named * 2)[:2] if named else ()
        sizes = [tuple(config[1:])] if config else [(size, size) for size in IMAGE_SIZES]
        sizes = [own, *sizes] if own else sizes
        first = self.layers.get(nn.Conv2d)
        channels = [first.in_channels] if first is not None else self.declared("num_channels", "in_chans", "channels")
        likely = dict.fromkeys((*channels, config[0] if config else 3))
        videos = [
            self.numbers(*self.declared("num_frames"), c, *sizes[0]) for c in likely if self.declared("num_frames")
        ]
        return [*(self.numbers(c, *size) for size in dict.fromkeys(sizes) for c in likely), *videos]

    def volumes(self) -> list[Tensor]:
        """Videos and volumes for the first convolution of three dimensions."""
        first = self.layers.get(nn.Conv3d)
        if first is None:
            return []
        own = self.declared("img_size", "image_size")
        sizes: list[tuple[int, ...]] = [own, *VOLUME_SIZES] if len(own) == 3 else [*VOLUME_SIZES]
        if len(own) in (1, 2):
            sizes.insert(0, (LENGTH, *(own * 2)[:2]))
        frames = self.declared("num_frames")[:1]
        channels, volumes = first.in_channels, []
        for depth, *rest in sizes:
            volumes += [self.numbers(channels, depth, *rest), self.numbers(*(frames or (depth,)), channels, *rest)]
            volumes += [self.numbers(3, depth, *rest)] if channels != 3 else []
        return volumes

    def signals(self) -> list[Tensor]:
        """Signals for the first convolution of one dimension: channels first, channels last, and without channels."""
        first = self.layers.get(nn.Conv1d)
        bands = self.declared("num_mel_bins", "n_mels")[:1] or ((first.in_channels,) if first is not None else ())
        if not bands:
            return [self.numbers(SIGNAL_LENGTHS[1]), *self.images()]
        signals = [self.numbers(*bands, SIGNAL_LENGTHS[0])] if first is not None else []
        if bands == (1,):
            signals.append(self.numbers(SIGNAL_LENGTHS[1]))
        for length in (*self.declared("max_length"), *SIGNAL_LENGTHS):
            forms = [self.numbers(*bands, length), self.numbers(length, *bands)]
            signals += forms if first is not None else forms[::-1]
        return signals

    def features(self) -> list[Tensor]:
        """Rows and sequences for the first linear map, and images whose patches or pixels it could take."""
        width = self.layers[nn.Linear].in_features
        rows = [self.numbers(width), self.numbers(LENGTH, width)]
        if (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size"):
            return [rows[0], *self.images(), rows[1]]
        length = self.declared("seq_len", "seq_length", "sequence_length", "context_length")[:1]
        variates = self.declared("num_input_channels", "enc_in")[:1] or (width,)
        series = [self.numbers(*length, *variates)] if length else []
        own = (self.declared("img_size", "image_size") * 2)[:2]
        return [*rows, *series, *(self.numbers(c, *size) for c, size in _cut_images(width, own))]

    def declared(self, *names: str) -> tuple[int, ...]:
        """The size that the model, its configuration or a part of it has under one of these names; empty if none."""
        config = getattr(self.model, "config", None)
        for holder in (self.model, config, *self.model.modules()):
            for name in names:
                value = None
                with contextlib.suppress(Exception):  # a property of the user's may raise anything
                    value = getattr(holder, name, None)
                value = (value,) if type(value) is int else value
                if isinstance(value, (tuple, list)) and value and all(type(one) is int and one > 0 for one in value):
                    return tuple(value)
        return ()


LAYERS = (nn.Conv2d, nn.Conv1d, nn.Conv3d, nn.Embedding, nn.Linear, nn.RNNBase, nn.MultiheadAttention)
"""Types of layers that say what they take."""


def _first_layers(model: nn.Module) -> dict[type, Any]:
    """The first layer of each type, in the order of registration."""
    first: dict[type, Any] = {}
    for module in model.modules():
        kind = next((kind for kind in LAYERS if isinstance(module, kind)), None)
        if kind is not None:
            first.setdefault(kind, module)
    return first


def _cut_images(width: int, named: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Channels and sizes of images that give rows of that width: when cut into patches, or taken whole."""
    for channels in (3, 1, 4, 2):
        side = math.isqrt(width // channels)
        if side * side * channels != width:
            continue
        if side in PATCH_SIZES:
            sizes = [(size, size) for size in IMAGE_SIZES if size % side == 0]
            yield from ((channels, size) for size in ([named, *sizes] if named else sizes))
        yield channels, (side, side)


def _varied(options: dict[str, list[Tensor]]) -> Iterator[dict[str, Tensor]]:
    """One tensor for each kind of argument: the first of each, then another one of one kind, the kinds in turn."""
    first = {kind: tensors[0] for kind, tensors in options.items()}
    yield first
    for number in range(1, max(map(len, options.values()))):
        yield from ({**first, kind: own[number]} for kind, own in options.items() if number < len(own))


def _passed(parameters: list[inspect.Parameter], chosen: list[inspect.Parameter], values: list[Any]) -> ModelArguments:
    """The values of required parameters that come first as positional arguments, the others by keyword."""
    positional = 0
    for parameter, given in zip(parameters, chosen, strict=False):
        if parameter is not given or given.kind is given.KEYWORD_ONLY or given.default is not given.empty:
            break
        positional += 1
    by_keyword = zip(chosen[positional:], values[positional:], strict=True)
    return ModelArguments(tuple(values[:positional]), {p.name: value for p, value in by_keyword})


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
