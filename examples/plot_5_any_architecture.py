r"""
5. Any architecture
===================

BackPACK knows the curvature of a list of layers. What about a network with a
layer that is not on the list? This page takes its curvature products from
automatic differentiation alone, so that any model and loss will do that
PyTorch can differentiate twice. The optimizer stays as it is, and each step
still solves

.. math::

   (C + \lambda I)\, v = -g

by `conjugate gradients <plot_2_conjugate_gradients.html>`__ (CG) on products
with :math:`C`. What changes is where these products come from, and which
parameters share a system: a weight and its bias, or the whole network.

To run this page yourself, download it from its end, and install its package:
``pip install`` and the address that stands on the site's `front page
<../index.html#run-it-yourself>`__.
"""

# %%
# Where BackPACK stops
# --------------------
#
# A residual network adds the input of a branch to its output, and usually
# normalises over the batch: here is one for MNIST, small enough for a page.

# A residual network: modules, and the branch that is added.
import warnings

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
# What does BackPACK say to it? First as it is, then with the option that
# rewrites a model as modules, additions included.

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
        print(f"{label}: {error}\n")
    else:
        raise AssertionError("BackPACK takes this model by now")

# %%
# An extension of BackPACK is a set of rules, one per kind of module. For the
# GGN's products there is none for batch normalisation over images, and none
# for the addition that ends the branch. Such rules serve many quantities; a
# product with a vector can do without.
#
# Products by automatic differentiation
# -------------------------------------
#
# The `generalized Gauss-Newton matrix
# <plot_1_newton_step.html#generalized-gauss-newton>`__ (GGN) is
# :math:`G = J^\top H_L\, J`, with the Jacobian :math:`J` of the outputs
# :math:`z` and the Hessian :math:`H_L` of the loss :math:`\ell(z)`. Its product
# with :math:`p` is read from right to left, and backward passes are all it
# takes:
#
# - :math:`J^\top u` **is** a backward pass: from :math:`u` in place of the
#   outputs' gradient. Let it build a graph of its own.
# - That result is linear in :math:`u`. Its derivative by :math:`u`,
#   transposed, is multiplication with :math:`J`: another backward pass,
#   through that graph, gives :math:`J p`.
# - The outputs' gradient :math:`g_z = \nabla_z \ell` has the Jacobian :math:`H_L`
#   with respect to :math:`z`, so :math:`H_L J` with respect to the parameters: a
#   backward pass from :math:`g_z` gives :math:`(H_L J)^\top J p = J^\top H_L\, J
#   p = G p`, as :math:`H_L` is symmetric.
#
# The pass that gives :math:`J^\top u` happens only once, at :math:`u = g_z`,
# where :math:`J^\top u` is the gradient. Here is what each pass reads and what it
# leaves, between the parameters :math:`x`, the outputs :math:`z` and the loss
# :math:`\ell`:

# Draw the passes as arrows between parameters, outputs and loss.
import matplotlib.pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe

PASSES = (
    ("forward", "x", "z", "", "", "black"),
    ("forward", "z", "ℓ", "", "", "black"),
    ("backward, with graph", "ℓ", "z", "", "leaves $g_z$", "blue"),
    ("backward, with graph", "z", "x", "u", "leaves $J^⊤ u$", "blue"),
    ("through that graph", "x", "z", "p", "leaves J p", "orange"),
    ("through the graph of $g_z$", "z", "x", "J p", "leaves G p", "orange"),
)
place = {"x": 0.0, "z": 0.5, "ℓ": 1.0}
fig, ax = plt.subplots(figsize=(5.6, 3.6))
for name, at in place.items():
    ax.text(at, 0.75, name, ha="center", size=13)
    ax.axvline(at, color="gray", lw=0.5, ymax=0.9)
for i, (how, start, end, reads, leaves, color) in enumerate(PASSES):
    ink = COLORS.get(color, color)
    arrow = {"arrowstyle": "-|>", "color": ink, "lw": 1.5}
    a, b = place[start], place[end]
    ax.annotate("", xy=(b, -i), xytext=(a, -i), arrowprops=arrow)
    ax.text((a + b) / 2, -i + 0.12, how, ha="center", size=8)
    side = {"ha": "left" if b > a else "right", "va": "center", "size": 9}
    ax.text(b + (0.015 if b > a else -0.015), -i, leaves, **side)
    side["ha"] = "right" if b > a else "left"
    ax.text(a - (0.015 if b > a else -0.015), -i, reads, **side)
ax.text(1.25, -1.5, "once\nper batch", ha="center", color=COLORS["blue"])
ax.text(1.25, -4.7, "for each\nproduct", ha="center", color=COLORS["orange"])
ax.axhline(-3.5, color="gray", lw=0.5, ls=":")
ax.set(xlim=(-0.22, 1.4), ylim=(-5.4, 1.2))
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
# A pass from :math:`z` to :math:`x` multiplies by :math:`J^\top`; one through its
# graph, from :math:`x` to :math:`z`, by :math:`J`. In code, for a block of one
# parameter :math:`x`:

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
# Is that the matrix that BackPACK multiplies with? For each of the eight
# parameters of the `tutorial's network
# <plot_3_matrix_free_optimization.html>`__, in double precision:

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


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


# %%

pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
for (name, x), x_twin in pairs:
    p = torch.randn_like(x)
    theirs = x_twin.ggnmp(p[None])[0]
    error = difference(ggn_product(loss, z, x)(p), theirs)
    print(f"{name:8}: relative difference {error:.1e}")
    assert error < 1e-12

# %%
# The Hessian is simpler still, one backward pass through the graph of the
# gradient: :math:`H p = (\partial g / \partial x)^\top p`. Both are in the
# package, for blocks of several parameters and for several outputs. They
# stand in one file of their own, `curvature.py <../curvature.py>`__, which
# needs nothing but PyTorch.
#
# One line in the training loop
# -----------------------------
#
# A **block** is a list of parameters whose system is solved as one. ``GGN``
# takes any list of blocks. Three are at hand: each parameter by itself, as
# BackPACK has it; the parameters of each layer together; the whole network.

from cgn_tutorial import GGN, Hessian, layers


def per_parameter(model):
    return model.parameters()


def whole_network(model):
    return [model.parameters()]


for blocks in (per_parameter, layers, whole_network):
    print(f"{blocks.__name__:13}", len(GGN(blocks(model)).blocks), "blocks")

# %%
# The training loop has one line that is new. ``curvature.backward`` takes the
# place of ``loss.backward()`` inside ``with backpack(...)``: it leaves the
# gradient on each parameter, and the product of its block. The optimizer is
# told where to find it, and nothing else changes.

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
# With blocks of one parameter, these are BackPACK's steps. The package's
# ``train`` is the same loop; without ``backward=`` it goes through BackPACK.

from cgn_tutorial.pages import train

torch.manual_seed(0)
loader = mnist_loader(64)
model = extend(make_model())
optimizer = CGNOptimizer(model.parameters(), GGNMP(), maxiter=20)
history = train(model, loss_function, optimizer, loader, steps=3)
for ours, theirs in zip(losses, history.loss, strict=True):
    print(f"autograd {ours:.5f}, BackPACK {theirs:.5f}")
    assert abs(ours - theirs) < 1e-3

# %%
# Can a product be trusted?
# -------------------------
#
# A curvature matrix is symmetric, and the GGN of a convex loss positive
# semi-definite. ``check_products`` tries both with random vectors :math:`u` and
# :math:`v`: :math:`u^\top C v = v^\top C u` and :math:`u^\top C u \ge 0`, a good
# habit with a new model, loss or source of products. For the residual network:

from cgn_tutorial import check_products

torch.manual_seed(0)
model = make_residual_cnn()
z = model(images)
products = GGN(layers(model)).backward(cross_entropy(z, labels), z)
asymmetry = check_products(products, positive=True)
print(f"largest difference, relative to the length of Cv: {asymmetry:.0e}")

# %%
# Rounding, and nothing else. PyTorch's own second derivative of ``weight_norm`` is
# wrong, and ``Hessian`` refuses a layer that is normalised by it:

normed = nn.utils.parametrizations.weight_norm(nn.Linear(784, 16))
model = nn.Sequential(nn.Flatten(), normed, nn.Tanh(), nn.Linear(16, 10))


def evaluate():
    z = model(images)
    return cross_entropy(z, labels), z


try:
    Hessian(layers(model)).backward(*evaluate())
except RuntimeError as error:
    print(error)
else:
    raise AssertionError("the Hessian of weight_norm is taken by now")

# %%
# Is the GGN right there? If it is given ``evaluate``, ``check_products`` also holds
# the products against central differences, which need first derivatives only:

products = GGN(layers(model)).backward(*evaluate())
asymmetry = check_products(products, positive=True, evaluate=evaluate)
print(f"largest difference, relative to the length of Cv: {asymmetry:.0e}")

# %%
# No error: the products of the GGN agree with the differences.
#
# What a product costs
# --------------------
#
# A product with the block of one layer does not need the whole network: both
# of its passes run between that layer and the loss. Measured on the
# tutorial's network and a batch of 64 images, in units of one gradient, which
# is a forward and a backward pass:

# Time functions in turns.
import statistics
import time


def medians(candidates, repeats=11):
    seconds = {name: [] for name in candidates}
    for _ in range(repeats):  # in turns, so that all meet the same load
        for name, function in candidates.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {k: statistics.median(v) for k, v in seconds.items()}


# %%

from functools import partial

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


# %%

candidates = {"gradient": gradient}
for kind in (GGN, Hessian):
    products = products_of(kind, layers) + products_of(kind, whole_network)
    for name, product in zip(NAMES, products, strict=True):
        p = torch.randn(1, size(product))
        candidates[kind.__name__, name] = partial(product, p)
times = medians(candidates)

# %%

# Draw the times of the products.
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
rows = torch.arange(len(NAMES))
for kind, shift, color in (("GGN", -0.2, "blue"), ("Hessian", 0.2, "orange")):
    cost = [times[kind, n] / times["gradient"] for n in NAMES]
    hatch = "" if kind == "GGN" else "//"
    style = {"color": COLORS[color], "hatch": hatch, "ec": "white"}
    ax.barh(rows + shift, cost, height=0.38, label=kind, **style)
    print(kind, [f"{c:.2f}" for c in cost])
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
# The closer to the loss, the cheaper: a product of the first convolution costs
# many of the last layer. The whole network's product passes through all layers
# once, and costs less than one product of each of them. The Hessian's products,
# in the same order, show the same picture.
#
# Until the matrix no longer fits
# -------------------------------
#
# Why not store the matrix? For a small network, one may. Here is one hidden
# layer of sigmoids on images of 7 × 7 pixels, and a Newton step of the whole
# network computed as the layer grows wider: with the dense GGN and a
# factorisation, and with CG on products, until the residual is a thousandth of
# the gradient.

from torch.func import functional_call, jacrev
from torch.nn.functional import adaptive_avg_pool2d

from cgn_tutorial import cg

LAM = 0.01


def damped(product, lam):
    return lambda p: product(p[None])[0] + lam * p


small = adaptive_avg_pool2d(images, 7).flatten(1)


def make_wide(width):
    first, last = nn.Linear(49, width), nn.Linear(width, 10)
    return nn.Sequential(first, nn.Sigmoid(), last)


def matrix_free_step(model):
    model.zero_grad()
    z = model(small)
    loss = cross_entropy(z, labels)
    (product,) = GGN(whole_network(model)).backward(loss, z)
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    return cg(damped(product, LAM), -g, tol=1e-3).x


# %%
# There is a third way, between the two. The GGN of a batch of :math:`N` images
# with ten outputs each has at most the rank :math:`10 N`, here 640: with
# :math:`H_L = S S^\top`, it is :math:`U^\top U` for the short and wide matrix
# :math:`U = S^\top J`. Woodbury's formula then needs a matrix of that size only,
#
# .. math::
#
#    (U^\top U + \lambda I)^{-1} g
#    = \frac{1}{\lambda} \bigl(g - U^\top (U U^\top + \lambda I)^{-1} U g\bigr) .


def jacobian_and_gradient(model):
    parameters = dict(model.named_parameters())
    J = jacrev(lambda x: functional_call(model, x, (small,)))(parameters)
    J = torch.cat([J_i.flatten(2) for J_i in J.values()], dim=2)
    share = model(small).softmax(dim=1)
    root = share.sqrt()
    S = root.diag_embed() - share[:, :, None] * root[:, None, :]
    U = (S.mT @ J / len(share) ** 0.5).flatten(0, 1)
    errors = (share - nn.functional.one_hot(labels, 10)) / len(share)
    return U.detach(), torch.einsum("nk,nki->i", errors, J).detach()


def dense_step(model):
    U, g = jacobian_and_gradient(model)
    G = U.T @ U
    G.diagonal().add_(LAM)
    L = torch.linalg.cholesky(G)
    return torch.cholesky_solve(-g[:, None], L)[:, 0]


def woodbury_step(model):
    U, g = jacobian_and_gradient(model)
    K = U @ U.T
    K.diagonal().add_(LAM)
    return (U.T @ torch.linalg.solve(K, U @ g) - g) / LAM


# %%
# The memory is counted, not measured. The dense way needs the matrix,
# :math:`4 n^2` bytes for :math:`n` parameters in single precision, Woodbury's
# :math:`U`, which is :math:`4 \cdot 640\, n`. The matrix-free way needs eight
# vectors for CG and what the two graphs hold on to, which PyTorch reports
# as it saves it.

# Count the bytes that the graphs hold on to.
from torch.autograd.graph import saved_tensors_hooks


def matrix_free_bytes(model):
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        z = model(small)
        loss = cross_entropy(z, labels)
        products = GGN(whole_network(model)).backward(loss, z)
    return sum(saved.values()) + 8 * 4 * sum(map(size, products))


# %%

# Take each step in the ways that end within seconds, and time them.
LARGEST = {"matrix-free": 4096, "Woodbury": 1024, "dense": 64}  # hidden units
STEP = {"matrix-free": matrix_free_step, "Woodbury": woodbury_step}
STEP["dense"] = dense_step
widths = [2**k for k in range(2, 13)]
sizes, memory, seconds = [], [], {name: [] for name in STEP}
for width in widths:
    torch.manual_seed(0)
    model = make_wide(width)
    sizes.append(sum(p.numel() for p in model.parameters()))
    memory.append(matrix_free_bytes(model))
    ways = {
        name: partial(step, model)
        for name, step in STEP.items()
        if width <= LARGEST[name]
    }
    steps = [way() for way in ways.values()]
    assert all(difference(steps[0], step) < 0.02 for step in steps)
    for name, t in medians(ways, repeats=3).items():
        seconds[name].append(t)

n = torch.tensor(sizes)
dense_memory, woodbury_memory = 4 * n.double() ** 2, 4 * 640 * n.double()
GB = 1e9

# %%

# Draw seconds and memory over the number of parameters.
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
bytes_of = dict(
    zip(
        STEP,
        (torch.tensor(memory), woodbury_memory, dense_memory),
        strict=True,
    )
)
styles = zip(("blue", "green", "orange"), ("o-", "^-.", "s--"), strict=True)
for name, (color, line) in zip(STEP, styles, strict=True):
    style = {"c": COLORS[color], "ms": 4, "label": name}
    left.loglog(n[: len(seconds[name])], seconds[name], line, **style)
    right.loglog(n, bytes_of[name] / GB, line, **style)
left.set(xlabel="parameters n", ylabel="seconds per step")
right.axhline(16, color="gray", lw=1, ls=":")
_ = right.text(n[0], 22, "16 GB", color="gray", fontsize=9)
right.set(xlabel="parameters n", ylabel="memory in GB", ylim=(1e-5, 1e5))
right.legend(loc="upper left", fontsize=8)
_ = describe(
    fig,
    "Two panels over the number of parameters, from 250 to 250,000, both axes"
    " logarithmic. The time of a dense step rises much more steeply than that"
    " of a matrix-free one; so does its memory, which crosses 16 GB near"
    " 60,000 parameters, where the matrix-free step needs a few MB. Woodbury's"
    " lies between the two.",
)

# %%

first_too_large = sizes[(dense_memory > 16 * GB).int().argmax()]
print(f"dense, {first_too_large:,} parameters: more than 16 GB")
ours, theirs = memory[-1] / 1e6, woodbury_memory[-1] / 1e6
print(f"{sizes[-1]:,} parameters: {ours:.0f} MB matrix-free, ", end="")
print(f"{theirs:.0f} MB by Woodbury's formula")
k = len(seconds["Woodbury"]) - 1
slower = seconds["Woodbury"][k] / seconds["matrix-free"][k]
print(f"at {sizes[k]:,} parameters, it takes {slower:.0f} times as long as CG")
assert theirs > 10 * ours
assert first_too_large < 200_000
assert memory[-1] < 0.1 * GB
assert dense_memory[-1] > 200 * GB

# %%
# All ways agree where they were taken. Doubling the number of parameters
# doubles the vectors, but quadruples the matrix, and its factorisation takes
# eight times the operations. A network of a hundred thousand parameters is a
# small one, and its matrix no longer fits. Woodbury's formula is an exact solve,
# too, and its memory grows only in proportion to the parameters. But its wide
# matrix has a row for each output of each image, all of which have to be computed
# first.
#
# Blocks: parameter, layer, network
# ---------------------------------
#
# Larger blocks keep more of the matrix. Here they are, outlined on the GGN of a
# network with 113 parameters in three layers:

# Draw the GGN of a small network three times, and outline the blocks.
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

KINDS = {
    "per parameter": per_parameter,
    "per layer": layers,
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

fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
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
# What lies outside the squares is taken for zero. Do larger ones pay? The
# tutorial's network again, with one block per parameter, per layer, and for the
# whole network, from three seeds. A fair comparison needs something held equal,
# and there is a choice: the tolerance of the solves, at 0.1 or at 0.01, or the
# number of products.

from itertools import accumulate

STEPS = 16
SEEDS = range(3)


def run(blocks, seed, tol, enough=lambda steps, products: steps == STEPS):
    """Losses, products and seconds of each step."""
    torch.manual_seed(seed)
    model, loader = make_model(), iter(mnist_loader(64))
    curvature = GGN(blocks(model))
    options = {"lr": 0.2, "damping": 1e-3, "tol": tol}
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


# %%
# First at equal tolerances, for 16 steps.


# Print a line of the comparison.
def report(label, tol, runs):
    late = ", ".join(f"{statistics.median(run[0][-5:]):.2f}" for run in runs)
    steps, products = len(runs[0][0]), sum(sum(run[1]) for run in runs) / 3
    seconds = sum(sum(run[2]) for run in runs) / 3
    print(f"tol {tol:<4g}  {label:13}  {steps:3d} steps, ", end="")
    print(f"{products:4.0f} products, {seconds:4.1f} s, late losses {late}")


runs = {}
for tol in (0.1, 0.01):
    for label, blocks in KINDS.items():
        runs[label, tol] = [run(blocks, seed, tol) for seed in SEEDS]
        report(label, tol, runs[label, tol])

# %%
# Then the whole network at a tolerance of 0.1 once more, with as many products
# as the blocks per layer have used.

budgets = [sum(run[1]) for run in runs["per layer", 0.1]]
runs["network", "equal"] = [
    run(whole_network, seed, 0.1, lambda _, used, most=most: used >= most)
    for seed, most in zip(SEEDS, budgets, strict=True)
]
report("network", 0.1, runs["network", "equal"])

# %%

# Draw the losses over steps, over products, and over seconds.
fig, axes = plt.subplots(1, 3, figsize=(7, 3.2), sharey=True)
for label, color, line in zip(
    KINDS, ("blue", "orange", "green"), ("-", "--", "-."), strict=True
):
    style = {"c": COLORS[color], "ls": line, "lw": 1}
    loose = "equal" if label == "network" else 0.1
    pairs = zip(runs[label, 0.01], runs[label, loose], strict=True)
    for seed, (tight, (losses, products, seconds)) in enumerate(pairs):
        name = label if seed == 0 else None
        axes[0].plot(tight[0], **style, label=name)
        for ax, spent in zip(axes[1:], (products, seconds), strict=True):
            ax.plot([0, *accumulate(spent)][:-1], losses, **style)
axes[0].set(ylabel="mini-batch loss", ylim=(0, 3.2))
for ax, tol, unit in zip(
    axes, (0.01, 0.1, 0.1), ("step", "products", "seconds"), strict=True
):
    ax.set(title=f"tolerance {tol:g}", xlabel=unit)
handles, names = axes[0].get_legend_handles_labels()
fig.legend(handles, names, loc="lower center", ncols=3, frameon=False)
fig.tight_layout(rect=(0, 0.09, 1, 1))
_ = describe(
    fig,
    "The mini-batch loss of nine runs each. Left, over steps at a tolerance of"
    " 0.01: blocks per layer come down from 2.3 with all three seeds, while"
    " some of the other runs leave the picture upwards. Middle and right,"
    " over products and over seconds at a tolerance of 0.1: all nine runs end"
    " below 1.2; over seconds, the whole network takes several times as long.",
)

# %%
# What holds on all three seeds:
#
# - At a tolerance of 0.1, blocks per parameter and per layer both train, and
#   those per layer with fewer products.
# - The whole network at 0.1 does not train in 16 steps: it stops after a product
#   or two. Given as many products as the layers, it trains, too, in
#   many more steps, each with a gradient to pay for as well. And its products
#   are the dear ones: each passes through all layers, while most of those of the
#   layers stop on the way, as the bars above have it. Compare the panel
#   on the right, over seconds, with the middle one.
# - At a tolerance of 0.01, blocks per layer train on every seed, to late losses
#   below 2, where guessing has 2.3. Of the six runs of the two other kinds, at
#   least one blows up: look for late losses above 3. Why is not known here. A
#   more exact solution of a model of one mini-batch is not a safer step.


# Check all of it, seed by seed.
def late(label, tol):
    return [
        statistics.median(losses[-5:]) for losses, _, _ in runs[label, tol]
    ]


for label in ("per parameter", "per layer"):
    assert max(late(label, 0.1)) < 1.2
for layer, parameter in zip(
    runs["per layer", 0.1], runs["per parameter", 0.1], strict=True
):
    assert sum(layer[1]) < 0.95 * sum(parameter[1])
assert min(late("network", 0.1)) > 2.2
assert max(late("network", "equal")) < 1.2
assert min(len(run[0]) for run in runs["network", "equal"]) > 5 * STEPS
assert max(late("per layer", 0.01)) < 2  # 0.3 to 1.3, by machine and rounding
assert max(late("per parameter", 0.01) + late("network", 0.01)) > 3

# %%
# What a tolerance on the whole network allows
# --------------------------------------------
#
# CG stops when the residual is small *as a whole*,
# :math:`\lVert r \rVert \le \mathrm{tol}\, \lVert b \rVert` (see `when to stop
# <plot_2_conjugate_gradients.html#when-to-stop>`__). The squared norm is a sum
# over the layers,
#
# .. math::
#
#    \lVert b \rVert^2 = \sum_l \lVert b_l \rVert^2, \qquad
#    \lVert r \rVert^2 = \sum_l \lVert r_l \rVert^2,
#
# so that a layer with a small share of :math:`\lVert b \rVert^2` hardly counts.
# What is each layer's share of
# :math:`\lVert b \rVert^2 = \lVert g \rVert^2` before training? And when CG
# stops, how long is each layer's part of the step, compared with the exact
# solution?

torch.manual_seed(0)
model = make_model()
(product,) = products_of(GGN, whole_network)
b = -torch.cat([p.grad.flatten() for p in product.parameters])
layer_sizes = [sum(p.numel() for p in layer) for layer in layers(model)]
A = damped(product, 1e-3)


def layer_norms(vector):
    return torch.stack([part.norm() for part in vector.split(layer_sizes)])


# %%

share = layer_norms(b) ** 2 / b.norm() ** 2
exact = layer_norms(cg(A, b, tol=1e-6).x)
length = {}
for tol in (0.1, 0.01):
    result = cg(A, b, tol=tol)
    length[tol] = layer_norms(result.x) / exact
    print(f"tol {tol}: {result.solve.products} products")
for i, name in enumerate(NAMES[:4]):
    lengths = [f"{length[tol][i]:.3f}" for tol in length]
    print(f"{name:8}: share {share[i]:.1e}, length", *lengths)

# %%

# Draw the shares, and the lengths of the steps.
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
rows = torch.arange(4)
left.barh(rows, share, color=COLORS["blue"])
for tol, marker, color in ((0.1, "s", "green"), (0.01, "D", "purple")):
    style = {"ms": 6, "c": COLORS[color], "label": f"tol {tol}"}
    right.plot(length[tol], rows, marker, **style)
    left.axvline(tol**2, c=COLORS[color], ls="--", label=f"tol² = {tol**2:g}")
left.set(xscale="log", xlabel="share of ‖b‖²", yticks=rows)
left.set(xlim=(1e-5, 1), yticklabels=NAMES[:4])
right.axvline(1, color="gray", lw=1)
right.set(xscale="log", xlabel="length of step / of exact step")
right.set(yticks=rows, yticklabels=[])
for ax in (left, right):
    ax.legend(fontsize=8, loc="best" if ax is right else "upper right")
    ax.set_ylim(3.5, -0.5)
_ = describe(
    fig,
    "Left: each layer's share of the squared right-hand side, on a logarithmic"
    " scale. It grows from layer to layer; the last one has nine tenths, the"
    " two convolutions together less than the squared tolerance 0.1. Right:"
    " the length of each layer's step compared with the exact one. With"
    " tolerance 0.01 all are close to 1, with tolerance 0.1 the convolutions'"
    " steps are less than a hundredth as long.",
)

# %%
# The last layer has nine tenths of :math:`\lVert b \rVert^2`. A tolerance of
# 0.1 lets a hundredth remain, and the two convolutions together have less than
# that: as far as the residual tells, they need not move at all, and their steps
# are less than a hundredth as long as the exact ones. With 0.01, the second
# convolution's share counts, and the whole step comes out within a few percent.
# With a block per layer, a tolerance of 0.1 asks for a digit of *each* layer's
# gradient.
#
# And the last layer itself? With 0.1 it gets an eighth of its step, with nine
# tenths of the gradient. Is that the other layers' doing? Solve its system alone,
# to the same tolerance, from three seeds. For each, how long is the step,
# compared with the exact one; how much of the model's decrease does it reap; and
# how strong is the curvature :math:`p^\top A p / p^\top p` along the gradient,
# and along what is missing?

assert share[3] > 0.8 and share[:2].sum() < 0.1**2 / 2
assert share[1] > 2 * 0.01**2
assert (length[0.1][:2] < 0.01).all() and abs(length[0.1][3] - 1 / 8) < 0.03
assert ((length[0.01] - 1).abs() < 0.05).all()

for seed in SEEDS:
    torch.manual_seed(seed)
    model = make_model()
    last = products_of(GGN, layers)[-1]
    A = damped(last, 1e-3)
    b = -torch.cat([p.grad.flatten() for p in last.parameters])
    exact, loose = cg(A, b, tol=1e-6), cg(A, b, tol=0.1)
    missing = exact.x - loose.x
    along = [(p @ A(p) / (p @ p)).item() for p in (b, missing)]
    part, reaped = (
        loose.x.norm() / exact.x.norm(),
        loose.solve.decrease / exact.solve.decrease,
    )
    print(f"seed {seed}: length {part:.2f}, decrease {reaped:.2f}, ", end="")
    print(f"curvature {along[0]:.2f} and {along[1]:.4f}")
    assert part < 0.2 and reaped > 0.8
    assert along[0] > 1 and along[1] < 1.5 * 1e-3

# %%
# It is as short alone. What is missing lies where the matrix hardly curves beyond
# the damping of 0.001, a thousandth of the curvature along the gradient. There a
# long piece of the step leaves a small residual, :math:`r = A\, (x - x_k)`, and
# adds little to the decrease, most of which is reaped.

# %%
# The residual network trains
# ---------------------------
#
# Back to the network that this page began with, with one block per layer.
# Its settings are its own: a larger damping, batches of 128 images, and shorter
# steps for the last ten.


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
# The accuracy is that of the trained model, in evaluation mode, on the first
# 10,000 of its training images.


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
# An image is also a sequence of 28 rows. In a transformer each row attends to
# all others: attention, layer normalisation and GELU, and a residual
# connection around both halves.


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
# PyTorch computes attention in one fused operation, which it cannot
# differentiate twice. The first product says so, and what to do.

torch.manual_seed(0)
model = Transformer()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
z = model(images)
product, *_ = GGN(layers(model)).backward(cross_entropy(z, labels), z)
try:
    product(torch.randn(1, sum(p.numel() for p in product.parameters)))
except RuntimeError as error:
    print(error)
else:
    raise AssertionError("fused attention is differentiated twice by now")

# %%
# The remedy is to evaluate the model with attention written out, softmax and
# all, as plain operations.

from torch.nn.attention import SDPBackend, sdpa_kernel

with sdpa_kernel(SDPBackend.MATH):
    model, row_losses = train_any(Transformer, [(0.2, 45), (0.05, 15)])
reached = training_accuracy(model)
print(f"transformer: training accuracy {reached:.3f}")
assert reached > 0.9

# %%

# Draw both losses.
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
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
# Both networks train, with the optimizer of the tutorial and one line
# exchanged. Which optimizer trains them fastest was not tried. For the tutorial's
# network and for an autoencoder, `page 4 <plot_4_is_it_worth_it.html>`__ asks.
#
# Which product to choose
# -----------------------
#
# **GGN or Hessian?** To train, take the GGN: it is positive semi-definite for
# the usual losses, so that no solve meets a negative direction. The Hessian
# shows the curvature as it is. CG finds a direction of `negative curvature
# <plot_2_conjugate_gradients.html#negative-curvature>`__ in it on the untrained
# residual network, and stops there.

torch.manual_seed(0)
model = make_residual_cnn()
reason = {}
for kind in (GGN, Hessian):
    model.zero_grad()
    (product,) = products_of(kind, whole_network)
    b = -torch.cat([p.grad.flatten() for p in product.parameters])
    result = cg(damped(product, 1e-3), b, tol=0.01, maxiter=100)
    reason[kind] = result.solve.reason
    print(
        f"{kind.__name__:7}: {result.solve.reason}, {result.solve.products} products"
    )
assert reason[GGN] != "negative curvature" == reason[Hessian]

# %%
# **BackPACK or autograd?** The products are the same where both exist. BackPACK
# has one block per parameter, for models made of the modules that it knows,
# and further curvatures, such as the `PCH
# <plot_1_newton_step.html#positive-curvature-hessian>`__. Autograd takes any
# model and any blocks, and the package's ``curvature.backward`` needs neither
# an extended model nor an extended loss.
#
# **Which blocks?** One per layer is a good start. The whole network as one
# block knows most, and needs a tighter tolerance, or many steps.
#
# These are few models, few seeds and one batch size each: take the settings of
# this page as a place to start from, not as a rule.
#
# Check yourself
# --------------
#
# .. fold:: How many backward passes does a step take whose solves need ten products
#     with one block?
#
#    22: two for the gradient, which also leave the graphs, and two for each
#    product. The very first step takes one more, to check that autograd sees all
#    parameters.
#
# .. fold:: A network is solved as one block, to a tolerance of 0.1. A layer has half
#     a percent of the squared gradient. Can the solve end before that layer
#     moves?
#
#    Yes. One percent, :math:`\mathrm{tol}^2`, of the square may remain, and the
#    layer has less than that.
#
# .. fold:: How large is the dense matrix of 50,000 parameters in single precision,
#     and how large are the eight vectors of CG?
#
#    10 GB, :math:`4 n^2` bytes, and 1.6 MB, :math:`8 \cdot 4 n` bytes.

# Check the answers.
n = 50_000
assert 2 + 2 * 10 == 22 and 0.005 < 0.1**2
assert (4 * n**2, 8 * 4 * n) == (10e9, 1.6e6)
