"""A classifier of images: Newton steps in the linear layers, Adam elsewhere, averaged weights."""

import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cgn_tutorial import GGN, CGNOptimizer
from cgn_tutorial.pages import load_mnist, make_model


def train(steps: int = 40, seed: int = 0) -> tuple[float, float]:
    """Train, and return the losses on 2,000 of the training images, without and with averages."""
    torch.manual_seed(seed)
    images, labels = load_mnist().tensors
    model = make_model()
    linear = [list(m.parameters()) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inside = {p for block in linear for p in block}
    others = [p for p in model.parameters() if p not in inside]
    curvature = GGN(linear)
    newton = CGNOptimizer(
        [p for block in linear for p in block],
        curvature,
        lr=0.3,
        damping=1e-2,
        tol=0.3,
        maxiter=5,
        max_length=0.2,
    )
    adam = torch.optim.Adam(others, lr=1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(steps):
        batch = torch.randint(len(images), (256,))
        model.zero_grad()
        outputs = model(images[batch])
        loss = cross_entropy(outputs, labels[batch])
        curvature.backward(loss, outputs)  # also leaves the gradients that Adam takes
        newton.step()
        adam.step()
        average.update_parameters(model)
    with torch.no_grad():
        ends = [cross_entropy(m(images[:2000]), labels[:2000]).item() for m in (model, average)]
    return ends[0], ends[1]
