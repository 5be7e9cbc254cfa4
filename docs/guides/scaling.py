"""Gradients and products of a loss that was multiplied by a number, scaled back."""

from collections.abc import Sequence

from torch import Tensor

from cgn_tutorial.curvature import BlockProduct


class Unscaled:
    """The product of the loss itself, from that of the scaled loss."""

    def __init__(self, product: BlockProduct, scale: float) -> None:
        self.product, self.scale = product, scale
        self.parameters = product.parameters  # tells the optimizer whose numbers these are

    def __call__(self, V: Tensor) -> Tensor:
        """`[V, n] → [V, n]`."""
        return self.product(V) / self.scale


def unscale(products: Sequence[BlockProduct], savefield: str, scale: float) -> None:
    """Divide the gradients and the products on all parameters by the scale of the loss."""
    for product in products:
        unscaled = Unscaled(product, scale)  # one for all parameters of a block
        for p in product.parameters:
            p.grad /= scale
            setattr(p, savefield, unscaled)
