"""What happens when `CGNOptimizer` is used wrongly: one test per row of docs/misuse.rst."""

from __future__ import annotations

import doctest
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from cgn_tutorial import CGNOptimizer

PAGE = Path(__file__).parents[1] / "docs" / "misuse.rst"

X, Y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
LOSS = extend(nn.MSELoss())

MODIFIED = "output of MSELoss.* seems to have been modified"  # BackPACK's warning


class Session:
    """A model w x with the loss 5/2 w², at w = 1; an undamped Newton step of length 1 ends at 0."""

    def __init__(self, *layers: nn.Module, **options: object) -> None:
        self.model = extend(nn.Sequential(*layers or [nn.Linear(1, 1, bias=False)]))
        for p in self.model.parameters():
            nn.init.ones_(p)
        options = {"lr": 1.0, "damping": 0.0, "tol": 1e-6} | options
        self.optimizer = CGNOptimizer(self.model.parameters(), GGNMP(), **options)

    def loss(self, x: Tensor = X, y: Tensor = Y) -> Tensor:
        """The mean squared error of a batch."""
        return LOSS(self.model(x), y)

    def backward(self, loss: Tensor | None = None, **options: object) -> None:
        """Leave gradients and products of the loss, by default that of the batch X."""
        with backpack(self.optimizer.bp_extension):
            (self.loss() if loss is None else loss).backward(**options)

    def weights(self) -> list[float]:
        """All weights."""
        return [w for p in self.model.parameters() for w in p.flatten().tolist()]

    def step(self) -> float:
        """The first weight after a step."""
        self.optimizer.step()
        return self.weights()[0]

    def refuses(
        self, error: type[Exception], message: str, loss: Callable[[], Tensor] | None = None
    ) -> None:
        """Assert that a step, or with a loss the way to it, raises and leaves all weights alone."""

        def way() -> None:
            if loss is not None:
                self.backward(loss())
            self.step()

        before = self.weights()
        with pytest.raises(error, match=message):
            way()
        assert self.weights() == before
        self.optimizer.zero_grad()


@pytest.fixture
def session() -> Session:
    return Session()


# Visible: it works, or raises with nothing changed.


def test_step_works_inside_and_outside_the_context(session):
    inside = Session()
    session.backward()
    with backpack(inside.optimizer.bp_extension):
        inside.loss().backward()
        inside.optimizer.step()
    assert session.step() == inside.weights()[0] == 0.0


def test_backward_outside_the_context_raises(session):
    session.loss().backward()
    session.refuses(RuntimeError, "no curvature product .ggnmp: call loss.backward")


def test_second_step_on_one_product_raises(session):
    session.backward()
    session.step()
    session.refuses(RuntimeError, "A product serves one step")


def test_product_of_an_earlier_backward_raises(session):
    session.backward()
    session.optimizer.zero_grad()
    session.loss().backward()
    session.refuses(RuntimeError, "No Newton step for parameter 0 .*input0")


def test_forward_without_gradients_in_between_works(session):
    session.backward()
    with torch.no_grad():
        session.model(2 * X)
    assert session.step() == 0.0


@pytest.mark.parametrize("size", [1, 3])
def test_forward_of_the_model_with_another_batch_size_in_between_raises(session, size):
    session.backward()
    session.model(torch.ones(size, 1))
    session.refuses(RuntimeError, "No Newton step for parameter 0 .* do not match")


def test_gradient_scaler_works(session):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    session.backward(scaler.scale(session.loss()))
    with pytest.warns(UserWarning, match=MODIFIED):
        scaler.step(session.optimizer)  # divides the gradient; BackPACK's products have no scale
    assert session.weights() == [0.0]


def test_autocast_raises():
    session = Session(nn.Linear(1, 1), nn.Sigmoid(), nn.Linear(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = session.loss()
    session.refuses(RuntimeError, "No Newton step .* BFloat16", lambda: loss)


def test_module_used_twice_raises():
    layer = nn.Linear(1, 1, bias=False)
    session = Session(layer, nn.Sigmoid(), layer)
    session.refuses(AssertionError, "expects a backpropagation quantity", session.loss)


def test_batch_norm_in_train_mode_works():
    """The step solves with the GGN of the whole batch, samples coupled by their statistics."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)
    session = Session(*layers, damping=0.5, tol=1e-12, atol=0.0)
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    for p in session.model.double().parameters():
        nn.init.normal_(p)
    parameters = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    expected = []
    for name, p in parameters.items():

        def outputs(q: Tensor, name: str = name) -> Tensor:
            return functional_call(session.model, parameters | {name: q}, x)

        f = outputs(p).detach()
        J = jacobian(outputs, p).view(6, -1)
        H = hessian(lambda f: nn.functional.mse_loss(f, y), f).view(6, 6)
        g = J.T @ (2 / 6 * (f - y).flatten())
        damped = J.T @ H @ J + 0.5 * torch.eye(p.numel())
        expected.append(p - torch.linalg.solve(damped, g).view(p.shape))
    session.backward(session.loss(x, y))
    session.step()
    torch.testing.assert_close([p.detach() for p in session.model.parameters()], expected)


@pytest.mark.parametrize("layer", [nn.LayerNorm(1), nn.GELU()])
def test_layer_backpack_cannot_take_raises(layer):
    session = Session(nn.Linear(1, 1), layer)
    session.refuses(NotImplementedError, "does not have an extension", session.loss)


def test_function_between_layers_raises(session):
    loss = LOSS(2 * session.model(X), Y)
    session.refuses(AssertionError, "expects a backpropagation quantity", lambda: loss)


def test_loss_that_is_not_extended_raises(session):
    loss = nn.MSELoss()(session.model(X), Y)
    session.refuses(AssertionError, "quantity but it is None", lambda: loss)


@pytest.mark.parametrize("option", [{"weight": torch.tensor([1.0, 2.0])}, {"ignore_index": 1}])
def test_loss_option_backpack_cannot_take_raises(option):
    session = Session(nn.Linear(1, 2))
    loss = extend(nn.CrossEntropyLoss(**option))(session.model(X), torch.tensor([0, 1]))
    message = f"No Newton step .* Only default {next(iter(option))}"
    session.refuses(RuntimeError, message, lambda: loss)


def test_empty_batch_moves_nothing(session):
    session.backward(session.loss(X[:0], Y[:0]))
    assert session.step() == 1.0


def test_integer_input_raises(session):
    session.refuses(RuntimeError, "same dtype", lambda: session.loss(X.long()))


def test_mixed_dtypes_raise(session):
    session.refuses(RuntimeError, "same dtype", lambda: session.loss(X.double()))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_devices_raise(session, device):
    session.refuses(RuntimeError, "device", lambda: session.loss(X.to(device)))


def test_nan_batch_in_the_middle_of_training_raises_and_training_goes_on(session):
    session.refuses(
        RuntimeError,
        "b has numbers that are not finite: .* No parameter has been changed",
        lambda: session.loss(math.nan * X),
    )
    session.backward()
    assert session.step() == 0.0


def test_zeroed_gradient_of_a_frozen_parameter_is_passed_over():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    p.product, q.product = (lambda v: v), (lambda v: v)
    optimizer = CGNOptimizer([p, q], SimpleNamespace(savefield="product"), lr=1, damping=0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    p.requires_grad_(False)
    q.product = lambda v: v
    optimizer.step()
    assert p.tolist() == q.tolist() == [0, 0]


# Invisible: the wrong number, and the right one.


def test_zero_grad_forgotten_adds_the_old_gradient():
    weights = {}
    for forgotten in (True, False):
        session = Session(lr=0.5)
        for _ in range(2):
            if not forgotten:
                session.optimizer.zero_grad()
            session.backward()
            session.step()
        weights[forgotten] = session.weights()[0]
    assert weights == {True: -0.25, False: 0.25}


def test_forward_in_between_changes_the_curvature(session):
    session.backward()
    session.model(2 * X)
    assert session.step() == 0.75


def test_inputs_changed_in_between_change_the_curvature(session):
    x = X.clone()
    session.backward(session.loss(x))
    x.mul_(2)
    assert session.step() == 0.75


def test_weights_changed_in_between_change_the_curvature():
    session, changed = (Session(*(nn.Linear(1, 1, bias=False) for _ in "ab")) for _ in "cd")
    session.backward()
    assert session.step() == 0.0
    changed.backward()
    changed.model[1].weight.data.mul_(2)
    assert changed.step() == 0.75


def test_second_backward_adds_gradients_but_not_curvatures(session):
    again = Session()
    for x, y in zip(X.split(1), Y.split(1), strict=True):
        session.backward(session.loss(x, y))
    assert session.step() == -0.25
    loss = again.loss()
    again.backward(loss, retain_graph=True)
    again.backward(loss)
    assert again.step() == -1.0


def test_scaled_loss_scales_the_step(session):
    session.backward(4 * session.loss())
    with pytest.warns(UserWarning, match=MODIFIED):
        assert session.step() == -3.0
    unscaled = Session()
    unscaled.backward(4 * unscaled.loss())
    unscaled.model[0].weight.grad.div_(4)
    with pytest.warns(UserWarning, match=MODIFIED):
        assert unscaled.step() == 0.0


def test_penalty_outside_the_loss_module_has_no_curvature(session):
    session.backward(session.loss() + 2.5 * session.model[0].weight.square().sum())
    assert session.step() == -1.0
    decayed = Session(weight_decay=5.0)
    decayed.backward()
    assert decayed.step() == 0.0


def test_parameter_in_two_modules_has_the_curvature_of_one():
    first, second = (nn.Linear(1, 1, bias=False) for _ in range(2))
    second.weight = first.weight
    session = Session(first, second)
    session.backward()
    assert session.step() == -1.0

    w = nn.Parameter(torch.ones(1, 1))  # the same model with the product of (∂(w² x)/∂w)²
    optimizer = CGNOptimizer([w], GGNMP(), lr=1.0, damping=0.0)
    LOSS(X @ w @ w, Y).backward()
    w.ggnmp = lambda v: 20 * v
    optimizer.step()
    assert w.item() == 0.5


# The page.


@pytest.mark.filterwarnings(f"ignore:.*{MODIFIED}")
def test_page_shows_the_numbers_it_computes():
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


def test_page_has_one_row_per_test():
    named = re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    tests = [name for name in globals() if name.startswith("test_") and "_page_" not in name]
    assert sorted(named) == sorted(tests)
