"""A classifier of images: Newton steps in the last layer, Muon in the others, averaged weights."""

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
    last = list(model[-1].parameters())
    hidden = [p for p in model[:-1].parameters() if p.ndim > 1]
    biases = [p for p in model[:-1].parameters() if p.ndim == 1]
    matrices = [p.detach().flatten(1).requires_grad_() for p in hidden]  # in the same memory
    curvature = GGN([last])
    options = {"lr": 0.4, "damping": 5e-3, "tol": 0.1, "maxiter": 5, "max_length": 0.5}
    optimizers = [
        CGNOptimizer(last, curvature, **options),
        torch.optim.Muon(matrices, lr=0.3, momentum=0.9, weight_decay=0.0),
        torch.optim.Adam(biases, lr=1e-2),
    ]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        model.zero_grad()
        outputs = model(images[batch])
        loss = cross_entropy(outputs, labels[batch])
        curvature.backward(loss, outputs)  # also leaves the gradients of the other layers
        for matrix, p in zip(matrices, hidden, strict=True):
            matrix.grad = p.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(model)
    with torch.no_grad():
        ends = [cross_entropy(m(images[:2000]), labels[:2000]).item() for m in (model, average)]
    return ends[0], ends[1]
