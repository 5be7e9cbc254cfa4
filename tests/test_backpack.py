"""BackPACK's blocks against a dense recursion, layer by layer, with autograd inside each layer."""

from collections.abc import Callable

import pytest
import torch
import trials
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

pytestmark = pytest.mark.versions

IMAGES, CLASSES = 2, 3
MODIFICATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda residual: residual,
    "zero": torch.zeros_like,
    "abs": torch.abs,
    "clip": lambda residual: residual.clamp(min=0),
}


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Tanh(),
        nn.Linear(4, CLASSES),
    ).double()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(IMAGES, 1, 5, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(params=[nn.CrossEntropyLoss, nn.MSELoss])
def loss_function(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


def labels_for(loss_function: nn.Module) -> Tensor:
    labels = torch.arange(IMAGES) % CLASSES
    if isinstance(loss_function, nn.MSELoss):
        return nn.functional.one_hot(labels, CLASSES).double()
    return labels


def recursion_blocks(
    net: nn.Sequential,
    images: Tensor,
    loss_function: nn.Module,
    modify: Callable[[Tensor], Tensor],
    delta_power: int = 1,
) -> list[Tensor]:
    """Dense blocks by the recursion that the table of BackPACK's products is judged by."""

    def loss(outputs: Tensor) -> Tensor:
        return loss_function(outputs, labels_for(loss_function))

    return trials.recursion_blocks(net, images, loss, modify, delta_power)


def backpack_blocks(
    net: nn.Sequential, images: Tensor, loss_function: nn.Module, extension: object
) -> list[Tensor]:
    """Dense blocks from BackPACK's products with all unit vectors at once."""
    extend(net)
    with backpack(extension):
        extend(loss_function)(net(images), labels_for(loss_function)).backward()
    blocks = []
    for p in net.parameters():
        unit_vectors = torch.eye(p.numel()).double().view(-1, *p.shape)
        blocks.append(getattr(p, extension.savefield)(unit_vectors).reshape(p.numel(), -1))
    return blocks


def errors(blocks: list[Tensor], others: list[Tensor]) -> list[float]:
    """The relative difference of each block."""
    return [
        ((block - other).norm() / other.norm()).item()
        for block, other in zip(blocks, others, strict=True)
    ]


def test_the_recursion_without_modification_gives_autograds_hessian_blocks(
    net: nn.Sequential, images: Tensor, loss_function: nn.Module
) -> None:
    blocks = recursion_blocks(net, images, loss_function, MODIFICATIONS["none"])
    parameters = dict(net.named_parameters())
    for (name, p), block in zip(parameters.items(), blocks, strict=True):

        def loss(value: Tensor, name: str = name) -> Tensor:
            outputs = functional_call(net, {name: value}, (images,))
            return loss_function(outputs, labels_for(loss_function))

        dense = hessian(loss, p.detach()).reshape(p.numel(), p.numel())
        assert (block - dense).norm() <= 1e-12 * dense.norm()


@pytest.mark.parametrize(("modification", "extension"), [("none", HMP()), ("zero", GGNMP())])
def test_backpacks_hessian_and_ggn_are_the_recursion_with_the_residual_kept_and_dropped(
    net: nn.Sequential,
    images: Tensor,
    loss_function: nn.Module,
    modification: str,
    extension: object,
) -> None:
    blocks = recursion_blocks(net, images, loss_function, MODIFICATIONS[modification])
    theirs = backpack_blocks(net, images, loss_function, extension)
    assert max(errors(theirs, blocks)) < 1e-12


@pytest.mark.parametrize("modification", ["abs", "clip"])
def test_backpacks_pch_is_the_recursion_with_the_gradient_squared_in_the_residual(
    net: nn.Sequential, images: Tensor, loss_function: nn.Module, modification: str
) -> None:
    """The definition has the gradient once. If this fails, say so on the pages that use PCHMP."""
    modify = MODIFICATIONS[modification]
    once = recursion_blocks(net, images, loss_function, modify)
    twice = recursion_blocks(net, images, loss_function, modify, delta_power=2)
    theirs = backpack_blocks(net, images, loss_function, PCHMP(modify=modification))
    assert max(errors(theirs, twice)) < 1e-12
    assert max(errors(theirs, once)) > 1e-2


@pytest.mark.parametrize("delta_power", [1, 2])
@pytest.mark.parametrize("modification", ["zero", "abs", "clip"])
def test_ggn_and_pch_blocks_are_positive_semi_definite_where_hessian_blocks_are_not(
    net: nn.Sequential, images: Tensor, modification: str, delta_power: int
) -> None:
    def smallest(modification: str) -> float:
        blocks = recursion_blocks(
            net, images, nn.CrossEntropyLoss(), MODIFICATIONS[modification], delta_power
        )
        return min(torch.linalg.eigvalsh(block)[0].item() for block in blocks)

    assert smallest(modification) > -1e-15
    assert smallest("none") < -1e-6
