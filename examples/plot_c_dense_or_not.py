r"""
C. Dense or not
===============

Why not store the curvature matrix, and factorize it? And if conjugate gradients
(CG) stop early, which part of the Newton step is missing? Each step solves

.. math::

   (C + \lambda I)\, v = -g .

Here, :math:`C = J^\top H_L\, J` is the `generalized Gauss-Newton matrix
<plot_1_newton_step.html#generalized-gauss-newton>`__ (GGN) of a whole network, or
of its layers.

*About 12 minutes to read, and two to run.* To run this page, ``pip install`` the
package, as the `front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# Until the matrix no longer fits
# -------------------------------
#
# Take a network with one hidden layer of sigmoids, for images of 7 × 7 pixels,
# and make the hidden layer wider and wider. How do time and memory of a Newton
# step grow? The **matrix-free** way is CG on products, until the residual is a
# thousandth of the gradient:

# What this page imports, and helpers.
import statistics
import time
from functools import partial

import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from cgn_tutorial import GGN, CGNOptimizer, cg, layers
from cgn_tutorial.pages import load_mnist, make_model, mnist_loader, train
from cgn_tutorial.pages.plotting import COLORS, describe

images, labels = (t[:64] for t in load_mnist().tensors)
small = adaptive_avg_pool2d(images, 7).flatten(1)
LAM = 0.01


def per_parameter(model):
    return model.parameters()


def whole_network(model):
    return [model.parameters()]


def damped(product, lam):
    return lambda p: product(p[None])[0] + lam * p


def size(product):
    return sum(p.numel() for p in product.parameters)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


# %%


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
# The **dense** way forms the matrix and factorizes it. The third way, the formula
# of **Woodbury**, solves a smaller system. With :math:`H_L = S S^\top` and
# :math:`U = S^\top J`, the GGN is :math:`U^\top U`. For 64 images with ten
# outputs each, :math:`U` has 640 rows, and the formula needs one solve with a
# matrix of 640 × 640:
#
# .. math::
#
#    (U^\top U + \lambda I)^{-1} g
#    = \frac{1}{\lambda} \bigl(g - U^\top (U U^\top + \lambda I)^{-1} U g\bigr) .


def jacobian_and_gradient(model):
    def outputs(x, image):
        return functional_call(model, x, (image[None],))[0]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    J = vmap(jacrev(outputs), (None, 0))(parameters, small)  # image by image
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
# In single precision, the dense matrix of :math:`n` parameters takes :math:`4
# n^2` bytes, and Woodbury's :math:`U` takes :math:`4 \cdot 640\, n`. The
# matrix-free way takes five vectors (the gradient and the `four of CG
# <plot_2_conjugate_gradients.html#the-algorithm>`__) and the tensors that the
# graphs of the products save.


# Count the bytes that the graphs hold on to.
def medians(candidates, repeats):
    seconds = {name: [] for name in candidates}
    for _ in range(repeats):  # in turns, so that all meet the same load
        for name, function in candidates.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {k: statistics.median(v) for k, v in seconds.items()}


def matrix_free_bytes(model):
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        z = model(small)
        loss = cross_entropy(z, labels)
        products = GGN(whole_network(model)).backward(loss, z)
    return sum(saved.values()) + 5 * 4 * sum(map(size, products))


# %%

# Take the steps by all ways that end within seconds, and time them.
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
fig, (left, right) = plt.subplots(2, 1, figsize=(5, 6), layout="constrained")
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
_ = right.text(n[0], 22, "16 GB", color="gray")
right.set(xlabel="parameters n", ylabel="memory in GB", ylim=(1e-5, 1e5))
right.legend(loc="upper left")
_ = describe(
    fig,
    "Two panels over the number of parameters, from 250 to 250,000, both axes"
    " logarithmic. The time of a dense step rises much more steeply than that"
    " of a matrix-free one; so does its memory, which crosses 16 GB near"
    " 60,000 parameters, where the matrix-free step needs a few MB. Woodbury's"
    " way lies between the two for large networks.",
)

# %%

# Compare seconds and memory.
first_too_large = sizes[(dense_memory > 16 * GB).int().argmax()]
print(f"dense, {first_too_large:,} parameters: the first above 16 GB")
ours, theirs = memory[-1] / 1e6, woodbury_memory[-1] / 1e6
print(f"{sizes[-1]:,} parameters: {ours:.0f} MB matrix-free, ", end="")
print(f"{theirs:.0f} MB by Woodbury's formula")
print("seconds relative to matrix-free:  " + "  ".join(list(STEP)[1:]))
for k in range(0, len(seconds["Woodbury"]), 2):
    row = [seconds[name][k : k + 1] for name in ("Woodbury", "dense")]
    cells = [f"{t[0] / seconds['matrix-free'][k]:9.1f}" for t in row if t]
    print(f"{sizes[k]:7,} parameters".ljust(32) + "".join(cells))
assert theirs > 10 * ours
assert first_too_large < 200_000
assert memory[-1] < 0.1 * GB
assert dense_memory[-1] > 200 * GB

# %%
# The steps agree to within 2 %. If the number of parameters doubles, the memory
# of the vectors doubles, the memory of the matrix grows fourfold, and the
# operations of its factorization eightfold. For a hundred thousand parameters,
# the matrix takes 40 GB. Woodbury's formula computes 640 rows, and :math:`U
# U^\top`.
#
# For the smallest networks, the dense way is the fastest. From about a thousand
# parameters on, the matrix-free way is ahead here, in time and in memory. (On
# least squares, with many products per step, a `stored Jacobian
# <plot_7_where_it_wins.html#what-a-step-costs>`__ pays.)
#
# What a tolerance on the whole network allows
# --------------------------------------------
#
# With :math:`b = -g`, CG stops once :math:`\lVert r \rVert \le \mathrm{tol}\,
# \lVert b \rVert` (`page 2 <plot_2_conjugate_gradients.html#when-to-stop>`__). If
# the whole network is one block, the squared norms are sums over the layers,
# :math:`\lVert b \rVert^2 = \sum_l \lVert b_l \rVert^2`, and a layer with a small
# share hardly counts. Take the network of `page 3
# <plot_3_matrix_free_optimization.html>`__ before training. What is each layer's
# share? And how long is each layer's part of the step, relative to the same part
# of the exact step?

NAMES = ["conv 1", "conv 2", "linear 1", "linear 2"]


def products_of(blocks, model):
    z = model(images)
    return GGN(blocks(model)).backward(cross_entropy(z, labels), z)


torch.manual_seed(0)
model = make_model()
(product,) = products_of(whole_network, model)
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
print("layer       share   length, tol 0.1   tol 0.01")
for i, name in enumerate(NAMES):
    lengths = f"{length[0.1][i]:16.3f} {length[0.01][i]:10.3f}"
    print(f"{name:8}  {share[i]:.1e}  {lengths}")

# %%

# Draw the shares, and the lengths of the steps.
fig, (left, right) = plt.subplots(2, 1, figsize=(5, 5), layout="constrained")
rows = torch.arange(4)
left.barh(rows, share, color=COLORS["blue"])
for tol, marker, color in ((0.1, "s", "green"), (0.01, "D", "purple")):
    style = {"ms": 6, "c": COLORS[color], "label": f"tol {tol}"}
    right.plot(length[tol], rows, marker, **style)
    left.axvline(tol**2, c=COLORS[color], ls="--", label=f"tol² = {tol**2:g}")
left.set(xscale="log", xlabel="share of ‖b‖²", yticks=rows)
left.set(xlim=(1e-5, 1), yticklabels=NAMES)
right.axvline(1, color="gray", lw=1)
right.set(xscale="log", xlabel="length of step / of exact step")
right.set(yticks=rows, yticklabels=NAMES)
for ax in (left, right):
    ax.legend(loc="best" if ax is right else "upper right")
    ax.set_ylim(3.5, -0.5)
_ = describe(
    fig,
    "Above: each layer's share of the squared right-hand side, on a logarithmic"
    " scale. It grows from layer to layer; the last one has nine tenths, the"
    " two convolutions together less than the squared tolerance 0.1. Below:"
    " the length of each layer's step compared with the exact one. With"
    " tolerance 0.01 all are close to 1, with tolerance 0.1 the convolutions'"
    " steps are less than a hundredth as long.",
)

# %%
# With a tolerance of 0.1, CG may leave :math:`0.1^2 = 1\,\%` of :math:`\lVert b
# \rVert^2`, and both convolutions together have less. So CG may stop before the
# convolutions have moved: their parts of the step are less than a hundredth as
# long as the exact parts. With a tolerance of 0.01, the second convolution's
# share is too large to be left. So CG goes on, and all four parts come out within
# a few percent, even the first convolution's, although its share is small enough
# to be left. If each layer is a block with a system of its own, then a tolerance
# of 0.1 brings each layer's residual to a tenth of its own gradient.

# Check shares and lengths.
assert share[3] > 0.8 and share[:2].sum() < 0.1**2 / 2
assert share[1] > 2 * 0.01**2
assert (length[0.1][:2] < 0.01).all() and abs(length[0.1][3] - 1 / 8) < 0.03
assert ((length[0.01] - 1).abs() < 0.05).all()

# %%
# The last layer alone
# --------------------
#
# The linear layers have large shares of :math:`\lVert b \rVert^2`. But with a
# tolerance of 0.1, their parts of the step are short, too: the last layer's part
# is an eighth as long as the exact part. Do the other layers cause this? Solve
# the last layer's system alone, from three seeds. The output has the length of
# the step and the decrease of the quadratic model, both relative to the exact
# step. The *missing part* is the exact step minus the step of CG. The output also
# has the curvature :math:`p^\top A p / p^\top p`, along the gradient and along
# the missing part:

SEEDS = range(3)
for seed in SEEDS:
    torch.manual_seed(seed)
    last = products_of(layers, make_model())[-1]
    A = damped(last, 1e-3)
    b = -torch.cat([p.grad.flatten() for p in last.parameters])
    exact, loose = cg(A, b, tol=1e-6), cg(A, b, tol=0.1)
    missing = exact.x - loose.x
    along = [(p @ A(p) / (p @ p)).item() for p in (b, missing)]
    part = loose.x.norm() / exact.x.norm()
    reaped = loose.solve.decrease / exact.solve.decrease
    print(f"seed {seed}: length {part:.2f}, decrease {reaped:.2f}, ", end="")
    print(f"curvature {along[0]:.2f}, missing {along[1]:.4f}")
    assert part < 0.2 and reaped > 0.8
    assert along[0] > 1 and along[1] < 1.5 * 1e-3

# %%
# The other layers are not the cause. Along the missing part, the curvature is
# hardly more than the damping of 0.001; along the gradient, above 1. The residual
# is :math:`A` times the missing part. So where the curvature is small, a long
# missing part leaves a small residual. The step reaches most of the decrease all
# the same.
#
# Does a tighter solve train better?
# ----------------------------------
#
# Page 5 trains with a tolerance of 0.1. Here are the same trainings, with `three
# kinds of blocks
# <plot_5_any_architecture.html#blocks-parameter-layer-network>`__, to a tolerance
# of 0.01: the medians of the last five of 16 losses, from three seeds.

KINDS = {
    "per parameter": per_parameter,
    "per layer": layers,
    "network": whole_network,
}
late = {}
for label, blocks in KINDS.items():
    late[label] = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, loader = make_model(), mnist_loader(64)
        curvature = GGN(blocks(model))
        options = {"lr": 0.2, "damping": 1e-3, "tol": 0.01}
        optimizer = CGNOptimizer(model.parameters(), curvature, **options)
        backward = curvature.backward
        history = train(
            model,
            cross_entropy,
            optimizer,
            loader,
            steps=16,
            backward=backward,
        )
        late[label].append(statistics.median(history.loss[-5:]))
    print(f"{label:13}  losses", *[f"{loss:8.2f}" for loss in late[label]])

# %%
# Blocks per layer train from every seed. Of the six other runs, some blow up
# (which ones, depends on the machine). A more exact solution for one mini-batch
# does not make a step safer.

# Check the late losses.
assert max(late["per layer"]) < 2  # 0.3 to 1.3, by machine and rounding
assert max(late["per parameter"] + late["network"]) > 3

# %%
# Check yourself
# --------------
#
# .. fold:: How large is the dense matrix of 50,000 parameters in single
#     precision, and how large are the gradient and the four vectors of CG?
#
#    The matrix takes :math:`4 n^2` bytes, 10 GB. The five vectors take :math:`5
#    \cdot 4 n` bytes, 1 MB.
#
# .. fold:: A network is solved as one block, to a tolerance of 0.1. A layer has
#     half a percent of the squared gradient. Can the solve end before that layer
#     moves?
#
#    Yes. One percent of the squared gradient may remain, :math:`\mathrm{tol}^2`,
#    and the layer has less.
#
# .. fold:: Change the code: set the damping of the last layer's system to 1. What
#     part of the exact step does a tolerance of 0.1 reach?
#
#    More than nine tenths, from each seed.

# Check the answers.
n = 50_000
assert (4 * n**2, 5 * 4 * n) == (10e9, 1e6)
assert 0.005 < 0.1**2
for seed in SEEDS:
    torch.manual_seed(seed)
    last = products_of(layers, make_model())[-1]
    A = damped(last, 1.0)
    b = -torch.cat([p.grad.flatten() for p in last.parameters])
    part = cg(A, b, tol=0.1).x.norm() / cg(A, b, tol=1e-6).x.norm()
    print(f"seed {seed}: length {part:.2f}")
    assert part > 0.9
