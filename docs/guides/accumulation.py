"""Curvature products of several backward passes, for one step."""

from collections.abc import Sequence

from torch import Tensor

from cgn_tutorial.curvature import BlockProduct


class Mean:
    """The mean of the products of one block, each of another part of a batch."""

    def __init__(self, products: Sequence[BlockProduct]) -> None:
        self.products = products
        self.parameters = products[0].parameters  # tells the optimizer whose numbers these are

    def __call__(self, V: Tensor) -> Tensor:
        """`[V, n] → [V, n]`."""
        return sum(product(V) for product in self.products) / len(self.products)
