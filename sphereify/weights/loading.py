"""The weights of a plain model, from a checkpoint that training scripts of any kind have written."""

import itertools
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphereify.annotations import UNTRAINED
from sphereify.errors import ArtifactError, first_line
from sphereify.files import as_path
from sphereify.weights.checkpoint_files import foreign_classes, read_checkpoint_file, unreadable


def load_weights(model: nn.Module, path: str | Path, *, classes: int | None = None) -> list[str]:
    """Fill a plain model from a checkpoint: safetensors, or a torch file, of which only tensors are read.

    The tensors may lie inside other dictionaries (`state_dict`, `model`, `net`, …), of which an average (`ema`) is
    preferred, and their names may begin with what a wrapper puts before them (`module.`, `_orig_mod.`, `model.`, …).
    Whatever the model's own strict `load_state_dict` takes is taken, so modules that translate older names do so.

    Args:
        classes: number of classes of the model. With it, an output layer that the file has for other classes keeps the
            weights of the model.

    Returns:
        The names of the tensors that the model keeps; none without `classes`.

    Raises:
        ArtifactError: no such file, one that cannot be read, tensors that do not fit, with names and shapes, or several
            that do. Nothing of the model is changed then.
    """
    path = as_path("path", path)
    content = read_checkpoint_file(path)
    states = list(_states_in(content))
    if not states:
        raise _without_tensors(path, content)
    state = _best_state(states, model, path)
    before = [(tensor, tensor.detach().clone()) for tensor in _tensors_of(model)]
    misfit = _fill(model, state.tensors)
    if misfit.fits_but_for_classes(classes):
        return [name for name, _, _ in misfit.shapes]
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
    foreign = foreign_classes(content)
    unread = f". Objects of {', '.join(foreign[:3])} in it are not read" if foreign else ""
    raise ArtifactError(f"{path}: does not fit {type(model).__name__}: {misfit}{unread}")


def fill_from(model: nn.Module, path: str | Path, classes: int | None) -> list[str]:
    """Fill a model as `load_weights` does, and note on it what stays new, as `UNTRAINED`."""
    new = load_weights(model, path, classes=classes)
    if new:
        note_untrained(model, new, f"{path} is for other classes than {classes}")
    return new


def note_untrained(model: nn.Module, tensors: list[str], why: str) -> None:
    """Note on a model that these tensors of it are new."""
    UNTRAINED.write(model, f"{why}, so {', '.join(tensors[:4])} {'is' if len(tensors) == 1 else 'are'} new")


def with_new_classifier(model: nn.Module, fresh: nn.Module, classes: int) -> list[str]:
    """Put the classifier of a new network into a trained one of the same architecture.

    Args:
        model: the trained network, changed in place.
        fresh: a network for `classes` classes, whose layers of that size are taken.

    Returns:
        The names of the new tensors; none, and nothing is changed, if the two differ in more than a classifier.
    """
    own = fresh.state_dict()
    shapes = [
        (name, tuple(tensor.shape), tuple(own[name].shape))
        for name, tensor in model.state_dict().items()
        if name in own and own[name].shape != tensor.shape
    ]
    if not _Misfit(shapes, [], []).fits_but_for_classes(classes):
        return []
    for layer in dict.fromkeys(name.rpartition(".")[0] for name, _, _ in shapes):
        model.set_submodule(layer, fresh.get_submodule(layer))
    for name, module in fresh.named_modules():
        twin = dict(model.named_modules()).get(name)
        if twin is not None and "num_classes" in vars(module):
            twin.num_classes = module.num_classes
    return [name for name, _, _ in shapes]


def _tensors_of(model: nn.Module) -> list[Tensor]:
    state = model.state_dict(keep_vars=True).values()
    return list({id(value): value for value in state if isinstance(value, Tensor)}.values())


def _without_tensors(path: Path, content: Any) -> ArtifactError:
    foreign = foreign_classes(content)
    if foreign:
        return unreadable(
            path,
            f"its weights are inside objects of {', '.join(foreign[:3])}, which only their own code can read; save the "
            f"state_dict() of the model instead",
        )
    return ArtifactError(f"{path}: holds {type(content).__name__}, expected a dictionary of tensors")


# --------------------------------------------------------------------------------------- the tensors that are meant


@dataclass(frozen=True)
class _State:
    """Tensors by name, and the place in the file where they lie: the keys that lead to them, and a prefix of names."""

    place: tuple[str, ...]
    tensors: dict[str, Any]

    @property
    def rank(self) -> int:
        """0 for an average of weights, 1 for the weights themselves, 2 for any other network in the file."""
        words = [word for part in self.place for word in re.split(r"[._\-]+", part.lower()) if word]
        if any(word.startswith("ema") for word in words):
            return 0
        return 1 if all(word in _USUAL for word in words) else 2

    def below(self, prefix: str) -> "_State":
        """The tensors whose names begin with a prefix, without it."""
        tensors: dict[str, Any] = OrderedDict(
            (name.removeprefix(prefix), tensor) for name, tensor in self.tensors.items() if name.startswith(prefix)
        )
        versions = getattr(self.tensors, "_metadata", None)
        if versions is not None:  # by which modules tell that a state is of an older version
            inside = ((f"{name}.", value) for name, value in versions.items() if f"{name}.".startswith(prefix))
            tensors._metadata = {name.removeprefix(prefix)[:-1]: value for name, value in inside}  # type: ignore[attr-defined]
        return _State((*self.place, prefix), tensors)


_USUAL = {"state", "dict", "model", "net", "network", "module", "orig", "mod", "weights", "params", "0"}
"""Words of the keys and prefixes under which training scripts keep a network and wrappers its parts."""


def _states_in(content: Any, place: tuple[str, ...] = ()) -> Iterator[_State]:
    """Each dictionary of tensors in the content of a file, the outermost first."""
    if not isinstance(content, dict):
        return
    is_empty = not content and not place
    if is_empty or any(isinstance(k, str) and isinstance(v, (Tensor, np.ndarray)) for k, v in content.items()):
        tensors: dict[str, Any] = OrderedDict(_named_tensors(content))
        if hasattr(content, "_metadata"):
            tensors._metadata = content._metadata  # type: ignore[attr-defined]
        yield _State(place, tensors)
    for key, value in content.items():
        yield from _states_in(value, (*place, str(key)))


def _named_tensors(content: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state")):
            yield name, value


def _best_state(states: list[_State], model: nn.Module, path: Path) -> _State:
    """The tensors, without the prefix of a wrapper, that have the most names of the model; an average before others.

    Raises:
        ArtifactError: several different ones that are equally good.
    """
    names = set(model.state_dict())
    candidates = [(len(names & set(part.tensors)), part) for state in states for part in _parts(state, names)]
    most = max(count for count, _ in candidates)
    if not most:  # the model may translate the names itself
        return max(states, key=lambda state: len(state.tensors))
    best = sorted((part for count, part in candidates if count == most), key=lambda part: part.rank)
    equal = [part for part in best if part.rank == best[0].rank]
    if any(not _same(part.tensors, equal[0].tensors, names) for part in equal[1:]):
        places = ", ".join(".".join(filter(None, part.place)).rstrip(".") or "the file itself" for part in equal)
        raise ArtifactError(
            f"{path}: holds several networks that fit {type(model).__name__}: {places}; save the one that is meant to "
            f"a file of its own"
        )
    return equal[0]


def _parts(state: _State, names: set[str]) -> Iterator[_State]:
    """The state itself, and what it holds under a prefix, if that is at least half of it."""
    yield state
    prefixes = Counter(
        name[: dot.end()] for name in state.tensors for dot in re.finditer(r"\.", name) if name[dot.end() :] in names
    )
    for prefix in prefixes:
        part = state.below(prefix)
        if 2 * len(part.tensors) >= len(state.tensors):
            yield part


def _same(one: dict[str, Any], other: dict[str, Any], names: set[str]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in names & set(one) & set(other))


# ------------------------------------------------------------------------------------------------- filling the model


@dataclass(frozen=True)
class _Misfit:
    """The parts of a state that do not fit a model."""

    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """Name, shape in the file and shape in the model of tensors that differ in shape; all others were filled."""
    missing: list[str]
    unknown: list[str]
    other: str = ""
    """Any other objection of the model."""

    def fits_but_for_classes(self, classes: int | None) -> bool:
        """True if nothing is amiss, or only tensors of the output layer, whose first dimension is `classes` in the
        model and one other number in the file, the same for all of them."""
        others = {shape[:1] for _, shape, _ in self.shapes}
        of_classes = all(shape[1:] == own[1:] and own[:1] == (classes,) for _, shape, own in self.shapes)
        return not (self.missing or self.unknown or self.other) and of_classes and len(others) <= 1

    def __str__(self) -> str:
        wrong = [f"{name}: {shape} in the file, {own} in the model" for name, shape, own in self.shapes]
        misfits = (("of another shape", wrong), ("missing", self.missing), ("not in the model", self.unknown))
        problems = [
            f"{len(names)} {what}: {'; '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for what, names in misfits
            if names
        ]
        return ". ".join([*problems, *filter(None, [self.other])])


_OTHER_SHAPE = re.compile(r"size mismatch for (.+?): copying a param with shape (.+?) from checkpoint, .* is (.+?)\.?$")
"""Torch's report of a tensor that has another shape."""


def _fill(model: nn.Module, tensors: dict[str, Any]) -> _Misfit:
    """Load the tensors by the model's own `load_state_dict`, as far as they fit, and tell what does not."""
    keys: list[Any] = []
    watch = model.register_load_state_dict_post_hook(lambda module, incompatible: keys.append(incompatible))
    error: Exception | None = None
    try:
        model.load_state_dict(tensors, strict=True)
    except Exception as raised:  # the model's own code may raise anything
        error = raised
    finally:
        watch.remove()
    if error is None:
        return _Misfit([], [], [])
    missing = list(itertools.chain.from_iterable(report.missing_keys for report in keys))
    absent = [name for name in model.state_dict() if name not in tensors]
    if missing and set(missing) <= set(absent):  # torch itself does not count what it has a default for
        missing = absent
    unknown = list(itertools.chain.from_iterable(report.unexpected_keys for report in keys))
    matches = [match for line in str(error).splitlines() if (match := _OTHER_SHAPE.search(line))]
    shapes = [(match[1], _shape(match[2]), _shape(match[3])) for match in matches]
    return _Misfit(shapes, missing, unknown, "" if shapes or missing or unknown else first_line(error))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))
