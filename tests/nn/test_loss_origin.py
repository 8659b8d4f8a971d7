"""A loss follows the weights that made the output: of the model, a copy, an average, or a functional call."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

from sphereify.errors import UsageError
from sphereify.nn import AngularHead, AngularLoss, AngularOutput
from tests.nn.oracle import normal

TARGETS = torch.tensor([0, 2, 1, 1])


def network(kind="ga-softmax", seed=0):
    torch.manual_seed(seed)
    head = AngularHead(5, 3, kind=kind, operator="learnable-sigmoid", bias=True)
    head.operator.p.data += 0.2 * torch.rand(3)
    return nn.Sequential(nn.Linear(4, 5), head).double()


def gradients(model, loss, x, y):
    loss(model(x), y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"separation": 0.3, "label_smoothing": 0.1}, {"chunk_size": 2}])
def test_gradients_of_a_functional_call_are_those_of_a_model_with_these_weights(options):
    model, other, x = network(), network(seed=1), normal(4, 4)
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    AngularLoss(model, **options)(functional_call(model, weights, (x,)), TARGETS).backward()
    expected = gradients(other, AngularLoss(other, **options), x, TARGETS)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_and_an_average_are_followed():
    model, x = network(), normal(4, 4)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    loss = AngularLoss(model)
    for parameter in model.parameters():
        parameter.data += 0.3 * normal(*parameter.shape, seed=3)
    average.update_parameters(network(seed=1))
    for other in (average, copy.deepcopy(average), copy.deepcopy(model)):
        other.train()
        torch.testing.assert_close(loss(other(x), TARGETS), AngularLoss(other)(other(x), TARGETS), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["w-softmax", "ga-softmax"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weight": torch.tensor([1.0, 2.0, 3.0])}])
def test_gradients_of_single_samples_are_those_of_a_loop(kind, options):
    model, x = network(kind), normal(4, 4)
    loss, weights = AngularLoss(model, **options), dict(model.named_parameters())

    def one(weights, x, y):
        return loss(functional_call(model, weights, (x[None],)), y[None])

    together = vmap(grad(one), in_dims=(None, 0, 0))(weights, x, TARGETS)
    for i in range(4):
        model.zero_grad()
        for name, expected in gradients(model, loss, x[i : i + 1], TARGETS[i : i + 1]).items():
            torch.testing.assert_close(together[name][i], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"separation": 0.5}])
def test_chunks_and_separation_go_through_vmap_and_refuse_nothing(options):
    model, x = network(), normal(4, 4)
    loss, weights = AngularLoss(model, **options), dict(model.named_parameters())
    value = vmap(lambda x, y: loss(functional_call(model, weights, (x[None],)), y[None]))(x, TARGETS)
    torch.testing.assert_close(value, torch.stack([loss(model(x[i : i + 1]), TARGETS[i : i + 1]) for i in range(4)]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", ["w-softmax", "ga-softmax"])
def test_a_loss_has_a_hessian(kind):
    model, x = network(kind), normal(4, 4)
    loss = AngularLoss(model)
    torch.testing.assert_close(
        hessian(lambda x: loss(model(x), TARGETS))(x),
        jacrev(jacrev(lambda x: loss(model(x), TARGETS)))(x),
        rtol=1e-8,
        atol=1e-8,
    )


def test_networks_of_an_ensemble_have_their_own_losses():
    networks, x = [network(seed=seed) for seed in range(3)], normal(4, 4)
    stacked = {
        name: torch.stack([dict(n.named_parameters())[name].detach() for n in networks])
        for name, _ in networks[0].named_parameters()
    }
    loss = AngularLoss(networks[0])
    together = vmap(lambda weights: loss(functional_call(networks[0], weights, (x,)), TARGETS))(stacked)
    torch.testing.assert_close(together, torch.stack([AngularLoss(n)(n(x), TARGETS) for n in networks]))
    outputs = vmap(lambda weights: functional_call(networks[0], weights, (x,)))(stacked)
    with pytest.raises(UsageError, match=r"out of a transformation, such as torch\.vmap.*Call the loss inside"):
        vmap(lambda output: loss(output, TARGETS))(outputs)


def test_an_output_that_was_taken_apart_is_checked_against_the_head():
    model, other, x = network(), network(seed=1), normal(4, 4)
    loss = AngularLoss(model)
    output = model(x)
    rebuilt = AngularOutput._make(output)
    assert rebuilt.head is None
    torch.testing.assert_close(loss(rebuilt, TARGETS), loss(output, TARGETS), rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"made with other weights.*scores differ by .*Make a loss for the model that"):
        loss(AngularOutput._make(other(x)), TARGETS)


def test_separation_of_plain_logits_is_refused_where_weights_are_handed_over():
    model, x = network("w-softmax"), normal(4, 4)
    loss, weights = AngularLoss(model, separation=0.1), dict(model.named_parameters())
    with pytest.raises(UsageError, match="separation reads the class weights of the model"):
        grad(lambda w: loss(functional_call(model, w, (x,)), TARGETS))(weights)
