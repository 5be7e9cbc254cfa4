"""The network of the tutorial."""

from torch import nn

__all__ = ["make_model"]


def make_model() -> nn.Sequential:
    """A small convolutional network for MNIST whose gradients vanish.

    Three layers of sigmoids, each of slope 1/4 at most, shrink what flows back through them, so
    that gradient descent barely moves the first layers. The weights are drawn by torch's default
    initialisation from the global generator.

    Returns:
        A model `[N, 1, 28, 28] → [N, 10]` with 21,840 parameters.

    Example:
        >>> sum(p.numel() for p in make_model().parameters())
        21840
    """
    return nn.Sequential(
        nn.Conv2d(1, 10, 5),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Conv2d(10, 20, 5),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(320, 50),
        nn.Sigmoid(),
        nn.Linear(50, 10),
    )
