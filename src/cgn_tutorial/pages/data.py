"""MNIST, in the copy of this package, and the figures of the published run."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

__all__ = [
    "MNIST_MEAN",
    "MNIST_STD",
    "load_mnist",
    "load_published_run",
    "load_tiny_mnist",
    "mnist_loader",
]

#: Mean of the training images' pixels, scaled to [0, 1].
MNIST_MEAN = 0.1307
#: Standard deviation of the training images' pixels, scaled to [0, 1].
MNIST_STD = 0.3081

_SIZES = {"train": 60_000, "t10k": 10_000}
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # unsigned bytes, in 3 dimensions and in 1


def load_mnist(
    train: bool = True, root: str | Path | None = None, *, download: bool = False
) -> TensorDataset:
    """MNIST as normalised images and labels, in the order of the original files.

    Pixels are scaled to [0, 1], then shifted and scaled by `MNIST_MEAN` and `MNIST_STD`.

    Args:
        train: Whether to read the 60,000 training images or the 10,000 test images.
        root: The folder to read from, in torchvision's layout `root/MNIST/raw`; `~` stands for your
            home folder. `None` reads the package's copy, without network, and writes nothing.
        download: Whether torchvision downloads missing files into `root`.

    Returns:
        A data set of images, float32 `[N, 1, 28, 28]`, and labels, int64 `[N]`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged; the message says what was expected and what was found. Or
            `download` is True, but `root` is None.

    Source:
        LeCun, Cortes and Burges, "The MNIST database of handwritten digits", CC BY-SA 3.0.
    """
    if root is None:
        if download:
            raise ValueError("download=True needs root, the folder to download into.")
        folder: Traversable = resources.files("cgn_tutorial.pages") / "mnist"
    else:
        root = Path(root).expanduser()
        if download:
            MNIST(root, train=train, download=True)
        folder = root / "MNIST" / "raw"
    part = "train" if train else "t10k"
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", _IMAGES_MAGIC, (_SIZES[part], 28, 28))
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", _LABELS_MAGIC, (_SIZES[part],))
    if labels.max() > 9:
        raise ValueError(
            f"{part}-labels-idx1-ubyte is damaged: expected labels from 0 to 9, "
            f"found {labels.max().item()}."
        )
    pixels = images.unsqueeze(1).float().div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)
    return TensorDataset(pixels, labels.long())


def mnist_loader(
    batch_size: int = 64,
    *,
    train: bool = True,
    shuffle: bool = True,
    root: str | Path | None = None,
    download: bool = False,
) -> DataLoader[tuple[Tensor, ...]]:
    """Mini-batches of `load_mnist`.

    The order of the images comes from torch's global generator: after `torch.manual_seed(seed)`,
    the same batches come in the same order.

    Args:
        batch_size: Images per batch; the last batch may be smaller.
        train: See `load_mnist`.
        shuffle: Whether each pass over the data draws a new order.
        root: See `load_mnist`.
        download: See `load_mnist`.

    Returns:
        A loader of pairs of images `[batch_size, 1, 28, 28]` and labels `[batch_size]`.
    """
    dataset = load_mnist(train, root, download=download)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def load_tiny_mnist() -> tuple[Tensor, Tensor]:
    """A hundred images of the digits 0, 1 and 2, shrunk to 3 × 3 pixels, for `make_tiny_model`.

    Returns:
        Images, float64 `[100, 9]`, and labels, int64 `[100]`.
    """
    images, labels = load_mnist(train=False).tensors
    few = (labels < 3).nonzero().flatten()[:100]
    return adaptive_avg_pool2d(images[few], 3).flatten(1).double(), labels[few]


def load_published_run() -> dict[str, Any]:
    """The loss and accuracy that the published example printed.

    Returns:
        A dictionary of the following.

        `"config"`: the example's `"seed"`, `"batch_size"`, and options, named as in `CGNOptimizer`;
        `"iterations"`: the iterations at which the example printed; `"runs"`: for each of nine
        optimizers, the `"loss"` and the `"accuracy"` on the mini-batches of these iterations.

    Source:
        BackPACK's documentation, example "Matrix-free second-order optimization" (Dangel, Kunstner
        and Hennig, 2020).
    """
    file = resources.files("cgn_tutorial.pages") / "published_run.json"
    run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return run


def _read_idx(folder: Traversable, name: str, magic: int, shape: tuple[int, ...]) -> Tensor:
    """The bytes of an IDX file, plain or gzipped. Raise if its header or its length is wrong."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if not (plain.is_file() or zipped.is_file()):
        raise FileNotFoundError(
            f"{name} is missing in {folder}, plain or as .gz: load_mnist(root=..., download=True) "
            "downloads it, root=None reads the copy that comes with the package."
        )
    file = plain if plain.is_file() else zipped
    header = (magic, *shape)
    expected = 4 * len(header) + math.prod(shape)
    try:
        with file.open("rb") as raw:
            content = (raw if file is plain else gzip.GzipFile(fileobj=raw)).read(expected + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged: expected a gzip file of {expected} bytes, found that {error}"
        ) from error
    found = tuple(int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(len(header)))
    if found != header:
        raise ValueError(
            f"{file} is damaged: expected the magic number {magic} and the shape {shape}, "
            f"found {found[0]} and {found[1:]}."
        )
    if len(content) != expected:
        size = "more" if len(content) > expected else str(len(content))
        raise ValueError(f"{file} is damaged: expected {expected} bytes, found {size}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 * len(header)).view(
        shape
    )
