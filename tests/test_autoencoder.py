"""The autoencoder trains with Adam, with constant damping, and with damping that adapts."""

from itertools import pairwise

import pytest

from cgn_tutorial.pages import autoencoder
from cgn_tutorial.pages.autoencoder import train_autoencoder


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Test on few images, which takes less time."""
    load_images = autoencoder.load_images

    def load_few(*, train):
        images, labels = load_images(train=train)
        return (images, labels) if train else (images[:500], labels[:500])

    monkeypatch.setattr(autoencoder, "load_images", load_few)


@pytest.mark.parametrize("options", [{"damping": None, "lr": 1e-3}, {"adapt_to": None}, {}])
def test_the_autoencoder_trains(options):
    tests = train_autoencoder(0, batch_size=100, steps=6, **options)
    assert [test.steps for test in tests] == [1, 2, 3, 4, 5, 6]
    assert tests[-1].error < 130
    assert all(a.seconds < b.seconds for a, b in pairwise(tests))
    damping = {test.damping for test in tests}
    if options == {"adapt_to": None}:
        assert damping == {0.03}
    elif not options:
        assert len(damping) > 1


def test_on_another_batch_damping_adapts_otherwise():
    dampings = [
        [test.damping for test in train_autoencoder(0, batch_size=20, steps=12, adapt_to=adapt_to)]
        for adapt_to in ("the same batch", "another batch")
    ]
    assert dampings[1][-1] > dampings[0][-1]


def test_what_damping_cannot_adapt_to_is_refused():
    with pytest.raises(ValueError, match=r"adapt_to must be .* but is 'a batch'"):
        train_autoencoder(0, adapt_to="a batch", steps=1)
