r"""
5. Any architecture
===================

How does a network with any modules train with curvature? The library BackPACK needs
a rule for each module. This page computes curvature products by automatic
differentiation alone, for any model and loss that PyTorch can differentiate twice.
The optimizer stays as it is, and each step still solves

.. math::

   (C + \lambda I)\, v = -g

by `conjugate gradients <plot_2_conjugate_gradients.html>`__ (CG). Two things
change: the source of the products, and the parameters that share a system: a single
tensor, a layer, or the whole network.

*About 20 minutes to read, and two to run.* To run this page, ``pip install`` the
package, as the `front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# Where BackPACK stops
# --------------------
#
# A residual network adds the output of a branch of layers to its input, and has
# batch normalisation after most layers. Here is a small one for MNIST:

# Define the modules of a residual network.
import warnings
from textwrap import fill

import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from torch import nn

from cgn_tutorial.pages import load_mnist

# Torch warns of BackPACK's hook on the first layer, harmlessly.
warnings.filterwarnings("ignore", "Full backward hook is firing")


def convolution(c_in, c_out, size, stride=1):
    padding = size // 2
    conv = nn.Conv2d(c_in, c_out, size, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class Residual(nn.Module):
    """A branch that is added to its input."""

    def __init__(self, c):
        super().__init__()
        first, second = convolution(c, c, 3), convolution(c, c, 3)
        self.branch = nn.Sequential(first, second[:2])
        nn.init.zeros_(second[1].weight)  # starts as the identity
        self.relu = nn.ReLU()

    def forward(self, x):
        """The sum of x and its branch, rectified."""
        return self.relu(x + self.branch(x))


# %%


def make_residual_cnn(c=8):
    return nn.Sequential(
        convolution(1, c, 5, stride=3),
        Residual(c),
        nn.MaxPool2d(2),
        Residual(c),
        nn.Flatten(),
        nn.Linear(25 * c, 10),
    )


n = sum(p.numel() for p in make_residual_cnn().parameters())
print(f"{n:,} parameters")
assert n < 100_000

# %%
# Does BackPACK take this model, as it is or with ``use_converter=True``, which
# rewrites additions as modules?

images, labels = (t[:64] for t in load_mnist().tensors)
attempts = {
    "as it is": extend(make_residual_cnn()),
    "converted": extend(make_residual_cnn(), use_converter=True),
}
for label, model in attempts.items():
    loss = extend(nn.CrossEntropyLoss())(model(images), labels)
    try:
        with backpack(GGNMP()):
            loss.backward()
    except NotImplementedError as error:
        print(fill(f"{label}: {error}", 66), end="\n\n")
    else:
        raise AssertionError("BackPACK takes this model by now")

# %%
# ``GGNMP`` has no rule for batch normalisation over images, nor for an addition.
# Automatic differentiation needs no such rules.
#
# Products by automatic differentiation
# -------------------------------------
#
# The `generalized Gauss-Newton matrix
# <plot_1_newton_step.html#generalized-gauss-newton>`__ (GGN) is :math:`G = J^\top
# H_L\, J`, with the Jacobian :math:`J` of the outputs :math:`z` and the Hessian
# :math:`H_L` of the loss :math:`\ell(z)`. A backward pass multiplies an incoming
# vector by the transpose of a Jacobian. Two backward passes per batch, and two for
# each product :math:`G p = J^\top (H_L (J p))`, are enough. In the figure, each
# arrow is a pass. The vector that comes in is named at the tail of the arrow, and
# the result at the head:

# Draw the passes as arrows between parameters, outputs and loss.
import matplotlib.pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe

PASSES = (
    ("forward", "x", "z", "", "", "black"),
    ("forward", "z", "ℓ", "", "", "black"),
    ("backward", "ℓ", "z", "", "leaves $g_z$", "blue"),
    ("backward", "z", "x", "u", "leaves $J^⊤ u$", "blue"),
    ("graph of $J^⊤ u$", "x", "z", "p", "leaves J p", "orange"),
    ("graph of $g_z$", "z", "x", "J p", "leaves G p", "orange"),
)
place = {"x": 0.0, "z": 0.5, "ℓ": 1.0}
fig, ax = plt.subplots(figsize=(5, 4.4))
for name, at in place.items():
    ax.text(at, 0.75, name, ha="center", size=13)
    ax.axvline(at, color="gray", lw=0.5, ymax=0.9)
for i, (how, start, end, reads, leaves, color) in enumerate(PASSES):
    ink = COLORS.get(color, color)
    arrow = {"arrowstyle": "-|>", "color": ink, "lw": 1.5}
    a, b = place[start], place[end]
    ax.annotate("", xy=(b, -i), xytext=(a, -i), arrowprops=arrow)
    ax.text((a + b) / 2, -i + 0.12, how, ha="center")
    side = {"ha": "left" if b > a else "right", "va": "center"}
    ax.text(b + (0.02 if b > a else -0.02), -i, leaves, **side)
    side["ha"] = "right" if b > a else "left"
    ax.text(a - (0.02 if b > a else -0.02), -i, reads, **side)
ax.text(1.25, -1.5, "once\nper batch", ha="center", color=COLORS["blue"])
ax.text(1.25, -4.7, "for each\nproduct", ha="center", color=COLORS["orange"])
ax.axhline(-3.5, color="gray", lw=0.5, ls=":")
ax.set(xlim=(-0.3, 1.5), ylim=(-5.4, 1.2))
ax.set_axis_off()
_ = describe(
    fig,
    "Arrows between x, z and the loss. Once per batch: forward from x to z to"
    " the loss, backward to z, which leaves the gradient of the outputs, and"
    " from there to x, which leaves J transposed times u. For each product:"
    " from x to z, which reads p and leaves J p, and back from z to x, which"
    " leaves G p.",
)

# %%
# **Once per batch** (blue). The first pass gives the gradient of the outputs,
# :math:`g_z = \nabla_z \ell`. The second pass starts from a vector :math:`u`, here
# :math:`g_z`, and gives :math:`J^\top u`, here the gradient. Both passes build
# graphs.
#
# **For each product** (orange). The vector :math:`J^\top u` is linear in :math:`u`.
# So the pass from :math:`J^\top u` back to :math:`u` multiplies by the transpose of
# :math:`J^\top`: the pass turns :math:`p` into :math:`J p`. The Jacobian of
# :math:`g_z` with respect to the parameters is :math:`H_L J`. So the pass from
# :math:`g_z` to the parameters multiplies by the transpose, :math:`J^\top H_L`: the
# pass turns :math:`J p` into :math:`J^\top H_L J p = G p`.
#
# In code, for a block of one parameter tensor :math:`x`:

from torch.autograd import grad


def ggn_product(loss, z, x):
    (g_z,) = grad(loss, z, create_graph=True)
    u = g_z.detach().requires_grad_()
    (Jt_u,) = grad(z, x, u, create_graph=True)

    def product(p):
        (Jp,) = grad(Jt_u, u, p, retain_graph=True)
        (Gp,) = grad(g_z, x, Jp, retain_graph=True)
        return Gp

    return product


# %%

# Compare with BackPACK's products, for each parameter of the tutorial's network.
import copy

from torch.nn.functional import cross_entropy

from cgn_tutorial.pages import make_model

torch.manual_seed(0)
model = make_model().double()
z = model(images.double())
loss = cross_entropy(z, labels)

twin = extend(copy.deepcopy(model))
loss_function = extend(nn.CrossEntropyLoss())
with backpack(GGNMP()):
    loss_function(twin(images.double()), labels).backward()

pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
for (name, x), x_twin in pairs:
    p = torch.randn_like(x)
    theirs = x_twin.ggnmp(p[None])[0]
    error = (ggn_product(loss, z, x)(p) - theirs).norm() / theirs.norm()
    print(f"{name:8}: relative difference {error:.1e}")
    assert error < 1e-12

# %%
# The products agree with BackPACK's, to within rounding. A product with the Hessian
# takes one backward pass through the graph of the gradient: :math:`H p = (\partial
# g / \partial x)^\top p`. The package has both products, for any blocks, in a file
# that needs nothing but PyTorch, `curvature.py <../curvature.py>`__.
#
# One line in the training loop
# -----------------------------
#
# A **block** is a list of parameters that share one linear system. ``GGN`` takes
# any list of blocks, for instance:

from cgn_tutorial import GGN, Hessian, layers


def per_parameter(model):
    return model.parameters()


def whole_network(model):
    return [model.parameters()]


for blocks in (per_parameter, layers, whole_network):
    print(f"{blocks.__name__:13}", len(GGN(blocks(model)).blocks), "blocks")

# %%
# One line of the training loop is new: ``curvature.backward`` takes the place of
# ``loss.backward()``, and leaves the gradient and the products.

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.pages import mnist_loader

torch.manual_seed(0)
loader = mnist_loader(64)
model = make_model()
curvature = GGN(per_parameter(model))
optimizer = CGNOptimizer(model.parameters(), curvature, maxiter=20)

losses = []
for _, (inputs, targets) in zip(range(3), loader, strict=False):
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = cross_entropy(outputs, targets)
    curvature.backward(loss, outputs)
    optimizer.step()
    losses.append(loss.item())

# %%

# Take the same steps with BackPACK's products.
from cgn_tutorial.pages import train

torch.manual_seed(0)
loader = mnist_loader(64)
model = extend(make_model())
optimizer = CGNOptimizer(model.parameters(), GGNMP(), maxiter=20)
history = train(model, loss_function, optimizer, loader, steps=3)
for ours, theirs in zip(losses, history.loss, strict=True):
    print(f"loss: autograd {ours:.5f}, BackPACK {theirs:.5f}")
    assert abs(ours - theirs) < 1e-3

# %%
# Can a product be trusted?
# -------------------------
#
# ``check_products`` tests with random vectors whether the matrix is symmetric,
# :math:`u^\top C v = v^\top C u`, and positive semi-definite, :math:`u^\top C u \ge
# 0`. For the residual network:

from cgn_tutorial import check_products

torch.manual_seed(0)
model = make_residual_cnn()
z = model(images)
products = GGN(layers(model)).backward(cross_entropy(z, labels), z)
asymmetry = check_products(products, positive=True)
print(f"largest |uᵀCv − vᵀCu|, relative: {asymmetry:.0e}")

# %%
# A difference of this size is rounding, in single precision. But a symmetric
# product may still be wrong. With ``evaluate``, a function that computes loss and
# outputs again, ``check_products`` also compares the products with products by
# central differences.
#
# The comparison with central differences has found an error: PyTorch's own second
# derivative of ``weight_norm`` is wrong. So ``Hessian`` refuses a layer with
# ``weight_norm``. The products of ``GGN`` pass the test:

# Try Hessian and GGN on a layer with weight_norm.
normed = nn.utils.parametrizations.weight_norm(nn.Linear(784, 16))
model = nn.Sequential(nn.Flatten(), normed, nn.Tanh(), nn.Linear(16, 10))


def evaluate():
    z = model(images)
    return cross_entropy(z, labels), z


try:
    Hessian(layers(model)).backward(*evaluate())
except RuntimeError as error:
    print(fill(str(error), 66))
else:
    raise AssertionError("the Hessian of weight_norm is taken by now")

products = GGN(layers(model)).backward(*evaluate())
asymmetry = check_products(products, positive=True, evaluate=evaluate)
print(f"largest |uᵀCv − vᵀCu|, relative: {asymmetry:.0e}")

# %%
# What a product costs
# --------------------
#
# A product with the block of a layer takes two passes, between this layer and the
# outputs only. The unit of the figure is a gradient, one forward and one backward
# pass, on 64 images:

# Time functions in turns.
import statistics
import time
from functools import partial


def medians(candidates, repeats=11):
    seconds = {name: [] for name in candidates}
    for _ in range(repeats):  # in turns, so that all meet the same load
        for name, function in candidates.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {k: statistics.median(v) for k, v in seconds.items()}


torch.manual_seed(0)
model = make_model()
NAMES = ["conv 1", "conv 2", "linear 1", "linear 2", "network"]


def gradient():
    cross_entropy(model(images), labels).backward()


def products_of(kind, blocks):
    z = model(images)
    return kind(blocks(model)).backward(cross_entropy(z, labels), z)


def size(product):
    return sum(p.numel() for p in product.parameters)


candidates = {"gradient": gradient}
for kind in (GGN, Hessian):
    products = products_of(kind, layers) + products_of(kind, whole_network)
    for name, product in zip(NAMES, products, strict=True):
        p = torch.randn(1, size(product))
        candidates[kind.__name__, name] = partial(product, p)
times = medians(candidates)

# %%

# Draw the times of the products.
fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
rows = torch.arange(len(NAMES))
for kind, shift, color in (("GGN", -0.2, "blue"), ("Hessian", 0.2, "orange")):
    cost = [times[kind, n] / times["gradient"] for n in NAMES]
    hatch = "" if kind == "GGN" else "//"
    style = {"color": COLORS[color], "hatch": hatch, "ec": "white"}
    ax.barh(rows + shift, cost, height=0.38, label=kind, **style)
    if kind == "GGN":
        print("product ", *[f"{name:>8}" for name in NAMES])
    print(f"{kind:8}", *[f"{c:8.2f}" for c in cost])
ax.axvline(1, color="gray", lw=1, ls=":")
ax.set(yticks=rows, yticklabels=NAMES)
ax.set(xlabel="time of a product, in gradients")
ax.invert_yaxis()
ax.legend()
_ = describe(
    fig,
    "Bars of the time of one product, for the four layers of the tutorial's"
    " network and for all of it at once. The first convolution costs most"
    " among the layers, the two linear layers a small fraction of a gradient.",
)

# %%
# A product of the first convolution takes many times as long as a product of the
# last layer. For small networks, `page C <plot_c_dense_or_not.html>`__ compares
# products with the stored matrix.
#
# Blocks: parameter, layer, network
# ---------------------------------
#
# Larger blocks keep more of the matrix, here the GGN of a network with 113
# parameters in three layers (darker: larger entries):

# Draw the GGN of a small network three times, and outline the blocks.
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from torch.nn.functional import adaptive_avg_pool2d

KINDS = {
    "parameter": per_parameter,
    "layer": layers,
    "network": whole_network,
}
torch.manual_seed(0)
tiny = nn.Sequential(
    nn.Linear(9, 6),
    nn.Sigmoid(),
    nn.Linear(6, 5),
    nn.Sigmoid(),
    nn.Linear(5, 3),
)
z = tiny(adaptive_avg_pool2d(images, 3).flatten(1))
loss = cross_entropy(z, labels % 3)
(product,) = GGN(whole_network(tiny)).backward(loss, z)
G = product(torch.eye(size(product))).abs() + 1e-9

fig, axes = plt.subplots(1, 3, figsize=(5, 2), layout="constrained")
for ax, (title, blocks) in zip(axes, KINDS.items(), strict=True):
    ax.imshow(G, cmap="Purples", norm=LogNorm(1e-6, 0.1))
    start = 0
    for block in GGN(blocks(tiny)).blocks:
        n = sum(p.numel() for p in block)
        square = Rectangle((start, start), n - 1, n - 1, fill=False)
        ax.add_patch(square).set(ec=COLORS["green"], lw=2)
        start += n
    ax.set(title=title, xticks=[], yticks=[])
_ = describe(
    fig,
    "The same matrix of 113 by 113 three times. Outlined are six squares on"
    " its diagonal, one per parameter, then three, one per layer, then all of it.",
)

# %%
# Do larger blocks need fewer products? Train the tutorial's network for 16 steps,
# with a tolerance of 0.1 and a damping of 0.001, from three seeds. Products and
# seconds are means over the seeds. "Late" is the median of the last five losses,
# for each seed.


# A function that trains with one kind of blocks.
STEPS = 16
SEEDS = range(3)


def run(blocks, seed, enough=lambda steps, products: steps == STEPS):
    """Losses, products and seconds of each step."""
    torch.manual_seed(seed)
    model, loader = make_model(), iter(mnist_loader(64))
    curvature = GGN(blocks(model))
    options = {"lr": 0.2, "damping": 1e-3, "tol": 0.1}
    optimizer = CGNOptimizer(model.parameters(), curvature, **options)
    losses, products, seconds = [], [], []
    while not enough(len(losses), sum(products)):
        history = train(
            model,
            cross_entropy,
            optimizer,
            loader,
            steps=1,
            backward=curvature.backward,
        )
        losses += history.loss
        products += history.products
        seconds += history.seconds
    return losses, products, seconds


def report(label, runs):
    late = [statistics.median(losses[-5:]) for losses, *_ in runs]
    steps, products = len(runs[0][0]), sum(sum(run[1]) for run in runs) / 3
    seconds = sum(sum(run[2]) for run in runs) / 3
    print(f"{label:9} {steps:3d} steps {products:5.0f} products ", end="")
    print(f"{seconds:5.1f} s  late", *[f"{loss:.2f}" for loss in late])
    return late


# %%

runs = {k: [run(blocks, s) for s in SEEDS] for k, blocks in KINDS.items()}
late = {label: report(label, runs[label]) for label in KINDS}

# %%
# At this tolerance, the solves of the whole network stop after a product or two,
# and the loss stays on the plateau (`page C
# <plot_c_dense_or_not.html#what-a-tolerance-on-the-whole-network-allows>`__ says
# why). Let the whole network have as many products as the blocks per layer:

budgets = [sum(products) for _, products, _ in runs["layer"]]
runs["network"] = [
    run(whole_network, seed, lambda _, used, most=most: used >= most)
    for seed, most in zip(SEEDS, budgets, strict=True)
]
late["equal"] = report("network", runs["network"])

# %%

# Draw the losses over products and over seconds.
from itertools import accumulate

fig, axes = plt.subplots(
    2, 1, figsize=(5, 5.4), sharey=True, layout="constrained"
)
for label, color, line in zip(
    KINDS, ("blue", "orange", "green"), ("-", "--", "-."), strict=True
):
    for losses, *spent in runs[label]:
        for ax, cost in zip(axes, spent, strict=True):
            style = {"c": COLORS[color], "ls": line, "lw": 1}
            name = label if losses is runs[label][0][0] else None
            ax.plot([0, *accumulate(cost)][:-1], losses, **style, label=name)
for ax, unit in zip(axes, ("products", "seconds"), strict=True):
    ax.set(xlabel=unit, ylabel="mini-batch loss", ylim=(0, 3))
axes[0].legend(title="a block per", frameon=False)
_ = describe(
    fig,
    "The mini-batch loss at a tolerance of 0.1, over products and over seconds,"
    " from three seeds. All nine runs end below 1.2. Blocks per layer take"
    " fewer products than blocks per parameter; over seconds, the whole network"
    " takes several times as long.",
)

# %%
# - Blocks per parameter and blocks per layer both train, the blocks per layer with
#   fewer products.
# - The whole network does not train in 16 steps. With equal products, the whole
#   network trains, in many more steps and in more time.
# - At a tolerance of 0.01, as `page C
#   <plot_c_dense_or_not.html#does-a-tighter-solve-train-better>`__ shows, blocks
#   per layer train, and some runs of the other blocks blow up.

# Check these points, seed by seed.
for label in ("parameter", "layer"):
    assert max(late[label]) < 1.2
for layer, parameter in zip(runs["layer"], runs["parameter"], strict=True):
    assert sum(layer[1]) < 0.95 * sum(parameter[1])
assert min(late["network"]) > 2.2
assert max(late["equal"]) < 1.2
assert min(len(losses) for losses, *_ in runs["network"]) > 5 * STEPS

# %%
# The residual network trains
# ---------------------------
#
# Back to the residual network, with a block per layer. The step size is 0.2 for 30
# steps, and 0.05 for the last ten.


def train_any(make, lr_and_steps):
    torch.manual_seed(0)
    model, loader = make(), mnist_loader(128)
    curvature = GGN(layers(model))
    backward, losses = curvature.backward, []
    options = {"damping": 0.1, "tol": 0.5}
    optimizer = CGNOptimizer(model.parameters(), curvature, **options)
    for lr, n in lr_and_steps:
        optimizer.param_groups[0]["lr"] = lr
        history = train(
            model, cross_entropy, optimizer, loader, steps=n, backward=backward
        )
        losses += history.loss
    return model, losses


# %%
# The accuracy is measured after training, in evaluation mode, on the first 10,000
# training images.


from cgn_tutorial.pages import accuracy


@torch.no_grad()
def training_accuracy(model):
    images, labels = (t[:10_000] for t in load_mnist().tensors)
    return accuracy(model.eval()(images), labels)


model, residual_losses = train_any(make_residual_cnn, [(0.2, 30), (0.05, 10)])
reached = training_accuracy(model)
print(f"residual network: training accuracy {reached:.3f}")
assert reached > 0.9

# %%
# A transformer on rows of pixels
# -------------------------------
#
# An image is also a sequence of 28 rows, and a transformer can attend to rows:


# A transformer with one encoder layer.
class Transformer(nn.Module):
    """One encoder layer over the rows of an image."""

    def __init__(self, d=24):
        super().__init__()
        self.embedding = nn.Linear(28, d)
        self.position = nn.Parameter(0.1 * torch.randn(28, d))
        options = {"dropout": 0.0, "activation": "gelu", "norm_first": True}
        self.encoder = nn.TransformerEncoderLayer(
            d, nhead=3, dim_feedforward=2 * d, batch_first=True, **options
        )
        flatten, linear = nn.Flatten(), nn.Linear(28 * d, 10)
        self.head = nn.Sequential(nn.LayerNorm(d), flatten, linear)

    def forward(self, x):
        """The scores of ten classes."""
        rows = self.embedding(x.squeeze(1)) + self.position
        return self.head(self.encoder(rows))


# %%
# PyTorch computes attention in one fused operation, and cannot differentiate this
# operation twice. The first product raises an error:

torch.manual_seed(0)
model = Transformer()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
z = model(images)
product, *_ = GGN(layers(model)).backward(cross_entropy(z, labels), z)
try:
    product(torch.randn(1, sum(p.numel() for p in product.parameters)))
except RuntimeError as error:
    print(fill(str(error), 66))
else:
    raise AssertionError("fused attention is differentiated twice by now")

# %%
# With the remedy, the model trains for 60 steps:

from torch.nn.attention import SDPBackend, sdpa_kernel

with sdpa_kernel(SDPBackend.MATH):
    model, row_losses = train_any(Transformer, [(0.2, 45), (0.05, 15)])
reached = training_accuracy(model)
print(f"transformer: training accuracy {reached:.3f}")
assert reached > 0.9

# %%

# Draw both losses.
fig, ax = plt.subplots(figsize=(5, 2.8), layout="constrained")
ax.plot(residual_losses, c=COLORS["blue"], label="residual network")
ax.plot(row_losses, "--", c=COLORS["orange"], label="transformer")
ax.set(xlabel="iteration", ylabel="mini-batch loss", ylim=(0, None))
ax.legend()
_ = describe(
    fig,
    "The mini-batch loss of the residual network over 40 iterations and of"
    " the transformer over 60. Both fall from 2.5 to below 0.5 and level off.",
)

# %%
# Both networks train, with one new line in the loop, the transformer within
# ``sdpa_kernel``. Other optimizers may train these networks faster: no race was
# held.
#
# Which product to choose
# -----------------------
#
# - **GGN or Hessian?** To train, take the GGN. With the Hessian of the untrained
#   residual network, CG meets `negative curvature
#   <plot_2_conjugate_gradients.html#negative-curvature>`__ within a few products,
#   and stops.
# - **BackPACK or autograd?** Autograd takes more models, and any blocks; BackPACK
#   has further curvatures, such as the `PCH
#   <plot_a_positive_curvature.html#positive-curvature-hessian>`__, and `wrong
#   products for some modules <../guides/backpack.html>`__.
# - **Which blocks?** A block per layer is a good start; for the other settings, see
#   `Choosing <../guides/choosing.html>`__.
#
# This advice rests on a few models, a few seeds and one batch size each.

# Solve for a step of the residual network, with GGN and Hessian.
from cgn_tutorial import cg

torch.manual_seed(0)
model = make_residual_cnn()
reason = {}
for kind in (GGN, Hessian):
    model.zero_grad()
    (product,) = products_of(kind, whole_network)

    def A(p, product=product):
        return product(p[None])[0] + 1e-3 * p

    b = -torch.cat([p.grad.flatten() for p in product.parameters])
    solve = cg(A, b, tol=0.01, maxiter=100).solve
    reason[kind] = solve.reason
    print(f"{kind.__name__:7}: {solve.reason}, {solve.products} products")
assert reason[GGN] != "negative curvature" == reason[Hessian]
assert solve.products < 10

# %%
# Check yourself
# --------------
#
# .. fold:: A step with the GGN has one block, and its solve takes ten products. How
#     many backward passes does the step take?
#
#    22: two passes per batch, and two for each product.
#
# .. fold:: Why does a product of the last layer cost less than a product of the
#     first layer?
#
#    Both passes run between the layer and the outputs: through one layer for the
#    last, through all layers for the first.
#
# .. fold:: Change the code: train the residual network with
#     ``GGN(per_parameter(model))`` for ten steps, and count the products. More, or
#     fewer, than with ``GGN(layers(model))``?
#
#    More, as the counts below show.

# Check the answers.
assert 2 + 2 * 10 == 22
assert times["GGN", "linear 2"] < times["GGN", "conv 1"]
counts = {}
for blocks in (per_parameter, layers):
    torch.manual_seed(0)
    model, loader = make_residual_cnn(), mnist_loader(128)
    curvature = GGN(blocks(model))
    options = {"lr": 0.2, "damping": 0.1, "tol": 0.5}
    optimizer = CGNOptimizer(model.parameters(), curvature, **options)
    history = train(
        model,
        cross_entropy,
        optimizer,
        loader,
        steps=10,
        backward=curvature.backward,
    )
    counts[blocks.__name__] = sum(history.products)
print(counts)
assert counts["per_parameter"] > counts["layers"]
