"""The stored Jacobian: its loss, gradient and products are those of autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.func import jacrev

from cgn_tutorial import (
    GGN,
    CGNOptimizer,
    JacobianGGN,
    LevenbergMarquardt,
    Nystrom,
    check_products,
    cholesky,
    layers,
)

DOUBLE = torch.float64


def fit(model, x, y):
    return model(x) - y


def curved(model, x):
    """A residual with second derivatives by the input, as differential equations have."""
    return 0.3 * jacrev(jacrev(lambda x: model(x).sum()))(x).diagonal().sum()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def terms():
    random = torch.Generator().manual_seed(1)
    x, y, z = (torch.randn(7, k, generator=random, dtype=DOUBLE) for k in (2, 3, 2))
    return (fit, x, y), (curved, z[:4])


def by_autograd(model, terms):
    """The loss of the terms and its outputs, the residuals, with a graph."""
    outputs = [
        torch.stack([residual(model, *sample) for sample in zip(*samples, strict=True)])
        for residual, *samples in terms
    ]
    return sum(r.square().sum() / (2 * len(r)) for r in outputs), outputs


@pytest.mark.versions
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_loss_gradient_and_products_are_autograds(model, terms, chunk_size):
    other = copy.deepcopy(model)
    curvature = JacobianGGN(model, layers(model), chunk_size)
    loss = curvature.backward(*terms)
    expected, outputs = by_autograd(other, terms)
    graph = GGN(layers(other)).backward(expected, outputs)

    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(curvature.loss(*terms), loss)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for block, product in zip(layers(model), graph, strict=True):
        n = sum(p.numel() for p in block)
        C = block[0].jacobian_product(torch.eye(n, dtype=DOUBLE))
        torch.testing.assert_close(C, product(torch.eye(n, dtype=DOUBLE)))


def test_products_pass_the_checks_of_products(model, terms):
    curvature = JacobianGGN(model, [model.parameters()])
    curvature.backward(*terms)
    product = model[0].weight.jacobian_product
    assert (
        check_products([product], positive=True, evaluate=lambda: by_autograd(model, terms)) < 1e-9
    )


def test_a_frozen_parameter_counts_as_a_constant(model, terms):
    model[2].weight.requires_grad_(False)
    curvature = JacobianGGN(model, [model.parameters()])
    curvature.backward(*terms)
    product = model[0].weight.jacobian_product
    assert product.root.shape == (7 * 3 + 4, 5 * 2 + 5 + 3)
    assert model[2].weight.grad is None
    assert not hasattr(model[2].weight, "jacobian_product")


def test_gradients_accumulate_and_hooks_run_as_in_a_backward_pass(model, terms):
    curvature = JacobianGGN(model, [model.parameters()])
    curvature.backward(*terms)
    once = model[0].bias.grad.clone()
    model[0].bias.register_hook(lambda g: 2 * g)
    curvature.backward(*terms)
    torch.testing.assert_close(model[0].bias.grad, 3 * once)


def test_a_residual_may_hold_the_model_and_use_its_parts(model, terms):
    other = copy.deepcopy(model)

    def held(_, x, y):
        return model(x) - y + model[0].bias.sum() * other[0].weight.sum()

    def given(model, x, y):
        return model(x) - y + model[0].bias.sum() * other[0].weight.sum()

    gradients = []
    for residual in held, given:
        model.zero_grad()
        loss = JacobianGGN(model, [model.parameters()]).backward((residual, *terms[0][1:]))
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    expected, _ = by_autograd(model, ((given, *terms[0][1:]),))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for found in gradients:
        torch.testing.assert_close(found, [p.grad for p in model.parameters()])


def test_what_the_model_assigns_is_undone(model, terms):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.register_buffer("seen", torch.zeros(3, dtype=DOUBLE))

        def forward(self, x):
            self.seen = self.seen + self.inner(x)
            return self.seen

    counting = Counting()
    curvature = JacobianGGN(counting, [counting.parameters()])
    curvature.backward(terms[0])
    curvature.loss(terms[0])
    assert torch.equal(counting.seen, torch.zeros(3, dtype=DOUBLE))


def test_products_outlive_a_step_that_is_taken_back(model, terms):
    curvature = JacobianGGN(model, [model.parameters()])
    curvature.backward(*terms)
    product = model[0].weight.jacobian_product
    v = torch.ones(1, product.root.shape[1], dtype=DOUBLE)
    before = product(v)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(product(v), before)


@pytest.mark.parametrize("rule", ["martens", "nielsen"])
@pytest.mark.parametrize(
    "preconditioner", [None, cholesky, Nystrom(10, 1)], ids=["plain", "cholesky", "nystrom"]
)
def test_a_fit_reaches_many_digits(rule, preconditioner):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    curvature = JacobianGGN(model, [model.parameters()])
    optimizer = CGNOptimizer(
        model.parameters(), curvature, lr=1.0, tol=1e-6, atol=0.0, preconditioner=preconditioner
    )
    adaptive = LevenbergMarquardt(optimizer, minimum=1e-14, rule=rule)
    x = torch.linspace(-1, 1, 40, dtype=DOUBLE)[:, None]
    term = fit, x, torch.sin(2 * x)
    start = curvature.loss(term)
    for _ in range(40):
        optimizer.zero_grad()
        adaptive.step(curvature.backward(term), lambda: curvature.loss(term))
    assert curvature.loss(term) < 1e-7 * start


def test_a_copy_of_model_and_curvature_trains_by_itself(model, terms):
    curvature = JacobianGGN(model, [model.parameters()])
    copied, its_model = copy.deepcopy((curvature, model))
    copied.backward(*terms)
    assert its_model[0].weight.grad is not None
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ((), ValueError, "no terms"),
        ((fit,), TypeError, r"tuple \(residual"),
        (((fit, 3.0),), TypeError, "tensors with rows"),
        (((fit,),), ValueError, "at least one"),
        (((fit, torch.ones(2, 2), torch.ones(3, 3)),), ValueError, r"\[2, 3\]"),
        (((fit, torch.ones(0, 2), torch.ones(0, 3)),), ValueError, r"\[0, 0\]"),
    ],
)
def test_bad_terms_are_refused_and_nothing_changes(model, bad, error, words):
    curvature = JacobianGGN(model, [model.parameters()])
    with pytest.raises(error, match=words):
        curvature.backward(*bad)
    assert all(p.grad is None for p in model.parameters())


def test_a_block_of_another_model_is_refused(model):
    with pytest.raises(ValueError, match="no parameter of the model"):
        JacobianGGN(model, [nn.Linear(2, 3).parameters()])


def test_a_model_with_nothing_to_train_is_refused(model, terms):
    curvature = JacobianGGN(model, [model.parameters()])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        curvature.backward(*terms)


def test_a_vector_of_another_size_is_refused(model, terms):
    JacobianGGN(model, [model.parameters()]).backward(*terms)
    with pytest.raises(ValueError, match=r"\[V, 33\]"):
        model[0].weight.jacobian_product(torch.ones(1, 5, dtype=DOUBLE))
