"""Newton steps for the last layers beside Adam's for the others, as the guide shows them."""

import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cgn_tutorial import GGN, CGNOptimizer, layers
from cgn_tutorial.pages import make_model, mnist_loader

torch.manual_seed(0)
model, losses = make_model(), []
loader = zip(range(60), mnist_loader(64), strict=False)

# The loop
*first, linear_1, linear_2 = layers(model)
curvature = GGN([linear_1, linear_2])
newton = CGNOptimizer(
    [*linear_1, *linear_2], curvature, lr=0.15, damping=3e-3, maxiter=5, max_length=0.2
)
adam = torch.optim.Adam([p for layer in first for p in layer], lr=1e-2)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

for _, (inputs, targets) in loader:
    model.zero_grad()
    outputs = model(inputs)
    loss = cross_entropy(outputs, targets)
    curvature.backward(loss, outputs)  # leaves the gradient on all parameters
    newton.step()
    adam.step()
    average.update_parameters(model)
    losses.append(loss.item())
# The end
