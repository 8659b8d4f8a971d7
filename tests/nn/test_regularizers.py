"""Hyperspherical energy and orthogonality, held against loops over pairs in plain Python and the known optima."""

import itertools
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sphereify.errors import UsageError
from sphereify.nn import HypersphericalEnergy, OrthogonalityPenalty
from sphereify.nn.energies import blocks
from sphereify.nn.energies.pairs import pair_energy
from sphereify.nn.filters import filter_banks
from tests.grids import grid
from tests.nn.energy_oracle import banks_by_hand, between, close, f, make_model, slow_energy, slow_penalty, unit_rows
from tests.nn.oracle import normal

DISTANCES = ("euclidean", "angular")
EXPONENTS = (0, 0.5, 1, 2, 3.3)
# distance, half_space, self_pairs
MEASURES = [(d, h, p) for d in DISTANCES for h in (False, True) for p in (True, False)]
SPACES = [(d, h) for d in DISTANCES for h in (False, True)]


# --------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize(("distance", "half_space", "self_pairs"), MEASURES)
@pytest.mark.parametrize("s", EXPONENTS)
def test_energy_of_a_tensor_is_the_mean_over_the_pairs_of_a_loop(s, distance, half_space, self_pairs):
    energy = HypersphericalEnergy(s, distance, half_space, self_pairs=self_pairs)
    for filters in (normal(7, 5), normal(4, 2, 3, 3, seed=1), normal(2, 3, seed=2), normal(5, 2, seed=3)):
        close(energy(filters), slow_energy(filters, s, distance, half_space, self_pairs))


@pytest.mark.parametrize(("distance", "half_space"), SPACES)
@pytest.mark.parametrize("s", [0, 1, 2])
def test_energy_of_chosen_rows_is_their_mean_over_all_others(s, distance, half_space):
    filters, rows = normal(2, 6, 4), torch.tensor([4, 0, 4])
    got = pair_energy(filters, s, distance, half_space, rows=rows)
    for group, row in itertools.product(range(2), range(3)):
        units, own = unit_rows(filters[group]), rows[row].item()
        signs = (1, -1) if half_space else (1,)
        others = [[sign * x for x in u] for i, u in enumerate(units) if i != own for sign in signs]
        close(got[group, row], math.fsum(f(between(units[own], v, distance), s) for v in others) / 5)


@pytest.mark.parametrize(("distance", "half_space", "self_pairs"), MEASURES)
@pytest.mark.parametrize("s", [0, 1])
def test_total_is_the_weighted_sum_of_the_layers_with_groups_apart_and_a_full_space_output(
    s, distance, half_space, self_pairs
):
    model = make_model()
    banks, output = banks_by_hand(model)
    each = [[slow_energy(b, s, distance, half_space, self_pairs) for b in groups] for groups in banks.values()]
    hidden = sum(math.fsum(groups) / len(groups) for groups in each)
    energy = HypersphericalEnergy(s, distance, half_space, 0.7, 10.0, self_pairs=self_pairs)
    close(energy(model), 0.7 * hidden + 10 * slow_energy(output, s, distance))


def test_weight_of_zero_leaves_a_part_out():
    model = make_model()
    hidden, output = HypersphericalEnergy(1, output_weight=0)(model), HypersphericalEnergy(1, hidden_weight=0)(model)
    close(output, slow_energy(model["head"].weight, 1))
    close(hidden + output, HypersphericalEnergy(1)(model).item())
    nothing = HypersphericalEnergy(1, hidden_weight=0, output_weight=0)(model)
    assert (nothing.item(), nothing.shape, nothing.dtype) == (0.0, (), torch.float64)


# --------------------------------------------------------------------------------------------------------- known values

# s = 0, 1, 2
GOLDEN = {
    ("orthonormal frame", "euclidean"): (-0.3465735903, 0.7071067812, 0.5),
    ("orthonormal frame", "angular"): (-0.4515827053, 0.6366197724, 0.4052847346),
    ("antipodal pair", "euclidean"): (-math.log(2), 1 / 2, 1 / 4),
    ("antipodal pair", "angular"): (-math.log(math.pi), 1 / math.pi, 1 / math.pi**2),
}


@pytest.mark.parametrize("s", [0, 1, 2])
@pytest.mark.parametrize(("name", "distance"), GOLDEN)
def test_golden_values(name, distance, s):
    frame = torch.linalg.qr(normal(5, 5)).Q
    filters = frame[:4] if name == "orthonormal frame" else torch.stack([3 * frame[0], -frame[0]])
    tolerance = 1e-10 if name == "orthonormal frame" else 1e-8  # next to -1, arccos has half the digits of its argument
    assert HypersphericalEnergy(s, distance)(filters).item() == pytest.approx(GOLDEN[name, distance][s], abs=tolerance)


@pytest.mark.parametrize("half_space", [False, True])
def test_one_filter_has_no_energy_but_that_of_its_own_opposite(half_space):
    assert HypersphericalEnergy(half_space=half_space, self_pairs=False)(normal(1, 3)).item() == 0
    assert HypersphericalEnergy(half_space=half_space)(normal(1, 3)).item() == (0.5 if half_space else 0)


def test_no_filters_have_no_energy():
    assert HypersphericalEnergy()(torch.zeros(0, 3)).item() == 0


# ----------------------------------------------------------------------------------------------------- finite gradients


@pytest.mark.parametrize(("distance", "half_space"), SPACES)
@pytest.mark.parametrize("s", EXPONENTS)
def test_gradcheck(s, distance, half_space):
    energy = HypersphericalEnergy(s, distance, half_space)
    assert torch.autograd.gradcheck(energy, (normal(4, 3).requires_grad_(),))


def test_gradcheck_of_a_model_by_every_filter():
    model = make_model()
    names = ["conv.weight", "up.weight", "sphere.weight", "volume.weight", "linear.weight", "head.weight"]

    def run(*weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (energy,))

    energy = HypersphericalEnergy(1, half_space=True, output_weight=10)
    model.forward = lambda energy: energy(model)
    leaves = tuple(model.get_parameter(name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def hard(case):
    """Four filters of length about 3, of which some coincide, oppose each other or vanish."""
    filters, direction = normal(4, 9), normal(9, seed=1)
    match case.split():
        case "duplicates", gap:
            filters[1] = filters[0] + float(gap) * direction
        case "opposites", gap:
            filters[1] = -filters[0] + float(gap) * direction
        case ["zeros"]:
            filters[1] = filters[2] = 0
        case ["nothing"]:
            filters[:] = 0
        case ["the", "same"]:
            filters[:] = filters[0]
    return filters


HARD = [
    *("duplicates 0", "duplicates 1e-7", "duplicates 1e-3", "opposites 0", "opposites 1e-7", "opposites 1e-3"),
    *("zeros", "nothing", "the same"),
]


@pytest.mark.parametrize("scale", grid([1e-3, 1, 100], lambda scale: scale == 1))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HARD)
def test_coinciding_opposite_and_vanishing_filters_are_finite_in_value_and_gradient(case, dtype, scale):
    for s, (distance, half_space) in itertools.product(EXPONENTS, SPACES):
        filters = (scale * hard(case) / 3).to(dtype).requires_grad_()
        energy = HypersphericalEnergy(s, distance, half_space)(filters)
        energy.backward()
        assert energy.dtype == torch.promote_types(dtype, torch.float32)
        assert energy.isfinite(), (s, distance, half_space)
        assert filters.grad.isfinite().all(), (s, distance, half_space)
        assert (filters.grad[(filters == 0).all(1)] == 0).all(), "a zero filter has no direction to be pushed in"


@pytest.mark.parametrize("s", [0, 1, 2])
@pytest.mark.parametrize("case", HARD)
def test_fp16_filters_are_finite_in_value_and_gradient(case, s):
    for (distance, half_space), scale in itertools.product(SPACES, (1, 100)):
        filters = (scale * hard(case) / 3).half().requires_grad_()
        energy = HypersphericalEnergy(s, distance, half_space)(filters)
        energy.backward()
        assert energy.isfinite(), (distance, half_space)
        assert filters.grad.isfinite().all(), (distance, half_space, scale)


@pytest.mark.parametrize("room", [blocks.ROOM, 10])
@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regularizer", [HypersphericalEnergy(2, "angular", True), OrthogonalityPenalty()])
def test_autocast_changes_neither_value_nor_gradient(monkeypatch, regularizer, amp, room):
    monkeypatch.setattr(blocks, "ROOM", room)
    model, filters = make_model().float(), hard("duplicates 1e-3").float()
    for subject, leaf in ((model, model["linear"].weight), (filters, filters.requires_grad_())):
        expected = regularizer(subject)
        with torch.autocast("cpu", amp):
            got = regularizer(subject)
        assert got.dtype == torch.float32
        gradients = [torch.autograd.grad(value, leaf)[0] for value in (got, expected)]
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e15, 1e30])
def test_length_of_a_filter_has_no_influence_however_small_or_large(scale):
    filters = normal(5, 6).float()
    scaled = (scale * filters).requires_grad_()
    for s, (distance, half_space) in itertools.product((0, 1, 2), SPACES):
        energy = HypersphericalEnergy(s, distance, half_space)
        got = energy(scaled)
        torch.testing.assert_close(got, energy(filters), rtol=1e-4, atol=1e-5)
        assert torch.autograd.grad(got, scaled)[0].isfinite().all()


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["duplicates", "opposites in half-space"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("s", [0, 1, 2])
def test_near_duplicates_are_pushed_apart_by_a_step_of_sgd(s, distance, kind, gap):
    half_space = kind != "duplicates"
    sign = -1 if half_space else 1
    first = normal(8).float()
    filters = torch.stack([first, sign * (first + gap * normal(8, seed=1).float())]).requires_grad_()

    def distance_now():
        u, v = unit_rows(filters)
        return math.dist(u, [sign * x for x in v])

    before = distance_now()
    HypersphericalEnergy(s, distance, half_space)(filters).backward()
    assert filters.grad.norm() > 0
    torch.optim.SGD([filters], lr=0.1 * gap / filters.grad.norm().item()).step()
    # To first order the step moves each filter by a fifteenth of the gap, straight away from the other.
    assert distance_now() > before + 0.01 * gap


# ----------------------------------------------------------------------------------------------------------- invariance


@st.composite
def problems(draw):
    """Filters of which no two nearly coincide or oppose, where float64 would not tell 1e-8; and any energy."""
    count, fan_in, seed = draw(st.integers(2, 6)), draw(st.integers(2, 5)), draw(st.integers(0, 2**31))
    measure = draw(st.sampled_from(EXPONENTS)), draw(st.sampled_from(DISTANCES)), draw(st.booleans())
    filters = normal(count, fan_in, seed=seed)
    unit = F.normalize(filters)
    assume((unit @ unit.mT).triu(1).abs().max() < 1 - 1e-4)
    return filters, HypersphericalEnergy(*measure)


@given(problems(), st.integers(0, 1000))
def test_rotation_of_all_filters_changes_nothing(problem, seed):
    filters, energy = problem
    rotation = torch.linalg.qr(normal(filters.shape[1], filters.shape[1], seed=seed)).Q
    close(energy(filters @ rotation), energy(filters).item(), 1e-8)


@given(problems(), st.lists(st.floats(1e-6, 1e6), min_size=6, max_size=6))
def test_positive_scaling_of_each_filter_changes_nothing(problem, lengths):
    filters, energy = problem
    close(energy(filters * torch.tensor(lengths).double()[: len(filters), None]), energy(filters).item(), 1e-8)


@given(problems(), st.permutations(range(6)))
def test_order_of_the_filters_changes_nothing(problem, order):
    filters, energy = problem
    close(energy(filters[[i for i in order if i < len(filters)]]), energy(filters).item(), 1e-8)


@given(problems(), st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6))
def test_signs_change_nothing_in_half_space(problem, signs):
    filters, energy = problem
    energy.half_space = True
    close(energy(filters * torch.tensor(signs)[: len(filters), None]), energy(filters).item(), 1e-8)


# --------------------------------------------------------------------------------------------------------------- optima


def simplex_energy(count, s, distance):
    cos = -1 / (count - 1)
    return f(math.sqrt(2 - 2 * cos) if distance == "euclidean" else math.acos(cos), s)


def octahedron_energy(s, distance):
    right, opposite = (math.sqrt(2), 2) if distance == "euclidean" else (math.pi / 2, math.pi)
    return (12 * f(right, s) + 3 * f(opposite, s)) / 15


def least_found(count, fan_in, s, distance, half_space=False):
    """The least energy that Adam reaches from eight random starts."""
    filters = normal(8, count, fan_in).requires_grad_()
    optimizer = torch.optim.Adam([filters], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        optimizer.zero_grad()
        energy = pair_energy(filters, s, distance, half_space, self_pairs=False)
        energy.sum().backward()
        optimizer.step()
        schedule.step()
    return energy.min().item()


# For angular distances and N ≥ 4 the simplex is the best for s = 1 and 2, but not for s = 0: see `least` below.
SIMPLICES = [
    *itertools.product([(2, 3), (3, 2)], DISTANCES, [0, 1, 2]),
    *itertools.product([(4, 3), (6, 6)], ["euclidean"], [0, 1, 2]),
    *itertools.product([(4, 3), (6, 6)], ["angular"], [1, 2]),
]


MINIMA = grid(itertools.product(DISTANCES, [0, 1, 2]), lambda distance, s: (distance, s) == ("angular", 0))


@pytest.mark.parametrize(("sizes", "distance", "s"), grid(SIMPLICES, lambda sizes, _, s: sizes == (4, 3) and s == 1))
def test_minimum_of_up_to_fan_in_plus_one_filters_is_the_simplex(sizes, distance, s):
    assert least_found(*sizes, s, distance) == pytest.approx(simplex_energy(sizes[0], s, distance), abs=1e-4)


@pytest.mark.parametrize(("distance", "s"), MINIMA)
def test_minimum_of_six_filters_in_three_dimensions_is_the_octahedron(s, distance):
    assert least_found(6, 3, s, distance) == pytest.approx(octahedron_energy(s, distance), abs=1e-4)


@pytest.mark.parametrize(("distance", "s"), MINIMA)
def test_minimum_in_half_space_of_up_to_fan_in_filters_is_an_orthogonal_frame(s, distance):
    right = f(math.sqrt(2) if distance == "euclidean" else math.pi / 2, s)
    assert least_found(3, 3, s, distance, half_space=True) == pytest.approx(right, abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- chunks


def energy_and_gradient(filters, *measure, **given):
    filters = filters.clone().requires_grad_()
    energy = pair_energy(filters, *measure, **given)
    weights = torch.arange(1.0, energy.numel() + 1).view_as(energy)
    return energy.detach(), torch.autograd.grad((weights * energy).sum(), filters)[0]


@pytest.mark.parametrize("rows", [None, [4, 0, 0, 2]])
@pytest.mark.parametrize(("distance", "half_space"), SPACES)
@pytest.mark.parametrize("room", [1, 9, 26, 60])
def test_pairs_in_chunks_of_groups_and_of_rows_have_the_same_energy_and_gradient(
    monkeypatch, room, distance, half_space, rows
):
    rows = rows and torch.tensor(rows)
    filters = normal(3, 5, 4)  # 25 pairs a group
    expected = energy_and_gradient(filters, 1, distance, half_space, rows=rows)
    monkeypatch.setattr(blocks, "ROOM", room)
    got = energy_and_gradient(filters, 1, distance, half_space, rows=rows)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_gradcheck_in_chunks(monkeypatch):
    monkeypatch.setattr(blocks, "ROOM", 10)
    assert torch.autograd.gradcheck(lambda w: pair_energy(w, 1), (normal(2, 5, 3).requires_grad_(),))


class Memory(TorchDispatchMode):
    """What every operation allocates: the largest tensor (elements), and the most bytes alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
                self.storages[storage._cdata] = weakref.ref(storage)
        self.storages = {key: ref for key, ref in self.storages.items() if ref() is not None}
        self.peak = max(self.peak, sum(ref().nbytes() for ref in self.storages.values() if ref() is not None))
        return result


@pytest.mark.parametrize("sizes", [(1, 64, 2), (3, 64, 2), (40, 8, 1)])
@pytest.mark.parametrize("half_space", [False, True])
def test_no_tensor_holds_more_pairs_than_there_is_room_for(monkeypatch, half_space, sizes):
    monkeypatch.setattr(blocks, "ROOM", 400)
    with Memory() as memory:
        energy_and_gradient(normal(*sizes), 1, "angular", half_space)
    assert memory.largest <= 400


def test_many_filters_need_bounded_memory_forward_and_backward(monkeypatch):
    monkeypatch.setattr(blocks, "ROOM", 1 << 18)
    count = 2000
    filters = normal(count, 16, dtype=torch.float32).requires_grad_()
    with Memory() as memory:
        energy = HypersphericalEnergy()(filters)
        energy.backward()
    assert memory.largest <= blocks.ROOM < count**2
    assert memory.peak < 4 * count**2, "less than one matrix of all pairs in fp32"
    # On the sphere S^15, E[1/z] of independent uniform directions.
    assert energy.item() == pytest.approx(mean_inverse_distance(16), rel=1e-3)
    # The gradient of one filter, from its pairs alone.
    some = filters.detach().double()
    own = some[:1].clone().requires_grad_()
    cos = F.cosine_similarity(own, some[1:])
    ((2 - 2 * cos) ** -0.5).sum().mul(2 / (count * (count - 1))).backward()
    torch.testing.assert_close(filters.grad[:1].double(), own.grad, rtol=1e-3, atol=1e-12)


def mean_inverse_distance(fan_in):
    """E[1/‖u - v‖] of uniform directions: the cosine t has the density (1 - t²)^((d - 3) / 2)."""
    steps = [-1 + (i + 0.5) / 5000 for i in range(10000)]
    density = [(1 - t * t) ** ((fan_in - 3) / 2) for t in steps]
    return sum(p / math.sqrt(2 - 2 * t) for p, t in zip(density, steps, strict=True)) / sum(density)


# -------------------------------------------------------------------------------------------------------- orthogonality


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [(3, 5), (4, 4), (7, 3), (5, 2, 2, 2), (1, 4), (4, 1)])
def test_penalty_agrees_with_a_loop_for_fewer_and_for_more_filters_than_inputs(sizes, normalize):
    filters = normal(*sizes)
    close(OrthogonalityPenalty(normalize)(filters), slow_penalty(filters, normalize))


@pytest.mark.parametrize("normalize", [True, False])
def test_penalty_of_a_model_is_the_sum_over_groups_and_hidden_layers_without_the_output(normalize):
    model = make_model()
    banks, _ = banks_by_hand(model)
    rows = [w for groups in banks.values() for w in groups]
    rows += [w[None] for w in (*model["depthwise"].weight, *model["depthwise_up"].weight)] + [model["single"].weight]
    close(OrthogonalityPenalty(normalize)(model), sum(slow_penalty(w, normalize) for w in rows))


@pytest.mark.parametrize("normalize", [True, False])
def test_penalty_of_groups_with_more_filters_than_inputs_is_the_sum_over_the_groups(normalize):
    conv = nn.Conv1d(4, 10, 1, groups=2).double()
    expected = sum(slow_penalty(w, normalize) for w in conv.weight.split(5))
    close(OrthogonalityPenalty(normalize)(nn.Sequential(conv, nn.Linear(10, 3))), expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)])
def test_gradcheck_of_the_penalty(sizes, normalize):
    assert torch.autograd.gradcheck(OrthogonalityPenalty(normalize), (normal(*sizes).requires_grad_(),))


def test_penalty_of_an_orthonormal_frame_is_zero_at_any_length_only_where_lengths_do_not_count():
    frame = torch.linalg.qr(normal(5, 5)).Q[:4]
    close(OrthogonalityPenalty()(3 * frame), 0)
    close(OrthogonalityPenalty(normalize=False)(frame), 0)
    close(OrthogonalityPenalty(normalize=False)(3 * frame), 4 * 8**2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HARD)
def test_penalty_of_coinciding_opposite_and_vanishing_filters_is_finite(case, dtype, normalize):
    for filters in (hard(case), hard(case)[:, :2]):
        filters = (filters / 3).to(dtype).requires_grad_()
        penalty = OrthogonalityPenalty(normalize)(filters)
        penalty.backward()
        assert penalty.dtype == torch.float32
        assert penalty.isfinite()
        assert filters.grad.isfinite().all()


def test_penalty_reaches_zero_by_descent():
    filters = normal(4, 6).requires_grad_()
    optimizer = torch.optim.Adam([filters], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        OrthogonalityPenalty()(filters).backward()
        optimizer.step()
    assert OrthogonalityPenalty()(filters).item() < 1e-6


# ----------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(("distance", "half_space"), SPACES)
@pytest.mark.parametrize("s", [0, 2])
def test_report_has_the_energy_of_each_layer_in_the_order_of_the_model(s, distance, half_space):
    model = make_model()
    hidden, output = banks_by_hand(model)
    report = HypersphericalEnergy(s, distance, half_space).report(model)
    assert [row.layer for row in report.layers] == [*hidden, "head"]
    for row in report.layers:
        banks = hidden.get(row.layer, [output])
        half = half_space and row.layer != "head"
        expected = [slow_energy(b, s, distance, half) for b in banks]
        assert row.energy == pytest.approx(sum(expected) / len(expected), abs=1e-10)
        sizes = (len(banks), len(banks[0]), banks[0][0].numel())
        assert (row.groups, row.filters, row.fan_in) == sizes
        assert row.is_output == (row.layer == "head")
    total = HypersphericalEnergy(s, distance, half_space)(model).item()
    assert sum(row.energy for row in report.layers) == pytest.approx(total, abs=1e-10)


@pytest.mark.parametrize("s", [0, 1, 2])
def test_least_is_the_energy_of_the_simplex_for_up_to_fan_in_plus_one_filters_in_the_full_space(s):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(8, 6), nn.Linear(3, 2)).double()
    model[0].weight.data = 2 * torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
    tetrahedron, five, six, two = HypersphericalEnergy(s).report(model).layers
    assert tetrahedron.least == pytest.approx(tetrahedron.energy, abs=1e-10)
    assert five.least is None
    assert six.least == pytest.approx(simplex_energy(6, s, "euclidean"), abs=1e-10)
    assert six.least < six.energy
    rows = HypersphericalEnergy(s, half_space=True).report(model).layers
    assert [row.least for row in rows[:3]] == [None, None, None]
    assert rows[3].least == pytest.approx(two.least) == pytest.approx(f(2, s))  # the output


@pytest.mark.parametrize("s", [0, 0.1, 0.25, 0.5, 1, 2])
@pytest.mark.parametrize("distance", DISTANCES)
def test_no_layer_has_less_energy_than_its_least(distance, s):
    frame = torch.eye(3)
    for pairs in (1, 2, 3):  # as many axes, with a filter at both ends
        layer = nn.Linear(6, 2 * pairs)
        layer.weight.data = F.pad(torch.cat([frame[:pairs], -frame[:pairs]]), (0, 3))
        (row,) = HypersphericalEnergy(s, distance).report(layer).layers
        assert row.least is None or row.energy > row.least - 1e-6, f"{2 * pairs} filters"


def make_long_named():
    deep = nn.Sequential(nn.Conv2d(64, 1024, 3, groups=2), nn.Linear(3, 4))
    for _ in range(30):
        deep = nn.ModuleDict({"a_long_name": deep})
    return nn.ModuleDict({"x": nn.Linear(2, 2), "deep": deep, "fc": nn.Linear(4, 3)})


def make_with_duplicates():
    layers = nn.ModuleDict({"body": nn.Linear(4, 3), "fc": nn.Linear(4, 3)})
    nn.init.ones_(layers["body"].weight)
    return layers


@pytest.mark.parametrize("build", [make_model, make_long_named, make_with_duplicates])
def test_report_prints_one_line_a_layer_in_aligned_columns(build, monkeypatch):
    monkeypatch.setenv("COLUMNS", "600")  # wide enough for whole names
    report = HypersphericalEnergy(2).report(build())
    title, header, *lines = str(report).splitlines()
    assert title == "hyperspherical energy (s=2, euclidean)"
    assert header.split() == ["layer", "filters", "fan-in", "energy", "least"]
    ends = {word: header.index(word) + len(word) for word in header.split()}
    assert len(lines) == len(report.layers)
    for line, row in zip(lines, report.layers, strict=True):
        filters = f"{row.groups}×{row.filters}" if row.groups > 1 else str(row.filters)
        least = [] if row.least is None else [f"{row.least:.4f}"]
        assert line.split() == [row.layer, filters, str(row.fan_in), f"{row.energy:.4f}", *least]
        cells = {"filters": filters, "fan-in": str(row.fan_in), "energy": f"{row.energy:.4f}", "least": "".join(least)}
        assert all(line[: ends[word]].endswith(cell) for word, cell in cells.items()), line


def test_report_says_which_energy_it_is_and_needs_no_gradient():
    energy = HypersphericalEnergy(0.5, "angular", True)
    model = make_model()
    report = energy.report(model)
    assert str(report).startswith("hyperspherical energy (s=0.5, angular, half space)\n")
    assert repr(energy) == "HypersphericalEnergy(s=0.5, angular, half space)"
    assert all(isinstance(row.energy, float) for row in report.layers)
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------- some layers only


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("conv", ["up", "sphere", "volume", "linear", "head"]),
        (("*p", "sphere", "head"), ["conv", "volume", "linear"]),
        ("re:.*(p|head)|sphere", ["conv", "volume", "linear"]),
        (["[cu]*"], ["sphere", "volume", "linear", "head"]),
    ],
)
def test_layers_that_match_exclude_are_left_out(exclude, left):
    model = make_model()
    assert [row.layer for row in HypersphericalEnergy(exclude=exclude).report(model).layers] == left
    hidden = [n for n in [*left, "depthwise", "depthwise_up", "single"] if n != "head"]
    parts = {b.layer: sum(slow_penalty(w, True) for w in b.filters) for b in filter_banks(model, single=True)}
    close(OrthogonalityPenalty(exclude=exclude)(model), sum(parts[n] for n in hidden))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"s": -1}, "s: got -1, expected a number of at least 0. Usual: 0, 1, 2"),
        ({"s": float("nan")}, "s: got nan, expected a number of at least 0. Usual: 0, 1, 2"),
        ({"s": float("inf")}, "s: got inf, expected a number of at least 0. Usual: 0, 1, 2"),
        ({"s": "1"}, "s: got '1', expected a number of at least 0. Usual: 0, 1, 2"),
        ({"hidden_weight": -0.1}, "hidden_weight: got -0.1, expected a number of at least 0"),
        ({"output_weight": -2}, "output_weight: got -2, expected a number of at least 0"),
        ({"distance": "angle"}, "distance: got 'angle', expected one of euclidean, angular.*Did you mean 'angular'"),
        ({"distance": None}, "distance: got None, expected one of euclidean, angular"),
    ],
)
def test_wrong_argument_is_refused(given, text):
    with pytest.raises(UsageError, match=text):
        HypersphericalEnergy(**given)


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Linear(4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Sequential(), nn.Embedding(4, 3)]
)
def test_a_model_in_which_nothing_could_repel_is_refused(model):
    text = f"{type(model).__name__}: there is no layer with two or more filters"
    with pytest.raises(UsageError, match=text):
        HypersphericalEnergy()(model)
    with pytest.raises(UsageError, match=text):
        HypersphericalEnergy().report(model)


def test_a_model_of_which_everything_is_excluded_is_refused():
    with pytest.raises(UsageError, match="ModuleDict: there is no layer with two or more filters"):
        HypersphericalEnergy(exclude="*")(make_model())
    with pytest.raises(UsageError, match="ModuleDict: there is no hidden convolution or linear layer"):
        OrthogonalityPenalty(exclude="*")(make_model())


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Linear(4, 3))])
def test_a_model_without_hidden_layers_is_refused_by_the_penalty(model):
    with pytest.raises(UsageError, match=f"{type(model).__name__}: there is no hidden convolution or linear layer"):
        OrthogonalityPenalty()(model)


@pytest.mark.parametrize("regularizer", [HypersphericalEnergy(), OrthogonalityPenalty()])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (torch.ones(3), r"got a tensor of shape \(3,\) and torch.float32, expected filters \(N, fan_in\) of floats"),
        (torch.tensor(1.0), r"got a tensor of shape \(\) and torch.float32, expected filters \(N, fan_in\) of floats"),
        (torch.ones(3, 2, dtype=torch.int64), r"got a tensor of shape \(3, 2\) and torch.int64, expected filters"),
        (torch.ones(3, 2, dtype=torch.bool), r"got a tensor of shape \(3, 2\) and torch.bool, expected filters"),
    ],
)
def test_a_tensor_that_holds_no_filters_is_refused(regularizer, given, text):
    with pytest.raises(UsageError, match=text):
        regularizer(given)


@pytest.mark.parametrize("regularizer", [HypersphericalEnergy(), OrthogonalityPenalty()])
@pytest.mark.parametrize("given", [[[1.0, 2.0]], SimpleNamespace(weight=torch.ones(3, 2))])
def test_what_is_neither_a_model_nor_a_tensor_is_a_type_error(regularizer, given):
    with pytest.raises(TypeError, match=f"model: got {type(given).__name__}, expected a model or a tensor of filters"):
        regularizer(given)


@pytest.mark.parametrize("term", [HypersphericalEnergy, OrthogonalityPenalty])
def test_exclude_that_matches_no_layer_is_an_error(term):
    with pytest.raises(UsageError, match=r"exclude: pattern 'conf\*' matches no layer; names look like conv"):
        term(exclude="conf*")(make_model())


@pytest.mark.parametrize("s", [12, 14, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_power_is_finite_for_filters_of_one_direction(s, dtype):
    filters = torch.randn(5, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    filters[1] = filters[0]
    filters.requires_grad_()
    energy = HypersphericalEnergy(s)(filters)
    energy.backward()
    assert energy.isfinite()
    assert filters.grad.isfinite().all()


def test_lazy_layers_without_weights_are_told():
    with pytest.raises(UsageError, match="has lazy layers without weights yet: run it once first"):
        HypersphericalEnergy()(nn.Sequential(nn.LazyLinear(3)))
