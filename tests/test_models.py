"""The tutorial's network is the published one."""

import torch

from cgn_tutorial import make_model


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
