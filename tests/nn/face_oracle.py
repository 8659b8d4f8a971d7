"""Slow answers for the heads of face recognition, by their papers: one sample and one class at a time, in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sphereify.nn import AngularHead
from tests.nn import oracle
from tests.nn.loss_oracle import cross_entropy, k_of

SOFTMAX = ("arcface", "cosface")
KINDS = (*SOFTMAX, "sphereface2")
MARGINS = {"arcface": [0.0, 0.1, 0.5, 1.2], "cosface": [0.0, 0.2, 0.35, 1.0], "sphereface2": [0.0, 0.2, 0.4, 1.0]}


def angles(head: AngularHead, x: Tensor) -> list[list[float]]:
    weight = head.weight.detach().double().tolist()
    return [[oracle.angle(feature, w, 0) for w in weight] for feature in x.detach().double().tolist()]


def shifts(head: AngularHead) -> list[float]:
    bias = [0.0] * head.num_classes if head.bias is None else head.bias.detach().double().tolist()
    common = head.common_bias.item() if head.kind == "sphereface2" else 0.0
    return [b + common for b in bias]


def similarity(g: float, power: float) -> float:
    return 2 * ((g + 1) / 2) ** power - 1


def plain(head: AngularHead, x: Tensor) -> list[list[float]]:
    """s·g(θ_j), of sphereface2 r·G(g(θ_j)) + b; plus the bias."""
    name, ks, rows = head.operator.name, k_of(head), []
    for row in angles(head, x):
        g = [oracle.g(name, theta, k) for theta, k in zip(row, ks, strict=True)]
        if head.kind == "sphereface2":
            g = [similarity(value, head.similarity_power) for value in g]
        rows.append([head.scale * value + shift for value, shift in zip(g, shifts(head), strict=True)])
    return rows


def with_margin(head: AngularHead, x: Tensor, targets: Sequence[int], annealing: float = 0) -> list[list[float]]:
    """The logits of the softmax in training: s·cos(θ_y + m) of ArcFace (eq. 3), s·(cos θ_y - m) of CosFace (eq. 4)."""
    name, ks, rows = head.operator.name, k_of(head), plain(head, x)
    for row, theta, y in zip(rows, angles(head, x), targets, strict=True):
        g = oracle.g(name, theta[y], ks[y])
        if head.kind == "cosface":
            target = g - head.margin
        else:
            beyond = theta[y] + head.margin > math.pi
            target = oracle.g(name, theta[y] + head.margin - beyond * math.pi, ks[y]) - 2 * beyond
        row[y] = head.scale * (annealing * g + target) / (1 + annealing) + shifts(head)[y]
    return rows


def binary(head: AngularHead, row: Sequence[float], y: int, margin: float) -> float:
    """λ/r·log(1 + exp(-(r·(G - m) + b))) of the target, (1 - λ)/r·Σ log(1 + exp(r·(G + m) + b)) of the others."""
    r, share = head.scale, head.positive_weight
    positive = share / r * math.log1p(math.exp(-(row[y] - r * margin)))
    negatives = [math.log1p(math.exp(z + r * margin)) for j, z in enumerate(row) if j != y]
    return positive + (1 - share) / r * math.fsum(negatives)


def face_loss(
    head: AngularHead,
    x: Tensor,
    targets: Tensor,
    *,
    annealing: float = 0,
    label_smoothing: float = 0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    has_margin: bool = True,
) -> Tensor:
    """The loss of a batch."""
    weight = [1.0] * head.num_classes if class_weight is None else class_weight.double().tolist()
    losses, total = [], 0.0
    for i, y in enumerate(targets.tolist()):
        if y == ignore_index:
            losses.append(0.0)
            continue
        total += weight[y]
        if head.kind != "sphereface2":
            (row,) = with_margin(head, x[i : i + 1], [y], annealing) if has_margin else plain(head, x[i : i + 1])
            losses.append(cross_entropy(row, y, label_smoothing, weight))
            continue
        (row,) = plain(head, x[i : i + 1])
        margin = head.margin / (1 + annealing) if has_margin else 0.0
        # With smoothing, the mean of the losses of all classes, each as likely.
        each = [w * binary(head, row, j, margin) for j, w in enumerate(weight)]
        losses.append((1 - label_smoothing) * each[y] + label_smoothing * sum(each) / len(each))
    if reduction == "none":
        return torch.tensor(losses, dtype=torch.float64)
    return torch.tensor(sum(losses) / (total if reduction == "mean" else 1), dtype=torch.float64)
