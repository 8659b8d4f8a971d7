"""Slow answers for the losses, by their definitions: one sample and one class at a time, float64, no ε."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sphereify.choices import MARGIN_HEADS, OPERATORS
from sphereify.nn import AngularHead
from tests.nn import oracle
from tests.nn.oracle import normal

PAPER_KINDS = ("w-softmax", "ga-softmax", "a-softmax", "s-softmax")
"""The kinds of NIPS 2017, whose margin is a multiple of the angle. Those of faces have tests of their own."""
HEADS = [(kind, name) for kind in PAPER_KINDS for name in (["cosine"] if kind == "a-softmax" else OPERATORS)]
"""Each of them with every operator that it takes."""
MARGINS = [(kind, name) for kind, name in HEADS if kind in MARGIN_HEADS]


def build(kind: str, operator: str, *, dtype: torch.dtype = torch.float64, sizes=(6, 4), **given) -> AngularHead:
    """A head whose parameters are as `normal` numbers, k different in each class."""
    head = AngularHead(*sizes, kind=kind, operator=operator, dtype=torch.float64, **given)
    for seed, (name, parameter) in enumerate(head.named_parameters(), start=1):
        parameter.data = normal(*parameter.shape, seed=seed)
        if name == "operator.p":  # away from the kink of |p|
            parameter.data = parameter.data.abs() + 0.1
    return head.to(dtype)


def at_angles(weight: Tensor, targets: Sequence[int], theta: Sequence[float], length: float = 3.0) -> Tensor:
    """Features (B, in) of a length, at given angles from the weights of their targets."""
    w = torch.nn.functional.normalize(weight.detach().double()[list(targets)], dim=1)
    aside = normal(*w.shape, seed=17)
    aside = torch.nn.functional.normalize(aside - (aside * w).sum(1, keepdim=True) * w, dim=1)
    theta = torch.tensor(theta, dtype=torch.float64)[:, None]
    return length * (theta.cos() * w + theta.sin() * aside)


def psi(name: str, theta: float, margin: float, k: float = 0.3) -> float:
    turns = math.floor(margin * theta / math.pi)
    return oracle.g(name, margin * theta - turns * math.pi, k) - 2 * turns


def k_of(head: AngularHead) -> list[float]:
    if head.operator.name == "learnable-sigmoid":
        return (head.operator.p.detach().double().abs() + 0.05).tolist()
    return [0.3] * head.num_classes


def scores(head: AngularHead, x: Tensor, targets: Sequence[int] | None = None, annealing: float = 0) -> list:
    """The logits of each sample; with targets those of training, where a margin head treats the target differently."""
    weight, ks, name = head.weight.detach().double().tolist(), k_of(head), head.operator.name
    bias = [0.0] * len(weight) if head.bias is None else head.bias.detach().double().tolist()
    rows = []
    for i, feature in enumerate(x.detach().double().tolist()):
        length = head.scale if head.kind == "s-softmax" else math.sqrt(sum(a * a for a in feature))
        row = []
        for j, w in enumerate(weight):
            theta = oracle.angle(feature, w, 0)
            score = oracle.g(name, theta, ks[j])
            if head.kind in MARGIN_HEADS and targets is not None and targets[i] == j:
                score = (annealing * score + psi(name, theta, head.margin, ks[j])) / (1 + annealing)
            row.append(length * score + bias[j])
        rows.append(row)
    return rows


def cross_entropy(row: Sequence[float], target: int, smoothing: float, weight: Sequence[float]) -> float:
    total = max(row) + math.log(sum(math.exp(z - max(row)) for z in row))
    spread = sum(w * (total - z) for w, z in zip(weight, row, strict=True)) / len(row)
    return (1 - smoothing) * weight[target] * (total - row[target]) + smoothing * spread


def separation(weight: Tensor, s: float) -> list[float]:
    """For each class the mean of f(‖ŵ_i - ŵ_j‖) over the others."""
    unit = [[a / math.sqrt(sum(b * b for b in w)) for a in w] for w in weight.detach().double().tolist()]
    energies = []
    for i, a in enumerate(unit):
        distances = [math.dist(a, b) for j, b in enumerate(unit) if j != i]
        energies.append(sum(-math.log(z) if s == 0 else z**-s for z in distances) / len(distances))
    return energies


def angular_loss(
    head: AngularHead,
    x: Tensor,
    targets: Tensor,
    *,
    annealing: float = 0,
    label_smoothing: float = 0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    apart: float = 0,
    s: float = 1,
) -> Tensor:
    """The loss of a batch."""
    weight = [1.0] * head.num_classes if class_weight is None else class_weight.double().tolist()
    labels = targets.tolist()
    energy = separation(head.weight, s) if apart else [0.0] * head.num_classes
    losses = []
    for row, y in zip(scores(head, x, labels, annealing), labels, strict=True):
        own = (
            0.0 if y == ignore_index else cross_entropy(row, y, label_smoothing, weight) + apart * weight[y] * energy[y]
        )
        losses.append(own)
    if reduction == "none":
        return torch.tensor(losses, dtype=torch.float64)
    total = sum(weight[y] for y in labels if y != ignore_index) if reduction == "mean" else 1.0
    return torch.tensor(sum(losses) / total, dtype=torch.float64)
