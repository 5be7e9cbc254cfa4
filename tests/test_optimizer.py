"""What `CGNOptimizer` promises."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP
from systems import counted_conversions
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from cgn_tutorial import GGN, CGNOptimizer, Hessian, Solve, cg

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXTENSION = SimpleNamespace(savefield="curvature")
EXACT = {"tol": 1e-12, "atol": 0.0, "maxiter": 1000}


class Quadratic:
    """Parameters x of given shapes, and for each a loss ½ xᵀCx − cᵀx."""

    def __init__(self, shapes, dtype=torch.float64, device="cpu"):
        random = torch.Generator().manual_seed(0)
        self.matrices, self.offsets, self.parameters = {}, {}, {}
        for i, shape in enumerate(shapes):
            n, name = math.prod(shape), f"p{i}"
            root = torch.randn(n, n, generator=random, dtype=torch.float64)
            c, x = torch.randn(2, *shape, generator=random, dtype=torch.float64)
            self.matrices[name] = (root @ root.T / n).to(device, dtype)
            self.offsets[name] = c.to(device, dtype)
            self.parameters[name] = nn.Parameter(x.to(device, dtype))

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.parameters[name]

    def product(self, name: str, vectors: Tensor) -> Tensor:
        """C times each of some vectors, `[V, *shape] → [V, *shape]`."""
        return (vectors.flatten(1) @ self.matrices[name]).view(vectors.shape)

    @torch.no_grad()
    def backward(self) -> Quadratic:
        """Leave a gradient and a curvature product on each parameter."""
        for name, p in self.parameters.items():
            p.grad = self.product(name, p.reshape(1, -1)).view(p.shape) - self.offsets[name]
            p.curvature = lambda v, name=name: self.product(name, v.view(len(v), -1)).view(v.shape)
        return self

    def newton_step(self, name: str, damping: float = 1e-2) -> Tensor:
        """The solution v of (C + λI) v = −g."""
        C, p = self.matrices[name], self[name]
        return torch.linalg.solve(C + damping * torch.eye(len(C)).to(C), -p.grad.reshape(-1)).view(
            p.shape
        )

    def values(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [p.detach().clone() for p in self.parameters.values()]


SHAPES = [(2, 3), (4,), (), (3, 1, 2)]


def only(solves: dict) -> Solve:
    """The solve of the one block."""
    (solve,) = solves.values()
    return solve


def trained(steps: int = 3, groups: Callable = lambda q: q.parameters.values(), **options) -> list:
    """The parameters of a `Quadratic` after some steps of an optimizer for groups of them."""
    quadratic = Quadratic(SHAPES)
    optimizer = CGNOptimizer(groups(quadratic), EXTENSION, **options)
    for _ in range(steps):
        quadratic.backward()
        optimizer.step()
    return quadratic.values()


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# A small network, with BackPACK's products.

INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.arange(8) % 4


LOSS = extend(nn.CrossEntropyLoss())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4)).double())


def backward(model: nn.Module, optimizer: CGNOptimizer, inputs: Tensor = INPUTS) -> Tensor:
    optimizer.zero_grad()
    loss = LOSS(model(inputs), TARGETS)
    with backpack(optimizer.bp_extension):
        loss.backward()
    return loss


def dense_blocks(extension: type) -> dict[str, Tensor]:
    """Each parameter's block of the network's GGN or Hessian, entry by entry."""
    model = network()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(name: str, p: Tensor) -> Tensor:
        return functional_call(model, parameters | {name: p}, INPUTS).reshape(-1)

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.view(8, 4), TARGETS)

    H = hessian(loss, outputs("2.bias", parameters["2.bias"]))
    blocks = {}
    for name, p in parameters.items():
        if extension is HMP:
            C = hessian(lambda q, name=name: loss(outputs(name, q)), p)
        else:
            J = jacobian(partial(outputs, name), p).reshape(len(H), -1)
            C = J.T @ H @ J
        blocks[name] = C.reshape(p.numel(), p.numel())
    return blocks


# The step.


@pytest.mark.versions
@pytest.mark.parametrize(("extension", "damping"), [(GGNMP, 1e-2), (HMP, 1.0)])
def test_step_solves_the_damped_system_with_backpacks_products(extension, damping):
    model = network()
    blocks = dense_blocks(extension)
    optimizer = CGNOptimizer(model.parameters(), extension(), lr=0.5, damping=damping, **EXACT)
    backward(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        C = blocks[name] + damping * torch.eye(p.numel(), dtype=torch.float64)
        v = torch.linalg.solve(C, -p.grad.reshape(-1)).view(p.shape)
        torch.testing.assert_close(p.detach(), before[name] + 0.5 * v, rtol=1e-8, atol=1e-10)


@pytest.mark.versions
def test_step_solves_the_damped_system_with_any_product_on_the_savefield():
    quadratic = Quadratic(SHAPES).backward()
    before = quadratic.values()
    steps = [quadratic.newton_step(name, 0.3) for name in quadratic.parameters]
    CGNOptimizer(quadratic.parameters.values(), EXTENSION, 0.5, 0.3, **EXACT).step()
    for p, x, v in zip(quadratic.values(), before, steps, strict=True):
        torch.testing.assert_close(p, x + 0.5 * v)


@pytest.mark.versions
def test_block_of_several_parameters_is_solved_as_one_system():
    quadratic = Quadratic([(2, 2), (3,), (7,)]).backward()
    x, y, both = quadratic.parameters.values()
    C = quadratic.matrices["p2"]  # couples x and y
    calls = []

    def product(vectors: Tensor) -> Tensor:
        calls.append(vectors.shape)
        return vectors @ C

    product.parameters = [y, x]
    x.curvature = y.curvature = product
    groups = [{"params": [x], "damping": 0.1}, {"params": [y, both], "damping": 0.2}]
    optimizer = CGNOptimizer(groups, EXTENSION, lr=0.5, **EXACT)
    damping = torch.diag(torch.tensor([0.2] * 3 + [0.1] * 4))
    v = torch.linalg.solve(C + damping, -torch.cat([y.grad, x.grad.reshape(-1)]))
    expected = y.detach() + 0.5 * v[:3], x.detach() + 0.5 * v[3:].view(2, 2)
    optimizer.step()
    torch.testing.assert_close((y.detach(), x.detach()), expected)
    assert set(calls) == {(1, 7)}
    assert [len(names) for names in optimizer.solves] == [2, 1]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("first", range(1, 5))
def test_order_and_grouping_of_parameters_change_no_bit(order, first):
    def groups(quadratic):
        parameters = [quadratic[f"p{i}"] for i in order]
        parts = parameters[:first], parameters[first:]
        return [{"params": part} for part in parts if part]

    assert_equal(trained(groups=groups), trained())


def test_frozen_and_unused_parameters_stay_as_they_are():
    model = network()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    optimizer = CGNOptimizer([*model.parameters(), unused], GGNMP(), weight_decay=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        backward(model, optimizer)
        optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]
    assert torch.equal(unused, torch.ones(3))


def test_groups_have_their_own_hyperparameters():
    quadratic = Quadratic(SHAPES).backward()
    before = quadratic.values()
    settings = {"p0": (0.1, 0.5), "p1": (0.0, 0.5), "p2": (0.7, 1e-2), "p3": (1.0, 3.0)}
    steps = {name: lr * quadratic.newton_step(name, d) for name, (lr, d) in settings.items()}
    groups = [
        {"params": [quadratic[name]], "lr": lr, "damping": damping}
        for name, (lr, damping) in settings.items()
    ]
    CGNOptimizer(groups, EXTENSION, **EXACT).step()
    for p, x, v in zip(quadratic.values(), before, steps.values(), strict=True):
        torch.testing.assert_close(p, x + v)


@pytest.mark.versions
def test_added_groups_are_trained_like_the_first():
    def added(quadratic):
        first, *others = quadratic.parameters.values()
        optimizer = CGNOptimizer([first], EXTENSION)
        for p in others:
            optimizer.add_param_group({"params": p})
        return optimizer.param_groups

    assert_equal(trained(groups=added), trained())


@pytest.mark.versions
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2.0, 6, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    ],
    ids=["StepLR", "CosineAnnealingLR", "OneCycleLR", "LambdaLR"],
)
def test_learning_rate_schedulers_set_the_length_of_the_step(scheduler):
    quadratic = Quadratic([(4,)])
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, lr=1.0, **EXACT)
    schedule = scheduler(optimizer)
    rates = []
    for _ in range(5):
        quadratic.backward()
        x, v = quadratic.values()[0], quadratic.newton_step("p0")
        optimizer.step()
        rates.append(schedule.get_last_lr()[0])
        torch.testing.assert_close(quadratic.values()[0], x + rates[-1] * v)
        schedule.step()
    assert len(set(rates)) == 5


@pytest.mark.versions
def test_closure_runs_with_gradients_and_its_loss_is_returned():
    model, expected = network(), network()
    optimizer = CGNOptimizer(model.parameters(), GGNMP())
    loss = optimizer.step(lambda: backward(model, optimizer))
    other = CGNOptimizer(expected.parameters(), GGNMP())
    assert torch.equal(loss, backward(expected, other))
    other.step()
    assert_equal(list(model.parameters()), list(expected.parameters()))
    assert other.step(lambda: 3.0 if torch.is_grad_enabled() and not other.zero_grad() else 0) == 3


@pytest.mark.versions
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.to(memory_format=torch.channels_last),
        lambda p: p.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        lambda p: torch.stack([p, p], -1)[..., 0],
    ],
    ids=["channels last", "permuted", "strided"],
)
def test_memory_layout_changes_no_bit(change):
    plain, other = Quadratic([(2, 3, 2, 2)]), Quadratic([(2, 3, 2, 2)])
    other["p0"].data = change(other["p0"].data)
    assert not other["p0"].is_contiguous()
    strides = other["p0"].stride()
    for quadratic in (plain, other):
        optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION)
        quadratic.backward()
        optimizer.step()
    assert torch.equal(plain["p0"], other["p0"])
    assert other["p0"].stride() == strides


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_steps_in_the_dtype_of_the_parameters(dtype):
    reference, quadratic = Quadratic([(4,)]).backward(), Quadratic([(4,)], dtype).backward()
    for q in (reference, quadratic):
        CGNOptimizer(q.parameters.values(), EXTENSION, lr=1.0, damping=1.0, tol=1e-2).step()
    assert quadratic["p0"].dtype == dtype
    error = (quadratic["p0"].double() - reference["p0"]).norm() / reference["p0"].norm()
    assert error <= 1e-2 + 20 * torch.finfo(dtype).eps


@pytest.mark.versions
def test_empty_parameters_are_no_obstacle():
    quadratic = Quadratic([(0, 3), (4,)]).backward()
    before = quadratic["p1"].detach().clone()
    CGNOptimizer(quadratic.parameters.values(), EXTENSION).step()
    assert not torch.equal(quadratic["p1"], before)


# Weight decay.


@pytest.mark.versions
def test_weight_decay_equals_the_penalty_in_the_loss():
    """Both ways round, with products by autograd: of the loss alone, and with ½ μ‖x‖² in it."""
    final = []
    for penalty, weight_decay in [(0.0, 0.2), (0.2, 0.0)]:
        model = network()
        parameters = list(model.parameters())
        optimizer = CGNOptimizer(
            parameters, EXTENSION, damping=1.0, weight_decay=weight_decay, **EXACT
        )
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(INPUTS), TARGETS)
            loss = loss + penalty / 2 * sum(p.square().sum() for p in parameters)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.detach()
                p.curvature = lambda v, p=p, g=g: torch.stack(
                    [torch.autograd.grad(g, p, u, retain_graph=True)[0] for u in v]
                )
            optimizer.step()
        final.append([p.detach() for p in parameters])
    torch.testing.assert_close(*final, rtol=1e-10, atol=1e-12)


# Dead units, zero gradients.


def test_dead_units_do_not_move():
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).double())
    model[0].bias.data[:2] = -100  # units 0 and 1 are never active
    dead = [model[0].weight[:2].clone(), model[0].bias[:2].clone(), model[2].weight[:, :2].clone()]
    optimizer = CGNOptimizer(model.parameters(), GGNMP())
    before = model[0].weight.detach().clone()
    for _ in range(3):
        backward(model, optimizer)
        optimizer.step()
    assert_equal([model[0].weight[:2], model[0].bias[:2], model[2].weight[:, :2]], dead)
    assert not torch.equal(model[0].weight, before)


def test_zero_gradients_cost_no_product_and_move_nothing():
    quadratic = Quadratic(SHAPES).backward()
    before = quadratic.values()
    for p in quadratic.parameters.values():
        p.grad.zero_()
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, damping=0.0)
    optimizer.step()
    assert_equal(quadratic.values(), before)
    assert [(s.products, s.reason) for s in optimizer.solves.values()] == [(0, "converged")] * 4


# Copies, pickles, checkpoints.


@pytest.mark.versions
def test_deepcopy_keeps_the_extension_and_takes_the_same_steps():
    quadratic = Quadratic(SHAPES)
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, lr=0.3)
    quadratic.backward()
    optimizer.step()
    twin = Quadratic(SHAPES)
    twin.parameters, copied = copy.deepcopy((quadratic.parameters, optimizer))
    assert copied.bp_extension.savefield == EXTENSION.savefield
    assert copied.param_groups[0]["params"][0] is twin["p0"] is not quadratic["p0"]
    quadratic.backward()
    optimizer.step()
    assert not torch.equal(quadratic["p0"], twin["p0"])
    twin.backward()
    copied.step()
    assert_equal(twin.values(), quadratic.values())


@pytest.mark.versions
def test_deepcopy_works_with_backpacks_extensions():
    model = network()
    optimizer = CGNOptimizer(model.parameters(), GGNMP(), lr=0.3)
    twin, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, copied)):
        backward(m, o)
        o.step()
    assert_equal(list(twin.parameters()), list(model.parameters()))


@pytest.mark.versions
@pytest.mark.parametrize("kind", [GGN, Hessian])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_takes_the_curvature_of_the_copied_model(kind, copied):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4)).double()
    optimizer = CGNOptimizer(model.parameters(), kind([model.parameters()]), lr=0.3)
    pairs = [(model, optimizer), copied((model, optimizer))]
    for m, o in pairs:
        for _ in range(2):
            o.zero_grad()
            z = m(INPUTS)
            o.bp_extension.backward(nn.functional.cross_entropy(z, TARGETS), z)
            o.step()
    assert_equal(list(pairs[1][0].parameters()), list(model.parameters()))
    assert pairs[1][1].bp_extension is not optimizer.bp_extension


@pytest.mark.versions
def test_state_dict_holds_plain_values():
    optimizer = CGNOptimizer(network().named_parameters(), GGNMP(), maxiter=None)
    state = optimizer.state_dict()
    assert state["state"] == {}
    for value in state["param_groups"][0].values():
        assert value is None or isinstance(value, int | float | str | list)
    assert set(optimizer.defaults) == set(state["param_groups"][0]) - {"params", "param_names"}


@pytest.mark.versions
@pytest.mark.parametrize("stopped", range(5))
def test_training_resumed_from_a_checkpoint_continues_to_the_same_bits(stopped):
    def session():
        model = network()
        optimizer = CGNOptimizer(model.named_parameters(), GGNMP(), lr=0.5)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    def train(model, optimizer, scheduler, steps):
        for step in steps:
            backward(model, optimizer, INPUTS * (1 + step))
            optimizer.step()
            scheduler.step()
        return list(model.parameters())

    expected = train(*session(), range(5))
    checkpoint = io.BytesIO()
    parts = session()
    train(*parts, range(stopped))
    torch.save([part.state_dict() for part in parts], checkpoint)
    checkpoint.seek(0)
    resumed = session()
    for part, state in zip(resumed, torch.load(checkpoint, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert_equal(train(*resumed, range(stopped, 5)), expected)


# Faults: everything `step()` can see raises before anything moves.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: delattr(p, "curvature"), r"no curvature product .*: call loss.backward\(\)"),
        (lambda p: p.grad.fill_(math.nan), "b has numbers that are not finite: up to nan"),
        (
            lambda p: p.grad.view(-1)[0].fill_(math.inf),
            "b has numbers that are not finite: up to inf",
        ),
        (
            lambda p: setattr(p, "curvature", lambda v: math.nan * v),
            r"At iteration 1, A\(p\) has numbers that are not finite",
        ),
        (
            lambda p: setattr(p, "curvature", lambda v: math.inf * v),
            r"At iteration 1, A\(p\) has numbers that are not finite",
        ),
        (lambda p: setattr(p, "curvature", lambda v: v[0]), r"shape .*\[1, 3, 1, 2\].*\[3, 1, 2\]"),
        (
            lambda p: setattr(p, "curvature", lambda v: v.flatten(1)),
            r"but has torch.Size\(\[1, 6\]\)",
        ),
        (lambda p: setattr(p, "curvature", lambda v: v.float()), "but has torch.float32"),
        (lambda p: setattr(p, "curvature", lambda v: v.to("meta")), "but has meta"),
        (lambda p: setattr(p, "curvature", lambda v: None), "must be a tensor, not NoneType"),
        (lambda p: setattr(p, "curvature", "a string"), "not callable"),
    ],
)
def test_faults_raise_naming_the_parameter_and_change_nothing(damage, message):
    quadratic = Quadratic(SHAPES).backward()
    optimizer = CGNOptimizer(quadratic.parameters.items(), EXTENSION)
    before = quadratic.values()
    damage(quadratic["p3"])
    with pytest.raises(RuntimeError, match=f"p3.*{message}"):
        optimizer.step()
    assert_equal(quadratic.values(), before)

    quadratic.backward()  # the next batch goes on from there
    optimizer.step()
    assert_equal(quadratic.values(), trained(1))


def test_message_names_the_remedy_and_unnamed_parameters_by_their_place():
    quadratic = Quadratic([(2, 3), (4,)])
    quadratic["p1"].grad = torch.ones_like(quadratic["p1"])
    groups = [{"params": [p]} for p in quadratic.parameters.values()]
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 1 \(shape \(4,\)\) has a gradient.*with back"
    ):
        CGNOptimizer(groups, EXTENSION).step()


def test_product_serves_one_step():
    quadratic = Quadratic(SHAPES).backward()
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION)
    optimizer.step()
    before = quadratic.values()
    with pytest.raises(RuntimeError, match="A product serves one step"):
        optimizer.step()
    assert_equal(quadratic.values(), before)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda x, y, o: setattr(y, "grad", None), RuntimeError, "y has no gradient"),
        (
            lambda x, y, o: delattr(y, "curvature"),
            RuntimeError,
            "y has a gradient, but no curvature product",
        ),
        (
            lambda x, y, o: setattr(y, "curvature", torch.clone),
            RuntimeError,
            "y has a gradient, but no",
        ),
        (lambda x, y, o: o.param_groups.pop(), RuntimeError, r"of shape \(3,\) is not held by"),
        (lambda x, y, o: o.param_groups[1].update(tol=0.5), ValueError, r"tol .* \[0.1, 0.5\]"),
        (lambda x, y, o: o.param_groups[1].update(maxiter=5), ValueError, "maxiter .* x, y"),
        (lambda x, y, o: o.param_groups[1].update(lr=2.0), ValueError, r"lr .* \[0.1, 2.0\]"),
        (lambda x, y, o: o.param_groups[1].update(warm_start=0.5), ValueError, "warm_start must"),
        (lambda x, y, o: o.param_groups[1].update(max_length=1.0), ValueError, "max_length must"),
        (
            lambda x, y, o: delattr(x.curvature, "parameters"),
            RuntimeError,
            "No Newton step for x: .*1x2",
        ),
    ],
)
def test_blocks_that_do_not_fit_raise_and_change_nothing(damage, error, message):
    quadratic = Quadratic([(2,), (3,)]).backward()
    x, y = quadratic.parameters.values()

    def product(vectors: Tensor) -> Tensor:
        return vectors @ torch.ones(5, 5, dtype=torch.float64)

    product.parameters = [x, y]
    x.curvature = y.curvature = product
    groups = [{"params": [("x", x)]}, {"params": [("y", y)]}]
    optimizer = CGNOptimizer(groups, EXTENSION)
    before = quadratic.values()
    damage(x, y, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_equal(quadratic.values(), before)


@pytest.mark.versions
def test_a_sparse_gradient_is_refused():
    p = nn.Embedding(4, 2, sparse=True).weight
    nn.functional.embedding(torch.tensor([1]), p, sparse=True).sum().backward()
    p.curvature = torch.clone
    with pytest.raises(RuntimeError, match="has a sparse gradient: use a layer with sparse=False"):
        CGNOptimizer([p], EXTENSION).step()


@pytest.mark.versions
def test_complex_parameters_are_refused():
    real, imaginary = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2) * 1j)
    with pytest.raises(TypeError, match=r"parameter 1 .* shape \(2,\), is .*complex64: .*view_as"):
        CGNOptimizer([real, imaginary], EXTENSION)
    optimizer = CGNOptimizer([real], EXTENSION)
    with pytest.raises(TypeError, match=r"parameter 0 .*complex64"):
        optimizer.add_param_group({"params": [imaginary]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("result", [lambda v: v[:, :1], lambda v: v.sum(), lambda v: v[0]])
def test_products_of_larger_blocks_must_return_the_shape_of_their_argument(result):
    quadratic = Quadratic([(2,)]).backward()
    x = quadratic["p0"]

    def product(vectors: Tensor) -> Tensor:
        return result(vectors)

    product.parameters = [x]
    x.curvature = product
    with pytest.raises(RuntimeError, match=r"product must have shape .*\[1, 2\]"):
        CGNOptimizer([x], EXTENSION).step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", math.nan),
        ("damping", -1e-3),
        ("damping", math.inf),
        ("weight_decay", -1.0),
        ("maxiter", -1),
        ("maxiter", 0.5),
        ("tol", -0.1),
        ("atol", math.nan),
        ("negative_curvature", "abs"),
        ("warm_start", 1.1),
        ("max_length", -1.0),
        ("max_length", None),
    ],
)
def test_options_set_out_of_range_between_steps_raise_and_change_nothing(name, value):
    quadratic = Quadratic(SHAPES).backward()
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION)
    optimizer.param_groups[0][name] = value
    before = quadratic.values()
    with pytest.raises(ValueError, match=f"{name} must be .*, but is {value!r}"):
        optimizer.step()
    assert_equal(quadratic.values(), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", math.nan),
        ("damping", -1e-3),
        ("damping", math.inf),
        ("weight_decay", -1.0),
        ("maxiter", -1),
        ("maxiter", 0.5),
        ("tol", -0.1),
        ("atol", math.nan),
        ("negative_curvature", "abs"),
    ],
)
def test_hyperparameters_out_of_range_raise_an_error_that_names_them(name, value):
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        CGNOptimizer([p], EXTENSION, **{name: value})
    optimizer = CGNOptimizer([p], EXTENSION)
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        optimizer.add_param_group({"params": [q], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("extension", [None, "ggnmp", GGNMP, SimpleNamespace(savefield=3)])
def test_extensions_without_a_savefield_are_refused(extension):
    with pytest.raises(TypeError, match="bp_extension must have a savefield"):
        CGNOptimizer([nn.Parameter(torch.ones(2))], extension)


# Memory.


@pytest.mark.versions
def test_products_are_released_after_the_step():
    model = network()
    optimizer = CGNOptimizer(model.parameters(), GGNMP())
    backward(model, optimizer)
    products = [weakref.ref(p.ggnmp) for p in model.parameters()]
    optimizer.step()
    gc.collect()
    assert [product() for product in products] == [None] * 4
    assert not any(hasattr(p, "ggnmp") for p in model.parameters())


@pytest.mark.versions
def test_memory_after_20_steps_is_memory_after_2():
    def tensors() -> tuple[int, int]:
        gc.collect()
        found = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        return len(found), sum(t.numel() for t in found)

    model = network()
    optimizer = CGNOptimizer(model.parameters(), GGNMP(), maxiter=2)
    after = {}
    for step in range(20):
        backward(model, optimizer)
        optimizer.step()
        after[step] = tensors() if step in (1, 19) else None
    assert after[1] == after[19]


@pytest.mark.versions
@pytest.mark.gpu
def test_gpu_memory_after_200_steps_is_memory_after_2():
    quadratic = Quadratic(SHAPES, device="cuda")
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION)
    after = []
    for _ in range(200):
        quadratic.backward()
        optimizer.step()
        after.append(torch.cuda.memory_allocated())
    assert after[1] == after[199]


# Diagnostics.


def test_solves_tell_what_each_block_took():
    quadratic = Quadratic(SHAPES).backward()
    optimizer = CGNOptimizer(quadratic.parameters.items(), EXTENSION, damping=0.1, tol=1e-3)
    assert optimizer.solves == {}
    expected = []
    for name, p in quadratic.parameters.items():
        C = quadratic.matrices[name] + 0.1 * torch.eye(p.numel(), dtype=torch.float64)
        result = cg(C.matmul, -p.grad.reshape(-1), tol=1e-3)
        expected.append((name, result))
    optimizer.step()
    for (names, solve), (name, (_, e)) in zip(optimizer.solves.items(), expected, strict=True):
        assert (names, solve.products, solve.reason) == ((name,), e.products, "converged")
        assert solve.residuals == pytest.approx(e.residuals, rel=1e-6, abs=1e-12)
        assert solve.decrease == pytest.approx(e.decrease, rel=1e-6)
        assert len(solve.residuals) == solve.products + 1


@pytest.mark.versions
def test_solves_plot_in_three_lines():
    plt = pytest.importorskip("matplotlib.pyplot")
    quadratic = Quadratic(SHAPES).backward()
    optimizer = CGNOptimizer(quadratic.parameters.items(), EXTENSION)
    optimizer.step()
    fig, ax = plt.subplots()
    for names, solve in optimizer.solves.items():
        ax.semilogy(solve.residuals, label=", ".join(names))
    assert ax.get_legend_handles_labels()[1] == ["p0", "p1", "p2", "p3"]
    plt.close(fig)


def test_solves_tell_of_negative_curvature_and_of_maxiter():
    quadratic = Quadratic([(4,), (4,)]).backward()
    quadratic["p0"].curvature = torch.neg
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, maxiter=1)
    optimizer.step()
    assert [solve.reason for solve in optimizer.solves.values()] == [
        "negative curvature",
        "maxiter",
    ]


# Waits for the device.


@pytest.mark.versions
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_waits_once_per_product_and_twice_per_block(weight_decay, device):
    quadratic = Quadratic(SHAPES, device=device).backward()
    optimizer = CGNOptimizer(
        quadratic.parameters.items(), EXTENSION, tol=1e-6, weight_decay=weight_decay
    )
    with counted_conversions() as conversions:
        optimizer.step()
    assert 0 < len(conversions) <= sum(solve.products + 2 for solve in optimizer.solves.values())


# What a step promises, and its length.


def model_value(quadratic: Quadratic, name: str, v: Tensor, damping: float) -> float:
    """gᵀv + ½ vᵀ(C + λI)v."""
    v, g = v.reshape(-1), quadratic[name].grad.reshape(-1)
    return (g @ v + v @ (quadratic.matrices[name] @ v + damping * v) / 2).item()


@pytest.mark.parametrize("warm_start", [0.0, 0.9])
@pytest.mark.parametrize("max_length", [math.inf, 0.3])
def test_predicted_is_the_models_value_where_the_step_ended(warm_start, max_length):
    quadratic = Quadratic(SHAPES)
    options = {"damping": 0.1, "maxiter": 2, "warm_start": warm_start, "max_length": max_length}
    optimizer = CGNOptimizer(quadratic.parameters.items(), EXTENSION, lr=0.7, **options)
    for _ in range(3):
        quadratic.backward()
        before = quadratic.values()
        optimizer.step()
        moves = [p - x for p, x in zip(quadratic.values(), before, strict=True)]
        named = zip(quadratic.parameters, moves, strict=True)
        expected = sum(model_value(quadratic, name, move, 0.1) for name, move in named)
        assert optimizer.predicted == pytest.approx(expected, rel=1e-9)
        assert optimizer.predicted < 0


def test_a_long_step_is_shortened_to_max_length_in_its_own_direction():
    (free, bound), steps = [Quadratic(SHAPES).backward() for _ in range(2)], []
    for quadratic, options in ((free, {}), (bound, {"max_length": 0.01})):
        before = quadratic.values()
        CGNOptimizer(quadratic.parameters.values(), EXTENSION, **EXACT, **options).step()
        steps.append(
            torch.cat([(p - x).flatten() for p, x in zip(quadratic.values(), before, strict=True)])
        )
    shrink = steps[1].norm() / steps[0].norm()
    assert shrink < 0.5
    torch.testing.assert_close(steps[1], shrink * steps[0])
    damped = torch.block_diag(*bound.matrices.values()) + 1e-2 * torch.eye(len(steps[1]))
    assert (steps[1] @ damped @ steps[1]).sqrt().item() == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("warm_start", [0.0, 0.9])
@pytest.mark.parametrize("matrix", ["negative", "null", "indefinite", "definite"])
def test_max_length_holds_for_curvature_of_any_sign(matrix, warm_start):
    random = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=random, dtype=torch.float64)).Q
    signs = {"negative": -1.0, "null": 0.0, "definite": 1.0}
    eigenvalues = torch.linspace(-1, 1, 6).double() if matrix == "indefinite" else signs[matrix]
    C = Q * torch.as_tensor(eigenvalues) @ Q.T
    quadratic = Quadratic([(6,), (2,)])
    options = {"damping": 0.0, "max_length": 1e-3, "warm_start": warm_start}
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, lr=1.0, **options)
    for _ in range(3):
        quadratic.backward()
        quadratic["p0"].curvature = lambda v: v @ C
        before = quadratic.values()
        optimizer.step()
        step = quadratic.values()[0] - before[0]
        assert step.any()
        assert (step @ C @ step).abs() <= 1.001e-6
        if matrix in ("negative", "null") and not warm_start:  # a multiple of the gradient
            assert step.norm() <= 1.001e-3


def test_max_length_is_an_option_of_groups():
    quadratic = Quadratic(SHAPES)
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, lr=1.0)
    quadratic.backward()
    optimizer.step()
    free = -optimizer.predicted
    restored = CGNOptimizer(quadratic.parameters.values(), EXTENSION, max_length=1e-3)
    state = restored.state_dict()
    assert state["param_groups"][0]["max_length"] == 1e-3
    optimizer.load_state_dict(state)
    quadratic.backward()
    optimizer.step()
    assert -optimizer.predicted < free / 10


def test_max_length_must_agree_over_the_blocks_of_a_step():
    quadratic = Quadratic(SHAPES).backward()
    groups = [
        {"params": [p], "max_length": 1.0 + i} for i, p in enumerate(quadratic.parameters.values())
    ]
    before = quadratic.values()
    with pytest.raises(ValueError, match="max_length must agree over all blocks"):
        CGNOptimizer(groups, EXTENSION).step()
    assert_equal(quadratic.values(), before)


def test_a_short_step_is_not_changed_by_max_length():
    assert_equal(trained(max_length=1e9), trained())


@pytest.mark.parametrize("max_length", [0.0, -1.0, math.nan])
def test_max_length_must_be_positive(max_length):
    with pytest.raises(ValueError, match=f"max_length must be greater than 0, but is {max_length}"):
        CGNOptimizer([nn.Parameter(torch.ones(2))], EXTENSION, max_length=max_length)


def test_warm_start_lets_solves_of_one_iteration_carry_on():
    """On a quadratic whose gradient is held fixed, the steps approach the exact solution."""
    quadratic = Quadratic([(6,)]).backward()
    exact = quadratic.newton_step("p0")
    optimizer = CGNOptimizer(
        quadratic.parameters.values(), EXTENSION, lr=1e-9, maxiter=1, tol=1e-9, warm_start=1.0
    )
    errors = []
    for _ in range(200):
        quadratic["p0"].curvature = lambda v: quadratic.product("p0", v)
        optimizer.step()
        errors.append((optimizer.state[quadratic["p0"]]["v"] - exact).norm() / exact.norm())
    assert errors[-1] < errors[0] / 3
    assert only(optimizer.solves).products == 2


def test_warm_start_stops_at_once_where_the_last_step_solves_the_system():
    quadratic = Quadratic([(6,)]).backward()
    options = {"warm_start": 1.0, "lr": 0.0, "tol": 1e-8}
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, **options)
    for _ in range(2):
        quadratic.backward()
        optimizer.step()
    assert only(optimizer.solves).products == 1
    assert only(optimizer.solves).converged


@pytest.mark.versions
def test_warm_start_survives_a_checkpoint(tmp_path):
    def steps(quadratic, optimizer, n):
        for _ in range(n):
            quadratic.backward()
            optimizer.step()

    whole, first, second = (Quadratic(SHAPES) for _ in range(3))
    optimizers = [
        CGNOptimizer(q.parameters.values(), EXTENSION, warm_start=0.9, maxiter=2)
        for q in (whole, first, second)
    ]
    steps(whole, optimizers[0], 4)
    steps(first, optimizers[1], 2)
    torch.save(optimizers[1].state_dict(), tmp_path / "checkpoint")
    optimizers[2].load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    with torch.no_grad():
        for p, x in zip(second.parameters.values(), first.values(), strict=True):
            p.copy_(x)
    steps(second, optimizers[2], 2)
    assert_equal(second.values(), whole.values())


@pytest.mark.parametrize("warm_start", [-0.1, 1.1, math.nan])
def test_warm_start_is_a_share(warm_start):
    with pytest.raises(ValueError, match=f"warm_start must be from 0 to 1, but is {warm_start}"):
        CGNOptimizer([nn.Parameter(torch.ones(2))], EXTENSION, warm_start=warm_start)


def test_a_warm_start_that_leads_uphill_is_dropped():
    quadratic = Quadratic([(30,)])
    optimizer = CGNOptimizer(
        quadratic.parameters.values(), EXTENSION, lr=1.0, warm_start=1.0, maxiter=3, tol=1e-9
    )
    quadratic.backward()
    optimizer.step()
    quadratic.backward()
    quadratic["p0"].grad = torch.zeros(30, dtype=torch.float64)
    before = quadratic.values()
    optimizer.step()
    assert optimizer.predicted == 0
    assert only(optimizer.solves).products == 4  # one for the start, and three from there
    assert_equal(quadratic.values(), before)


def test_a_block_that_sits_out_a_step_starts_from_zero_again():
    quadratic = Quadratic([(6,), (6,)])
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, warm_start=0.9)
    for _ in range(2):
        quadratic.backward()
        optimizer.step()
        quadratic["p1"].requires_grad_(False)
    assert list(optimizer.state) == [quadratic["p0"]]


def test_a_warm_start_that_overflows_fails_once():
    quadratic = Quadratic([(6,)])
    optimizer = CGNOptimizer(quadratic.parameters.values(), EXTENSION, warm_start=1.0)
    for _ in range(2):
        quadratic.backward()
        optimizer.step()
    optimizer.state[quadratic["p0"]]["v"] *= 1e200
    quadratic.backward()
    before = quadratic.values()
    with pytest.raises(RuntimeError, match="the next batch go on from here"):
        optimizer.step()
    assert_equal(quadratic.values(), before)
    quadratic.backward()
    optimizer.step()


# What cannot be moved, or needs no move.


@pytest.mark.versions
def test_a_parameter_whose_entries_share_memory_is_refused_before_anything_moves():
    quadratic = Quadratic([(4,), (3,)])
    shared = nn.Parameter(torch.ones(1, dtype=torch.float64).expand(3))
    quadratic.parameters["p1"] = shared
    optimizer = CGNOptimizer(quadratic.parameters.items(), EXTENSION)
    quadratic.backward()
    before = quadratic.values()
    with pytest.raises(RuntimeError, match=r"p1 holds several entries .* \.clone\(\)"):
        optimizer.step()
    assert_equal(quadratic.values(), before)


def test_a_zeroed_gradient_without_a_product_is_passed_over():
    """As of heads trained in turn, with zero_grad(set_to_none=False)."""
    quadratic = Quadratic([(4,), (3,)]).backward()
    del quadratic["p1"].curvature
    quadratic["p1"].grad.zero_()
    before = quadratic.values()
    CGNOptimizer(quadratic.parameters.values(), EXTENSION).step()
    assert not torch.equal(quadratic.values()[0], before[0])
    assert torch.equal(quadratic.values()[1], before[1])


def test_blocks_show_what_a_step_would_solve_and_change_nothing():
    quadratic = Quadratic(SHAPES).backward()
    optimizer = CGNOptimizer(quadratic.parameters.items(), EXTENSION)
    before = quadratic.values()
    blocks = optimizer.blocks()
    assert [block.names for block in blocks] == [("p0",), ("p1",), ("p2",), ("p3",)]
    for block in blocks:
        (p,) = block.parameters
        C = quadratic.matrices[block.names[0]]
        torch.testing.assert_close(block(torch.eye(p.numel(), dtype=torch.float64)), C)
    optimizer.step()
    assert not torch.equal(quadratic.values()[0], before[0])


@pytest.mark.versions
def test_a_gradient_scaler_is_refused_with_the_remedy():
    model = network()
    optimizer = CGNOptimizer(model.parameters(), GGNMP())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    loss = scaler.scale(LOSS(model(INPUTS), TARGETS))
    with backpack(optimizer.bp_extension):
        loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="from the loss itself"):
        scaler.step(optimizer)
    assert_equal([p.detach() for p in model.parameters()], before)
    backward(model, optimizer)
    optimizer.step()  # the scaler has left nothing behind


@pytest.mark.versions
def test_a_product_over_a_block_may_differentiate():
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def product(vectors: Tensor) -> Tensor:
        y = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(y.cosh().sum(), y, create_graph=True)
        return torch.stack([torch.autograd.grad(g, y, v, retain_graph=True)[0] for v in vectors])

    product.parameters = [x]
    x.curvature, x.grad = product, x.detach().sinh()
    CGNOptimizer([x], EXTENSION, lr=1.0, damping=0.0, **EXACT).step()
    newton = 1 - math.tanh(1.0)
    torch.testing.assert_close(x.detach(), torch.full_like(x, newton))


@pytest.mark.versions
@pytest.mark.parametrize("order", [1, -1])
def test_a_block_may_mix_dtypes_in_any_order(order):
    torch.manual_seed(0)
    first, last = nn.Linear(3, 5), nn.Linear(5, 4).double()
    parameters = [*first.parameters(), *last.parameters()]
    curvature = GGN([parameters[::order]])
    optimizer = CGNOptimizer(parameters, curvature, lr=1.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        z = last(first(INPUTS.float()).sigmoid().double())
        loss = nn.functional.cross_entropy(z, TARGETS)
        curvature.backward(loss, z)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    assert [p.dtype for p in parameters] == [torch.float32] * 2 + [torch.float64] * 2
