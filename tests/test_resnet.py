"""A model too large for dense blocks, and of layers that BackPACK cannot take, takes a step."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.curvature import GGN, layers


@pytest.mark.gpu
def test_resnet18_takes_a_step_with_layer_blocks_that_lowers_the_loss():
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to("cuda")
    curvature = GGN(layers(model))
    optimizer = CGNOptimizer(model.named_parameters(), curvature, lr=0.1, maxiter=5)
    inputs = torch.randn(32, 3, 64, 64, device="cuda")
    targets = torch.randint(10, (32,), device="cuda")

    def evaluate():
        outputs = model(inputs)
        return cross_entropy(outputs, targets), outputs

    before = [p.detach().clone() for p in model.parameters()]
    loss, outputs = evaluate()
    products = curvature.backward(loss, outputs)
    optimizer.step()

    assert len(products) == len(optimizer.solves) == 41  # 20 convolutions, 20 norms, 1 linear layer
    for solve in optimizer.solves.values():
        assert 0 < solve.products <= 5
        assert solve.reason in ("converged", "maxiter")
    for p, p_before in zip(model.parameters(), before, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, p_before)
    assert evaluate()[0] < loss
