"""Curvature products by autograd against BackPACK's, and against dense matrices of torch.func."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.curvature import GGN, BlockProduct, Curvature, Hessian, layers
from cgn_tutorial.pages import make_model

PRECISION = {torch.float32: 1e-5, torch.float64: 1e-12}
BLOCKS: dict[str, Callable[[nn.Module], object]] = {
    "parameters": lambda model: model.parameters(),
    "layers": layers,
    "network": lambda model: [model.parameters()],
    "own": lambda model: [list(model.parameters())[::-2], list(model.parameters())[-2::-2]],
}
# torch.func brings some of its forward-mode formulas as scripts.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated"),
    pytest.mark.versions,
]

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
        with pytest.raises(ValueError, match=r"Output \d, .* was computed from another .*clone"):
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
    with pytest.raises(ValueError, match="was computed from another"):
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


def test_gradient_and_products_share_one_backward_pass(
    counted: tuple[nn.Module, Tensor], curvature_type: type[Curvature]
) -> None:
    Counted.calls = {"forward": 0, "backward": 0}
    products_of(curvature_type(layers(counted[0])), *counted, LOSSES["cross-entropy"])
    assert Counted.calls["backward"] == 1


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


def test_an_output_with_a_hook_is_refused() -> None:
    model = nn.Linear(3, 3)
    z = model(torch.randn(4, 3))
    z.register_hook(lambda g: g / 2)
    with pytest.raises(ValueError, match="has a hook, which would act on products"):
        GGN(model.parameters()).backward(LOSSES["cross-entropy"](z), z)
    assert model.weight.grad is None


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


def test_an_operation_without_second_derivatives_is_named(
    curvature_type: type[Curvature],
) -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)

    def loss_function(z: Tensor) -> Tensor:
        targets, lengths = torch.tensor([[1], [2]]), torch.tensor([1, 1])
        return F.ctc_loss(z.log_softmax(1)[:, None].expand(2, 2, 3), targets, lengths * 2, lengths)

    (product,) = products_of(curvature_type([model.parameters()]), model, x, loss_function)
    with pytest.raises(RuntimeError, match=r"_ctc_loss_backward twice: write it in terms of"):
        product(torch.randn(1, 12))


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
