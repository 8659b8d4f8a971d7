"""Observation of a model's forward passes, on the meta device: shapes without values, at hardly any cost.

A trace shows how modules are wired. An observation shows what is called, in modules that cannot be traced too, and
which weights are passed to functions.
"""

import re
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes

from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.assumed_inputs import assumed_inputs, first_that_runs
from sphereify.convert.input_values import filled
from sphereify.convert.model_inputs import tensors_in, unchanged
from sphereify.convert.provenance import End
from sphereify.convert.sites import Call
from sphereify.convert.watch import Watch, WatchBeneath
from sphereify.errors import first_line

NO_VALUES = "[Mm]eta tensor|data-dependent|DataDependent|Expected mat_[ab] to be"
"""Pattern of torch's errors where a forward asks for values on the meta device, or in a dtype that this device alone
refuses."""


@dataclass
class Observation:
    """Facts about a model that a forward pass in evaluation and one in training show."""

    order: list[str] = field(default_factory=list)
    """Modules, and weights of functional calls, in the order in which they are first called or passed."""
    in_evaluation: frozenset[str] = frozenset()
    """Those of them that a pass in evaluation shows."""
    calls: list[Call] = field(default_factory=list)
    """Functional calls with a learned weight."""
    fixed: list[Call] = field(default_factory=list)
    """Functional calls with a weight that is no parameter's: a buffer, or computed from activations."""
    attention: list[Call] = field(default_factory=list)
    """Projections that a forward hands to `F.multi_head_attention_forward`."""
    readers: dict[str, str] = field(default_factory=dict)
    """Parameter -> a function that is called with it."""
    output: tuple[int, ...] | None = None
    """Shape of the output in evaluation, if that is one tensor."""
    ends: list[End] = field(default_factory=list)
    """The different outputs in evaluation that end in sites."""
    training_ends: list[End] = field(default_factory=list)
    """The outputs in training, if that pass succeeded too, that end in other sites than those in evaluation."""
    outputs: int = 0
    """Number of tensors that the model returns in evaluation."""
    not_in_both: set[Call] = field(default_factory=set)
    """Calls that one of the two passes makes and the other does not, though it runs the owner."""
    direct: frozenset[str] = frozenset()
    """Weights whose products are outputs, with nothing in between; in training, if that pass succeeded."""
    causal: dict[str, str] = field(default_factory=dict)
    """Weights of convolutions that are causal -> the sign of it."""
    elements: dict[str, int] = field(default_factory=dict)
    """Weight -> elements of the inputs and outputs of its convolutions and linear maps in one pass."""
    multiplications: dict[str, int] = field(default_factory=dict)
    """Weight, or innermost module where none is known -> multiplications of a pass, in evaluation if that succeeded."""
    foreign: frozenset[str] = frozenset()
    """Weights whose product is scaled by a normalization along other channels than its filters."""
    by_values: bool = False
    """True if values decide what is called, so that another input may call what these inputs did not."""
    error: str = ""
    """Reason why no forward pass succeeded; empty if one did."""
    arguments: ModelArguments = field(default_factory=ModelArguments)
    """The arguments that the model ran with, or the first ones with which it did not."""
    in_want_of_values: list[ModelArguments] = field(default_factory=list)
    """Arguments with which it did not run on shapes alone, since its control flow asks for values."""


def observe_model(model: nn.Module, example_inputs: Inputs = None, *, on_shapes: bool = True) -> Observation:
    """Observe one forward pass of a model in evaluation and one in training.

    Args:
        model: the skeleton of a model. Its mode changes, nothing else.
        example_inputs: default: the first of the usual inputs with which it runs; see `assumed_inputs`.
        on_shapes: run on the meta device; otherwise with values, on the device of the parameters.
    """
    candidates = assumed_inputs(model) if example_inputs is None else [ModelArguments.of(example_inputs)]
    return observe_first(model, candidates, on_shapes)


def observe_first(model: nn.Module, candidates: list[ModelArguments], on_shapes: bool = True) -> Observation:
    """Observe a model with the first of some arguments with which it runs; see `observe_model`."""
    in_want: list[ModelArguments] = []

    def run(arguments: ModelArguments) -> tuple[dict[str, Observation], list[str]]:
        passes: dict[str, Observation] = {}
        errors = []
        for mode in ("evaluation", "training"):
            model.train(mode == "training")
            try:
                with unchanged(model), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    passes[mode] = _observe_pass(model, arguments, on_shapes)
            except Exception as error:  # a forward may raise anything; it may need values, or other inputs
                errors.append(first_line(error))
        if not passes and any(re.search(NO_VALUES, error) for error in errors):
            in_want.append(arguments)
        return passes, errors

    arguments, passes, errors = first_that_runs(candidates, run)
    if arguments is None:
        return Observation(error=errors[0], arguments=candidates[0], in_want_of_values=in_want)
    return replace(_merged(passes), arguments=arguments)


def _merged(passes: dict[str, Observation]) -> Observation:
    """The facts of the passes that succeeded, those of evaluation first."""
    evaluation, training = passes.get("evaluation"), passes.get("training")
    merged = replace(evaluation) if evaluation is not None else Observation()
    for name in ("order", "calls", "fixed", "attention"):
        setattr(merged, name, list(dict.fromkeys(x for one in passes.values() for x in getattr(one, name))))
    merged.readers = {parameter: reader for one in passes.values() for parameter, reader in one.readers.items()}
    merged.causal = {weight: sign for one in passes.values() for weight, sign in one.causal.items()}
    merged.foreign = frozenset().union(*(one.foreign for one in passes.values()))
    if training is not None:
        merged.direct = training.direct
    if training is not None and evaluation is None:
        merged.multiplications = training.multiplications
    if evaluation is not None and training is not None:
        merged.in_evaluation = frozenset(evaluation.order)
        ends = frozenset().union(*(end.weights for end in evaluation.ends))
        merged.training_ends = [end for end in training.ends if not end.weights <= ends]
        merged.not_in_both = _only_in(evaluation, training) | _only_in(training, evaluation)
    return merged


def _only_in(one: Observation, other: Observation) -> set[Call]:
    """Calls that the other pass does not make, though it runs their owner.

    A weight may be computed in training only, as DropConnect does it; its call would be angular in one mode.
    """
    return {call for call in one.calls if call not in other.calls and (call.owner in other.order or not call.owner)}


@torch.no_grad()
def _observe_pass(model: nn.Module, arguments: ModelArguments, on_shapes: bool) -> Observation:
    first = next(model.parameters(), None)
    device = torch.device("meta") if on_shapes or first is None else first.device
    placed = arguments.to(device) if device.type == "meta" else filled(arguments, model)
    parameters = {name: p.detach().to(device) for name, p in model.named_parameters()}
    buffers = {name: b.clone() if b.device == device else b.to(device) for name, b in model.named_buffers()}
    aliases, frozen = _names_of_parameters(model)
    watch = Watch(parameters, buffers, aliases, frozen)
    seen, provenance = watch.sightings, watch.provenance
    # On shapes alone, a size that depends on values is taken as large as it can be.
    largest = shapes.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    output = None
    provenance.note_inputs(placed)
    try:
        with torch.random.fork_rng(devices=[]), largest, watch.entering(model), WatchBeneath(watch), watch:
            output = torch.func.functional_call(model, {**parameters, **buffers}, placed.args, dict(placed.kwargs))
    except Exception:
        if not (on_shapes and _has_run_all_layers(model, seen.finished)):
            raise
        # Every layer has run: what failed is the reading of the results, boxes drawn from scores for one.
        provenance.cut = provenance.multiplied
    return Observation(
        order=seen.order,
        calls=seen.calls,
        fixed=seen.fixed,
        attention=seen.attention,
        readers=seen.readers,
        output=tuple(output.shape) if isinstance(output, Tensor) else None,
        ends=provenance.ends(output),
        outputs=sum(1 for _ in tensors_in(output)),
        direct=provenance.direct(output),
        causal=watch.causality.causal,
        elements=dict(seen.elements),
        multiplications=dict(seen.multiplications),
        foreign=frozenset(watch.channels.foreign),
    )


def _names_of_parameters(model: nn.Module) -> tuple[dict[str, list[str]], frozenset[str]]:
    """All names of each parameter by its first one, and the names of those that require no gradient."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases: dict[str, list[str]] = {}
    frozen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(first[id(parameter)], []).append(name)
        if not parameter.requires_grad:
            frozen.add(name)
    return aliases, frozenset(frozen)


def _has_run_all_layers(model: nn.Module, finished: set[str]) -> bool:
    """True if the forward of every module with parameters came to its end."""
    modules = ((n, m) for n, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule))
    layers = (n for n, m in modules if next(m.parameters(recurse=False), None) is not None)
    return all(name in finished for name in layers)
