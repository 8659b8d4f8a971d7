"""A start for a converted network from what the original computes on a few unlabelled inputs, without training.

Layer by layer, in the order in which they run, each angular layer becomes the least-squares fit of what the original
layer gave to the rest of the network, on what the layer now receives from the part already converted. Where the output
is added to a shortcut, the fit is to the sum, so that errors made before are corrected; where a ReLU follows, errors
that it hides do not count. The head follows the original's class probabilities.
"""

import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from sphereify.annotations import CALIBRATED, CALIBRATION_FIT, PLAN
from sphereify.calibration.batches import checked_batches, joined, range_warning
from sphereify.calibration.distillation import check_steps, distill
from sphereify.calibration.head import set_head
from sphereify.calibration.layer import set_layer
from sphereify.calibration.layer_pairs import LayerPair, layer_pairs, reference_of
from sphereify.calibration.network_state import on_device, restored_on_error
from sphereify.calibration.paired_passes import run_paired
from sphereify.calibration.results import Calibration, LayerFit
from sphereify.calibration.rows import MOST_ROWS, Batch
from sphereify.calibration.trial_runs import can_take_turns, first_run
from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.model_inputs import evaluating
from sphereify.convert.plan import ConversionPlan
from sphereify.errors import UsageError
from sphereify.nn import AngularHead
from sphereify.nn.modules import check_module
from sphereify.nn.precision import no_autocast

WHOLE = slice(None)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Inputs],
    *,
    steps: int = 0,
    contrast_jitter: bool = False,
    seed: int = 0,
    positions: int = MOST_ROWS,
    device: str | torch.device | None = None,
    on_layer: Callable[[str, float], None] = lambda name, explained: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Calibration:
    """Set the converted layers of `model` to reproduce those of `original`, in place, without labels or training.

    Args:
        model: from `apply_plan(original, plan)`.
        original: the network before the conversion, trained. It is not changed.
        batches: inputs, each as `example_inputs` of `plan_conversion`. 500 to 2,000 images are usual. The memory needed
            is that of the activations of all of them at one place of the network.
        steps: number of optimizer steps towards the original's outputs afterwards; see `distill`. Usual: 0, or 200 to
            500.
        contrast_jitter: True for steps in which the converted network sees the images at lower contrast; see `distill`.
        seed: random seed for the positions that are drawn where there are more than a fit needs, and for the order of
            the steps.
        positions: number of positions that a layer is fitted to, drawn from all of them, where so many are enough for
            its filters. Fewer are faster.
        device: where to run; "auto" is the GPU if there is one. Both networks are moved there and back. Default: where
            they are.
        on_layer: called after each layer with its name and R².
        on_step: called after each step with its number and loss.

    Returns:
        R² of each converted layer that the inputs reach, before and after.

    Raises:
        UsageError: no batches, negative steps, or a model that was not converted.
        ArgumentTypeError: a network that is no module, or batches that are neither tensors nor tuples nor mappings.
        DataError: inputs that are not finite, or make the original's outputs so. Nothing has been changed then.

    Both models run in eval mode and get their mode back afterwards; layers are set without autocast, steps follow the
    caller's. Solved are filters, β, γ or the bias, the affine part and the running statistics of a BatchNorm that
    follows, k of a learnable sigmoid (unless the whole network shares it), and a head's class weights. A filter that
    another layer uses too, or that the model computes from other parameters, keeps its direction.
    """
    check_module(model)
    plan = PLAN.of(model)
    if plan is None:
        raise UsageError(f"calibration: {type(model).__name__} was not converted")
    check_module(original, "original", "a torch.nn.Module, the plain network")
    if original is model:
        raise UsageError(
            "calibration: model and original are one network, expected the converted one and the plain one"
        )
    check_steps(steps)
    inputs = checked_batches(batches)
    with on_device(device, model, original) as target:
        if target is not None:
            inputs = [batch.to(target) for batch in inputs]
        kind = next(itertools.chain(model.parameters(), model.buffers())).device.type
        with no_autocast(kind), evaluating(model, original), restored_on_error(model):
            calibration = _fit_layers(model, original, plan, inputs, seed, positions, on_layer)
        if steps:
            calibration.difference = distill(
                model, original, inputs, steps=steps, seed=seed, contrast_jitter=contrast_jitter, on_step=on_step
            )
    CALIBRATED.write(model, True)
    count = sum(len(batch.tensors()[0]) for batch in inputs)
    CALIBRATION_FIT.write(model, calibration.to_json(steps=steps, inputs=count))
    return calibration


def _fit_layers(
    model: nn.Module,
    original: nn.Module,
    plan: ConversionPlan,
    inputs: list[ModelArguments],
    seed: int,
    positions: int,
    on_layer: Callable[[str, float], None],
) -> Calibration:
    reference = reference_of(original, plan)
    pairs = layer_pairs(model, reference, plan)
    outputs, calls = first_run(reference, pairs, inputs[0])
    warning = range_warning(reference, inputs)
    if warning:
        warnings.warn(warning, stacklevel=4)
    if len(inputs) > 1 and not can_take_turns(reference, pairs, inputs, outputs):
        inputs = [joined(inputs)]
    del outputs
    fitter = _LayerFitter(calls, on_layer)
    run_paired(model, reference, pairs, inputs, seed=seed, positions=positions, set_layer=fitter.fit)
    unreached = [name for name in pairs if name not in fitter.layers]
    notes = [warning] if warning else []
    if unreached:
        notes.append(f"not calibrated, since the inputs do not reach them: {', '.join(unreached)}")
    return Calibration(fitter.layers, notes)


class _LayerFitter:
    """A fitter that sets layers in the order in which they run, and collects their fits.

    Args:
        calls: the number of calls of each layer in one pass through the original.
        on_layer: called after the last call of each layer with its name and R².
    """

    def __init__(self, calls: Counter[str], on_layer: Callable[[str, float], None]):
        self.layers: dict[str, LayerFit] = {}
        self._calls = calls
        self._on_layer = on_layer
        self._earlier: dict[str, list[Batch]] = {}  # of layers that are called several times
        self._parts: dict[str, list[LayerFit]] = defaultdict(list)  # of filters that calls take in parts

    def fit(self, pair: LayerPair, call: int, batches: list[Batch]) -> None:
        """Set a layer before one of its calls, from this call's inputs and those of the calls before."""
        name, whole = pair.name, batches[0].filters == WHOLE
        if self._calls[name] > 1 and whole:
            batches = self._earlier.get(name, []) + batches
            self._earlier[name] = batches
        fit = set_head(pair, batches) if isinstance(pair.layer, AngularHead) else set_layer(pair, batches)
        if not whole:
            self._parts[name].append(fit)
            fit = _mean(self._parts[name])
        self.layers[name] = fit
        if call == max(1, self._calls[name]):
            self._earlier.pop(name, None)
            self._on_layer(name, fit.after)


def _mean(parts: list[LayerFit]) -> LayerFit:
    """The newest fit with the mean R² of all parts."""
    before, after = (sum(getattr(part, name) for part in parts) / len(parts) for name in ("before", "after"))
    return replace(parts[-1], before=before, after=after)
