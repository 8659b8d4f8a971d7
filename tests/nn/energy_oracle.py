"""Slow answers for energies and penalties: loops over pairs of filters in plain Python, and a model to take them of."""

import itertools
import math

import torch
from torch import nn

from sphereify.nn import AngularHead, SphereConv1d, SphereLinear


def f(z, s):
    return -math.log(z) if s == 0 else z**-s


def between(u, v, distance):
    chord = math.dist(u, v)
    # By the half angle, which is exact for opposites, where arccos of a rounded product is not.
    return chord if distance == "euclidean" else 2 * math.atan2(chord, math.dist(u, [-x for x in v]))


def unit_rows(filters):
    rows = filters.detach().double().flatten(1).tolist()
    return [[x / math.hypot(*row) for x in row] for row in rows]


def slow_energy(filters, s, distance="euclidean", half_space=False, self_pairs=True):
    """The mean over all unordered pairs of the N unit vectors, or in half-space of the 2N vectors ±w, one by one."""
    vectors = list(enumerate(unit_rows(filters)))
    if half_space:
        vectors += [(i, [-x for x in u]) for i, u in vectors]
        assert len(list(itertools.combinations(vectors, 2))) == len(filters) * (2 * len(filters) - 1)
    pairs = [(u, v) for (i, u), (j, v) in itertools.combinations(vectors, 2) if self_pairs or i != j]
    return math.fsum(f(between(u, v, distance), s) for u, v in pairs) / len(pairs)


def slow_penalty(filters, normalize):
    """Σ_ij (w_i·w_j - δ_ij)²"""
    rows = unit_rows(filters) if normalize else filters.detach().double().flatten(1).tolist()
    gram = [[math.fsum(a * b for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]
    return math.fsum((gram[i][j] - (i == j)) ** 2 for i in range(len(rows)) for j in range(len(rows)))


def close(got, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance, atol=tolerance)


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "depthwise": nn.Conv2d(6, 6, 3, groups=6),
            "up": nn.ConvTranspose2d(6, 4, 2, groups=2),
            "depthwise_up": nn.ConvTranspose1d(3, 3, 2, groups=3),
            "norm": nn.BatchNorm2d(4),
            "sphere": SphereConv1d(3, 4, 2, operator="learnable-sigmoid", rescale=True),
            "volume": nn.Conv3d(2, 3, 2),
            "linear": SphereLinear(5, 4),
            "single": nn.Linear(4, 1),
            "head": AngularHead(4, 3),
        }
    ).double()


def banks_by_hand(model):
    """The hidden layers' banks, and the output's."""
    up = model["up"].weight  # (6 in, 4 / 2 out, 2, 2): three inputs of a group meet two filters, one an output channel
    hidden = {
        "conv": [model["conv"].weight[:3], model["conv"].weight[3:]],
        "up": [torch.stack([up[:3, o] for o in range(2)]), torch.stack([up[3:, o] for o in range(2)])],
        "sphere": [model["sphere"].weight],
        "volume": [model["volume"].weight],
        "linear": [model["linear"].weight],
    }
    return hidden, model["head"].weight
