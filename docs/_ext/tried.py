"""What BackPACK and autograd make of layers and losses.

Each case is a tiny model, tried while the site is built. Its products with all unit vectors are
held against a matrix that needs first derivatives only, by central differences, of a model that was
never extended. So a second derivative that is wrong, BackPACK's or torch's, shows as wrong.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from torch import Tensor, nn
from torch.func import functional_call

from cgn_tutorial import GGN, Hessian

ROUNDING = 1e-6  # the largest relative difference that central differences explain
COLUMNS = ("GGNMP", "HMP", "PCHMP", "GGN", "Hessian")  # three of BackPACK, two of autograd


class Residual(nn.Module):
    """A layer that is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        y: Tensor = self.layer(x)
        return x + y


class First(nn.Module):
    """A recurrent layer's outputs, without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """All outputs."""
        outputs: Tensor = self.layer(x)[0]
        return outputs


class Twice(nn.Sequential):
    """A module that is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        """The first module, twice."""
        return torch.tanh(self[0](torch.tanh(self[0](x))))


@dataclass(frozen=True)
class Case:
    """Layers and a loss to try; a linear layer to three outputs follows the layers."""

    layers: Callable[[], Sequence[nn.Module]] = lambda: [nn.Linear(4, 4), nn.Tanh()]
    shape: tuple[int, ...] = (4, 4)
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    like_outputs: bool = False  # targets are numbers, not classes
    whole: bool = True  # whether the model is differentiated in train mode

    def model(self) -> nn.Sequential:
        """The same model each time, in double precision."""
        torch.manual_seed(0)
        body = nn.Sequential(*self.layers(), nn.Flatten()).double().train(self.whole)
        with torch.no_grad():
            size = body(self.inputs()).shape[1]
        return body.append(nn.Linear(size, 3).double())

    def inputs(self) -> Tensor:
        """The same inputs each time."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).double()

    def targets(self) -> Tensor:
        """Classes, or numbers between zero and one."""
        n = self.shape[0]
        return (
            torch.linspace(0.1, 0.9, 3 * n).view(n, 3).double()
            if self.like_outputs
            else (torch.arange(n) % 3)
        )


LAYERS: dict[str, Case] = {"`Linear`, `Tanh`": Case()}
LAYERS |= {
    f"`{layer.__name__}`": Case(lambda layer=layer: [nn.Linear(4, 4), layer()])  # type: ignore[misc]
    for layer in (nn.Sigmoid, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus)
}
LAYERS |= {
    "`Conv1d`": Case(lambda: [nn.Conv1d(2, 2, 2), nn.Tanh()], (4, 2, 4)),
    "`Conv2d`": Case(lambda: [nn.Conv2d(1, 2, 2), nn.Tanh()], (4, 1, 3, 3)),
    "`Conv3d`": Case(lambda: [nn.Conv3d(1, 2, 2), nn.Tanh()], (4, 1, 2, 3, 2)),
    "`ConvTranspose2d`": Case(lambda: [nn.ConvTranspose2d(1, 2, 2), nn.Tanh()], (4, 1, 2, 2)),
    "`MaxPool2d`": Case(lambda: [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2)], (4, 1, 5, 5)),
    "`AvgPool2d`": Case(lambda: [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.AvgPool2d(2)], (4, 1, 5, 5)),
    "`AdaptiveAvgPool2d`": Case(
        lambda: [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(2)], (4, 1, 5, 5)
    ),
    "`ZeroPad2d`": Case(lambda: [nn.ZeroPad2d(1), nn.Conv2d(1, 2, 2), nn.Tanh()], (4, 1, 2, 2)),
    "`Dropout`, in train mode": Case(lambda: [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3)]),
    "`BatchNorm1d`, in train mode": Case(lambda: [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()]),
    "`BatchNorm1d`, in evaluation mode": Case(
        lambda: [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()], whole=False
    ),
    "`BatchNorm2d`, in train mode": Case(
        lambda: [nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh()], (4, 1, 3, 3)
    ),
    "`LayerNorm`": Case(lambda: [nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()]),
    "`GroupNorm`": Case(lambda: [nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Tanh()]),
    "`LSTM`": Case(lambda: [First(nn.LSTM(2, 2, batch_first=True))], (4, 3, 2)),
    "`GRU`": Case(lambda: [First(nn.GRU(2, 2, batch_first=True))], (4, 3, 2)),
    "An addition, `x + layer(x)`": Case(lambda: [Residual(), nn.Tanh()]),
    "A module used twice": Case(lambda: [Twice(nn.Linear(4, 4))]),
}
LOSSES: dict[str, Case] = {
    "`CrossEntropyLoss`": Case(),
    '… with `reduction="sum"`': Case(loss=lambda: nn.CrossEntropyLoss(reduction="sum")),
    "… with `label_smoothing`": Case(loss=lambda: nn.CrossEntropyLoss(label_smoothing=0.1)),
    "… with `weight`": Case(
        loss=lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    ),
    "… with `ignore_index`": Case(loss=lambda: nn.CrossEntropyLoss(ignore_index=1)),
    "`MSELoss`": Case(loss=nn.MSELoss, like_outputs=True),
    "`BCEWithLogitsLoss`": Case(loss=nn.BCEWithLogitsLoss, like_outputs=True),
    "`SmoothL1Loss`": Case(loss=nn.SmoothL1Loss, like_outputs=True),
}


def differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-4) -> Tensor:
    """The Jacobian of f at x, `[f(x).numel(), x.numel()]`, by central differences of order 4."""
    columns = []
    for e in h * torch.eye(x.numel()).double().view(-1, *x.shape):
        near, far = f(x + e) - f(x - e), f(x + 2 * e) - f(x - 2 * e)
        columns.append((8 * near - far).flatten() / (12 * h))
    return torch.stack(columns, dim=1)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of f at x."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x)
    return g


def references(case: Case) -> dict[str, list[Tensor]]:
    """The blocks of the GGN and of the Hessian, one per parameter, from first derivatives."""
    model, loss, x, y = case.model(), case.loss(), case.inputs(), case.targets()

    def outputs(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(2)  # the same mask, where there is dropout
        z: Tensor = functional_call(model, values, (x,))
        return z

    z = outputs({}).detach()
    H_L = differences(lambda z: gradient(lambda z: loss(z, y), z), z)
    blocks: dict[str, list[Tensor]] = {"GGN": [], "Hessian": []}
    for name, p in model.named_parameters():

        def outputs_of(value: Tensor, name: str = name) -> Tensor:
            return outputs({name: value})

        def loss_of(value: Tensor, name: str = name) -> Tensor:
            value_of: Tensor = loss(outputs({name: value}), y)
            return value_of

        with torch.no_grad():
            J = differences(outputs_of, p.detach())
        blocks["GGN"].append(J.T @ H_L @ J)
        blocks["Hessian"].append(differences(partial(gradient, loss_of), p.detach()))
    return blocks


def products(case: Case, column: str) -> list[Tensor]:
    """The blocks as products with all unit vectors have them."""
    model, loss, x, y = case.model(), case.loss(), case.inputs(), case.targets()
    torch.manual_seed(2)
    if column in ("GGN", "Hessian"):
        curvature = {"GGN": GGN, "Hessian": Hessian}[column](model.parameters())
        z = model(x)
        found = curvature.backward(loss(z, y), z)
        return [product(torch.eye(product.parameters[0].numel()).double()) for product in found]
    extension = {"GGNMP": GGNMP, "HMP": HMP, "PCHMP": PCHMP}[column]()
    model, loss = extend(model), extend(loss)
    with backpack(extension):
        loss(model(x), y).backward()
    blocks = []
    for p in model.parameters():
        product = getattr(p, extension.savefield)
        unit_vectors = torch.eye(p.numel()).double().view(-1, *p.shape)
        blocks.append(product(unit_vectors).reshape(p.numel(), -1))
    return blocks


def verdicts(case: Case) -> dict[str, str]:
    """What becomes of the product of each column, in a word or two, and what BackPACK says."""
    expected = references(case)
    words, said = {}, ""
    for column in COLUMNS:
        matrix = {"GGNMP": "GGN", "HMP": "Hessian"}.get(column, column)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = products(case, column)
        except Exception as error:  # of any kind
            words[column] = "raises"
            kind = "" if isinstance(error, NotImplementedError) else f"`{type(error).__name__}`: "
            said = said or f"{kind}{brief(str(error))}"
            continue
        if column == "PCHMP":
            words[column] = "takes"
            continue
        all_found, all_expected = torch.block_diag(*found), torch.block_diag(*expected[matrix])
        difference = ((all_found - all_expected).norm() / all_expected.norm()).item()
        words[column] = "right" if difference < ROUNDING else f"**wrong**, {difference:.1g}"
    return words | {"said": said}


def brief(message: str) -> str:
    """The first sentence of an error, without where classes come from."""
    line = re.split(r"[.:] |\n|\. Currently", message.strip())[0]
    named = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", line)
    named = re.sub(
        r"Extension saving to \w+ does not have an extension for Module", "no rule for", named
    )
    return " ".join(re.sub(r"[`*\\]", "", named).split())
