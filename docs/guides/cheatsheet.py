"""The loop on the page to print."""

import torch
from torch.nn.functional import cross_entropy

from cgn_tutorial import GGN, CGNOptimizer, layers
from cgn_tutorial.pages import make_model, mnist_loader

torch.manual_seed(0)
model = make_model()
loader = [batch for _, batch in zip(range(3), mnist_loader(64), strict=False)]

# The loop
curvature = GGN(layers(model))
optimizer = CGNOptimizer(model.parameters(), curvature)
for inputs, targets in loader:
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = cross_entropy(outputs, targets)
    curvature.backward(loss, outputs)
    optimizer.step()
# The end
