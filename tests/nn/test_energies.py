"""Compressive energy, separation and Gram determinant against loops in float64, and what holds of them in theory."""

import itertools
import math

import pytest
import torch
from torch import nn

from sphereify.errors import UsageError
from sphereify.nn import HypersphericalEnergy
from sphereify.nn.energies import blocks
from tests.grids import grid
from tests.nn.energy_oracle import banks_by_hand, between, close, f, make_model, unit_rows
from tests.nn.oracle import normal
from tests.nn.test_regularizers import HARD, Memory, hard, mean_inverse_distance

DISTANCES = ("euclidean", "angular")
KINDS = {
    "compressive": {"s": 1, "dimensions": 4, "projections": 5},
    "compressive, angular": {"energy": "compressive", "s": 0, "distance": "angular", "dimensions": 3},
    "separation": {},
    "separation, angular": {"energy": "separation", "distance": "angular"},
    "determinant": {"gamma": 0.7},
}
CASES = [{"energy": name, **given} for name, given in KINDS.items()]
RIDGE = 1e-6


def simplex(count):
    """`count` unit vectors of which each two have the cosine -1 / (count - 1)."""
    return torch.eye(count, dtype=torch.float64) - 1 / count


# ----------------------------------------------------------------------------------------------- loops by the formulas


def slow_separation(filters, distance, half_space=False):
    rows = unit_rows(filters)
    apart = [between(u, v, distance) for u, v in itertools.combinations(rows, 2)]
    if half_space:
        apart += [between(u, [-x for x in v], distance) for u, v in itertools.combinations(rows, 2)]
    return -min(apart)


def slow_determinant(filters, gamma, half_space=False):
    """By Gaussian elimination of the kernel matrix."""
    rows = unit_rows(filters)

    def kernel(i, j):
        if i == j:
            return 1 + RIDGE
        cos = math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return math.cosh(2 * gamma * cos) / math.cosh(2 * gamma) if half_space else math.exp(-gamma * (2 - 2 * cos))

    matrix = [[kernel(i, j) for j in range(len(rows))] for i in range(len(rows))]
    total = 0.0
    for i, pivot in enumerate(matrix):
        total -= math.log(pivot[i])
        for row in matrix[i + 1 :]:
            row[:] = [a - row[i] / pivot[i] * b for a, b in zip(row, pivot, strict=True)]
    return total


def slow_compressive(filters, projections, s, distance, half_space=False):
    energies = []
    for p in projections.tolist():
        projected = [[math.fsum(x * r[k] for x, r in zip(w, p, strict=True)) for k in range(len(p[0]))] for w in
                     unit_rows(filters)]  # fmt: skip
        vectors = list(enumerate(unit_rows(torch.tensor(projected, dtype=torch.float64))))
        if half_space:
            vectors += [(i, [-x for x in u]) for i, u in vectors]
        pairs = [f(between(u, v, distance), s) for (_, u), (_, v) in itertools.combinations(vectors, 2)]
        energies.append(math.fsum(pairs) / len(pairs))
    return math.fsum(energies) / len(energies)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("sizes", [(2, 3), (5, 4), (9, 3)])
def test_separation_is_the_distance_of_the_closest_pair_of_a_loop(sizes, distance, half_space):
    filters = 5 * normal(*sizes)
    energy = HypersphericalEnergy(energy="separation", distance=distance, half_space=half_space)
    close(energy(filters), slow_separation(filters, distance, half_space))


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("gamma", [0.25, 1, 4.0])
def test_determinant_is_that_of_a_loop(gamma, half_space):
    filters = 5 * normal(6, 4)
    energy = HypersphericalEnergy(energy="determinant", gamma=gamma, half_space=half_space)
    close(energy(filters), slow_determinant(filters, gamma, half_space), 1e-9)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize(("s", "distance"), [(0, "euclidean"), (1, "angular"), (2, "euclidean")])
def test_compressive_energy_is_the_mean_over_the_projections_of_a_loop(s, distance, half_space):
    filters = normal(5, 8)
    energy = HypersphericalEnergy(s, distance, half_space, energy="compressive", dimensions=3, projections=4)
    torch.manual_seed(7)
    got = energy(filters)
    torch.manual_seed(7)
    projections = torch.randn(4, 8, 3, dtype=torch.float64)
    close(got, slow_compressive(filters, projections, s, distance, half_space))
    assert energy(filters) != got, "projections are drawn anew in each call"


def test_compressive_energy_without_dimensions_projects_to_30_and_narrow_layers_not_at_all():
    narrow, wide = normal(5, 30), normal(5, 31)
    energy = HypersphericalEnergy(2, energy="compressive")
    torch.testing.assert_close(energy(narrow), HypersphericalEnergy(2)(narrow), rtol=0, atol=0)
    torch.manual_seed(0)
    got = energy(wide)
    torch.manual_seed(0)
    expected = HypersphericalEnergy(2, energy="compressive", dimensions=30, projections=20)(wide)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("half_space", [False, True])
def test_of_a_model_is_the_weighted_sum_over_groups_and_layers_with_a_full_space_output(half_space):
    model = make_model()
    hidden, output = banks_by_hand(model)
    for energy, slow in [
        ("separation", lambda w, half: slow_separation(w, "euclidean", half)),
        ("determinant", lambda w, half: slow_determinant(w, 1.0, half)),
    ]:
        total = HypersphericalEnergy(1, "euclidean", half_space, 0.7, 10.0, energy=energy)
        layers = [sum(slow(bank, half_space) for bank in banks) / len(banks) for banks in hidden.values()]
        close(total(model), 0.7 * sum(layers) + 10 * slow(output, False), 1e-9)


# -------------------------------------------------------------------------------------------------------- exact values


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_a_simplex_and_an_orthonormal_frame_have_their_exact_values(count):
    for frame, cos in [(simplex(count), -1 / (count - 1)), (3 * torch.eye(count, dtype=torch.float64), 0.0)]:
        for distance, z in [("euclidean", math.sqrt(2 - 2 * cos)), ("angular", math.acos(cos))]:
            energy = HypersphericalEnergy(energy="separation", distance=distance)
            assert energy(frame).item() == pytest.approx(-z, abs=1e-12)
        for gamma in (0.5, 1, 3):
            a = math.exp(-2 * gamma * (1 - cos))  # det of (1 - a)·I + a·J
            expected = -(count - 1) * math.log(1 + RIDGE - a) - math.log(1 + RIDGE + (count - 1) * a)
            energy = HypersphericalEnergy(energy="determinant", gamma=gamma)
            assert energy(frame).item() == pytest.approx(expected, abs=1e-11)


def test_an_orthonormal_frame_in_half_space_has_its_exact_values():
    frame, a = torch.eye(4, dtype=torch.float64), 1 / math.cosh(2)
    expected = -3 * math.log(1 + RIDGE - a) - math.log(1 + RIDGE + 3 * a)
    assert HypersphericalEnergy(energy="determinant", half_space=True)(frame).item() == pytest.approx(expected)
    half = HypersphericalEnergy(energy="separation", distance="angular", half_space=True)
    assert half(torch.cat([frame[:2], -frame[2:]])).item() == pytest.approx(-math.pi / 2)
    assert half(torch.cat([frame, -frame[:1]])).item() == pytest.approx(0, abs=1e-12)


def test_the_projections_of_an_orthonormal_frame_are_independent_uniform_directions():
    energy = HypersphericalEnergy(energy="compressive", dimensions=16, projections=4000)
    torch.manual_seed(0)
    assert energy(torch.eye(20)).item() == pytest.approx(mean_inverse_distance(16), rel=1e-3)


@pytest.mark.parametrize("options", [{"energy": "separation"}, {"energy": "separation", "distance": "angular"},
                                     {"energy": "determinant"}, {"energy": "determinant", "gamma": 3}])  # fmt: skip
def test_no_layer_has_less_energy_than_the_simplex(options):
    energy = HypersphericalEnergy(**options)
    for seed in range(20):
        layer = nn.Linear(3, 4, bias=False).double()
        layer.weight.data = normal(4, 3, seed=seed)
        (row,) = energy.report(layer).layers
        assert row.energy > row.least
    layer.weight.data = torch.linalg.qr(simplex(4)).R[:3].T  # the simplex in three dimensions
    (row,) = energy.report(layer).layers
    assert row.energy == pytest.approx(row.least, abs=1e-9)
    layer = nn.Linear(3, 5)
    assert [row.least for row in energy.report(layer).layers] == [None]


def test_reports_say_which_energy_it_is():
    model = make_model()
    for options, text in [
        ({"energy": "separation"}, "separation, euclidean"),
        ({"energy": "determinant", "gamma": 0.5, "half_space": True}, "determinant, γ=0.5, half space"),
        ({"energy": "compressive", "s": 2}, "compressive, 20 × 30 dimensions, s=2, euclidean"),
    ]:
        energy = HypersphericalEnergy(**options)
        assert str(energy.report(model)).startswith(f"hyperspherical energy ({text})\n")
        assert repr(energy) == f"HypersphericalEnergy({text})"


# ----------------------------------------------------------------------------------------------- gradients and extremes


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("options", CASES, ids=KINDS)
def test_gradcheck(options, half_space):
    energy = HypersphericalEnergy(half_space=half_space, **options)

    def run(filters):
        torch.manual_seed(3)
        return energy(filters)

    assert torch.autograd.gradcheck(run, (normal(4, 5).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CASES, ids=KINDS)
@pytest.mark.parametrize("case", HARD)
def test_coinciding_opposite_and_vanishing_filters_are_finite_in_value_and_gradient(case, options, dtype):
    for half_space, scale in itertools.product((False, True), (1e-3, 1, 100)):
        filters = (scale * hard(case) / 3).to(dtype).requires_grad_()
        energy = HypersphericalEnergy(half_space=half_space, **options)(filters)
        energy.backward()
        assert energy.dtype == torch.promote_types(dtype, torch.float32)
        assert energy.isfinite(), half_space
        assert filters.grad.isfinite().all(), half_space
        assert (filters.grad[(filters == 0).all(1)] == 0).all()


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", CASES, ids=KINDS)
def test_autocast_changes_neither_value_nor_gradient(options, amp):
    energy, filters, results = HypersphericalEnergy(**options), normal(6, 9).float().requires_grad_(), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", amp, enabled=enabled):
            value = energy(filters)
        results.append((value, *torch.autograd.grad(value, filters)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_determinant_of_crowded_filters_in_fp32_has_the_digits_of_float64():
    filters = normal(40, 3).float()
    energy = HypersphericalEnergy(energy="determinant")
    assert energy(filters).dtype == torch.float32
    assert energy(filters).item() == pytest.approx(slow_determinant(filters, 1.0), rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_separation_of_near_duplicates_in_fp32_has_all_its_digits(distance):
    filters = torch.tensor([[1.0, 0.0], [1.0, 1e-5], [0.0, 1.0]], requires_grad=True)
    energy = HypersphericalEnergy(energy="separation", distance=distance)(filters)
    assert energy.item() == pytest.approx(-1e-5, rel=1e-6)
    energy.backward()
    torch.testing.assert_close(filters.grad, torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0]]), rtol=1e-4, atol=1e-4)


def test_a_vanishing_filter_is_at_a_right_angle_to_all():
    filters = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert HypersphericalEnergy(energy="separation")(filters).item() == pytest.approx(-math.sqrt(2))
    angular = HypersphericalEnergy(energy="separation", distance="angular")
    assert angular(filters).item() == pytest.approx(-math.pi / 2)


# ----------------------------------------------------------------------------------------------- invariance and descent


@pytest.mark.parametrize("options", CASES, ids=KINDS)
def test_rotation_length_and_order_change_nothing(options):
    energy, filters = HypersphericalEnergy(**options), normal(5, 6)
    turn = torch.linalg.qr(normal(6, 6, seed=3)).Q
    lengths = torch.tensor([[0.1], [1.0], [7.0], [2.0], [30.0]], dtype=torch.float64)

    def of(filters, projections=2000):
        if "compressive" not in options["energy"]:
            return energy(filters).item()
        torch.manual_seed(1)
        many = HypersphericalEnergy(**{**options, "s": 0, "projections": projections})
        return many(filters).item()

    base = of(filters)
    assert of(filters * lengths) == pytest.approx(base, rel=1e-9)
    assert of(filters[[3, 1, 4, 0, 2]]) == pytest.approx(base, rel=1e-9)
    # A rotation turns the projections, which leaves their distribution as it is.
    assert of(filters @ turn) == pytest.approx(base, rel=1e-9, abs=0.02 * ("compressive" in options["energy"]))


@pytest.mark.parametrize("options", CASES[2:], ids=list(KINDS)[2:])
def test_energy_falls_as_a_filter_turns_away_from_another(options):
    energy = HypersphericalEnergy(**options)
    values = []
    for angle in torch.linspace(0.05, math.pi, 15):
        filters = torch.tensor([[1.0, 0, 0], [math.cos(angle), math.sin(angle), 0]], dtype=torch.float64)
        values.append(energy(filters).item())
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("options", CASES, ids=KINDS)
def test_descent_spreads_the_filters(options):
    torch.manual_seed(0)
    filters = (torch.ones(4, 6) + 0.1 * torch.randn(4, 6)).requires_grad_()
    energy, closest = HypersphericalEnergy(**options), HypersphericalEnergy(energy="separation", distance="angular")
    before, optimizer = closest(filters).item(), torch.optim.Adam([filters], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        energy(filters).backward()
        optimizer.step()
    assert before > -0.3, "radians"
    assert closest(filters).item() < -1.2


# ----------------------------------------------------------------------------------------------------------- its memory


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("room", grid([1, 30, 120], lambda room: room != 30))
@pytest.mark.parametrize("options", CASES[:4], ids=list(KINDS)[:4])
def test_in_chunks_value_and_gradient_are_the_same(monkeypatch, options, room, half_space):
    energy, filters, results = HypersphericalEnergy(half_space=half_space, **options), normal(7, 5), []
    for size in (blocks.ROOM, room):
        monkeypatch.setattr(blocks, "ROOM", size)
        torch.manual_seed(0)
        leaf = torch.stack([filters, filters.flip(1)]).requires_grad_()
        value = energy.measure(leaf, half_space)
        results.append((value, *torch.autograd.grad((value * torch.tensor([1.0, 2.0])).sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_the_determinant_of_many_filters_is_summed_over_random_parts(monkeypatch):
    monkeypatch.setattr(blocks, "ROOM", 9)  # three filters at a time
    energy, filters = HypersphericalEnergy(energy="determinant"), normal(7, 5).requires_grad_()
    torch.manual_seed(4)
    got = energy(filters)
    torch.manual_seed(4)
    parts = torch.randperm(7).tensor_split(3)
    close(got, sum(slow_determinant(filters[part], 1.0) for part in parts), 1e-9)
    (gradient,) = torch.autograd.grad(got, filters)
    monkeypatch.undo()
    (expected,) = torch.autograd.grad(sum(energy(filters[part]) for part in parts), filters)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(case, id=kind, marks=[pytest.mark.exhaustive] if case.get("distance") == "angular" else [])
        for kind, case in zip(KINDS, CASES, strict=True)
    ],
)
def test_many_filters_need_bounded_memory_forward_and_backward(monkeypatch, options):
    monkeypatch.setattr(blocks, "ROOM", 1 << 12)
    count = 300
    filters = normal(count, 8, dtype=torch.float32).requires_grad_()
    with Memory() as memory:
        HypersphericalEnergy(**options)(filters).backward()
    assert filters.grad.isfinite().all()
    assert memory.largest <= blocks.ROOM < count**2
    assert memory.peak < 4 * count**2, "less than one matrix of all pairs in fp32"


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"energy": "entropy"}, "energy: got 'entropy', expected one of mhe, compressive, separation, determinant"),
        (
            {"energy": "separation", "s": 2},
            "s: has no effect on energy='separation'; it belongs to mhe and compr",
        ),
        ({"energy": "determinant", "distance": "angular"}, "distance: has no effect on energy='determinant'"),
        ({"dimensions": 20}, "dimensions: has no effect on energy='mhe'; it belongs to compressive"),
        ({"energy": "compressive", "gamma": 2}, "gamma: has no effect on energy='compressive'; it belongs to determ"),
        ({"energy": "compressive", "dimensions": 1}, "dimensions: got 1, expected a number of at least 2. Usual: 20"),
        ({"energy": "compressive", "dimensions": 2.5}, "dimensions: got 2.5, expected a whole number"),
        ({"energy": "compressive", "projections": 0}, "projections: got 0, expected a number of at least 1. Usual: 5"),
        ({"energy": "determinant", "gamma": 0}, "gamma: got 0, expected a number above 0. Usual: 0.5 to 4"),
        ({"energy": "determinant", "gamma": math.inf}, "gamma: got inf, expected a number above 0"),
    ],
)
def test_wrong_argument_is_refused(given, text):
    with pytest.raises(UsageError, match=text):
        HypersphericalEnergy(**given)


@pytest.mark.parametrize("energy", ["separation", "determinant"])
def test_one_filter_is_refused(energy):
    with pytest.raises(UsageError, match=f"energy='{energy}': got 1 filter, expected two or more"):
        HypersphericalEnergy(energy=energy)(torch.ones(1, 3))
    with pytest.raises(UsageError, match="Linear: there is no layer with two or more filters"):
        HypersphericalEnergy(energy=energy)(nn.Linear(4, 1))


def test_projections_wider_than_the_filters_are_refused_with_the_layer():
    energy = HypersphericalEnergy(energy="compressive", dimensions=9)
    with pytest.raises(UsageError, match=r"^dimensions=9: a projection cannot be wider .* have 8 inputs. Take at most"):
        energy(normal(3, 8))
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 3))
    with pytest.raises(UsageError, match=r"^1: dimensions=9: a projection cannot be wider than its filters"):
        energy(model)
    HypersphericalEnergy(energy="compressive", dimensions=9, exclude="1")(model)
    HypersphericalEnergy(energy="compressive", dimensions=9, output_weight=0)(model)
