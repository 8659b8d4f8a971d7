"""A start for a converted network from what the original knows and a few unlabelled inputs, without training.

Layer by layer, in the order in which they run, each angular layer becomes the least-squares fit of what the original
layer gave to the rest of the network, on what the layer now receives from the part already converted. Where the output
is added to a shortcut, the fit is to the sum, so that errors made before are corrected; where a ReLU follows, errors
that it hides do not count. The head follows the original's class probabilities.
"""

import contextlib
import functools
import itertools
import math
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.calibration.batches import (
    batches_of,
    check_steps,
    joined,
    out_of_range,
    unless_raised,
)
from sphereify.calibration.distillation import reconstruct
from sphereify.calibration.head import set_head
from sphereify.calibration.layer import LayerFit, keeps_statistics, scale_of, set_layer, shift_of
from sphereify.calibration.layer_pairs import Site, is_tied, path_of, reference_of
from sphereify.calibration.lockstep import Follow, Pass, Pending, Place, Received, current
from sphereify.calibration.rows import MOST_PRODUCTS, MOST_ROWS, Batch, rows_at
from sphereify.convert.model_inputs import evaluating, fresh, tensors_in
from sphereify.convert.names import submodule
from sphereify.convert.plan import ConversionPlan
from sphereify.convert.rewrite import PLAN_ATTRIBUTE
from sphereify.errors import DataError, UsageError, first_line
from sphereify.nn import AngularHead
from sphereify.nn.functional_calls import AngularCall
from sphereify.nn.precision import no_autocast


@dataclass
class Calibration(Mapping[str, float]):
    """R² after calibration by the name of each converted layer, with more in `layers`."""

    layers: dict[str, LayerFit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know: inputs outside the model's range, layers that were not reached."""
    difference: tuple[float, float] | None = None
    """Of the networks' outputs, before and after the steps; see `reconstruct`."""

    def __getitem__(self, name: str) -> float:
        return self.layers[name].after

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def worst(self) -> list[LayerFit]:
        """The layers, the least explained first."""
        return sorted(self.layers.values(), key=lambda layer: layer.after)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Tensor | tuple[Any, ...]],
    *,
    steps: int = 0,
    seed: int = 0,
    on_layer: Callable[[str, float], None] = lambda name, explained: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Calibration:
    """Set the converted layers of `model` to reproduce those of `original`, in place, without labels or training.

    Args:
        model: from `apply_plan(original, plan)`.
        original: the network before the conversion, trained. It is not changed.
        batches: inputs: tensors, or tuples of the model's arguments. 500 to 2,000 images are usual. Memory is that of
            the activations which all of them have at one place of the network.
        steps: of an optimizer towards the original's outputs, afterwards; see `reconstruct`. Usual: 0, or 200 to 500.
        seed: of the positions that are drawn where there are more than a fit needs, and of the order of the steps.
        on_layer: called after each layer with its name and R².
        on_step: called after each step with its number and loss.

    Returns:
        For each converted layer that the inputs reach R², before and after.

    Raises:
        UsageError: no batches, negative steps, or a model that was not converted.
        DataError: inputs that are not finite, or make the original's outputs so. Nothing has been changed then.

    Both models run in eval mode and get their mode back afterwards; layers are set without autocast, steps follow the
    caller's. Solved are filters, β, γ or the bias, the affine part and the running statistics of a BatchNorm that
    follows, k of a learnable sigmoid (unless the whole network shares it), and a head's class weights. A filter that
    another layer uses too, or that the model computes from other parameters, keeps its direction.
    """
    plan: ConversionPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise UsageError(f"calibration: {type(model).__name__} was not converted")
    if original is model:
        raise UsageError(
            "calibration: model and original are one network, expected the converted one and the plain one"
        )
    check_steps(steps)
    inputs = batches_of(batches)
    device = next(itertools.chain(model.parameters(), model.buffers())).device.type
    with no_autocast(device), evaluating(model, original), unless_raised(model):
        result = _Calibrating(model, original, plan, inputs, seed, on_layer).run()
    if steps:
        result.difference = reconstruct(model, original, inputs, steps=steps, seed=seed, on_step=on_step)
    return result


# ---------------------------------------------------------------------------------------------------------- the passes


class _Calibrating:
    """One calibration."""

    def __init__(self, model: nn.Module, original: nn.Module, plan: ConversionPlan, inputs: list[tuple[Any, ...]],
                 seed: int, on_layer: Callable[[str, float], None]):  # fmt: skip
        self.model = model
        self.reference = reference_of(original, plan)
        self.inputs = inputs
        self.seed = seed
        self.on_layer = on_layer
        self.result = Calibration()
        self.sites: dict[str, Site] = {}
        norms = Counter(d.norm for d in plan.converted)
        for decision in plan.converted:
            path = path_of(decision)
            norm = submodule(self.reference, decision.norm) if norms[decision.norm] == 1 else None
            self.sites[decision.name] = Site(
                decision, model.get_submodule(path), self.reference.get_submodule(path), norm,
                submodule(model, decision.norm) if norm is not None else None,
                norms[decision.norm] > 1 and decision.norm is not None, is_tied(model, decision),
                model.get_submodule(decision.call.owner if decision.call is not None else decision.name),
            )  # fmt: skip
        self.earlier: dict[str, list[Batch]] = {}
        """Of a layer that is called several times: what it received so far."""
        self.expected: Counter[str] = Counter()
        self.parts: dict[str, list[LayerFit]] = defaultdict(list)

    def run(self) -> Calibration:
        self._check_interleaving(self._check_inputs())
        handles = [*self._watch(self.model), *self._watch(self.reference)]
        handles += [h for site in self.sites.values() for h in self._stops(site)]
        theirs = [_Targets(Pass(self._body(self.reference, x, follow=True), n)) for n, x in enumerate(self.inputs)]
        ours = [Pass(self._body(self.model, x), n) for n, x in enumerate(self.inputs)]
        try:
            self._proceed(ours, theirs)
        finally:
            for one in [*ours, *(targets.passing for targets in theirs)]:
                one.close()
            for handle in handles:
                handle.remove()
        missed = [name for name in self.sites if name not in self.result.layers]
        if missed:
            self.result.notes.append(f"not calibrated, since the inputs do not reach them: {', '.join(missed)}")
        return self.result

    def _proceed(self, ours: list[Pass], theirs: list["_Targets"]) -> None:
        waiting: dict[int, Received] = {}
        running = list(range(len(ours)))
        while running:
            for number in running:
                if number not in waiting:
                    event = ours[number].advance()
                    if event is not None:
                        waiting[number] = event
            running = sorted(waiting)
            if not running:
                return
            now = waiting[running[0]]
            together = [n for n in running if (waiting[n].site, waiting[n].call) == (now.site, now.call)]
            site = self.sites[now.site]
            batches = []
            for number in together:
                target = theirs[number].of(now.site, now.call)
                if target is not None:
                    batches.append(self._batch(site, waiting[number], target, ours[number], number))
            batches = [batch for batch in batches if batch is not None]
            if batches:
                self._set(site, now, batches)  # type: ignore[arg-type]
            del batches
            for number in together:
                del waiting[number]

    def _check_inputs(self) -> list[Tensor]:
        """The original takes the first batch, and what it returns, here too, is finite; also counts the calls."""
        handles = [
            site.original.register_forward_hook(lambda *_, name=name: self.expected.update([name]))  # type: ignore[misc]
            for name, site in self.sites.items()
        ]
        try:
            output = self.reference(*fresh(self.inputs[0]))
        except TypeError as error:
            raise UsageError(
                f"calibration: the model does not take the first batch, a tuple of {len(self.inputs[0])} "
                f"({first_line(error)}). Leave labels out: [images for images, _ in loader]."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            raise DataError(
                "calibration: the original network's output is not finite on the first batch; its weights or the range "
                "of the inputs are wrong"
            )
        note = out_of_range(self.reference, self.inputs)
        if note:
            warnings.warn(note, stacklevel=4)
            self.result.notes.append(note)
        return list(tensors_in(output))

    def _check_interleaving(self, first: list[Tensor]) -> None:
        """Passes take turns in one network. Where a module keeps something of its own from one layer to the next, they
        would mix it up; all inputs then make one pass."""
        if len(self.inputs) == 1:
            return
        ends = [self.inputs[0], self.inputs[-1]]
        alone = [first, list(tensors_in(self.reference(*fresh(ends[1]))))]
        together: dict[int, list[Tensor]] = {}

        def body(number: int) -> Callable[[], Any]:
            def run() -> None:
                together[number] = list(tensors_in(self.reference(*fresh(ends[number]))))

            return run

        def stop(*_: Any) -> None:
            passing = current()
            if passing is not None:
                passing.stand_still(True)

        handles = [site.original.register_forward_hook(stop) for site in self.sites.values()]
        passes = [Pass(body(number), number) for number in range(2)]
        try:
            moving = list(passes)
            while moving:
                moving = [one for one in moving if one.advance() is not None]
            same = all(_close(alone[number], together[number]) for number in range(2))
        except RuntimeError:  # sizes that do not go together
            same = False
        finally:
            for one in passes:
                one.close()
            for handle in handles:
                handle.remove()
        if not same:
            self.inputs = [joined(self.inputs)]

    def _body(self, network: nn.Module, arguments: tuple[Any, ...], *, follow: bool = False) -> Callable[[], Any]:
        def run() -> None:
            with Follow() if follow else contextlib.nullcontext():
                network(*fresh(arguments))

        return run

    def _watch(self, network: nn.Module) -> Iterator[Any]:
        """Notes what goes in and out of each module, for the passes that need it."""
        for name, module in network.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                passing = current()
                if passing is not None:
                    passing.calls[name] += 1
                    if args and isinstance(args[0], Tensor):
                        passing.note(Place(name, passing.calls[name], "in"), args[0])

            def leave(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                passing = current()
                if passing is not None and isinstance(out, Tensor):
                    passing.note(Place(name, passing.calls[name], "out"), out)

            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave)

    def _stops(self, site: Site) -> Iterator[Any]:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            passing = current()
            if passing is not None:
                passing.layer_calls[site.name] += 1
                passing.stand_still(Received(site.name, passing.layer_calls[site.name], (*args, *kwargs.values())))

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
            args = (*args, *kwargs.values())
            passing = current()
            if passing is not None:
                passing.layer_calls[site.name] += 1
                call = passing.layer_calls[site.name]
                drawn = self._drawn(site, call, passing.number, out)
                rows = functools.partial(rows_at, site, drawn=drawn)
                passing.pending.append(Pending(site.name, call, input_of(args).shape, out, rows, drawn))

        yield site.layer.register_forward_pre_hook(before, with_kwargs=True)
        yield site.original.register_forward_hook(after, with_kwargs=True)
        if site.norm is not None:
            yield site.norm.register_forward_pre_hook(lambda module, args: _enter_norm(site, args))
            yield site.norm.register_forward_hook(lambda module, args, out: _leave_norm(site, module, out))

    def _drawn(self, site: Site, call: int, number: int, output: Tensor) -> Tensor | None:
        """Which positions of an output are used, in order; None is all of them."""
        fan_in, groups = site.decision.shape[1:], getattr(site.layer, "groups", 1)
        unknowns = max(1, math.prod(fan_in))
        available = output.numel() // (output.shape[-1] if site.decision.kind == "linear" else site.decision.shape[0])
        wanted = max(4 * unknowns, min(MOST_ROWS, int(MOST_PRODUCTS / (unknowns**2 * groups))))
        share = math.ceil(wanted / len(self.inputs))
        if available <= share:
            return None
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {site.name} {call} {number}".encode()))
        return torch.randperm(available, generator=generator)[:share].sort().values.to(output.device)

    def _batch(self, site: Site, received: Received, target: Pending, passing: Pass, number: int) -> "Batch | None":
        """A layer's input in one pass, and what is wanted of it."""
        arguments = received.arguments
        call = arguments[1] if isinstance(site.layer, AngularCall) else None
        x = input_of(arguments)
        rows = arguments[2] if call is not None and len(arguments) > 2 else slice(None)
        if x.shape != target.received:
            return None  # a network that sends inputs on different ways has sent these on another than the original
        if not target.raw.isfinite().all():
            raise DataError(
                f"calibration: the original's {site.name} gives values that are not finite on batch {number}"
            )
        wanted, added, rectified = target.raw, None, False
        norm = site.norm
        if keeps_statistics(norm):
            wanted = target.raw * scale_of(norm) + shift_of(norm)
            rectified = target.rectified
        elif norm is not None:
            wanted = target.normalized if site.decision.drops_norm and target.normalized is not None else target.raw
            return Batch(x, call, rows, target.drawn, target.raw, wanted, None, False, target.normalized)
        else:
            rectified = target.rectified
        if target.total is not None:
            other = passing.at(target.other)
            if other is not None and other.shape == target.shape:
                added = rows_at(site, other, target.drawn)
                wanted = target.total - added
            else:
                added = target.total - wanted
        return Batch(
            x, call, rows, target.drawn, target.raw, wanted, added if rectified else None, rectified, target.normalized
        )

    def _with_other_rows(self, found: LayerFit) -> LayerFit:
        """Of filters that calls take in parts, the mean over the parts."""
        self.parts[found.name].append(found)
        parts = self.parts[found.name]
        means = [sum(getattr(part, name) for part in parts) / len(parts) for name in ("before", "after")]
        return replace(found, before=means[0], after=means[1])

    def _set(self, site: Site, received: Received, batches: "list[Batch]") -> None:
        if self.expected[site.name] > 1 and batches[0].rows == slice(None):
            batches = self.earlier.setdefault(site.name, []) + batches
            self.earlier[site.name] = batches
        found = set_head(site, batches) if isinstance(site.layer, AngularHead) else set_layer(site, batches)
        if batches[0].rows != slice(None):
            found = self._with_other_rows(found)
        self.result.layers[site.name] = found
        if received.call == max(1, self.expected[site.name]):
            self.earlier.pop(site.name, None)
            self.on_layer(site.name, found.after)


def _close(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3)
        for a, b in zip(one, other, strict=True)
    )


class _Targets:
    """A pass through the original, asked for what its layers gave."""

    def __init__(self, passing: Pass):
        self.passing = passing
        self.arrived: dict[tuple[str, int], Pending] = {}
        self.ended = False

    def of(self, site: str, call: int) -> Pending | None:
        while (site, call) not in self.arrived and not self.ended:
            event = self.passing.advance()
            self.ended = event is None
            for pending in self.passing.pending if event is None else [event]:
                self.arrived[pending.site, pending.call] = pending
        return self.arrived.pop((site, call), None)


def input_of(arguments: tuple[Any, ...]) -> Tensor:
    """What a layer or an `AngularCall` multiplies with its filters."""
    return arguments[1].x if len(arguments) > 1 and not isinstance(arguments[1], Tensor) else arguments[0]  # type: ignore[no-any-return]


def _enter_norm(site: Site, args: Any) -> None:
    passing = current()
    for pending in passing.pending if passing is not None else []:
        if pending.site == site.name and args and args[0] is pending.tensor:
            pending.inside = True


def _leave_norm(site: Site, norm: nn.Module, out: Any) -> None:
    passing = current()
    for pending in list(passing.pending) if passing is not None else []:
        if passing is not None and pending.inside and pending.site == site.name:
            pending.inside = False
            pending.normalized = rows_at(site, out, pending.drawn)
            pending.tensor = out
            activation = getattr(norm, "act", None)
            if activation is not None and not isinstance(activation, nn.Identity):
                pending.rectified = isinstance(activation, nn.ReLU)
                passing.tell(pending)
