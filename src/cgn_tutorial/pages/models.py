"""The networks of the tutorial."""

from itertools import pairwise

from torch import nn

__all__ = ["make_autoencoder", "make_mlp", "make_model"]


def make_model(activation: type[nn.Module] = nn.Sigmoid) -> nn.Sequential:
    """A small convolutional network for MNIST whose gradients vanish.

    The slope of a sigmoid is 1/4 at most. Three layers of sigmoids shrink the gradient of the first
    layers so much that gradient descent barely moves them. Torch's default initialisation draws the
    weights from the global generator.

    Args:
        activation: The module between the layers, such as `nn.ReLU`.

    Returns:
        A model `[N, 1, 28, 28] → [N, 10]` with 21,840 parameters.

    Example:
        >>> sum(p.numel() for p in make_model().parameters())
        21840
    """
    return nn.Sequential(
        nn.Conv2d(1, 10, 5),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(10, 20, 5),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(320, 50),
        activation(),
        nn.Linear(50, 10),
    )


def make_mlp() -> nn.Sequential:
    """A perceptron with five layers of sigmoids for MNIST.

    Torch's default initialisation draws the weights from the global generator.

    Returns:
        A model `[N, 1, 28, 28] → [N, 10]` with 119,910 parameters.

    Example:
        >>> sum(p.numel() for p in make_mlp().parameters())
        119910
    """
    modules: list[nn.Module] = [nn.Flatten()]
    for before in [784, *[100] * 4]:
        modules += [nn.Linear(before, 100), nn.Sigmoid()]
    return nn.Sequential(*modules, nn.Linear(100, 10))


def make_autoencoder() -> nn.Sequential:
    """A deep autoencoder of sigmoids for MNIST: images to 30 numbers, and back.

    After Hinton and Salakhutdinov (2006), but with fewer and smaller layers. Torch's default
    initialisation draws the weights from the global generator. The outputs are logits of pixels.

    Returns:
        A model `[N, 784] → [N, 784]` with 449,514 parameters.

    Example:
        >>> sum(p.numel() for p in make_autoencoder().parameters())
        449514
    """
    widths = [784, 250, 100, 30, 100, 250, 784]
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.Sigmoid()]
    return nn.Sequential(*modules[:-1])
