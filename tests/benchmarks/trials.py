"""What BackPACK and autograd make of layers and losses: the tables of docs/guides/backpack.rst.

Each case is a tiny model. Its products with all unit vectors are held against a matrix that needs
first derivatives only: central differences of outputs and of gradients, of a model that was never
extended. So a second derivative that is wrong, BackPACK's or torch's, shows as wrong.

`nox -s bench` writes the tables, beside those of the benchmarks; this file alone does, too.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from measuring import Row, write
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from cgn_tutorial import GGN, Hessian

#: The columns: whose products, and which matrix they claim to be.
MATRICES = {"GGNMP": "GGN", "HMP": "Hessian", "PCHMP": "PCH", "GGN": "GGN", "Hessian": "Hessian"}
BACKPACK = {"GGNMP": GGNMP, "HMP": HMP, "PCHMP": PCHMP}
AUTOGRAD = {"GGN": GGN, "Hessian": Hessian}
#: The relative difference that rounding and central differences explain.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}

#: What errors say, and what to do. A table with an error that is not listed is not written.
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
    "`sdpa_kernel(SDPBackend.MATH)`, as on :doc:`page 5 </auto_examples/plot_5_any_architecture>`.",
    "_embedding_bag_backward": "Use `nn.Embedding`, and a mean.",
    "cannot differentiate weight_norm": "Take the GGN, or write it out, `g * v / v.norm()`.",
    "multi_margin_loss_backward": "Write the loss in other operations, or take another one.",
}


@dataclass(frozen=True, eq=False)
class Case:
    """A model and a loss to try.

    Attributes:
        name: What the table calls it.
        layers: Makes the layers in question, one each; a linear layer to three outputs follows.
        shape: The inputs' shape, with the batch; or the inputs.
        loss: Makes the loss.
        targets: The targets, or a class per sample if `None`.
        converter: Whether BackPACK is to rewrite the model as modules that it knows.
        dtype: The precision of the products; what they are held against has double.
    """

    name: str
    layers: Sequence[Callable[[], nn.Module]]
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
        model = nn.Sequential(*(make() for make in self.layers)).double()
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
            return f"raises {1 + [*REMEDIES].index(known(self.error))}"
        if self.right:
            return "right, but zero" if self.zero else "right"
        return f"**wrong**, by {self.difference:.2g}"


def known(error: str) -> str:
    """The entry of `REMEDIES` that an error belongs to."""
    for pattern in REMEDIES:
        if re.search(pattern, error):
            return pattern
    raise ValueError(f"No remedy is known for: {error}")


def evaluate(model: nn.Module, x: Tensor, name: str = "", value: Tensor | None = None) -> Tensor:
    """The outputs, perhaps with another value of a parameter; always with the same dropout mask."""
    torch.manual_seed(2)
    z: Tensor = functional_call(model, {} if value is None else {name: value}, (x,))
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


@cache
def reference(case: Case, matrix: str) -> list[Tensor]:
    """The true blocks, one per parameter: of the GGN and the Hessian, from first derivatives."""
    model, loss, x, y = case.model(), case.loss(), case.inputs(), case.labels()
    if matrix == "PCH":
        return recursion_blocks(model, x, lambda z: loss(z, y), lambda R: R.clamp(min=0))
    H_L = differences(partial(gradient, lambda z: loss(z, y)), evaluate(model, x).detach())
    blocks = []
    for name, p in model.named_parameters():
        outputs = partial(evaluate, model, x, name)
        if matrix == "GGN":
            with torch.no_grad():
                J = differences(outputs, p.detach())
            blocks.append(J.T @ H_L @ J)
        else:

            def slope(q: Tensor, f: Callable[[Tensor], Tensor] = outputs) -> Tensor:
                return gradient(lambda q: loss(f(q), y), q)

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
        hidden.append(evaluate(layer, hidden[-1]).detach())
    delta = jacobian(loss, hidden[-1])
    H = hessian(loss, hidden[-1]).reshape(delta.numel(), delta.numel())
    blocks: list[Tensor] = []
    for layer, h in zip(reversed(net), reversed(hidden[:-1]), strict=True):
        own = []
        for name, p in layer.named_parameters():
            J = jacobian(partial(evaluate, layer, h, name), p.detach()).reshape(len(H), p.numel())
            own.append(J.T @ H @ J)
        blocks = own + blocks

        def weighted(h: Tensor, layer: nn.Module = layer, delta: Tensor = delta) -> Tensor:
            return (delta**delta_power * evaluate(layer, h).view_as(delta)).sum()

        residual = hessian(weighted, h).reshape(h.numel(), h.numel())
        J = jacobian(partial(evaluate, layer), h).reshape(len(H), h.numel())
        H = J.T @ H @ J + modify(residual)
        delta = (J.T @ delta.flatten()).view_as(h)
    return blocks


def products(case: Case, whose: str) -> list[Tensor]:
    """The blocks, one per parameter, from products with all unit vectors."""
    model, loss = case.model().to(case.dtype), case.loss().to(case.dtype)
    x, y = (
        t.to(case.dtype) if t.is_floating_point() else t for t in (case.inputs(), case.labels())
    )
    if whose in AUTOGRAD:
        z = evaluate(model, x)
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


IMAGES, SEQUENCES, ROWS, VOXELS = (2, 1, 4, 4), (2, 2, 4), (2, 3, 4), (2, 1, 2, 2, 2)
LINEAR, CONV = partial(nn.Linear, 4, 4), partial(nn.Conv2d, 1, 2, 2)


def behind(
    name: str,
    layer: Callable[[], nn.Module],
    shape: tuple[int, ...] = (3, 4),
    dtype: torch.dtype = torch.float64,
) -> Case:
    """A layer behind one with parameters: a convolution for images, else a linear one."""
    return Case(name, [CONV if shape == IMAGES else LINEAR, layer], shape, dtype=dtype)


LAYERS = [
    Case("Linear", [LINEAR]),
    Case("Linear on `[N, …, features]`", [LINEAR], ROWS),
    Case("Conv2d", [CONV], IMAGES),
    Case(
        "Conv2d with stride, padding, dilation and groups",
        [partial(nn.Conv2d, 2, 4, 2, stride=2, padding=1, dilation=2, groups=2)],
        (2, 2, 4, 4),
    ),
    Case(
        'Conv2d, `padding="same"`, the first layer',
        [partial(nn.Conv2d, 1, 2, 3, padding="same")],
        (2, 1, 5, 5),
    ),
    behind(
        'Conv2d, `padding="same"`, a later layer',
        partial(nn.Conv2d, 2, 1, 3, padding="same"),
        IMAGES,
    ),
    Case(
        'Conv2d, `padding_mode="circular"`',
        [partial(nn.Conv2d, 1, 2, 3, padding=1, padding_mode="circular")],
        IMAGES,
    ),
    Case("Conv1d", [partial(nn.Conv1d, 2, 2, 2)], SEQUENCES),
    Case("Conv3d", [partial(nn.Conv3d, 1, 2, 2)], VOXELS),
    Case("ConvTranspose1d", [partial(nn.ConvTranspose1d, 2, 2, 2)], SEQUENCES),
    Case("ConvTranspose2d", [partial(nn.ConvTranspose2d, 1, 2, 2)], (2, 1, 2, 2)),
    Case("ConvTranspose3d", [partial(nn.ConvTranspose3d, 1, 1, 2)], VOXELS),
    Case("Embedding", [partial(nn.Embedding, 5, 4)], torch.arange(3)),
    Case("EmbeddingBag", [partial(nn.EmbeddingBag, 5, 4)], torch.arange(6).view(3, 2) % 5),
    behind("ReLU", nn.ReLU),
    behind("ReLU, `inplace=True`", partial(nn.ReLU, inplace=True)),
    *(behind(layer.__name__, layer) for layer in (nn.Sigmoid, nn.Tanh, nn.ReLU6, nn.LeakyReLU)),
    *(behind(layer.__name__, layer) for layer in (nn.ELU, nn.GELU, nn.SiLU, nn.Softplus)),
    behind("PReLU", nn.PReLU),
    behind("Softmax", partial(nn.Softmax, 1)),
    behind("Identity", nn.Identity),
    behind("Flatten", nn.Flatten, IMAGES),
    behind("MaxPool2d", partial(nn.MaxPool2d, 2), IMAGES),
    behind("AvgPool2d", partial(nn.AvgPool2d, 2), IMAGES, torch.float32),
    behind("AvgPool2d, `float64`", partial(nn.AvgPool2d, 2), IMAGES),
    behind(
        "AvgPool2d, `count_include_pad=False`",
        partial(nn.AvgPool2d, 2, padding=1, count_include_pad=False),
        IMAGES,
    ),
    behind("AdaptiveAvgPool2d", partial(nn.AdaptiveAvgPool2d, 2), IMAGES),
    behind("MaxPool1d", partial(nn.MaxPool1d, 2), SEQUENCES),
    behind("ZeroPad2d", partial(nn.ZeroPad2d, 1), IMAGES),
    behind("ReflectionPad2d", partial(nn.ReflectionPad2d, 1), IMAGES),
    behind("BatchNorm1d on `[N, C]`, train", partial(nn.BatchNorm1d, 4)),
    behind("BatchNorm1d on `[N, C]`, eval", lambda: nn.BatchNorm1d(4).eval()),
    behind("BatchNorm1d on `[N, C, L]`, train", partial(nn.BatchNorm1d, 2), SEQUENCES),
    behind("BatchNorm1d, `affine=False`", partial(nn.BatchNorm1d, 4, affine=False)),
    behind("BatchNorm2d, train", partial(nn.BatchNorm2d, 2), IMAGES),
    behind("BatchNorm2d, eval", lambda: nn.BatchNorm2d(2).eval(), IMAGES),
    behind("LayerNorm", partial(nn.LayerNorm, 4)),
    behind("GroupNorm", partial(nn.GroupNorm, 1, 2), IMAGES),
    behind("Dropout, train", nn.Dropout),
    behind("Dropout, eval", lambda: nn.Dropout().eval()),
    Case("A Sequential within another", [lambda: nn.Sequential(LINEAR(), nn.ReLU())]),
    Case("A residual connection", [Residual]),
    Case("A residual connection, `use_converter=True`", [Residual], converter=True),
    Case("LSTM", [lambda: Only(nn.LSTM(2, 2, batch_first=True))], (2, 3, 2)),
    Case("GRU", [lambda: Only(nn.GRU(2, 2, batch_first=True))], (2, 3, 2)),
    Case(
        "MultiheadAttention, with its weights",
        [lambda: Only(nn.MultiheadAttention(4, 2, batch_first=True), times=3)],
        ROWS,
    ),
    Case("`scaled_dot_product_attention`", [Attention], ROWS),
    Case("`weight_norm`", [lambda: weight_norm(LINEAR())]),
]

ONE_HOT = torch.eye(3).double()
CROSS_ENTROPY = nn.CrossEntropyLoss


def loss_case(name: str, loss: Callable[[], nn.Module], targets: Tensor | None = None) -> Case:
    """A loss behind layers that all products take."""
    return Case(name, [LINEAR, nn.ReLU], loss=loss, targets=targets)


LOSSES = [
    loss_case("CrossEntropyLoss", CROSS_ENTROPY),
    loss_case('`reduction="sum"`', partial(CROSS_ENTROPY, reduction="sum")),
    loss_case("`label_smoothing`", partial(CROSS_ENTROPY, label_smoothing=0.1)),
    loss_case("`weight`", partial(CROSS_ENTROPY, weight=torch.arange(1, 4).double())),
    loss_case("`ignore_index`", partial(CROSS_ENTROPY, ignore_index=1)),
    loss_case("a target of −100, the default index", CROSS_ENTROPY, torch.tensor([0, -100, 2])),
    loss_case("probabilities as targets", CROSS_ENTROPY, torch.full((3, 3), 1 / 3).double()),
    loss_case("targets that add up to 3/2", CROSS_ENTROPY, torch.full((3, 3), 1 / 2).double()),
    loss_case("MSELoss", nn.MSELoss, ONE_HOT),
    loss_case('MSELoss, `reduction="sum"`', partial(nn.MSELoss, reduction="sum"), ONE_HOT),
    loss_case("BCEWithLogitsLoss", nn.BCEWithLogitsLoss, ONE_HOT),
    loss_case("L1Loss", nn.L1Loss, ONE_HOT),
    loss_case("SmoothL1Loss", nn.SmoothL1Loss, ONE_HOT),
    loss_case("HuberLoss", nn.HuberLoss, ONE_HOT),
    loss_case("NLLLoss of log-probabilities", nn.NLLLoss),
    loss_case("PoissonNLLLoss", nn.PoissonNLLLoss, ONE_HOT),
    loss_case("MultiMarginLoss", nn.MultiMarginLoss),
]


def trial_tables(quick: bool = False) -> Iterator[tuple[str, list[Row]]]:
    """The verdicts on layers and on losses, the errors among them, and the versions tried."""
    examples: dict[str, str] = {}
    for name, column, cases in (("layers", "Layer", LAYERS), ("losses", "Loss", LOSSES)):
        table = []
        for case in cases[:: 8 if quick else 1]:
            found = {whose: verdict(case, whose) for whose in MATRICES}
            table.append({column: case.name} | {whose: v.word for whose, v in found.items()})
            for error in (v.error for v in found.values() if v.error):
                examples.setdefault(known(error), error)
        yield f"backpack_{name}", table
    if not quick and (unseen := REMEDIES.keys() - examples.keys()):
        raise ValueError(f"No case raises this any more: {', '.join(unseen)}")
    table = []
    for number, (pattern, remedy) in enumerate(REMEDIES.items(), start=1):
        if pattern in examples:
            said = " ".join(examples[pattern].splitlines()[0].replace("`", "'").split())
            said = shorten(said, 110, placeholder=" …")
            table.append({"No.": str(number), "The error": f"`{said}`", "What to do": remedy})
    yield "backpack_errors", table
    tried = {"BackPACK": version("backpack-for-pytorch"), "PyTorch": torch.__version__}
    yield (
        "backpack_versions",
        [{"Tried with": name, "Version": tried[name].partition("+")[0]} for name in tried],
    )


if __name__ == "__main__":
    for name, table in trial_tables():
        write(table, Path(__file__).parents[2] / "docs" / "bench" / f"{name}.csv")
