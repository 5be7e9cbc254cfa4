"""The networks of the tutorial, and networks as functions of one vector."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.func import functional_call

__all__ = [
    "make_autoencoder",
    "make_mlp",
    "make_model",
    "make_tiny_model",
    "outputs_of",
    "split",
]


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


def make_tiny_model() -> nn.Sequential:
    """A network whose curvature matrices fit on a page, for `load_tiny_mnist`.

    Torch's default initialisation draws the weights from the global generator.

    Returns:
        A model `[N, 9] → [N, 3]` with 113 parameters, in double precision.

    Example:
        >>> sum(p.numel() for p in make_tiny_model().parameters())
        113
    """
    return nn.Sequential(
        nn.Linear(9, 6),
        nn.Sigmoid(),
        nn.Linear(6, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
    ).double()


def split(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Cut a vector into tensors of the shapes of a model's parameters.

    Args:
        model: The model.
        x: A vector of as many numbers as the model has parameters, as
            `torch.nn.utils.parameters_to_vector` gives it.

    Returns:
        Views of `x`, in the order of the parameters.
    """
    shapes = [p.shape for p in model.parameters()]
    parts = x.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def outputs_of(model: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The outputs of a model as a function of its parameters.

    Args:
        model: The model, which stays as it is.
        inputs: The inputs, `[N, ...]`.

    Returns:
        A function from a vector of all parameters, see `split`, to the outputs `[N, ...]`.
    """
    names = [name for name, _ in model.named_parameters()]

    def outputs(x: Tensor) -> Tensor:
        parameters = dict(zip(names, split(model, x), strict=True))
        z: Tensor = functional_call(model, parameters, (inputs,))
        return z

    return outputs
