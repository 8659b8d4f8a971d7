"""The losses in training: memory, autocast, compilation, several processes, saved and resumed state."""

import copy
import os
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from sphereify.choices import OPERATORS
from sphereify.nn import AngularHead, AngularLoss, MarginAnnealing, as_metric_loss, softmax_loss
from tests.grids import grid
from tests.nn.loss_oracle import HEADS, MARGINS, build
from tests.nn.oracle import normal

WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25])


# ------------------------------------------------------------------------------------------------------------- memory


class LargeTensors(TorchDispatchMode):
    """Counts the storages of at least `size` elements that live at one time."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.peak, self.largest = size, {}, 0, 0  # `largest` in elements, of all tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                if t.numel() >= self.size:
                    self.alive.setdefault(t.untyped_storage()._cdata, StorageWeakRef(t.untyped_storage()))
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        return len(self.alive)


@pytest.fixture
def little_room(monkeypatch):
    """The copies of some rows of logits smaller than logits of 64 × 20,000, as they are for larger ones."""
    monkeypatch.setattr(softmax_loss, "ROOM", 1 << 18)


def memory_of_forward(kind, operator, bias=False, batch=64, classes=20_000, **options):
    """How many tensors of batch × classes are held after the forward pass of head and loss, and at most during it."""
    head = AngularHead(4, classes, kind=kind, operator=operator, bias=bias)
    loss, x = AngularLoss(head, **options), torch.randn(batch, 4, requires_grad=True)
    with LargeTensors(batch * classes) as large:
        value = loss(head(x), torch.arange(batch))
        kept = large.now()
    assert value.requires_grad
    return kept, large.peak


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_backward_needs_two_tensors_of_batch_by_classes(kind, operator, bias, little_room):
    smooth = {"label_smoothing": 0.1, "class_weight": torch.ones(20_000)}
    for options in ({}, smooth):
        kept, _ = memory_of_forward(kind, operator, bias, **options)
        assert 1 <= kept <= 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_has_two_tensors_of_batch_by_classes_at_any_time(operator, bias, little_room):
    _, peak = memory_of_forward("ga-softmax", operator, bias, label_smoothing=0.1)
    assert peak <= 2


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "annealing": MarginAnnealing()}], ids=["plain", "more"]
)
def test_chunks_never_hold_a_tensor_of_batch_by_classes_in_forward_or_backward(options):
    batch, classes, chunk = 64, 8_000, 400
    head, x = AngularHead(2, classes, kind="ga-softmax", operator="linear"), torch.randn(batch, 2, requires_grad=True)
    head.training_logits = False
    loss = AngularLoss(head, chunk_size=chunk, **options)
    with LargeTensors(batch * chunk) as large:
        value = loss(head(x), torch.arange(batch))
        assert large.now() == 0
        value.backward()
    assert large.largest == batch * chunk
    assert large.peak <= 10 < classes / chunk


def test_little_room_changes_neither_loss_nor_gradient(monkeypatch):
    head, x, y = build("ga-softmax", "linear"), normal(7, 6).requires_grad_(), torch.tensor([0, 3, 2, 2, 1, 0, 0])
    results = []
    for room in (softmax_loss.ROOM, 1, 9):
        monkeypatch.setattr(softmax_loss, "ROOM", room)
        loss = AngularLoss(head, 0.1)(head(x), y)
        results.append((loss, *torch.autograd.grad(loss, [x, head.weight])))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-13)


# -------------------------------------------------------------------------------------------- autocast and compilation


class Net(nn.Module):
    """A layer below the head, and the loss of a batch."""

    def __init__(self, kind="ga-softmax", operator="sigmoid", **options):
        super().__init__()
        dtype = options.pop("dtype", torch.float64)
        self.body = nn.Linear(5, 6, dtype=dtype)
        for seed, p in enumerate(self.body.parameters(), start=5):
            p.data = normal(*p.shape, seed=seed, dtype=dtype)
        self.head = build(kind, operator, dtype=dtype, bias=True, margin=3)
        self.head.training_logits = not options.pop("lean", False)
        self.loss = AngularLoss(self.head, **options)

    def forward(self, x, y):
        return self.loss(self.head(self.body(x)), y)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"label_smoothing": 0.1, "class_weight": WEIGHT}], ids=str)
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_logits_and_loss_under_autocast_are_in_fp32(kind, operator, options):
    net = Net(kind, operator, dtype=torch.float32)
    loss = as_metric_loss(net.head, separation=0.1, **options)
    x, y = normal(8, 5, dtype=torch.float32), torch.arange(8) % 4
    for targets in (y, (y, y.flip(0), 0.3)):
        with torch.autocast("cpu", torch.bfloat16):
            features = net.body(x)
            value, logits = loss(features, targets), net.head(features)
        assert features.dtype == torch.bfloat16
        assert value.dtype == torch.float32
        assert (logits.logits if net.head.has_margin else logits).dtype == torch.float32
        exact = as_metric_loss(copy.deepcopy(net.head).double(), separation=0.1, **options)
        # ε inside the roots is 1e-5 for features in half precision, and they are of length 1 to 10.
        torch.testing.assert_close(value.double(), exact(features.double(), targets), rtol=1e-4, atol=1e-4)
        value.backward()
        assert all(g.isfinite().all() for g in gradients(net).values())


COMPILED = [
    {},
    {"kind": "a-softmax", "operator": "cosine", "annealing": MarginAnnealing(3, rate=1)},
    {"operator": "learnable-sigmoid", "label_smoothing": 0.1, "class_weight": WEIGHT, "ignore_index": 2},
    {"operator": "linear", "chunk_size": 3, "lean": True, "annealing": MarginAnnealing(3, rate=1)},
    {"kind": "s-softmax", "operator": "linear"},
    {"operator": "linear", "separation": 0.5},
]


@pytest.mark.parametrize(
    "options", grid(COMPILED, lambda options: options in COMPILED[3:4]), ids=lambda o: "-".join(map(str, o)) or "plain"
)
def test_compiled_head_and_loss_have_the_same_value_gradient_and_count(options):
    torch._dynamo.reset()
    plain, other = Net(**copy.deepcopy(options)), Net(**copy.deepcopy(options))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = normal(8, 5)
    for step in range(3):
        y = (torch.arange(8) + step) % 4
        results = []
        for net in (plain, compiled):
            net.zero_grad()
            loss = net(x, y)
            loss.backward()
            results.append(loss.detach())
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients(other), gradients(plain), rtol=0, atol=1e-12)
    if "annealing" in options:
        assert plain.loss.annealing.calls == other.loss.annealing.calls == 3


def test_loss_finds_the_head_of_a_wrapped_model():
    model = nn.Sequential(nn.Linear(5, 6), AngularHead(6, 4, kind="a-softmax"))
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager"), nn.ModuleList([model])):
        assert AngularLoss(wrapped).head is model[1]


# ---------------------------------------------------------------------------------------------------- several processes

WAYS = [{"annealing": MarginAnnealing(3, rate=1)}, {"operator": "learnable-sigmoid", "chunk_size": 3, "lean": True}]


def run_of(options, batch, wrap=lambda model: model):
    """Gradients of the second of two steps, and the state of the loss."""
    net = Net(**copy.deepcopy(options))
    model = wrap(nn.Sequential(net.body, net.head))
    x, y = normal(8, 5)[batch], (torch.arange(8) % 4)[batch]
    for _ in range(2):
        net.zero_grad()
        net.loss(model(x), y).backward()
    return gradients(net), net.loss.state_dict()


def process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = [run_of(options, slice(rank, None, 2), DistributedDataParallel) for options in WAYS]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # the results are saved; torch's threads now and then abort the interpreter on its way out


@pytest.mark.processes
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    expected = [run_of(options, slice(None)) for options in WAYS]
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ annealing and state


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [1000.0, 1000 / 1.12, 1000 / 1.24]),
        ({"start": 6, "rate": 1, "floor": 2.5}, [6.0, 3.0, 2.5]),
        ({"start": 8, "rate": 1, "floor": 0, "power": 2}, [8.0, 2.0, 8 / 9]),
        ({"start": 6, "rate": 1, "floor": 0, "every": 2}, [6.0, 6.0, 3.0]),
        ({"start": 2, "floor": 5}, [5.0, 5.0, 5.0]),
        ({"start": 4, "rate": 0, "floor": 0}, [4.0, 4.0, 4.0]),
    ],
)
def test_annealing_falls_with_each_call_of_the_loss_in_training(given, expected):
    head, x, y = build("ga-softmax", "linear"), normal(3, 6), torch.tensor([0, 1, 2])
    loss, got = AngularLoss(head, annealing=MarginAnnealing(**given)), []
    for _ in expected:
        got.append(loss.annealing().item())
        loss.eval()(head(x), y)  # does not count
        loss.train()(head(x), (y, y.flip(0), 0.5))  # counts once
    assert got == pytest.approx(expected, rel=1e-6)
    assert loss.annealing.calls.item() == len(expected)


def test_annealing_of_sphere_face_ends_at_5():
    annealing = MarginAnnealing()
    annealing.calls.fill_(1_000_000)
    assert annealing().item() == 5


def test_a_call_that_fails_does_not_count():
    head = build("ga-softmax", "linear")
    loss = AngularLoss(head, annealing=MarginAnnealing())
    with pytest.raises(ValueError, match="got class 9"):
        loss(head(normal(1, 6)), torch.tensor([9]))
    assert loss.annealing.calls == 0


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_accumulated_gradients_train_as_the_whole_batch_when_annealing_steps_once_for_all_parts(chunk_size):
    x, y, parts = normal(8, 5), torch.arange(8) % 4, 4
    nets = [Net(annealing=MarginAnnealing(3, 0, 1, every=n), chunk_size=chunk_size) for n in (1, parts)]
    for net, count in zip(nets, (1, parts), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            for features, targets in zip(x.chunk(count), y.chunk(count), strict=True):
                (net(features, targets) / count).backward()
            optimizer.step()
    torch.testing.assert_close(dict(nets[1].named_parameters()), dict(nets[0].named_parameters()), rtol=0, atol=1e-12)
    assert nets[1].loss.annealing.calls == 12


def test_loss_has_no_parameters_and_a_state_of_the_count_alone():
    head = build("ga-softmax", "learnable-sigmoid", bias=True)
    loss = AngularLoss(head, class_weight=WEIGHT, annealing=MarginAnnealing())
    assert list(loss.parameters()) == []
    assert list(loss.state_dict()) == ["annealing.calls"]
    assert list(AngularLoss(head, class_weight=WEIGHT).state_dict()) == []
    assert head not in set(loss.modules())
    assert loss.double() is loss
    assert loss.annealing.calls.dtype == torch.int64


def test_resumed_loss_continues_the_annealing():
    x, y = normal(8, 5), torch.arange(8) % 4
    first = Net(annealing=MarginAnnealing(3, 0, 1))
    for _ in range(3):
        first(x, y)
    resumed = Net(annealing=MarginAnnealing(3, 0, 1))
    assert (resumed(x, y) - first(x, y)).abs() > 1e-3
    resumed.loss.load_state_dict(first.loss.state_dict())
    assert resumed.loss.annealing().item() == pytest.approx(3 / 5)
    torch.testing.assert_close(resumed(x, y), first(x, y), rtol=0, atol=0)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(("kind", "operator"), HEADS)
def test_copy_of_model_and_loss_has_the_copied_head_and_the_same_value(kind, operator, copied):
    annealing = MarginAnnealing(3) if (kind, operator) in MARGINS else None
    head, x, y = build(kind, operator), normal(8, 6), torch.arange(8) % 4
    loss = AngularLoss(head, class_weight=WEIGHT, annealing=annealing)
    loss(head(x), y)
    head_2, loss_2 = copied((head, loss))
    assert loss_2.head is head_2
    assert head_2 is not head
    torch.testing.assert_close(loss_2(head_2(x), y), loss(head(x), y), rtol=0, atol=0)
    loss_2(head_2(x), y).backward()
    assert head.weight.grad is None
    assert head_2.weight.grad is not None
    alone = copied(loss)
    assert (alone.head is head) == (copied is copy.deepcopy)  # the head that the model goes on training
    torch.testing.assert_close(alone.head.weight, head.weight)


def test_replaced_weights_of_a_loaded_or_cast_model_are_those_of_the_loss():
    net, other = Net(), Net()
    other.body.weight.data.mul_(2)
    other.head.weight.data.copy_(normal(4, 6, seed=99))
    net.load_state_dict(other.state_dict())
    x, y = normal(8, 5), torch.arange(8) % 4
    torch.testing.assert_close(net(x, y), other(x, y), rtol=0, atol=0)
    torch.testing.assert_close(net.float()(x.float(), y).double(), other(x, y), rtol=1e-5, atol=1e-5)
    net.head.weight = nn.Parameter(torch.zeros_like(net.head.weight))
    net(x.float(), y).backward()
    assert net.head.weight.grad.isfinite().all()


def test_model_without_an_angular_head_trains_on_plain_logits():
    model, x, y = nn.Linear(5, 4), normal(8, 5, dtype=torch.float32), torch.arange(8) % 4
    loss = AngularLoss(model, 0.1, WEIGHT)
    assert loss.head is None
    torch.testing.assert_close(loss(model(x), y), nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)(model(x), y))
