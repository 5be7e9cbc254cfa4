"""The data are MNIST, and what is not is refused by name."""

import gzip
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch

from cgn_tutorial.pages import load_mnist, load_published_run, mnist_loader
from cgn_tutorial.pages.data import MNIST_MEAN, MNIST_STD

BUNDLED = resources.files("cgn_tutorial.pages") / "mnist"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in torchvision's layout with the test set."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copy(str(BUNDLED / name), raw / name)
    return tmp_path


@pytest.mark.versions
@pytest.mark.parametrize(("train", "size"), [(True, 60_000), (False, 10_000)])
def test_the_bundled_copy_is_all_of_mnist_normalised(train, size):
    images, labels = load_mnist(train).tensors
    assert images.shape == (size, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.shape == (size,)
    assert labels.unique().tolist() == list(range(10))
    pixels = images * MNIST_STD + MNIST_MEAN
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1)
    if train:  # the constants are the training set's own, rounded
        assert pixels.mean() == pytest.approx(MNIST_MEAN, abs=5e-5)
        assert pixels.double().std() == pytest.approx(MNIST_STD, abs=5e-5)


@pytest.mark.versions
def test_loading_writes_nothing(monkeypatch):
    def refuse(path, mode="r", *args, **kwargs):
        assert not set(mode) & set("wax+")
        return original(path, mode, *args, **kwargs)

    original = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("made a folder"))
    assert len(load_mnist(train=False)) == 10_000


@pytest.mark.versions
def test_a_root_in_torchvisions_layout_gives_the_same_data(root):
    for ours, theirs in zip(
        load_mnist(False).tensors, load_mnist(False, root).tensors, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_root_may_begin_with_a_tilde(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("USERPROFILE", str(root.parent))  # Windows
    images = load_mnist(False, f"~/{root.name}").tensors[0]
    assert torch.equal(images, load_mnist(False).tensors[0])


@pytest.mark.versions
def test_unzipped_files_are_read_too(root):
    zipped = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    zipped.with_suffix("").write_bytes(gzip.decompress(zipped.read_bytes()))
    zipped.unlink()
    assert torch.equal(load_mnist(False, root).tensors[1], load_mnist(False).tensors[1])


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train-images-idx3-ubyte is missing.*download=True"
    ):
        load_mnist(root=tmp_path)


def test_download_without_a_root_is_refused():
    with pytest.raises(ValueError, match="needs root"):
        load_mnist(download=True)


def damaged(content: bytes, how: str) -> bytes:
    """A gzip file of content, damaged."""
    match how:
        case "zip truncated":
            return gzip.compress(content)[:-100]
        case "no zip":
            return content
        case "zip garbled":
            zipped = bytearray(gzip.compress(content))
            zipped[len(zipped) // 2 :] = bytes(len(zipped) - len(zipped) // 2)
            return bytes(zipped)
        case "content truncated":
            return gzip.compress(content[:-3])
        case "content too long":
            return gzip.compress(content + b"123")
        case "wrong magic number":
            return gzip.compress(b"\0\0\x08\x03" + content[4:])
        case "wrong shape":
            return gzip.compress(content[:4] + b"\0\0\0\x07" + content[8:])
        case "no digit":
            return gzip.compress(content[:-1] + b"\x0a")
    raise ValueError(how)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("zip truncated", "expected a gzip file of 10008 bytes, found that Compressed file ended"),
        ("no zip", "expected a gzip file of 10008 bytes, found that Not a gzipped file"),
        ("zip garbled", "expected a gzip file of 10008 bytes, found that"),
        ("content truncated", "expected 10008 bytes, found 10005"),
        ("content too long", "expected 10008 bytes, found more"),
        ("wrong magic number", r"expected the magic number 2049 .* found 2051"),
        ("wrong shape", r"the shape \(10000,\), found 2049 and \(7,\)"),
        ("no digit", "expected labels from 0 to 9, found 10"),
    ],
)
def test_a_damaged_file_is_refused_by_name(root, how, found):
    file = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(damaged(gzip.decompress(file.read_bytes()), how))
    with pytest.raises(ValueError, match=f"t10k-labels-idx1-ubyte.* is damaged: .*{found}"):
        load_mnist(train=False, root=root)


@pytest.mark.versions
def test_the_loader_draws_from_torchs_global_generator():
    loader = mnist_loader(64, train=False)
    order = []
    for _ in range(2):
        torch.manual_seed(0)
        order.append(next(iter(loader))[1])
    assert torch.equal(*order)

    torch.manual_seed(0)
    plain = torch.utils.data.DataLoader(range(10_000), batch_size=64, shuffle=True)
    labels = load_mnist(train=False).tensors[1]
    assert torch.equal(order[0], labels[next(iter(plain))])


def test_the_loader_keeps_the_last_smaller_batch():
    sizes = [len(targets) for _, targets in mnist_loader(3_000, train=False)]
    assert sizes == [3_000, 3_000, 3_000, 1_000]


def test_the_published_run_has_two_figures_for_each_iteration_of_nine_runs():
    published = load_published_run()
    assert len(published["runs"]) == 9
    for figures in published["runs"].values():
        assert len(figures["loss"]) == len(figures["accuracy"]) == len(published["iterations"])
