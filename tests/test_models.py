"""The networks are what they say."""

import torch
from torch.nn.utils import parameters_to_vector

from cgn_tutorial.pages import (
    load_tiny_mnist,
    make_autoencoder,
    make_model,
    make_tiny_model,
    outputs_of,
    split,
)


def test_the_model_has_21840_parameters_and_ten_outputs():
    model = make_model()
    assert sum(p.numel() for p in model.parameters()) == 21_840
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_the_weights_are_drawn_from_the_global_generator():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make_model())
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_the_autoencoder_maps_images_to_images():
    assert make_autoencoder()(torch.zeros(3, 784)).shape == (3, 784)
    assert min(p.shape[0] for p in make_autoencoder().parameters()) == 30


def test_activations_can_be_others():
    kinds = [type(module) for module in make_model(torch.nn.ReLU)]
    assert kinds.count(torch.nn.ReLU) == 3
    assert torch.nn.Sigmoid not in kinds


def test_the_tiny_model_takes_the_tiny_images_and_separates_their_digits():
    images, labels = load_tiny_mnist()
    model = make_tiny_model()
    assert sum(p.numel() for p in model.parameters()) == 113
    assert model(images).shape == (len(labels), int(labels.max()) + 1) == (100, 3)


def test_outputs_are_a_function_of_one_vector_that_leaves_the_model_as_it_is():
    images, _ = load_tiny_mnist()
    one, other = make_tiny_model(), make_tiny_model()
    x, kept = (parameters_to_vector(model.parameters()).detach() for model in (one, other))
    torch.testing.assert_close(outputs_of(other, images)(x), one(images))
    assert torch.equal(parameters_to_vector(other.parameters()), kept)
    for part, p in zip(split(other, x), one.parameters(), strict=True):
        assert torch.equal(part, p)
