"""Passes through the converted network and the original, side by side, one of each for every batch.

The passes take turns. Before the converted network runs a layer, the original has run up to the use of that layer's
output, and the caller sets the layer from both.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.calibration.norms import scale_of, shift_of
from sphereify.calibration.rows import Batch, rows_at, sampled_positions
from sphereify.calibration.tracking import (
    LayerCall,
    LayerOutput,
    OutputTracker,
    TrackedPass,
    follow_output,
    input_of,
    pause_before,
    record_places,
)
from sphereify.convert.arguments import ModelArguments
from sphereify.convert.sites import has_statistics
from sphereify.errors import DataError
from sphereify.nn.functional_calls import AngularCall

SetLayer = Callable[[LayerPair, int, list[Batch]], None]
"""A function that takes a layer, the number of its call, and its batches."""


def run_paired(
    model: nn.Module,
    reference: nn.Module,
    pairs: dict[str, LayerPair],
    inputs: list[ModelArguments],
    *,
    seed: int,
    positions: int,
    set_layer: SetLayer,
) -> None:
    """Run both networks on all batches, and call `set_layer` before each call of a converted layer.

    Raises:
        DataError: a layer of the original gives values that are not finite.
    """

    def sample(pair: LayerPair, call: int, batch: int, output: Tensor) -> Tensor | None:
        return sampled_positions(pair, output, share=len(inputs), most=positions, seed=seed, call=call, batch=batch)

    handles = [*record_places(model), *record_places(reference)]
    for pair in pairs.values():
        handles += [*pause_before(pair), *follow_output(pair, sample)]
    targets = [_Targets(TrackedPass(_body(reference, x, OutputTracker()), n)) for n, x in enumerate(inputs)]
    passes = [TrackedPass(_body(model, x), n) for n, x in enumerate(inputs)]
    try:
        _take_turns(passes, targets, pairs, set_layer)
    finally:
        for one in [*passes, *(target.reference_pass for target in targets)]:
            one.close()
        for handle in handles:
            handle.remove()


def _body(network: nn.Module, arguments: ModelArguments, tracker: Any = None) -> Callable[[], None]:
    def run() -> None:
        with tracker or contextlib.nullcontext():
            arguments.run(network)

    return run


def _take_turns(
    passes: list[TrackedPass], targets: "list[_Targets]", pairs: dict[str, LayerPair], set_layer: SetLayer
) -> None:
    """Advance all passes to their next layer; set the layer of the first one, which lets those at it go on."""
    waiting: dict[int, LayerCall] = {}
    running = list(range(len(passes)))
    while running:
        for number in running:
            if number not in waiting:
                event = passes[number].advance()
                if event is not None:
                    waiting[number] = event
        running = sorted(waiting)
        if not running:
            return
        first = waiting[running[0]]
        together = [n for n in running if (waiting[n].layer, waiting[n].number) == (first.layer, first.number)]
        pair = pairs[first.layer]
        batches = []
        for number in together:
            target = targets[number].at(first)
            batch = None if target is None else _batch(pair, waiting[number], target, passes[number])
            if batch is not None:
                batches.append(batch)
            del target, batch
        if batches:
            set_layer(pair, first.number, batches)
        del batches, first  # activations that nothing else needs
        for number in together:
            del waiting[number]


class _Targets:
    """The outputs of the original's layers on one batch, from a pass that runs as far as they are asked for."""

    def __init__(self, reference_pass: TrackedPass):
        self.reference_pass = reference_pass
        self._outputs: dict[tuple[str, int], LayerOutput] = {}
        self._ended = False

    def at(self, call: LayerCall) -> LayerOutput | None:
        """The original's output of this call of a layer; None if the original makes no such call."""
        key = (call.layer, call.number)
        while key not in self._outputs and not self._ended:
            event = self.reference_pass.advance()
            self._ended = event is None
            for output in self.reference_pass.outputs if event is None else [event]:
                self._outputs[output.layer, output.call] = output
        return self._outputs.pop(key, None)


def _batch(pair: LayerPair, call: LayerCall, output: LayerOutput, converted_pass: TrackedPass) -> Batch | None:
    """A layer's input in one pass, and the output that it should have; None if the original received other inputs."""
    arguments = call.arguments
    functional = arguments[0] if isinstance(pair.layer, AngularCall) else None
    x = input_of(arguments)
    filters = arguments[1] if functional is not None and len(arguments) > 1 else slice(None)
    if x.shape != output.input_shape:
        return None  # a network that routes its inputs has sent these another way than the original did
    if not output.raw.isfinite().all():
        number = converted_pass.number
        raise DataError(f"calibration: the original's {pair.name} gives values that are not finite on batch {number}")
    target, added, rectified = output.raw, None, output.rectified
    if has_statistics(pair.norm):
        target = output.raw * scale_of(pair.norm) + shift_of(pair.norm)
    elif pair.norm is not None:
        if pair.decision.drops_norm and output.normalized is not None:
            target = output.normalized
        return Batch(x, functional, filters, output.positions, output.raw, target, None, False, output.normalized)
    if output.total is not None:
        other = converted_pass.tensor_at(output.addend)
        if other is not None and other.shape == output.shape:
            added = rows_at(pair, other, output.positions)
            target = output.total - added
        else:
            added = output.total - target
    return Batch(
        x,
        functional,
        filters,
        output.positions,
        output.raw,
        target,
        added if rectified else None,
        rectified,
        output.normalized,
    )
