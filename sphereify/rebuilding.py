"""Finding a builder of timm, of torchvision or by name that gives a converted network again, and proving that it does.

The proof builds, converts and folds the network once more. It is kept on the model, so that saving the same network
after each epoch costs no more than a look at its layers.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sphereify.annotations import CALIBRATED, LOADED_FINGERPRINT, PREPARATION, PRETRAINED_BASE, REBUILDING_PROOF
from sphereify.convert.plan import ConversionPlan
from sphereify.convert.rewrite import apply_plan
from sphereify.convert.sites import class_name
from sphereify.deployment.folding import Folding, apply_folding
from sphereify.sources import Source, build_model, recognise

Description = list[tuple[Any, ...]]
"""The shape of each tensor, and the class and the settings of each module: all of a network but its values."""


@dataclass(frozen=True)
class Proof:
    """The outcome of a search for a source, with all that it depended on."""

    candidates: list[Source]
    plan: ConversionPlan
    folding: Folding | None
    description: Description
    source: Source | None = None


def proven_source(model: nn.Module, plan: ConversionPlan, folding: Folding | None) -> Source | None:
    """The source that gives the same network when it is built, converted by the plan and folded; None if none does.

    Args:
        model: a converted network. It carries the answer from now on, also in copies of it, until one of its modules,
            settings or shapes, its plan or its folding changes.
        plan: the plan that it was converted by.
        folding: how it was folded, if it was.
    """
    question = Proof(recognise(model), plan, folding, _describe(model))
    answer = REBUILDING_PROOF.of(model)
    if answer is None or question != _without_source(answer):
        source = next((s for s in question.candidates if _rebuilds(s, plan, folding, question.description)), None)
        answer = Proof(question.candidates, plan, folding, question.description, source)
        REBUILDING_PROOF.write(model, answer)
    return answer.source


def _without_source(proof: Proof) -> Proof:
    return Proof(proof.candidates, proof.plan, proof.folding, proof.description)


def _rebuilds(source: Source, plan: ConversionPlan, folding: Folding | None, description: Description) -> bool:
    for device in ("meta", "cpu"):  # some builders cannot work without real tensors
        try:
            with torch.device(device), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                model = apply_plan(build_model(source), plan, inplace=True)
                rebuilt = _describe(apply_folding(model, folding) if folding else model)
                return len(rebuilt) == len(description) and all(map(_same, rebuilt, description))
        except Exception:  # a builder may refuse these arguments in its own way
            continue
    return False


def _describe(model: nn.Module) -> Description:
    described: Description = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    for name, module in model.named_modules():
        settings = {
            key: copy.deepcopy(value)  # a list may change later
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _NO_SETTING and _is_plain(value)
        }
        described.append((name, class_name(module), module.extra_repr(), settings))
    return described


def _same(rebuilt: tuple[Any, ...], original: tuple[Any, ...]) -> bool:
    """Equality, where a list may stand for a None: a forward pass has filled it in, such as the scales of a pyramid."""
    if not isinstance(rebuilt[-1], dict) or not isinstance(original[-1], dict):
        return rebuilt == original
    filled = {k for k, v in rebuilt[-1].items() if v is None and isinstance(original[-1].get(k, []), (list, tuple))}
    settings = [{k: v for k, v in side[-1].items() if k not in filled} for side in (rebuilt, original)]
    return rebuilt[:-1] == original[:-1] and settings[0] == settings[1]


_NO_SETTING = {
    "training",
    "training_logits",
    "grad_checkpointing",
    "output_read_only",
    *(annotation.attribute for annotation in (CALIBRATED, PRETRAINED_BASE, LOADED_FINGERPRINT, PREPARATION)),
}
"""Attributes that change without making another network."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
