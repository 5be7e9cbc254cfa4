"""Curvature products by autograd against BackPACK's, and against dense matrices of torch.func."""

from __future__ import annotations

import doctest
import gc
import io
import re
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.curvature import (
    GGN,
    BlockProduct,
    Curvature,
    Hessian,
    check_products,
    layers,
    restrict,
)
from cgn_tutorial.pages import make_model

PRECISION = {torch.float32: 1e-5, torch.float64: 1e-12}
BLOCKS: dict[str, Callable[[nn.Module], object]] = {
    "parameters": lambda model: model.parameters(),
    "layers": layers,
    "network": lambda model: [model.parameters()],
    "own": lambda model: [list(model.parameters())[::-2], list(model.parameters())[-2::-2]],
}
# torch.func brings some of its forward-mode formulas as scripts.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated")

Inputs = Tensor | tuple[Tensor, ...]
LossFunction = Callable[[Tensor], Tensor]


@pytest.fixture(params=[GGN, Hessian])
def curvature_type(request: pytest.FixtureRequest) -> type[Curvature]:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=PRECISION, ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)  # BackPACK's AvgPool2d computes in no other
    yield request.param
    torch.set_default_dtype(before)


def assert_close(result: Tensor, expected: Tensor, precision: float = 1e-11) -> None:
    assert result.dtype == expected.dtype
    assert (result - expected).norm() <= precision * expected.norm()


def evaluate(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def products_of(
    curvature: Curvature, model: nn.Module, inputs: Inputs, loss_function: LossFunction
) -> list[BlockProduct]:
    z = evaluate(model, inputs)
    return curvature.backward(loss_function(z), z)


def matrix_of(product: BlockProduct) -> Tensor:
    n = sum(p.numel() for p in product.parameters)
    return product(torch.eye(n, dtype=product.parameters[0].dtype))


# ------------------------------------------------------------------------------------- BackPACK

IMAGES = (6, 2, 6, 6)
PUBLISHED: dict[str, Callable[[], list[nn.Module]]] = {
    "Linear": lambda: [nn.Flatten(), nn.Linear(72, 5), nn.Linear(5, 3)],
    "Conv2d": lambda: [nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 2, 2, 1, 2), nn.Flatten()],
    "MaxPool2d": lambda: [nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), nn.Flatten()],
    "AvgPool2d": lambda: [nn.Conv2d(2, 2, 3), nn.AvgPool2d(2), nn.Flatten()],
    "ZeroPad2d": lambda: [nn.Conv2d(2, 2, 3), nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3), nn.Flatten()],
    "Dropout": lambda: [nn.Flatten(), nn.Linear(72, 5), nn.Dropout(0.4), nn.Linear(5, 3)],
    "ReLU": lambda: [nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 3)],
    "Sigmoid": lambda: [nn.Flatten(), nn.Linear(72, 5), nn.Sigmoid(), nn.Linear(5, 3)],
    "Tanh": lambda: [nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3)],
    "BatchNorm1d": lambda: [nn.Flatten(), nn.Linear(72, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)],
}


def assert_agreement_with_backpack(
    model: nn.Module,
    inputs: Tensor,
    loss_function: nn.Module,
    targets: Tensor,
    curvature_type: type[Curvature],
) -> None:
    plain = deepcopy(model)
    extension = {GGN: GGNMP, Hessian: HMP}[curvature_type]()
    extend(model)
    extend(loss_function)
    random_state = torch.get_rng_state()
    with backpack(extension):
        loss_function(model(inputs), targets).backward()
    torch.set_rng_state(random_state)
    z = plain(inputs)
    products = curvature_type(plain.parameters()).backward(F_loss(loss_function, z, targets), z)
    for p, product in zip(model.parameters(), products, strict=True):
        (q,) = product.parameters
        assert_close(q.grad, p.grad, PRECISION[p.dtype])
        v = torch.randn(3, *p.shape, dtype=p.dtype)
        expected = getattr(p, extension.savefield)(v).flatten(1)
        assert_close(product(v.flatten(1)), expected, PRECISION[p.dtype])


def F_loss(loss_function: nn.Module, z: Tensor, targets: Tensor) -> Tensor:
    """The loss by a fresh module, without BackPACK's hooks."""
    return type(loss_function)()(z, targets)


@pytest.mark.parametrize("loss_type", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize(
    ("name", "training"),
    [
        (name, training)
        for name in PUBLISHED
        for training in (True, False)
        # Before BatchNorm in training mode, a bias has no curvature to compare by its size.
        if not (training and name == "BatchNorm1d")
    ],
)
def test_products_and_gradients_agree_with_backpack(
    name: str,
    training: bool,
    loss_type: type[nn.Module],
    dtype: torch.dtype,
    curvature_type: type[Curvature],
) -> None:
    model = nn.Sequential(*PUBLISHED[name]()).to(dtype).train(training)
    inputs = torch.randn(IMAGES, dtype=dtype)
    shape = model(inputs).shape
    targets = (
        torch.randint(shape[1], shape[:1])
        if loss_type is nn.CrossEntropyLoss
        else torch.randn(shape, dtype=dtype)
    )
    assert_agreement_with_backpack(model, inputs, loss_type(), targets, curvature_type)


@pytest.mark.versions
def test_products_of_the_tutorial_model_agree_with_backpack(
    dtype: torch.dtype, curvature_type: type[Curvature]
) -> None:
    inputs, targets = torch.randn(16, 1, 28, 28, dtype=dtype), torch.randint(10, (16,))
    model, loss_function = make_model().to(dtype), nn.CrossEntropyLoss()
    assert_agreement_with_backpack(model, inputs, loss_function, targets, curvature_type)


# ------------------------------------------------------------------------------- dense matrices


class ResidualNet(nn.Module):
    """Convolutions with BatchNorm around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.GELU())
        self.branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.silu(x + self.branch(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM, and the mean of what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).mean(1)


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(3, 2), nn.Linear(2, 2), nn.Linear(2, 3)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(x))))


class TiedKernels(nn.Module):
    """A kernel in two convolutions, and another that something else uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.mixed = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.mixed(x).mean((2, 3)) * self.mixed.weight.mean()


class TwoInputs(nn.Module):
    """A function of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sin(self.first(x)) * self.second(y)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "residual, training": lambda: (ResidualNet(), images(4, 1, 6, 6)),
    "residual, evaluation": lambda: (ResidualNet().eval(), images(4, 1, 6, 6)),
    "transformer": lambda: (transformer(), images(4, 3, 4)),
    "recurrent": lambda: (Recurrent(), images(4, 3, 2)),
    "tied": lambda: (Tied(), torch.randint(3, (4,))),
    "tied kernels": lambda: (TiedKernels(), images(4, 1, 5, 5)),
    "two inputs": lambda: (TwoInputs(), (images(4, 2), images(4, 4))),
}
TARGETS = torch.tensor([0, 2, 1, 2])
LOSSES: dict[str, LossFunction] = {
    "cross-entropy": lambda z: F.cross_entropy(z, TARGETS),
    "weights": lambda z: F.cross_entropy(z, TARGETS, z.new_tensor([1.0, 3.0, 0.5])),
    "label smoothing": lambda z: F.cross_entropy(z, TARGETS, label_smoothing=0.1),
    "ignore_index": lambda z: F.cross_entropy(z, TARGETS, ignore_index=2, reduction="sum"),
    "MSE": lambda z: F.mse_loss(z, F.one_hot(TARGETS, 3).to(z.dtype)),
    "BCE": lambda z: F.binary_cross_entropy_with_logits(z, F.one_hot(TARGETS, 3).to(z.dtype)),
    "custom": lambda z: (z.logsumexp(1) - z[:, 0] + z.pow(4).sum(1)).mean(),
    "not convex": lambda z: z.sin().sum(),
    "linear": lambda z: z.sum(),
}


class PlainNorm(nn.Module):
    """BatchNorm in training mode or LayerNorm, in elementary operations.

    As of torch 2.15, torch.func's second derivatives of torch's own are wrong where their weights
    are differentiated too: not even symmetric.
    """

    def __init__(self, norm: nn.BatchNorm2d | nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        batch = isinstance(norm, nn.BatchNorm2d)
        self.dims, self.shape = ((0, 2, 3), (-1, 1, 1)) if batch else ((-1,), (-1,))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(self.dims, keepdim=True)
        x = x / (x.square().mean(self.dims, keepdim=True) + self.eps).sqrt()
        return x * self.weight.view(self.shape) + self.bias.view(self.shape)


def dense(
    curvature_type: type[Curvature],
    model: nn.Module,
    inputs: Inputs,
    loss_function: LossFunction,
    parameters: Sequence[Tensor],
) -> Tensor:
    """A block of the matrix by forward-mode differentiation, as one function of n numbers."""
    names = {p: name for name, p in model.named_parameters()}
    frozen = {name: p.detach() for p, name in names.items()}
    plain = deepcopy(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or (
            isinstance(module, nn.BatchNorm2d) and module.training
        ):
            plain.set_submodule(path, PlainNorm(module))

    def outputs(theta: Tensor) -> Tensor:
        parts = zip(theta.split([p.numel() for p in parameters]), parameters, strict=True)
        own = {names[p]: part.view_as(p) for part, p in parts}
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        return functional_call(plain, frozen | own, arguments, tie_weights=True)

    theta = torch.cat([p.detach().flatten() for p in parameters])
    if curvature_type is Hessian:
        return hessian(lambda theta: loss_function(outputs(theta)))(theta)
    z = outputs(theta).detach()
    J = jacfwd(outputs)(theta).reshape(z.numel(), -1)
    return J.T @ hessian(loss_function)(z).reshape(z.numel(), -1) @ J


@pytest.fixture
def _exact_attention() -> Iterator[None]:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.mark.versions
@pytest.mark.usefixtures("_exact_attention")
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
def test_products_are_the_diagonal_blocks_of_the_dense_matrix(
    name: str, blocks: str, curvature_type: type[Curvature]
) -> None:
    model, inputs = MODELS[name]()
    model.double()
    curvature = curvature_type(BLOCKS[blocks](model))
    products = products_of(curvature, model, inputs, LOSSES["cross-entropy"])
    assert [product.parameters for product in products] == curvature.blocks
    for product in products:
        expected = dense(curvature_type, model, inputs, LOSSES["cross-entropy"], product.parameters)
        assert_close(matrix_of(product), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_products_take_any_loss(loss: str, curvature_type: type[Curvature]) -> None:
    model, inputs = MODELS["residual, training"]()
    model.double()
    curvature = curvature_type([model.parameters()])
    (product,) = products_of(curvature, model, inputs, LOSSES[loss])
    expected = dense(curvature_type, model, inputs, LOSSES[loss], product.parameters)
    assert_close(matrix_of(product), expected)


CONVOLUTIONS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "1d": lambda: (nn.Conv1d(2, 3, 3, stride=2), images(4, 2, 9)),
    "3d": lambda: (nn.Conv3d(1, 2, 2), images(4, 1, 3, 3, 3)),
    "groups": lambda: (nn.Conv2d(4, 4, 2, groups=2), images(4, 4, 4, 4)),
    "dilated": lambda: (nn.Conv2d(1, 3, 2, dilation=2, padding=1), images(4, 1, 5, 5)),
    "reflected": lambda: (
        nn.Conv2d(1, 3, 3, padding="same", padding_mode="reflect"),
        images(4, 1, 4, 4),
    ),
    "transposed": lambda: (nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), images(4, 2, 3, 3)),
    "one image": lambda: (nn.Conv2d(1, 3, 3), images(1, 4, 4)),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_products_take_any_convolution(name: str, curvature_type: type[Curvature]) -> None:
    layer, inputs = CONVOLUTIONS[name]()
    model = nn.Sequential(layer, nn.Tanh()).double()

    def loss_function(z: Tensor) -> Tensor:
        return z.exp().mean()

    (product,) = products_of(curvature_type([model.parameters()]), model, inputs, loss_function)
    expected = dense(curvature_type, model, inputs, loss_function, product.parameters)
    assert_close(matrix_of(product), expected)


def test_several_outputs_count_as_one_long_output(curvature_type: type[Curvature]) -> None:
    model, x = nn.Linear(3, 2).double(), images(5, 3)
    scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    blocks = [[*model.parameters(), scale]]

    z = model(x)
    (together,) = curvature_type(blocks).backward((z.exp() * scale).mean(), (z, scale))
    z = torch.cat([model(x).flatten(), scale[None]])
    (expected,) = curvature_type(blocks).backward((z[:-1].exp() * z[-1]).mean(), z)
    assert_close(matrix_of(together), matrix_of(expected))


def test_outputs_that_depend_on_one_another_are_refused_with_a_remedy_that_works() -> None:
    w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    h = 3 * w
    z = h * h
    for outputs in ((h, z), (z, h), (h, z, z)):
        with pytest.raises(ValueError, match=r"Output \d, .* was computed from it.*clone"):
            GGN([w]).backward(z + h, outputs)
    assert w.grad is None
    out = h.clone()
    (product,) = GGN([w]).backward((z + out).square(), (out, z))
    assert w.grad == 2 * (36 + 6) * (36 + 3)  # (9w² + 3w)²
    assert product(torch.ones(1, 1, dtype=torch.float64)) == 2 * (36 + 3) ** 2


def test_deep_supervision_has_the_gradient_of_the_loss() -> None:
    body, head, x = nn.Linear(3, 3).double(), nn.Linear(3, 3).double(), images(4, 3)
    curvature = GGN(layers(nn.Sequential(body, head)))

    def loss_function(h: Tensor, z: Tensor) -> Tensor:
        return LOSSES["cross-entropy"](h) + LOSSES["cross-entropy"](z)

    h = body(x)
    z = head(h)
    with pytest.raises(ValueError, match="was computed from it"):
        curvature.backward(loss_function(h, z), (h, z))
    assert body.weight.grad is None
    loss_function(h, z).backward()
    expected = body.weight.grad
    body.weight.grad = None
    h = body(x)
    z, h = head(h), h.clone()
    curvature.backward(loss_function(h, z), (h, z))
    assert_close(body.weight.grad, expected)


def test_outputs_the_loss_leaves_out_change_nothing() -> None:
    model, x = nn.Linear(3, 4).double(), images(5, 3)
    used, unused = model(x).split(2, dim=1)
    (product,) = GGN([model.parameters()]).backward(used.square().mean(), (used, unused))
    z = model(x)
    (expected,) = GGN([model.parameters()]).backward(z[:, :2].square().mean(), z)
    assert_close(matrix_of(product), matrix_of(expected))


# ----------------------------------------------------------------------------------- properties

ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.Softplus]


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    widths = [*draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)), 3]
    modules: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        modules += [nn.Linear(inner, outer), draw(st.sampled_from(ACTIVATIONS))()]
        if draw(st.booleans()):
            modules.append(nn.LayerNorm(outer))
    return nn.Sequential(*modules, nn.Linear(3, 3)).double(), images(4, widths[0])


@given(networks(), st.sampled_from(sorted(LOSSES)), st.sampled_from([GGN, Hessian]))
def test_products_are_symmetric(
    network: tuple[nn.Module, Tensor], loss: str, curvature_type: type[Curvature]
) -> None:
    (product,) = products_of(curvature_type([network[0].parameters()]), *network, LOSSES[loss])
    C = matrix_of(product)
    assert (C - C.T).norm() <= 1e-13 * C.norm()


@given(networks(), st.sampled_from(sorted(LOSSES.keys() - {"not convex"})))
def test_the_ggn_of_a_convex_loss_is_positive_semidefinite(
    network: tuple[nn.Module, Tensor], loss: str
) -> None:
    (product,) = products_of(GGN([network[0].parameters()]), *network, LOSSES[loss])
    eigenvalues = torch.linalg.eigvalsh(matrix_of(product))
    assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]


# ------------------------------------------------------------------------- the backward pass


class Counted(torch.autograd.Function):
    """The identity, which counts how often it goes forward and backward."""

    calls: dict[str, int]

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        Counted.calls["forward"] += 1
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        Counted.calls["backward"] += 1
        return Counted.apply(g) if torch.is_grad_enabled() else g.clone()


@pytest.fixture
def counted() -> tuple[nn.Module, Tensor]:
    """Two layers with a counter in between."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(3, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = Counted.apply(torch.tanh(self.below(x)))
            Counted.calls = {"forward": 1, "backward": 0}
            return self.above(x)

    return Model().double(), images(4, 3)


@pytest.mark.versions
def test_gradient_and_products_share_one_backward_pass(
    counted: tuple[nn.Module, Tensor], curvature_type: type[Curvature]
) -> None:
    Counted.calls = {"forward": 0, "backward": 0}
    curvature = curvature_type(layers(counted[0]))
    products_of(curvature, *counted, LOSSES["cross-entropy"])
    assert Counted.calls["backward"] == 2  # the first time, one more checks that autograd sees all
    products_of(curvature, *counted, LOSSES["cross-entropy"])
    assert Counted.calls["backward"] == 1


@pytest.mark.versions
def test_a_product_passes_through_what_lies_above_its_block_only(
    counted: tuple[nn.Module, Tensor], curvature_type: type[Curvature]
) -> None:
    Counted.calls = {"forward": 0, "backward": 0}
    curvature = curvature_type(layers(counted[0]))
    below, above = products_of(curvature, *counted, LOSSES["cross-entropy"])
    before = Counted.calls["backward"]
    above(images(1, 9))
    assert Counted.calls["backward"] == before
    below(images(1, 8))
    assert Counted.calls["backward"] > before


@pytest.mark.versions
def test_a_kernels_product_takes_one_convolution_more_than_needed_per_layer_above() -> None:
    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            if "convolution" in str(func):
                name, _ = str(func).removeprefix("aten.").split(".")
                calls.append(name if name == "convolution" else (name, *args[-1]))
            return func(*args, **kwargs or {})

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Tanh())
    below, above = products_of(
        GGN([model[0].weight, model[2].weight]),
        model,
        torch.randn(4, 2, 6, 6),
        lambda z: z.square().mean(),
    )
    by_input = ("convolution_backward", True, False, False)
    by_kernel = ("convolution_backward", False, True, False)
    for product, expected in (
        (above, ["convolution", by_kernel]),
        # Taken to the end of its layer, then through the layer above: the last of these three is
        # what becomes of the upper kernel's gradient, which torch computes unasked.
        (below, ["convolution", "convolution", "convolution", by_input, by_kernel]),
    ):
        calls: list[object] = []
        with Convolutions():
            product(torch.randn(1, product.parameters[0].numel()))
        assert calls == expected


@pytest.mark.versions
def test_gradients_are_those_of_backward_for_every_leaf(curvature_type: type[Curvature]) -> None:
    model, x = ResidualNet().double(), images(4, 1, 6, 6).requires_grad_()
    leaves = [*model.parameters(), x]
    LOSSES["cross-entropy"](model(x)).backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    products_of(curvature_type(model.head.parameters()), model, x, LOSSES["cross-entropy"])
    for leaf, g in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, g)
        assert not leaf.grad.requires_grad


@pytest.mark.versions
def test_gradients_accumulate_in_place(curvature_type: type[Curvature]) -> None:
    model, x = nn.Linear(3, 3).double(), images(4, 3)
    curvature = curvature_type(model.parameters())
    products_of(curvature, model, x, LOSSES["cross-entropy"])
    g = model.weight.grad
    once = g.clone()
    products_of(curvature, model, x, LOSSES["cross-entropy"])
    assert model.weight.grad is g
    assert_close(g, 2 * once)


def test_changing_a_gradient_in_place_changes_neither_products_nor_other_gradients(
    curvature_type: type[Curvature],
) -> None:
    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = a + b
    products = curvature_type([a, b]).backward(z.pow(4).sum(), z)
    expected = matrix_of(products[0])
    a.grad.zero_()
    assert b.grad.count_nonzero() == 3
    assert_close(matrix_of(products[0]), expected)


@pytest.mark.versions
def test_hooks_of_a_parameter_reach_its_gradient_once_and_its_products_never(
    curvature_type: type[Curvature],
) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), images(4, 3)
    curvature = curvature_type([model.parameters()])
    (product,) = products_of(curvature, model, x, LOSSES["cross-entropy"])
    gradient, expected = model[0].weight.grad, matrix_of(product)
    model.zero_grad()
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda g: g / 2)
    model[2].weight.register_hook(seen.append)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    (product,) = products_of(curvature, model, x, LOSSES["cross-entropy"])
    assert_close(model[0].weight.grad, gradient / 2)
    assert_close(matrix_of(product), expected)
    assert len(seen) == 2
    assert any(g is model[0].weight.grad for g in seen)


@pytest.mark.versions
def test_an_output_with_a_hook_is_refused() -> None:
    model = nn.Linear(3, 3)
    z = model(torch.randn(4, 3))
    z.register_hook(lambda g: g / 2)
    with pytest.raises(ValueError, match="has a hook, which would act on products"):
        GGN(model.parameters()).backward(LOSSES["cross-entropy"](z), z)
    assert model.weight.grad is None


@pytest.mark.versions
def test_a_sparse_gradient_is_refused(curvature_type: type[Curvature]) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=r"shape \[5, 3\] is sparse.*sparse=False"):
        products_of(curvature_type(layers(model)), model, torch.arange(4), LOSSES["cross-entropy"])
    assert model[0].weight.grad is None
    assert model[1].weight.grad is None


def test_frozen_parameters_and_parameters_not_in_use_get_no_product(
    curvature_type: type[Curvature],
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    idle = nn.Parameter(images(2))
    model[2].bias.requires_grad_(False)
    model[0].requires_grad_(False)
    curvature = curvature_type([*layers(model), idle])
    (product,) = products_of(curvature, model, images(4, 3), LOSSES["cross-entropy"])
    assert product.parameters == (model[2].weight,)
    for p in (*model.parameters(), idle):
        carries = p is model[2].weight
        assert (p.grad is not None) == carries
        assert hasattr(p, curvature.savefield) == carries


def test_each_backward_pass_drops_the_products_before_it(curvature_type: type[Curvature]) -> None:
    model = nn.Linear(3, 3)
    curvature = curvature_type(model.parameters())
    products_of(curvature, model, torch.randn(4, 3), LOSSES["cross-entropy"])
    model.bias.requires_grad_(False)
    products_of(curvature, model, torch.randn(4, 3), LOSSES["cross-entropy"])
    assert not hasattr(model.bias, curvature.savefield)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_are_multiplied_one_by_one(rows: int, curvature_type: type[Curvature]) -> None:
    model = nn.Linear(3, 3).double()
    (product,) = products_of(
        curvature_type([model.parameters()]), model, images(4, 3), LOSSES["cross-entropy"]
    )
    v = images(rows, 12)
    assert_close(product(v), v @ matrix_of(product).T)
    assert not product(v.requires_grad_()).requires_grad


# ---------------------------------------------------------------------------------- blocks


def test_layers_are_the_modules_that_hold_parameters() -> None:
    model = Tied()
    expected = [[model.embedding.weight], [*model.inner.parameters()], [model.head.bias]]
    assert [[id(p) for p in block] for block in layers(model)] == [
        [id(p) for p in block] for block in expected
    ]
    attention = nn.MultiheadAttention(4, 2)
    assert [len(block) for block in layers(nn.Sequential(attention))] == [2, 2]


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (lambda _: [], ValueError, "no blocks"),
        (lambda m: [m[0].parameters(), []], ValueError, "Block 1 is empty"),
        (lambda m: [m.parameters(), m[1].bias], ValueError, r"block 1 .*shape \[3\].* block 0"),
        (lambda m: [[m[0].weight, m[0].weight]], ValueError, "block 0 .* block 0"),
        (lambda m: m, TypeError, r"Block 0 .*Linear: use model\.parameters"),
        (lambda m: m.named_parameters(), TypeError, "Block 0 .*str"),
        (
            lambda _: [nn.Parameter(torch.ones(2, dtype=torch.complex64))],
            TypeError,
            r"real, but block 0 .*\[2\] .*complex64: .*view_as_real",
        ),
    ],
)
def test_blocks_that_make_no_sense_are_refused(
    blocks: Callable[[nn.Sequential], object],
    error: type[Exception],
    message: str,
    curvature_type: type[Curvature],
) -> None:
    with pytest.raises(error, match=message):
        curvature_type(blocks(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))


# --------------------------------------------------------------------------------- optimizer

OPTIONS = {"lr": 0.5, "damping": 0.1, "maxiter": 500, "tol": 1e-13, "atol": 0.0}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_step_solves_the_dense_system_of_each_block(
    blocks: str, curvature_type: type[Curvature]
) -> None:
    model, inputs = MODELS["residual, training"]()
    model.double()
    curvature = curvature_type(BLOCKS[blocks](model))
    optimizer = CGNOptimizer(model.parameters(), curvature, **OPTIONS, negative_curvature="ignore")
    products = products_of(curvature, model, inputs, LOSSES["cross-entropy"])
    expected = []
    for product in products:
        C = dense(curvature_type, model, inputs, LOSSES["cross-entropy"], product.parameters)
        x = torch.cat([p.detach().flatten() for p in product.parameters])
        g = torch.cat([p.grad.flatten() for p in product.parameters])
        step = torch.linalg.solve(C + 0.1 * torch.eye(len(C), dtype=C.dtype), -g)
        expected.append((product.parameters, x + 0.5 * step))
    optimizer.step()
    for parameters, x in expected:
        assert_close(torch.cat([p.detach().flatten() for p in parameters]), x, 1e-9)
        assert not any(hasattr(p, curvature.savefield) for p in parameters)


@pytest.mark.versions
def test_a_step_on_blocks_of_one_parameter_is_the_step_on_backpack() -> None:
    inputs, targets = torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
    ours = make_model().double()
    theirs, loss_function = extend(deepcopy(ours)), extend(nn.CrossEntropyLoss())
    curvature = GGN(ours.parameters())
    optimizers = [
        CGNOptimizer(ours.parameters(), curvature, **OPTIONS | {"maxiter": 10}),
        CGNOptimizer(theirs.parameters(), GGNMP(), **OPTIONS | {"maxiter": 10}),
    ]
    products_of(curvature, ours, inputs.double(), lambda z: F.cross_entropy(z, targets))
    with backpack(optimizers[1].bp_extension):
        loss_function(theirs(inputs.double()), targets).backward()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p, q, 1e-10)


@pytest.mark.versions
def test_a_step_frees_the_graph_without_the_garbage_collector(
    curvature_type: type[Curvature],
) -> None:
    model, x = ResidualNet(), torch.randn(4, 1, 6, 6)
    curvature = curvature_type(layers(model))
    optimizer = CGNOptimizer(model.parameters(), curvature)
    alive: list[weakref.ref[Tensor]] = []

    def remember(module: nn.Module, inputs: object, output: Tensor) -> None:
        alive.append(weakref.ref(output))

    gc.collect()
    gc.disable()
    try:
        handles = [module.register_forward_hook(remember) for module in model.modules()]
        z = model(x)
        for handle in handles:
            handle.remove()
        loss = LOSSES["cross-entropy"](z)
        products = [weakref.ref(product) for product in curvature.backward(loss, z)]
        del z, loss
        assert all(product() for product in products)
        assert any(output() is not None for output in alive)
        optimizer.step()
        assert not any(product() for product in products)
        assert all(output() is None for output in alive)
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------ misuse


def test_a_loss_of_other_outputs_is_refused() -> None:
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    curvature = GGN(model.parameters())
    for z in (model(x), model(x).detach(), ()):
        with pytest.raises(ValueError, match="not computed from these outputs"):
            curvature.backward(LOSSES["cross-entropy"](model(x)), z)
    z = model(x)
    with pytest.raises(ValueError, match="not computed from these outputs"):
        curvature.backward(LOSSES["cross-entropy"](z), z.softmax(1))
    first, second = model(x).split([1, 2], dim=1)
    with pytest.raises(ValueError, match="name it among the outputs"):
        curvature.backward(first.square().sum() + second.sum(), first)
    assert model.weight.grad is None


def test_a_penalty_in_the_loss_is_refused_by_the_ggn_and_taken_by_the_hessian() -> None:
    model, x = nn.Linear(3, 3).double(), images(4, 3)
    z = model(x)
    loss = LOSSES["cross-entropy"](z) + 2 * model.weight.square().sum()
    with pytest.raises(ValueError, match=r"leaf of shape \[3, 3\].*weight_decay"):
        GGN(model.parameters()).backward(loss, z)
    (product, _) = Hessian(model.parameters()).backward(loss)
    (plain, _) = products_of(Hessian(model.parameters()), model, x, LOSSES["cross-entropy"])
    assert_close(matrix_of(product), matrix_of(plain) + 4 * torch.eye(9, dtype=torch.float64))


def test_a_loss_that_is_no_number_or_has_no_graph_is_refused(
    curvature_type: type[Curvature],
) -> None:
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    curvature, z = curvature_type(model.parameters()), model(x)
    with pytest.raises(ValueError, match=r"single number, but has shape \[4\]"):
        curvature.backward(F.cross_entropy(z, TARGETS, reduction="none"), z)
    with pytest.raises(ValueError, match="no_grad, or its output detached"):
        curvature.backward(LOSSES["cross-entropy"](z.detach()), z)


def test_blocks_of_another_model_are_refused(curvature_type: type[Curvature]) -> None:
    model = nn.Linear(3, 3)
    curvature = curvature_type(deepcopy(model).parameters())
    with pytest.raises(ValueError, match="no parameter of the blocks"):
        products_of(curvature, model, torch.randn(4, 3), LOSSES["cross-entropy"])
    assert model.weight.grad is None


def test_vectors_of_another_shape_or_dtype_are_refused(curvature_type: type[Curvature]) -> None:
    model = nn.Linear(3, 3)
    (product,) = products_of(
        curvature_type([model.parameters()]), model, torch.randn(4, 3), LOSSES["cross-entropy"]
    )
    for shape in ((12,), (1, 11), (2, 3, 4)):
        with pytest.raises(ValueError, match=rf"\[V, 12\], but has {re.escape(str([*shape]))}"):
            product(torch.randn(shape))
    with pytest.raises(TypeError, match=r"float32.*float64"):
        product(torch.randn(1, 12).double())


@pytest.mark.versions
def test_a_product_refuses_to_outlive_its_parameters_and_its_graph(
    curvature_type: type[Curvature],
) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 3)
    curvature = curvature_type(layers(model))
    below, _ = products_of(curvature, model, x, LOSSES["cross-entropy"])
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"inplace operation .*evaluate the model again"):
        below(torch.randn(1, 12))

    z = model(x)
    loss = LOSSES["cross-entropy"](z)
    below, _ = curvature.backward(loss, z)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"freed.*in place of loss\.backward"):
        below(torch.randn(1, 12))


class Attention(nn.Module):
    """Attention that torch fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)[:, None]
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.versions
def test_fused_attention_is_named_with_its_remedy(curvature_type: type[Curvature]) -> None:
    model, x = Attention(), torch.randn(2, 3, 4)
    optimizer = CGNOptimizer(model.parameters(), curvature_type([model.parameters()]))
    products_of(optimizer.bp_extension, model, x, lambda z: z.square().mean())
    before = model.inner.weight.clone()
    with pytest.raises(RuntimeError, match=r"_scaled_dot_product\w+ twice.*sdpa_kernel.*MATH"):
        optimizer.step()
    assert torch.equal(model.inner.weight, before)

    optimizer.zero_grad()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        products_of(optimizer.bp_extension, model, x, lambda z: z.square().mean())
    optimizer.step()
    assert not torch.equal(model.inner.weight, before)


@pytest.mark.versions
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
@pytest.mark.parametrize("part", ["model", "loss"])
def test_what_is_compiled_is_refused_with_its_remedy(
    curvature_type: type[Curvature], part: str
) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    loss_function = nn.CrossEntropyLoss()
    parts = {"model": model, "loss": loss_function}
    parts[part] = torch.compile(parts[part], backend="aot_eager")
    z = parts["model"](torch.randn(4, 3))
    loss = parts["loss"](z, torch.arange(4) % 3)
    with pytest.raises(RuntimeError, match=r"what torch\.compile made twice.*not compiled"):
        curvature_type([model.parameters()]).backward(loss, z)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.versions
def test_an_operation_without_second_derivatives_is_named(
    curvature_type: type[Curvature],
) -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)

    def loss_function(z: Tensor) -> Tensor:
        targets, lengths = torch.tensor([[1], [2]]), torch.tensor([1, 1])
        return F.ctc_loss(z.log_softmax(1)[:, None].expand(2, 2, 3), targets, lengths * 2, lengths)

    (product,) = products_of(curvature_type([model.parameters()]), model, x, loss_function)
    with pytest.raises(RuntimeError, match=r"_ctc_loss_backward twice: .*CTC.*logsumexp"):
        product(torch.randn(1, 12))


@pytest.mark.versions
def test_other_errors_of_torch_come_through_as_they_are() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise RuntimeError("a message of its own")
            return g.clone()

    model = nn.Linear(3, 3)
    (product,) = products_of(
        GGN([model.parameters()]), model, torch.randn(4, 3), lambda z: Broken.apply(z).exp().sum()
    )
    with pytest.raises(RuntimeError, match=r"^a message of its own$"):
        product(torch.randn(1, 12))


@pytest.mark.versions
@pytest.mark.gpu
def test_a_cudnn_rnn_is_named_with_its_remedy(curvature_type: type[Curvature]) -> None:
    model, x = Recurrent().cuda(), torch.randn(4, 3, 2, device="cuda")
    curvature = curvature_type([model.parameters()])
    (product,) = products_of(curvature, model, x, lambda z: z.square().mean())
    v = torch.randn(1, sum(p.numel() for p in model.parameters()), device="cuda")
    with pytest.raises(RuntimeError, match=r"cudnn_rnn.*twice.*cudnn\.flags\(enabled=False\)"):
        product(v)
    with torch.backends.cudnn.flags(enabled=False):
        (product,) = products_of(curvature, model, x, lambda z: z.square().mean())
    assert product(v).isfinite().all()


# --------------------------------------------------------------------------- a third curvature


def test_the_page_on_contributing_makes_a_third_curvature() -> None:
    page = Path(__file__).parents[1] / "docs" / "contributing.rst"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 10
    assert result.failed == 0


# ------------------------------------------------------------------------------------- copies


@pytest.mark.versions
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_and_its_curvature_belong_together(
    curvature_type: type[Curvature], how: str
) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), images(4, 3)
    pair = model, curvature_type(layers(model))
    products = products_of(pair[1], model, x, LOSSES["cross-entropy"])
    if how == "pickle":
        for p in model.parameters():
            delattr(p, pair[1].savefield)
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        twin, curvature = torch.load(file, weights_only=False)
    else:
        twin, curvature = deepcopy(pair)
    assert curvature.savefield == pair[1].savefield
    assert [p for block in curvature.blocks for p in block] == [*twin.parameters()]
    for mine, other in zip(
        products, products_of(curvature, twin, x, LOSSES["cross-entropy"]), strict=True
    ):
        assert other.parameters[0] is not mine.parameters[0]
        assert_close(matrix_of(other), matrix_of(mine))


def test_a_shallow_copy_of_a_curvature_serves_the_same_model(
    curvature_type: type[Curvature],
) -> None:
    model = nn.Linear(3, 3)
    curvature = copy(curvature_type(layers(model)))
    (product,) = products_of(curvature, model, torch.randn(4, 3), LOSSES["cross-entropy"])
    assert product.parameters == tuple(model.parameters())


# ------------------------------------------------------------------------ outputs and the loss


def test_a_mapping_of_outputs_counts_as_its_tensors() -> None:
    model, x = nn.Linear(3, 3).double(), images(4, 3)
    (expected,) = products_of(GGN([model.parameters()]), model, x, LOSSES["cross-entropy"])
    z = model(x)
    loss = LOSSES["cross-entropy"](z)
    outputs = {"loss": loss, "logits": z, "mask": TARGETS > 0, "states": (z,), "cache": None}
    (product,) = GGN([model.parameters()]).backward(loss, outputs)
    assert_close(matrix_of(product), matrix_of(expected))


@pytest.mark.parametrize(
    ("outputs", "found"), [(["z"], "str"), (object(), "object"), ([None], "NoneType")]
)
def test_outputs_that_are_no_tensors_are_named(
    curvature_type: type[Curvature], outputs: object, found: str
) -> None:
    model = nn.Linear(3, 3)
    loss = model(torch.randn(4, 3)).square().sum()
    with pytest.raises(TypeError, match=rf"there is {found}: .*outputs\.logits"):
        curvature_type(model.parameters()).backward(loss, outputs)
    assert model.weight.grad is None


def test_a_loss_that_is_no_tensor_is_refused(curvature_type: type[Curvature]) -> None:
    model = nn.Linear(3, 3)
    z = model(torch.randn(4, 3))
    with pytest.raises(TypeError, match=r"must be a tensor, not float: .*loss\.item\(\)"):
        curvature_type(model.parameters()).backward(z.square().sum().item(), z)


@pytest.mark.versions
def test_many_outputs_take_one_walk_over_the_graph() -> None:
    model = nn.Linear(3, 1).double()

    def seconds(stacked: bool) -> float:
        z = [torch.tanh(model(images(3))) for _ in range(100)]
        for _ in range(100):
            z = [z_i * 1.01 for z_i in z]
        outputs = torch.stack(z) if stacked else z
        loss = (outputs if stacked else torch.stack(z)).square().mean()
        curvature = GGN(model.parameters())
        start = time.process_time()
        curvature.backward(loss, outputs)
        return time.process_time() - start

    seconds(True)
    assert seconds(False) < 5 * seconds(True)


def test_many_outputs_have_the_product_of_the_stacked_one() -> None:
    model, x = nn.Linear(3, 2).double(), images(20, 3)
    z = [model(row) for row in x]
    (product,) = GGN([model.parameters()]).backward(torch.stack(z).exp().mean(), z)
    (expected,) = products_of(GGN([model.parameters()]), model, x, lambda z: z.exp().mean())
    assert_close(matrix_of(product), matrix_of(expected))


# --------------------------------------------------------------------------- unusual parameters


@pytest.mark.versions
@pytest.mark.parametrize("order", [1, -1])
def test_a_block_of_several_dtypes_takes_vectors_of_the_widest(
    curvature_type: type[Curvature], order: int
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.single, self.double_ = nn.Linear(3, 3), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.double_(torch.tanh(self.single(x)).double())

    model, x = Mixed(), torch.randn(4, 3)
    blocks = [[*model.parameters()][::order]]
    (product,) = products_of(curvature_type(blocks), model, x, LOSSES["cross-entropy"])
    with pytest.raises(TypeError, match=r"must be torch\.float64.*not torch\.float32"):
        product(torch.ones(1, 24))
    C = product(torch.eye(24).double())
    (expected,) = products_of(
        curvature_type([[*(twin := deepcopy(model).double()).parameters()][::order]]),
        twin,
        x.double(),
        LOSSES["cross-entropy"],
    )
    assert_close(C, matrix_of(expected), 1e-5)


@pytest.mark.versions
def test_a_complex_parameter_as_real_behind_an_odd_number_of_others(
    curvature_type: type[Curvature],
) -> None:
    scale, w = nn.Parameter(images(1)), nn.Parameter(images(3, 2))

    def z() -> Tensor:
        return torch.view_as_real(torch.view_as_complex(w) * (1 + 2j)).sum(0) * scale

    loss = (out := z()).pow(4).sum()
    (product,) = curvature_type([[scale, w]]).backward(loss, out)
    C = matrix_of(product)
    assert_close(C, C.T)

    def evaluate() -> object:
        loss = (out := z()).pow(4).sum()
        return loss if curvature_type is Hessian else (loss, out)

    check_products([product], evaluate=evaluate)


class Nothing(torch.autograd.Function):
    """A function that says that it has no gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> None:
        return None


@pytest.mark.versions
def test_a_convolution_whose_gradient_ends_has_no_curvature(
    curvature_type: type[Curvature],
) -> None:
    convolution, linear, x = nn.Conv2d(1, 2, 2), nn.Linear(8, 3), torch.randn(4, 1, 3, 3)
    z = linear(Nothing.apply(convolution(x)).flatten(1))
    parameters = [*convolution.parameters(), *linear.parameters()]
    (product,) = curvature_type([parameters]).backward(LOSSES["cross-entropy"](z), z)
    C = matrix_of(product)
    assert convolution.weight.grad.count_nonzero() == 0
    assert C[:10].count_nonzero() == C[:, :10].count_nonzero() == 0
    assert C[10:].count_nonzero()


# ----------------------------------------------------------------- curvature that is not seen


class Cubed(torch.autograd.Function):
    """The third power, with a backward pass in NumPy."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())


class Remembered(torch.autograd.Function):
    """The exponential, whose backward pass uses an intermediate kept on ctx."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.y = x.exp()
        return ctx.y.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        return g * ctx.y


class Edges(nn.Module):
    """A layer, and a sparse matrix with trained values."""

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.inner, self.values = nn.Linear(3, 3), nn.Parameter(torch.randn(5))
        self.indices = torch.tensor([[0, 0, 1, 2, 3], [1, 3, 2, 0, 1]])
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        if self.dense:
            A = self.values.new_zeros(4, 4).index_put(tuple(self.indices), self.values)
            return A @ self.inner(x)
        options = {"check_invariants": False}
        return torch.sparse.mm(
            torch.sparse_coo_tensor(self.indices, self.values, (4, 4), **options), self.inner(x)
        )


class Around(nn.Module):
    """A function, beside a connection around it."""

    def __init__(self, function: Callable[[Tensor], Tensor], around: bool = True) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.function, self.around = function, around

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.outer(self.function(x) + (x if self.around else 0))


UNSEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "NumPy": (lambda: Around(Cubed.apply, around=False), r"\[3, 3\]"),
    "NumPy, and a way around": (lambda: Around(Cubed.apply), r"\[3, 3\] and \[3\]"),
    "sparse values": (Edges, r"\[5\]"),
}


@pytest.mark.versions
@pytest.mark.parametrize("case", UNSEEN)
def test_curvature_that_autograd_does_not_see_is_refused(
    curvature_type: type[Curvature], dtype: torch.dtype, case: str
) -> None:
    make, shapes = UNSEEN[case]
    model, x = make().to(dtype), torch.randn(4, 3, dtype=dtype)
    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=rf"cannot see the curvature of .*{shapes}.*NumPy"):
        products_of(curvature_type([model.parameters()]), model, x, LOSSES["cross-entropy"])
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_remedy_for_sparse_values_is_seen(curvature_type: type[Curvature]) -> None:
    model, x = Edges(dense=True).double(), images(4, 3)
    products = products_of(curvature_type(layers(model)), model, x, LOSSES["cross-entropy"])
    check_products(products, evaluate=again(curvature_type, model, x))


def test_gradients_without_curvature_are_not_refused(curvature_type: type[Curvature]) -> None:
    a, b = nn.Parameter(images(3)), nn.Parameter(images(3))
    z = a + 2 * b
    (product,) = curvature_type([[a, b]]).backward(z.sum(), z)
    assert matrix_of(product).count_nonzero() == 0
    assert_close(b.grad, torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.versions
def test_a_model_under_autocast_or_at_its_minimum_is_not_refused(
    curvature_type: type[Curvature],
) -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12))), torch.randn(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        loss = z.float().square().mean()
    curvature_type(model.parameters()).backward(loss, z)
    linear = nn.Linear(3, 1).double()
    x, y = images(20, 3), images(20, 1)
    A = torch.cat([x, torch.ones_like(y)], 1)
    solution = torch.linalg.lstsq(A, y).solution
    with torch.no_grad():
        linear.weight.copy_(solution[:3].T)
        linear.bias.copy_(solution[3])
    products_of(curvature_type(linear.parameters()), linear, x, lambda z: F.mse_loss(z, y))


# ---------------------------------------------------------------- derivatives known to be wrong


def weight_norm() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.versions
def test_the_hessian_of_weight_norm_is_refused_and_the_ggn_is_right() -> None:
    model, x = weight_norm(), images(8, 3)
    targets = torch.arange(8) % 3

    def loss_function(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets)

    with pytest.raises(RuntimeError, match=r"cannot differentiate weight_norm twice.*GGN"):
        products_of(Hessian([model.parameters()]), model, x, loss_function)
    assert all(p.grad is None for p in model.parameters())
    products = products_of(GGN([model.parameters()]), model, x, loss_function)

    def evaluate() -> tuple[Tensor, Tensor]:
        z = model(x)
        return loss_function(z), z

    check_products(products, evaluate=evaluate)
    w = nn.Parameter(images(3))
    with pytest.raises(RuntimeError, match="weight_norm"):  # in the loss, the GGN needs it, too
        GGN([w]).backward((z := 2 * w).sum() * torch._weight_norm(z[None], z[:1, None]).sum(), z)


@pytest.mark.versions
def test_weight_norm_written_out_has_a_hessian() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.v = nn.Parameter(images(3, 1)), nn.Parameter(images(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.g * self.v / self.v.norm(dim=1, keepdim=True)).T

    model, x = Written(), images(4, 3)
    products = products_of(Hessian([model.parameters()]), model, x, LOSSES["cross-entropy"])
    check_products(products, evaluate=again(Hessian, model, x))


def test_a_norm_at_zero_is_named_with_its_remedy() -> None:
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def step(length: Callable[[Tensor], Tensor]) -> None:
        optimizer = CGNOptimizer([w], Hessian([w]), damping=0.1)
        optimizer.zero_grad()
        optimizer.bp_extension.backward(length(w) + (w - 1).square().sum())
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"A root has no second derivative at 0.*1e-12"):
        step(Tensor.norm)
    assert w.count_nonzero() == 0
    step(lambda w: (w.square().sum() + 1e-12).sqrt())
    assert w.count_nonzero() == 3


def ctc(log_p: Tensor, target: Tensor) -> Tensor:
    """CTC's loss of log-probabilities `[T, C]` for one target, in elementary operations."""
    labels = torch.zeros(2 * len(target) + 1, dtype=torch.long)
    labels[1::2] = target
    skip = F.pad(labels[2:] != labels[:-2], (2, 0)) & (labels != 0)
    none = log_p.new_full((1,), -1e30)
    alpha = torch.cat([log_p[0, labels[:2]], none.expand(len(labels) - 2)])
    for row in log_p[1:]:
        one, two = torch.cat([none, alpha[:-1]]), torch.cat([none, none, alpha[:-2]])
        two = torch.where(skip, two, none)
        alpha = torch.stack([alpha, one, two]).logsumexp(0) + row[labels]
    return -alpha[-2:].logsumexp(0) / len(target)


@pytest.mark.versions
def test_ctc_written_out_has_a_ggn() -> None:
    model, x, target = nn.Linear(3, 4).double(), images(6, 3), torch.tensor([1, 1, 3])

    def evaluate() -> tuple[Tensor, Tensor]:
        z = model(x)
        return ctc(z.log_softmax(1), target), z

    loss, z = evaluate()
    lengths = torch.tensor([6]), torch.tensor([3])
    assert_close(loss, F.ctc_loss(z.log_softmax(1)[:, None], target[None], *lengths))
    check_products(GGN([model.parameters()]).backward(loss, z), evaluate=evaluate)


# --------------------------------------------------------------------------------------- masks

MASK = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)


def mask_gradient(p: Tensor) -> None:
    p.grad *= MASK


@pytest.mark.parametrize("kind", ["tensor", "accumulated"])
@pytest.mark.parametrize("old", [None, 0.0, 1.0])
def test_a_hook_that_masks_a_gradient_is_refused(
    curvature_type: type[Curvature], kind: str, old: float | None
) -> None:
    model = nn.Linear(3, 3).double()
    if old is not None:
        model.weight.grad = old * MASK
    if kind == "tensor":
        model.weight.register_hook(lambda g: g * MASK)
    else:
        model.weight.register_post_accumulate_grad_hook(mask_gradient)
    curvature = curvature_type([model.parameters()])
    with pytest.raises(RuntimeError, match=r"sets 4 entries .*\[3, 3\].*restrict.*prune"):
        products_of(curvature, model, images(4, 3), LOSSES["cross-entropy"])
    assert not hasattr(model.weight, curvature.savefield)


def test_a_hook_that_leaves_no_gradient_is_not_refused(curvature_type: type[Curvature]) -> None:
    model = nn.Linear(3, 3).double()
    model.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    products_of(curvature_type(layers(model)), model, images(4, 3), LOSSES["cross-entropy"])
    assert model.weight.grad is None


def masked_system(model: nn.Module, x: Tensor, free: Tensor) -> Tensor:
    """The Newton step in the free entries of a linear layer, by dense algebra."""
    (product,) = products_of(GGN([model.parameters()]), model, x, LOSSES["cross-entropy"])
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    A = matrix_of(product) + 0.1 * torch.eye(len(g), dtype=g.dtype)
    v = torch.zeros_like(g)
    v[free] = torch.linalg.solve(A[free][:, free], -g[free])
    for p in model.parameters():
        p.grad = None
        delattr(p, "ggn_product")
    return v


@pytest.mark.parametrize("products", ["autograd", "BackPACK"])
def test_a_restricted_step_is_newtons_in_the_free_entries(products: str) -> None:
    model, x, loss_function = nn.Linear(3, 3).double(), images(4, 3), nn.CrossEntropyLoss()
    if products == "BackPACK":
        model.bias.requires_grad_(False)
    before = model.weight.detach().clone()
    free = torch.cat([MASK.flatten() > 0, torch.ones(3) > 0])
    if products == "BackPACK":
        (block,) = GGN([model.weight]).backward(loss_function(z := model(x), TARGETS), z)
        A, g = matrix_of(block) + 0.1 * torch.eye(9).double(), model.weight.grad.flatten()
        expected, f = torch.zeros(9).double(), free[:9]
        expected[f] = torch.linalg.solve(A[f][:, f], -g[f])
        model.weight.grad = None
        model, loss_function = extend(model), extend(loss_function)
        curvature = GGNMP()
    else:
        expected = masked_system(model, x, free)[:9]
        curvature = GGN([model.parameters()])
    optimizer = CGNOptimizer(model.parameters(), curvature, **OPTIONS | {"lr": 1.0})
    if products == "BackPACK":
        with backpack(curvature):
            loss_function(model(x), TARGETS).backward()
    else:
        products_of(curvature, model, x, LOSSES["cross-entropy"])
    restrict(curvature, {model.weight: MASK})
    optimizer.step()
    assert torch.equal(model.weight[MASK == 0], before[MASK == 0])
    assert_close(model.weight.detach() - before, expected.view(3, 3), 1e-9)


def test_restrict_refuses_what_makes_no_sense_and_changes_nothing() -> None:
    model = nn.Linear(3, 3).double()
    curvature = GGN([model.parameters()])
    restrict(curvature, {model.weight: MASK})  # nothing to do without a gradient
    (product,) = products_of(curvature, model, images(4, 3), LOSSES["cross-entropy"])
    g = model.weight.grad.clone()
    for mask, message in ((MASK[:2], r"shape \[2, 3\]"), (MASK / 2, r"0 and 1.*0\.5")):
        with pytest.raises(ValueError, match=message):
            restrict(curvature, {model.weight: mask})
    del model.bias.ggn_product
    with pytest.raises(RuntimeError, match=r"\[3\] has a gradient, but no .*\.ggn_product"):
        restrict(curvature, {model.weight: MASK, model.bias: MASK[0]})
    assert model.weight.ggn_product is product
    assert torch.equal(model.weight.grad, g)


@pytest.mark.versions
def test_pruned_weights_stay_pruned_and_have_the_right_products(
    curvature_type: type[Curvature],
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = images(4, 3)
    prune.custom_from_mask(model[0], "weight", MASK)
    curvature = curvature_type(layers(model))
    optimizer = CGNOptimizer(model.parameters(), curvature, damping=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        products = products_of(curvature, model, x, LOSSES["cross-entropy"])
        check_products(products, evaluate=again(curvature_type, model, x))
        before = model[0].weight_orig.detach().clone()
        optimizer.step()
        moved = model[0].weight_orig != before
        assert torch.equal(moved, MASK == 1)


# ----------------------------------------------------------------------------- check_products


def again(
    curvature_type: type[Curvature],
    model: nn.Module,
    x: Tensor,
    loss_function: LossFunction = LOSSES["cross-entropy"],
) -> Callable[[], object]:
    """What evaluates the loss again, with a seed."""

    def evaluate() -> object:
        torch.manual_seed(3)
        z = model(x)
        loss = loss_function(z)
        return loss if curvature_type is Hessian else (loss, z)

    return evaluate


class Batches(nn.Module):
    """Layers with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


RIGHT: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "BatchNorm and dropout": lambda: (Batches(), torch.randn(4, 3)),
    "residual": lambda: (ResidualNet(), torch.randn(4, 1, 6, 6)),
    "tied kernels": lambda: (TiedKernels(), torch.randn(4, 1, 5, 5)),
    "an intermediate, first derivatives": lambda: (Around(Remembered.apply), torch.randn(4, 3)),
}


@pytest.mark.parametrize(
    ("name", "curvature_type"),
    [
        (name, matrix)
        for name in RIGHT
        for matrix in (GGN, Hessian)
        # Its Hessian is wrong, see below.
        if not (name == "an intermediate, first derivatives" and matrix is Hessian)
    ],
)
def test_right_products_pass_and_nothing_is_changed(
    name: str, curvature_type: type[Curvature], dtype: torch.dtype
) -> None:
    model, x = RIGHT[name]()
    model.to(dtype)
    curvature = curvature_type(layers(model))
    evaluate = again(curvature_type, model, x.to(dtype))
    result = evaluate()
    products = curvature.backward(*(result if isinstance(result, tuple) else (result,)))
    tensors = {**model.state_dict(keep_vars=True)}
    values = {key: value.detach().clone() for key, value in tensors.items()}
    gradients = {p: p.grad.clone() for p in model.parameters()}
    C = [matrix_of(product) for product in products]
    random_state = torch.get_rng_state()
    assert check_products(products, evaluate=evaluate) < 1e3 * torch.finfo(dtype).eps
    assert torch.equal(torch.get_rng_state(), random_state)
    for key, value in model.state_dict(keep_vars=True).items():
        assert value is tensors[key]
        assert torch.equal(value, values[key])
    assert all(torch.equal(p.grad, g) for p, g in gradients.items())
    for product, expected in zip(products, C, strict=True):
        assert torch.equal(matrix_of(product), expected)
    CGNOptimizer(model.parameters(), curvature).step()


def test_differences_find_an_intermediate_kept_on_ctx(dtype: torch.dtype) -> None:
    model, x = Around(Remembered.apply).to(dtype), torch.randn(4, 3, dtype=dtype)
    products = products_of(Hessian(layers(model)), model, x, LOSSES["cross-entropy"])
    check_products(products)
    with pytest.raises(RuntimeError, match=r"\[3, 3\], .*\[3\] is wrong: .*differences"):
        check_products(products, evaluate=again(Hessian, model, x))


@pytest.mark.parametrize(
    ("case", "curvature_type"),
    [*((case, matrix) for case in UNSEEN for matrix in (GGN, Hessian)), ("weight_norm", Hessian)],
)
def test_differences_find_any_wrong_product(
    case: str, curvature_type: type[Curvature], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (weight_norm() if case == "weight_norm" else UNSEEN[case][0]()).to(dtype)
    x = torch.randn(4, 3, dtype=dtype)

    class Own:
        """A product that is not known to be one by autograd, whose gradient was not checked."""

        def __init__(self, block: BlockProduct) -> None:
            self.block, self.parameters, self.names = block, block.parameters, ["w"]

        def __call__(self, v: Tensor) -> Tensor:
            return self.block(v)

    monkeypatch.setattr("cgn_tutorial.curvature._check_seen", lambda *_: None)
    monkeypatch.setattr("cgn_tutorial.curvature._WRONG_TWICE", {})
    monkeypatch.setattr(torch.Tensor, "count_nonzero", lambda _: False)
    products = products_of(curvature_type([model.parameters()]), model, x, LOSSES["cross-entropy"])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"product of w is (wrong|not symmetric): "):
        check_products([Own(*products)], evaluate=again(curvature_type, model, x))


@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_the_check_is_as_sharp_as_it_says(curvature_type: type[Curvature], factor: float) -> None:
    model, x = Around(torch.tanh).double(), images(4, 3)

    class Scaled:
        def __init__(self, product: BlockProduct) -> None:
            self.product, self.parameters = product, product.parameters

        def __call__(self, v: Tensor) -> Tensor:
            return (1 + (factor - 1) * scale) * self.product(v)

    (product,) = products_of(
        curvature_type([model.parameters()]), model, x, LOSSES["cross-entropy"]
    )
    evaluate = again(curvature_type, model, x)
    scale = 0.001  # 1e-6
    check_products([Scaled(product)], evaluate=evaluate)
    scale = 0.03  # 3e-5
    with pytest.raises(RuntimeError, match="is wrong"):
        check_products([Scaled(product)], evaluate=evaluate)


def test_the_hessian_is_not_taken_for_the_ggn() -> None:
    model, x = Around(torch.tanh).double(), images(4, 3)
    for made, checked in ((Hessian, GGN), (GGN, Hessian)):
        products = products_of(made([model.parameters()]), model, x, LOSSES["cross-entropy"])
        with pytest.raises(RuntimeError, match=r"alone for the Hessian, \(loss, outputs\) for"):
            check_products(products, evaluate=again(checked, model, x))


def test_the_check_refuses_what_it_cannot_check() -> None:
    with pytest.raises(ValueError, match="no products to check"):
        check_products([])
    with pytest.raises(TypeError, match=r"function does not: .*optimizer\.blocks\(\)"):
        check_products([lambda v: v])


def test_the_check_puts_parameters_back_when_evaluate_raises() -> None:
    model, x = nn.Linear(3, 3).double(), images(4, 3)
    products = products_of(GGN([model.parameters()]), model, x, LOSSES["cross-entropy"])
    before = deepcopy(model.state_dict())

    def evaluate() -> None:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        check_products(products, evaluate=evaluate)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_check_names_what_is_not_symmetric_or_not_positive() -> None:
    model, x = nn.Linear(3, 3).double(), images(4, 3)
    (product,) = products_of(
        GGN([model.parameters()]), model, x, lambda z: -LOSSES["cross-entropy"](z)
    )
    check_products([product])
    with pytest.raises(RuntimeError, match=r"shape \[3, 3\], .* is not positive semi-definite"):
        check_products([product], positive=True)
    lopsided = BlockProduct((model.bias,), lambda block, v: [v[0].cumsum(0)])
    with pytest.raises(RuntimeError, match=r"shape \[3\] is not symmetric"):
        check_products([lopsided])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [False, True])
def test_differences_at_a_kink_pass_what_is_right_and_find_what_is_not(
    dtype: torch.dtype, wrong: bool
) -> None:
    """As of residual networks whose last normalisation begins at zero: ReLU stands at its kink."""
    torch.manual_seed(0)
    first, branch = nn.Linear(6, 8).to(dtype), nn.Linear(8, 8).to(dtype)
    with torch.no_grad():
        for p in branch.parameters():
            p.zero_()
    x, y = torch.randn(40, 6, dtype=dtype), torch.randint(8, (40,))

    def evaluate() -> tuple[Tensor, Tensor]:
        h = first(x)
        z = h + branch(h).relu()
        return nn.functional.cross_entropy(z, y), z

    loss, z = evaluate()
    products = GGN([branch.parameters(), first.parameters()]).backward(loss, z)
    if not wrong:
        check_products(products, positive=True, evaluate=evaluate)
        return
    right = products[1]

    def doubled(v: Tensor) -> Tensor:
        return 2 * right(v)

    doubled.parameters = right.parameters
    with pytest.raises(RuntimeError, match="is wrong: C v is"):
        check_products([doubled], evaluate=evaluate)
