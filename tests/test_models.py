"""The networks are what they say."""

import torch

from cgn_tutorial.pages import make_autoencoder, make_model


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
