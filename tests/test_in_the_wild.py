"""What real training has besides the textbook's: each against a slower, plainer way."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from cgn_tutorial import GGN, CGNOptimizer, Curvature, Hessian, layers

TIGHT = {"rtol": 1e-9, "atol": 1e-12}

both = pytest.mark.parametrize("kind", [GGN, Hessian])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def matrix(
    kind: type[Curvature], parameters: list[Tensor], loss: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The curvature as one block, and the gradient, both dense."""
    for p in parameters:
        p.grad = None
    (product,) = kind([parameters]).backward(loss, outputs)
    n = sum(p.numel() for p in parameters)
    return product(torch.eye(n, dtype=torch.float64)), parameters_to_vector(
        [p.grad for p in parameters]
    )


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert expected[0].norm() > 1e-3
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TIGHT)


# What models hold.


@both
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_graph_network_with_a_sparse_matrix_has_the_curvature_of_the_dense_one(kind, layout):
    nodes, labelled = 12, torch.tensor([0, 3, 5, 8])
    dense = torch.eye(nodes).double() + (torch.rand(nodes, nodes) < 0.2)
    dense /= dense.sum(1, keepdim=True)
    sparse = getattr(dense, layout)()
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    features, labels = numbers(nodes, 3), torch.tensor([0, 1, 1, 0])
    parameters = [*first.parameters(), *second.parameters()]

    def of(A: Tensor) -> tuple[Tensor, Tensor]:
        outputs = (A @ second(torch.tanh(A @ first(features))))[labelled]
        return matrix(kind, parameters, F.cross_entropy(outputs, labels), outputs)

    assert_same(of(sparse), of(dense))


@both
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_have_the_curvature_of_one_sequence_at_a_time(kind, cell):
    lengths = [5, 3, 1]
    model = nn.ModuleDict({"rnn": cell(2, 3, batch_first=True), "head": nn.Linear(3, 2)}).double()
    inputs, targets = numbers(3, 5, 2), [numbers(n, 2) for n in lengths]
    parameters = list(model.parameters())

    def of(states: list[Tensor]) -> tuple[Tensor, Tensor]:
        outputs = model["head"](torch.cat(states))
        return matrix(kind, parameters, F.mse_loss(outputs, torch.cat(targets)), outputs)

    packed = pack_padded_sequence(inputs, torch.tensor(lengths), batch_first=True)
    padded, _ = pad_packed_sequence(model["rnn"](packed)[0], batch_first=True)
    alone = [model["rnn"](x[None, :n])[0][0] for x, n in zip(inputs, lengths, strict=True)]
    assert_same(of([states[:n] for states, n in zip(padded, lengths, strict=True)]), of(alone))


@both
def test_parameters_of_no_dimension_have_the_curvature_of_one_vector(kind):
    x, y = numbers(20), numbers(20)
    values = (0.7, 1.3, -0.2)

    def of(parameters: list[Tensor], a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        outputs = a * torch.sin(b * x + c)
        return matrix(kind, parameters, F.mse_loss(outputs, y), outputs)

    scalars = [nn.Parameter(torch.tensor(value).double()) for value in values]
    vector = nn.Parameter(torch.tensor(values).double())
    assert_same(of(scalars, *scalars), of([vector], *vector))


def test_a_parameter_of_no_dimension_takes_its_newton_step():
    w = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    curvature = GGN([w])
    outputs = 2 * w
    curvature.backward((outputs - 1).square(), outputs)  # 4w² − 4w + 1
    CGNOptimizer([w], curvature, lr=1.0, damping=0.0).step()
    assert w.item() == pytest.approx(0.5, rel=1e-14)


@both
def test_hooks_of_modules_that_only_look_change_no_product(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = numbers(8, 3), torch.arange(8) % 2

    def of_model() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return matrix(kind, list(model.parameters()), F.cross_entropy(outputs, y), outputs)

    expected, seen = of_model(), []
    for module in model:
        module.register_forward_pre_hook(lambda module, args: seen.append("before"))
        module.register_forward_hook(lambda module, args, output: seen.append("after"))
        module.register_full_backward_hook(lambda module, *gradients: seen.append("back"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    for actual, e in zip(of_model(), expected, strict=True):
        assert torch.equal(actual, e)
    assert set(seen) == {"before", "after", "back", "accumulated"}
    assert seen.count("accumulated") == 1


@both
def test_a_forward_hook_that_changes_outputs_is_part_of_the_model(kind):
    linear = nn.Linear(3, 2).double()
    x, y = numbers(8, 3), numbers(8, 2)

    def of(outputs: Tensor) -> tuple[Tensor, Tensor]:
        return matrix(kind, list(linear.parameters()), F.mse_loss(outputs, y), outputs)

    expected = of(torch.sin(linear(x)))
    linear.register_forward_hook(lambda module, args, output: torch.sin(output))
    assert_same(of(linear(x)), expected)


# What losses hold.


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def residuals(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """u″ + sin u inside, and u at the ends, scaled so that their squares add up to the loss."""
    x = x.requires_grad_()
    values = u(x)
    (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    inside = (bend + torch.sin(values)) / math.sqrt(len(x))
    return torch.cat([inside, u(torch.tensor([[0.0], [1.0]]).double())])


def test_residuals_of_a_differential_equation_have_the_matrix_of_gauss_and_newton():
    model, x = network(), torch.rand(7, 1, dtype=torch.float64)
    r = residuals(model, x)
    C, g = matrix(GGN, list(model.parameters()), r.square().sum(), r)

    shapes = {name: p.shape for name, p in model.named_parameters()}

    def plain(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        own = {name: v.view(shapes[name]) for name, v in zip(shapes, parts, strict=True)}
        return residuals(lambda x: functional_call(model, own, (x,)), x.detach().clone())

    theta = parameters_to_vector(model.parameters()).detach()
    J = torch.autograd.functional.jacobian(plain, theta).flatten(1)
    assert_same((C, g), (2 * J.T @ J, 2 * J.T @ plain(theta).detach().flatten()))


def test_slopes_as_targets_count_as_outputs():
    model, x = network(), torch.rand(7, 1, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def plain(own: dict[str, Tensor]) -> Tensor:
        """The values, and the slopes written out: W₂ (W₁ (1 − tanh²))."""
        hidden = torch.tanh(x.detach() @ own["0.weight"].T + own["0.bias"])
        slopes = (own["0.weight"].T * (1 - hidden**2)) @ own["2.weight"].T
        return torch.cat([hidden @ own["2.weight"].T + own["2.bias"], slopes])

    x.requires_grad_()
    values = model(x)
    (slopes,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    loss = values.sin().exp().sum() + slopes.pow(2).sum()
    C, _ = matrix(GGN, list(parameters.values()), loss, (values, slopes))

    detached = {name: p.detach() for name, p in parameters.items()}
    J = torch.cat([part.flatten(1) for part in jacrev(plain)(detached).values()], dim=1)
    z, two = values.detach().flatten(), torch.full((7,), 2.0).double()
    second = torch.cat([z.sin().exp() * (z.cos() ** 2 - z.sin()), two])
    assert_same((C,), (J.view(14, -1).T * second @ J.view(14, -1),))


@both
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float64).min, -1e9])
def test_masked_logits_have_the_curvature_of_the_others_alone(kind, fill):
    model, x = nn.Linear(3, 4).double(), numbers(6, 3)
    allowed = torch.tensor([True, False, True, True])
    labels = torch.tensor([0, 2, 3, 0, 2, 3])
    parameters = list(model.parameters())

    outputs = model(x)
    masked = outputs.masked_fill(~allowed, fill)
    after = matrix(kind, parameters, F.cross_entropy(masked, labels), masked)
    outputs = model(x)
    masked = outputs.masked_fill(~allowed, fill)
    before = matrix(kind, parameters, F.cross_entropy(masked, labels), outputs)
    alone = model(x)[:, allowed]
    expected = matrix(
        kind, parameters, F.cross_entropy(alone, (allowed.cumsum(0) - 1)[labels]), alone
    )
    assert_same(after, expected)
    assert_same(before, expected)


@both
def test_ignored_targets_and_weights_of_samples_have_the_curvature_written_out(kind):
    model, x = nn.Linear(3, 4).double(), numbers(6, 3)
    labels, weights = torch.tensor([0, -100, 3, 1, -100, 3]), torch.rand(6).double()
    parameters, kept = list(model.parameters()), labels != -100

    outputs = model(x)
    losses = F.cross_entropy(outputs, labels, reduction="none")
    actual = matrix(kind, parameters, (weights * losses).sum() / weights[kept].sum(), outputs)
    outputs = model(x[kept])
    own = -outputs.log_softmax(1)[torch.arange(4), labels[kept]]
    expected = (weights[kept] * own).sum() / weights[kept].sum()
    assert_same(actual, matrix(kind, parameters, expected, outputs))


@pytest.mark.parametrize("blocks", [lambda model: [model.parameters()], layers])
def test_one_undamped_step_solves_a_linear_regression(blocks):
    x, y = numbers(30, 4), numbers(30, 2)
    model = nn.Linear(4, 2).double()
    curvature = GGN(blocks(model))
    optimizer = CGNOptimizer(
        model.parameters(), curvature, lr=1.0, damping=0.0, tol=1e-13, atol=0.0
    )
    outputs = model(x)
    curvature.backward(F.mse_loss(outputs, y), outputs)
    optimizer.step()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1).double()], 1), y).solution
    torch.testing.assert_close(model.weight, solution[:-1].T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.bias, solution[-1], rtol=1e-9, atol=1e-9)


# What loops hold.

X, Y = numbers(32, 3), torch.arange(32) % 2
Schedule = Callable[[CGNOptimizer], object]


def train(
    steps: int,
    lr: float | Tensor = 0.1,
    schedule: Schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
    each: Callable[[nn.Module], object] = lambda model: None,
) -> tuple[nn.Module, CGNOptimizer]:
    """A small network and its optimizer, after some steps, each followed by a call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    curvature = GGN(layers(model))
    optimizer = CGNOptimizer(model.parameters(), curvature, lr=lr, maxiter=3, warm_start=0.9)
    schedule = schedule(optimizer)
    for step in range(steps):
        batch = torch.arange(16) + 16 * (step % 2)
        optimizer.zero_grad()
        outputs = model(X[batch])
        curvature.backward(F.cross_entropy(outputs, Y[batch]), outputs)
        optimizer.step()
        schedule.step()
        each(model)
    return model, optimizer


def weights(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach()


def test_averaged_weights_are_the_mean_of_the_steps_and_change_none_of_them():
    averages, visited = [], []

    def average(model: nn.Module) -> None:
        if not averages:
            averages.append(AveragedModel(model))
        averages[0].update_parameters(model)
        visited.append(weights(model))

    def schedule(optimizer: CGNOptimizer) -> SWALR:
        return SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)

    train(5, schedule=schedule, each=average)
    alone, optimizer = train(5, schedule=schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert torch.equal(weights(alone), visited[-1])
    torch.testing.assert_close(weights(averages[0].module), torch.stack(visited).mean(0), **TIGHT)
    update_bn([X], averages[0])
    batch_norm = averages[0].module[1]
    torch.testing.assert_close(batch_norm.running_mean, averages[0].module[0](X).mean(0), **TIGHT)


def test_a_tensor_as_the_rate_takes_the_steps_of_a_number():
    def halve(optimizer: CGNOptimizer) -> ExponentialLR:
        return ExponentialLR(optimizer, 0.5)

    model, optimizer = train(4, lr=torch.tensor(0.1, dtype=torch.float64), schedule=halve)
    expected, _ = train(4, lr=0.1, schedule=halve)
    assert torch.equal(weights(model), weights(expected))
    assert optimizer.param_groups[0]["lr"].item() == 0.1 / 16
    assert isinstance(optimizer.predicted, float)

    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    _, other = train(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_memory_after_50_steps_is_memory_after_10_without_the_garbage_collector():
    found, steps = {}, itertools.count(1)

    def count(model: nn.Module) -> None:
        step = next(steps)
        if step in (10, 50):
            found[step] = sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        train(50, each=count)
    finally:
        gc.enable()
    assert found[10] == found[50] > 0


def test_copying_and_evaluating_the_model_between_steps_changes_none_of_them():
    def look(model: nn.Module) -> None:
        other = copy.deepcopy(model).eval()
        with torch.no_grad():
            other(X)

    assert torch.equal(weights(train(4, each=look)[0]), weights(train(4)[0]))
