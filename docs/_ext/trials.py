"""What BackPACK and autograd make of layers and losses, tried while the site is built.

Each case is a tiny model. Its products with all unit vectors are held against a matrix that needs
first derivatives only: central differences of outputs and of gradients, of a model that was never
extended. So a second derivative that is wrong, BackPACK's or torch's, shows as wrong.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from textwrap import shorten
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from cgn_tutorial import GGN, Hessian

#: The columns: whose products, and which matrix they claim to be.
MATRICES = {"GGNMP": "GGN", "HMP": "Hessian", "PCHMP": "PCH", "GGN": "GGN", "Hessian": "Hessian"}
BACKPACK = {"GGNMP": GGNMP, "HMP": HMP, "PCHMP": PCHMP}
AUTOGRAD = {"GGN": GGN, "Hessian": Hessian}
#: The relative difference that rounding and central differences explain.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}

#: What errors say, and what to do. An error that is not listed stops the build.
REMEDIES = {
    "does not have an extension for Module": "BackPACK has no rule for the module. Take products "
    "by autograd, or a layer that it knows.",
    "is being modified inplace": "Use `inplace=False`.",
    "Only default (weight|ignore_index)": "Take products by autograd.",
    "Only implemented for affine=True": "Use `affine=True`, or autograd.",
    "implemented only for 0 dimensions": "Feed it `[N, C]`, or take the GGN, or autograd.",
    "exotic hyperparameters of AvgPool2d": "Use `count_include_pad=True`, or autograd.",
    "expected scalar type Double but found Float": "Use single precision, or autograd.",
    "unsupported operand type.* 'str'": "Write the padding as a number.",
    "scaled_dot_product_flash_attention": "Evaluate the model within "
    "`sdpa_kernel(SDPBackend.MATH)`, as :doc:`page 5 </auto_examples/plot_5_any_architecture>`.",
    "_embedding_bag_backward": "Use `nn.Embedding`, and a mean.",
    "cannot differentiate weight_norm": "Take the GGN, or write it out, `g * v / v.norm()`.",
    "multi_margin_loss_backward": "Write the loss in other operations, or take another one.",
}


@dataclass(frozen=True)
class Case:
    """A model and a loss to try.

    Attributes:
        name: What the table calls it.
        layers: Makes the layers in question; a linear layer to three outputs follows.
        shape: The inputs' shape, with the batch; or the inputs.
        loss: Makes the loss.
        targets: The targets, or a class per sample if `None`.
        converter: Whether BackPACK is to rewrite the model as modules that it knows.
        dtype: The precision of the products; what they are held against has double.
    """

    name: str
    layers: Callable[[], Sequence[nn.Module]]
    shape: tuple[int, ...] | Tensor = (3, 4)
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    targets: Tensor | None = None
    converter: bool = False
    dtype: torch.dtype = torch.float64

    def inputs(self) -> Tensor:
        """The same inputs each time, in double precision."""
        if isinstance(self.shape, Tensor):
            return self.shape
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).double()

    def model(self) -> nn.Sequential:
        """The same model each time, in double precision."""
        torch.manual_seed(0)
        model = nn.Sequential(*self.layers()).double()
        with torch.no_grad():
            z = copy.deepcopy(model)(self.inputs())
        if z.dim() > 2:
            model.append(nn.Flatten())
        return model.append(nn.Linear(z.flatten(1).shape[1], 3).double())

    def labels(self) -> Tensor:
        """The targets."""
        return torch.arange(len(self.inputs())) % 3 if self.targets is None else self.targets


@dataclass(frozen=True)
class Verdict:
    """What became of one product.

    Attributes:
        difference: From the true blocks, relative to them; the largest of all blocks.
        zero: Whether all true blocks are zero.
        error: What was raised, if anything.
        right: Whether nothing was, and the difference is rounding.
    """

    difference: float = math.nan
    zero: bool = False
    error: str = ""
    right: bool = False

    @property
    def word(self) -> str:
        """What the table shows."""
        if self.error:
            return f"raises\u00a0{1 + [*REMEDIES].index(known(self.error))}"
        if self.right:
            return "right, but zero" if self.zero else "right"
        return f"**wrong**, by {self.difference:.2g}"


def known(error: str) -> str:
    """The entry of `REMEDIES` that an error belongs to."""
    for pattern in REMEDIES:
        if re.search(pattern, error):
            return pattern
    raise ValueError(f"No remedy is known for: {error}")


def outputs_of(model: nn.Module, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """The model's outputs, with the same dropout mask each time."""
    torch.manual_seed(2)
    z: Tensor = functional_call(model, parameters or {}, (x,))
    return z


def differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-4) -> Tensor:
    """The Jacobian of f at x, `[f(x).numel(), x.numel()]`, by central differences of order 4."""
    columns = []
    for e in h * torch.eye(x.numel()).double().view(-1, *x.shape):
        near, far = f(x + e) - f(x - e), f(x + 2 * e) - f(x - 2 * e)
        columns.append((8 * near - far).flatten() / (12 * h))
    return torch.stack(columns, dim=1)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of f at x by autograd."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(f(x), x)
    return g


def reference(case: Case, matrix: str) -> list[Tensor]:
    """The true blocks, one per parameter: of the GGN and the Hessian, from first derivatives."""
    model, loss, x, y = case.model(), case.loss(), case.inputs(), case.labels()
    if matrix == "PCH":
        return recursion_blocks(model, x, lambda z: loss(z, y), lambda R: R.clamp(min=0))
    z = outputs_of(model, x).detach()
    H_L = differences(lambda z: gradient(lambda z: loss(z, y), z), z)
    blocks = []
    for name, p in model.named_parameters():

        def outputs(q: Tensor, name: str = name) -> Tensor:
            return outputs_of(model, x, {name: q})

        if matrix == "GGN":
            with torch.no_grad():
                J = differences(outputs, p.detach())
            blocks.append(J.T @ H_L @ J)
        else:

            def slope(q: Tensor, z: Callable[[Tensor], Tensor] = outputs) -> Tensor:
                return gradient(lambda q: loss(z(q), y), q)

            blocks.append(differences(slope, p.detach()))
    return blocks


def recursion_blocks(
    net: nn.Sequential,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    modify: Callable[[Tensor], Tensor],
    delta_power: int = 1,
) -> list[Tensor]:
    """Dense blocks, one per parameter, from the loss backwards, one layer at a time.

    A layer h ↦ f(h) passes on Jᵀ H J + modify(Σ_k δ_k ∇²f_k), with its Jacobian J, and H and δ what
    came to its output, the matrix and the gradient; `delta_power=2` puts δ_k² in the sum.
    """
    hidden = [inputs]
    for layer in net:
        hidden.append(outputs_of(layer, hidden[-1]).detach())
    delta = jacobian(loss, hidden[-1])
    H = hessian(loss, hidden[-1]).reshape(delta.numel(), delta.numel())
    blocks: list[Tensor] = []
    for layer, h in zip(reversed(net), reversed(hidden[:-1]), strict=True):
        own = []
        for name, p in layer.named_parameters():

            def outputs(
                value: Tensor, layer: nn.Module = layer, name: str = name, h: Tensor = h
            ) -> Tensor:
                return outputs_of(layer, h, {name: value})

            J = jacobian(outputs, p.detach()).reshape(len(H), p.numel())
            own.append(J.T @ H @ J)
        blocks = own + blocks

        def weighted(h: Tensor, layer: nn.Module = layer, delta: Tensor = delta) -> Tensor:
            return (delta**delta_power * outputs_of(layer, h).view_as(delta)).sum()

        residual = hessian(weighted, h).reshape(h.numel(), h.numel())
        J = jacobian(partial(outputs_of, layer), h).reshape(len(H), h.numel())
        H = J.T @ H @ J + modify(residual)
        delta = (J.T @ delta.flatten()).view_as(h)
    return blocks


def products(case: Case, whose: str) -> list[Tensor]:
    """The blocks, one per parameter, from products with all unit vectors."""
    model, loss = case.model().to(case.dtype), case.loss().to(case.dtype)
    x, y = case.inputs(), case.labels()
    x = x.to(case.dtype) if x.is_floating_point() else x
    y = y.to(case.dtype) if y.is_floating_point() else y
    if whose in AUTOGRAD:
        z = outputs_of(model, x)
        blocks = AUTOGRAD[whose](model.parameters()).backward(loss(z, y), z)
        return [block(torch.eye(block.parameters[0].numel()).to(z)) for block in blocks]
    extension = BACKPACK[whose]()
    model, loss = extend(model, use_converter=case.converter), extend(loss)
    with backpack(extension):
        torch.manual_seed(2)  # `functional_call` would go past BackPACK's hooks
        loss(model(x), y).backward()
    return [
        getattr(p, extension.savefield)(torch.eye(p.numel()).to(p).view(-1, *p.shape)).view(
            p.numel(), -1
        )
        for p in model.parameters()
    ]


def verdict(case: Case, whose: str, true: Sequence[Tensor] | None = None) -> Verdict:
    """Try a product, and hold it against the true blocks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blocks = products(case, whose)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        return Verdict(error=str(error))
    true = reference(case, MATRICES[whose]) if true is None else true
    norm = max(block.norm().item() for block in true)
    if norm < 1e-8:
        difference = max(block.norm().item() for block in blocks)
        return Verdict(difference, zero=True, right=difference < 1e-8)
    difference = max(
        ((block - b).norm() / max(b.norm().item(), ROUNDING[case.dtype] * norm)).item()
        for block, b in zip(blocks, true, strict=True)
    )
    return Verdict(difference, right=difference < ROUNDING[case.dtype])


def verdicts(case: Case) -> dict[str, Verdict]:
    """One verdict per column; GGN and Hessian are computed once for two columns each."""
    true = {matrix: reference(case, matrix) for matrix in ("GGN", "Hessian")}
    return {whose: verdict(case, whose, true.get(MATRICES[whose])) for whose in MATRICES}


# The cases.


class Residual(nn.Module):
    """A branch that is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.tanh = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        z: Tensor = x + self.tanh(self.linear(x))
        return z


class Only(nn.Module):
    """The outputs of a recurrent or attention layer, without what else it returns."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        """The first of what the layer returns."""
        z: Tensor = self.layer(*[x] * self.times)[0]
        return z


class Attention(nn.Module):
    """Attention as torch computes it fastest."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Each row of x attends to all."""
        q = self.linear(x)
        return nn.functional.scaled_dot_product_attention(q, q, x)


IMAGES, SEQUENCES, ROWS = (2, 1, 4, 4), (2, 2, 4), (2, 3, 4)


def behind(layer: Callable[[], nn.Module]) -> Callable[[], list[nn.Module]]:
    """The layer behind a linear one."""
    return lambda: [nn.Linear(4, 4), layer()]


def behind_conv(layer: Callable[[], nn.Module]) -> Callable[[], list[nn.Module]]:
    """The layer behind a convolution."""
    return lambda: [nn.Conv2d(1, 2, 2), layer()]


LAYERS = [
    Case("Linear", lambda: [nn.Linear(4, 4)]),
    Case("Linear on `[N, …, features]`", lambda: [nn.Linear(4, 4)], ROWS),
    Case("Conv2d", lambda: [nn.Conv2d(1, 2, 2)], IMAGES),
    Case(
        "Conv2d with stride, padding, dilation and groups",
        lambda: [nn.Conv2d(2, 4, 2, stride=2, padding=1, dilation=2, groups=2)],
        (2, 2, 4, 4),
    ),
    Case(
        'Conv2d, `padding="same"`, the first layer',
        lambda: [nn.Conv2d(1, 2, 3, padding="same")],
        (2, 1, 5, 5),
    ),
    Case(
        'Conv2d, `padding="same"`, a later layer',
        behind_conv(lambda: nn.Conv2d(2, 1, 3, padding="same")),
        IMAGES,
    ),
    Case(
        'Conv2d, `padding_mode="circular"`',
        lambda: [nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")],
        IMAGES,
    ),
    Case("Conv1d", lambda: [nn.Conv1d(2, 2, 2)], SEQUENCES),
    Case("Conv3d", lambda: [nn.Conv3d(1, 2, 2)], (2, 1, 2, 2, 2)),
    Case("ConvTranspose1d", lambda: [nn.ConvTranspose1d(2, 2, 2)], SEQUENCES),
    Case("ConvTranspose2d", lambda: [nn.ConvTranspose2d(1, 2, 2)], (2, 1, 2, 2)),
    Case("ConvTranspose3d", lambda: [nn.ConvTranspose3d(1, 1, 2)], (2, 1, 2, 2, 2)),
    Case("Embedding", lambda: [nn.Embedding(5, 4)], torch.arange(3)),
    Case("EmbeddingBag", lambda: [nn.EmbeddingBag(5, 4)], torch.arange(6).view(3, 2) % 5),
    Case("ReLU", behind(nn.ReLU)),
    Case("ReLU, `inplace=True`", behind(lambda: nn.ReLU(inplace=True))),
    Case("Sigmoid", behind(nn.Sigmoid)),
    Case("Tanh", behind(nn.Tanh)),
    Case("ReLU6", behind(nn.ReLU6)),
    Case("LeakyReLU", behind(nn.LeakyReLU)),
    Case("ELU", behind(nn.ELU)),
    Case("GELU", behind(nn.GELU)),
    Case("SiLU", behind(nn.SiLU)),
    Case("Softplus", behind(nn.Softplus)),
    Case("PReLU", behind(nn.PReLU)),
    Case("Softmax", behind(lambda: nn.Softmax(1))),
    Case("Identity", behind(nn.Identity)),
    Case("Flatten", behind_conv(nn.Flatten), IMAGES),
    Case("MaxPool2d", behind_conv(lambda: nn.MaxPool2d(2)), IMAGES),
    Case("AvgPool2d", behind_conv(lambda: nn.AvgPool2d(2)), IMAGES, dtype=torch.float32),
    Case("AvgPool2d, `float64`", behind_conv(lambda: nn.AvgPool2d(2)), IMAGES),
    Case(
        "AvgPool2d, `count_include_pad=False`",
        behind_conv(lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False)),
        IMAGES,
    ),
    Case("AdaptiveAvgPool2d", behind_conv(lambda: nn.AdaptiveAvgPool2d(2)), IMAGES),
    Case("MaxPool1d", behind(lambda: nn.MaxPool1d(2)), SEQUENCES),
    Case("ZeroPad2d", behind_conv(lambda: nn.ZeroPad2d(1)), IMAGES),
    Case("ReflectionPad2d", behind_conv(lambda: nn.ReflectionPad2d(1)), IMAGES),
    Case("BatchNorm1d on `[N, C]`, train", behind(lambda: nn.BatchNorm1d(4))),
    Case("BatchNorm1d on `[N, C]`, eval", behind(lambda: nn.BatchNorm1d(4).eval())),
    Case("BatchNorm1d on `[N, C, L]`, train", behind(lambda: nn.BatchNorm1d(2)), SEQUENCES),
    Case("BatchNorm1d, `affine=False`", behind(lambda: nn.BatchNorm1d(4, affine=False))),
    Case("BatchNorm2d, train", behind_conv(lambda: nn.BatchNorm2d(2)), IMAGES),
    Case("BatchNorm2d, eval", behind_conv(lambda: nn.BatchNorm2d(2).eval()), IMAGES),
    Case("LayerNorm", behind(lambda: nn.LayerNorm(4))),
    Case("GroupNorm", behind_conv(lambda: nn.GroupNorm(1, 2)), IMAGES),
    Case("Dropout, train", behind(nn.Dropout)),
    Case("Dropout, eval", behind(lambda: nn.Dropout().eval())),
    Case("A Sequential within another", lambda: [nn.Sequential(nn.Linear(4, 4), nn.ReLU())]),
    Case("A residual connection", lambda: [Residual()]),
    Case("A residual connection, `use_converter=True`", lambda: [Residual()], converter=True),
    Case("LSTM", lambda: [Only(nn.LSTM(2, 2, batch_first=True))], (2, 3, 2)),
    Case("GRU", lambda: [Only(nn.GRU(2, 2, batch_first=True))], (2, 3, 2)),
    Case(
        "MultiheadAttention, with its weights",
        lambda: [Only(nn.MultiheadAttention(4, 2, batch_first=True), times=3)],
        ROWS,
    ),
    Case("`scaled_dot_product_attention`", lambda: [Attention()], ROWS),
    Case("`weight_norm`", lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))]),
]

ONE_HOT = torch.eye(3).double()
RELU = behind(nn.ReLU)


def loss_case(name: str, loss: Callable[[], nn.Module], targets: Tensor | None = None) -> Case:
    """A loss behind layers that all products take."""
    return Case(name, RELU, loss=loss, targets=targets)


def cross_entropy(**options: Any) -> Callable[[], nn.Module]:
    """Makes a cross entropy with options."""
    return lambda: nn.CrossEntropyLoss(**options)


LOSSES = [
    loss_case("CrossEntropyLoss", nn.CrossEntropyLoss),
    loss_case('`reduction="sum"`', cross_entropy(reduction="sum")),
    loss_case("`label_smoothing`", cross_entropy(label_smoothing=0.1)),
    loss_case("`weight`", cross_entropy(weight=torch.tensor([1.0, 2.0, 3.0]).double())),
    loss_case("`ignore_index`", cross_entropy(ignore_index=1)),
    loss_case("a target of −100, the default index", cross_entropy(), torch.tensor([0, -100, 2])),
    loss_case("probabilities as targets", cross_entropy(), torch.full((3, 3), 1 / 3).double()),
    loss_case("targets that add up to 3/2", cross_entropy(), torch.full((3, 3), 1 / 2).double()),
    loss_case("MSELoss", nn.MSELoss, ONE_HOT),
    loss_case('MSELoss, `reduction="sum"`', lambda: nn.MSELoss(reduction="sum"), ONE_HOT),
    loss_case("BCEWithLogitsLoss", nn.BCEWithLogitsLoss, ONE_HOT),
    loss_case("L1Loss", nn.L1Loss, ONE_HOT),
    loss_case("SmoothL1Loss", nn.SmoothL1Loss, ONE_HOT),
    loss_case("HuberLoss", nn.HuberLoss, ONE_HOT),
    loss_case("NLLLoss of log-probabilities", nn.NLLLoss),
    loss_case("PoissonNLLLoss", nn.PoissonNLLLoss, ONE_HOT),
    loss_case("MultiMarginLoss", nn.MultiMarginLoss),
]
CASES = {"layers": LAYERS, "losses": LOSSES}


# The page.


@cache
def all_verdicts(kind: str) -> dict[str, dict[str, Verdict]]:
    """The verdicts on all layers, or on all losses."""
    return {case.name: verdicts(case) for case in CASES[kind]}


def table(kind: str) -> str:
    """The verdicts as a table in reStructuredText."""
    header = ["Layer" if kind == "layers" else "Loss", *MATRICES]
    rows = [header]
    rows += [
        [name, *(found[whose].word for whose in MATRICES)]
        for name, found in all_verdicts(kind).items()
    ]
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 30 14 14 14 14 14", ""]
    for row in rows:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines)


def errors() -> str:
    """The errors of both tables, each with an example of its text and its remedy."""
    examples: dict[str, str] = {}
    for kind in CASES:
        for found in all_verdicts(kind).values():
            for one in found.values():
                if one.error:
                    examples.setdefault(known(one.error), one.error)
    lines = []
    for pattern, remedy in REMEDIES.items():
        if pattern not in examples:
            raise ValueError(f"No case raises this any more: {pattern}")
        first = " ".join(examples[pattern].splitlines()[0].replace("`", "'").split())
        lines += [f"#. `{shorten(first, 110, placeholder=' …')}`", "", f"   {remedy}", ""]
    return "\n".join(lines)
