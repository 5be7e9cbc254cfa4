r"""
A. Positive curvature, Fisher and their kin
===========================================

Which matrices without negative eigenvalues can take the place of the Hessian? `Page 1
<plot_1_newton_step.html>`__ splits the Hessian of a network into the generalized Gauss-Newton
matrix (GGN) and a residual, :math:`H = G + R`. This page relates the GGN to the Fisher matrix,
finds the part of the residual that each layer adds, and changes this part: the *positive-curvature
Hessian* (PCH). At the end, the page compares the eigenvalues of four curvatures.

*About 20 minutes to read, and one to run.* To run this page, ``pip install`` the package, as the
`front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# Fisher matrix
# -------------
#
# Take an image and a possible label, and let :math:`g` be the gradient of the loss with this label.
# Average :math:`g g^\top` over the labels, weighted by the model's probabilities. The mean of these
# averages over all images is the **Fisher** matrix. For softmax and cross-entropy, the Fisher
# matrix equals the GGN (`Martens, 2020 <https://arxiv.org/abs/1412.1193>`__).
#
# The **empirical Fisher** is the mean of :math:`g g^\top` over the images, with their true labels
# only. Compare both with the GGN, for the tiny network of page 1:

# Load the tiny network, and compute its Hessian.
import torch
from torch.func import grad, jacrev
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils import parameters_to_vector

from cgn_tutorial.pages import (
    load_tiny_mnist,
    make_tiny_model,
    outputs_of,
    split,
)

images, labels = load_tiny_mnist()
torch.manual_seed(0)
tiny = make_tiny_model()
x_init = parameters_to_vector(tiny.parameters()).detach()
outputs = outputs_of(tiny, images)


def loss(x):
    return cross_entropy(outputs(x), labels)


H = jacrev(grad(loss))(x_init)

# %%


def loss_hessians(z):  # H_L of softmax and cross-entropy, per image
    share = z.softmax(dim=1)
    outer = share[:, :, None] * share[:, None, :]
    return (share.diag_embed() - outer) / len(z)


J = jacrev(outputs)(x_init)  # [images, outputs, parameters]
H_L = loss_hessians(outputs(x_init))
G = torch.einsum("nki,nkl,nlj->ij", J, H_L, J)

# Each image's gradient is Jᵀ times its gradient in z.
share = outputs(x_init).softmax(dim=1)
in_z = share[:, None] - torch.eye(3).double()  # [images, labels, outputs]
g = torch.einsum("nci,nij->ncj", in_z, J)
fisher = torch.einsum("nc,nci,ncj->ij", share, g, g) / len(images)
true = g[torch.arange(len(images)), labels]
empirical = true.T @ true / len(images)
for name, matrix in (("Fisher", fisher), ("empirical Fisher", empirical)):
    error = (matrix - G).norm() / G.norm()  # relative, to the GGN
    print(f"{name}: relative difference to the GGN {error:.0e}")

# %%

# Check both, and the formula of H_L.
F = torch.einsum("nc,nci,ncj->nij", share, in_z, in_z) / len(share)
torch.testing.assert_close(F, H_L)
torch.testing.assert_close(fisher, G)
assert (empirical - G).norm() > 0.1 * G.norm()

# %%
# The empirical Fisher is neither the Fisher matrix nor the GGN (`Kunstner, Hennig and Balles, 2019
# <https://arxiv.org/abs/1905.12558>`__). **K-FAC** (`Martens and Grosse, 2015
# <https://arxiv.org/abs/1503.05671>`__) approximates each layer's block of the Fisher matrix by a
# Kronecker product of two small matrices, which K-FAC can store and invert. This tutorial
# multiplies by the exact block.
#
# Positive-curvature Hessian
# --------------------------
#
# Let :math:`L` be the loss of one image. A linear layer computes :math:`z = W h + b`. Its input
# :math:`h = \sigma(a)` is the sigmoid of :math:`a`, the output of the layer below. Let :math:`H_z`,
# :math:`H_h` and :math:`H_a` be the Hessians of the loss with respect to :math:`z`, :math:`h` and
# :math:`a`, and :math:`\delta = \partial L / \partial h`.
#
# **Through the weight.** The output :math:`z` is linear in :math:`h`, with the Jacobian :math:`W`:
#
# .. math:: H_h = W^\top H_z W .
#
# **Through the sigmoid.** The chain rule gives :math:`\partial L / \partial a_i = \sigma'(a_i)\,
# \delta_i`. Differentiate this product with respect to :math:`a_j`. The derivative of
# :math:`\delta_i` gives :math:`\sigma'(a_i)\, (H_h)_{ij}\, \sigma'(a_j)`. The derivative of
# :math:`\sigma'(a_i)` gives :math:`r_i = \sigma''(a_i)\, \delta_i`, on the diagonal only:
#
# .. math::
#
#     \begin{aligned}
#     H_a &= \operatorname{diag}(\sigma'(a))\, H_h \operatorname{diag}(\sigma'(a))
#         + \operatorname{diag}(r), \\
#     r &= \sigma''(a) \odot \delta .
#     \end{aligned}
#
# Now :math:`a` is the output of the layer below, so that :math:`H_a` is that layer's :math:`H_z`,
# and the recursion repeats (`Botev, Ritter and Barber, 2017 <https://arxiv.org/abs/1706.03662>`__;
# for many kinds of layers, `Dangel, Harmeling and Hennig, 2020
# <https://arxiv.org/abs/1902.01813>`__).
#
# The recursion starts at the outputs of the network, with :math:`H_z = H_L`. If the loss is convex
# in the outputs, all terms of the recursion are positive semi-definite, except
# :math:`\operatorname{diag}(r)`. With :math:`r = 0`, the result is the GGN. The
# **positive-curvature Hessian** (PCH; `Chen, Chou and Chang, 2018
# <https://arxiv.org/abs/1802.06502>`__) replaces :math:`r` in each layer by :math:`|r|` (*abs*) or
# by :math:`\max(r, 0)` (*clip*), and so is positive semi-definite.
#
# The four curvatures differ in one function of :math:`\sigma''(a)` and :math:`\delta`:

RESIDUALS = {
    "Hessian": lambda s2, delta: s2 * delta,
    "GGN": lambda s2, delta: 0 * delta,
    "PCH, abs": lambda s2, delta: (s2 * delta).abs(),
    "PCH, clip": lambda s2, delta: (s2 * delta).clamp(min=0),
}

# %%
# Blocks of the recursion
# -----------------------
#
# In :math:`z = W h + b`, adding :math:`t` to :math:`b_i` adds :math:`t` to :math:`z_i`, and adding
# :math:`t` to :math:`W_{ij}` adds :math:`t h_j` to :math:`z_i`. So for one image, the blocks of the
# bias and of the weight are
#
# .. math::
#
#     \frac{\partial^2 L}{\partial b_i\, \partial b_k} = (H_z)_{ik}, \qquad
#     \frac{\partial^2 L}{\partial W_{ij}\, \partial W_{kl}} = (H_z)_{ik}\, h_j h_l .
#
# In a batch of N images, each loss counts with the factor 1/N, and the blocks of the images add up.
# If :math:`H_z` is positive semi-definite, both blocks are.


def forward(x):
    parameters = split(tiny, x)
    weights, biases = parameters[::2], parameters[1::2]
    h = [images]  # the inputs of all layers
    for W_l, b_l in zip(weights, biases, strict=True):
        z = h[-1] @ W_l.T + b_l
        h.append(z.sigmoid())
    return weights, h[:-1], z  # there is no sigmoid behind the last layer


# %%


def recursion(x, residual):
    weights, h, z = forward(x)
    H_z = loss_hessians(z)
    g_z = (z.softmax(1) - one_hot(labels)) / len(z)  # ∂L/∂z
    for W_l, h_l in zip(reversed(weights), reversed(h), strict=True):
        H_h = W_l.T @ H_z @ W_l
        yield W_l, h_l, H_z, H_h
        # To the layer below, if there is one: σ' and δ, then σ'' within r.
        s1 = h_l * (1 - h_l)
        delta = g_z @ W_l  # ∂L/∂h
        r = residual(s1 * (1 - 2 * h_l), delta)
        H_z = s1[:, :, None] * H_h * s1[:, None, :] + r.diag_embed()
        g_z = s1 * delta


def curvature_blocks(x, residual):
    blocks = []
    for W_l, h_l, H_z, _ in recursion(x, residual):
        B = torch.einsum("nik,nj,nl->ijkl", H_z, h_l, h_l)
        blocks = [B.reshape(W_l.numel(), -1), H_z.sum(0), *blocks]
    return blocks


# %%
# Are these the blocks of the dense Hessian and GGN?


# Compare the blocks with those of the dense matrices.
def blocks_of(matrix):
    sizes = [p.numel() for p in tiny.parameters()]
    rows = matrix.split(sizes)
    return [row.split(sizes, dim=1)[i] for i, row in enumerate(rows)]


def difference(blocks, others):  # relative, over all blocks
    blocks, others = torch.block_diag(*blocks), torch.block_diag(*others)
    return ((blocks - others).norm() / others.norm()).item()


for name, dense in ("Hessian", H), ("GGN", G):
    ours = curvature_blocks(x_init, RESIDUALS[name])
    error = difference(ours, blocks_of(dense))
    print(f"{name}: relative difference {error:.1e}")
    assert error < 1e-12

# %%
# The blocks agree. The next figure shows the recursion for one image, from right to left. Each
# layer gives the blocks of its bias and its weight (arrows down), and passes a matrix of the size
# of its input to the layer below.

# Run the recursion, and draw the matrices that the first image meets.
from matplotlib import pyplot as plt
from matplotlib.colors import SymLogNorm

from cgn_tutorial.pages.plotting import COLORS, describe

met = []
for W_l, _, H_z, H_h in recursion(x_init, RESIDUALS["Hessian"]):
    met += [("$H_z$", W_l.shape, H_z[0]), ("$H_h$", None, H_h[0])]
met = met[:-1]  # nothing is below the first layer

fig, ax = plt.subplots(figsize=(6, 3.6))
steps, edge = ("σ′", "W"), 0.0
for i, (name, shape, matrix) in enumerate(met):
    half = 0.07 * len(matrix)
    center = edge - (0.75 + half if i else 0)
    extent = (center - half, center + half, -half, half)
    norm = SymLogNorm(1e-3, vmin=-1, vmax=1)
    ax.imshow(matrix / matrix.abs().max(), "PuOr", extent=extent, norm=norm)
    ax.text(center, 0.58, name, ha="center")
    if i:
        ends = {"xy": (center + half, 0), "xytext": (edge, 0)}
        arrow = {"arrowstyle": "->", "color": "gray"}
        ax.annotate("", arrowprops=arrow, **ends)
        middle = (center + half + edge) / 2
        ax.text(middle, 0.14, steps[i % 2], ha="center")
    if shape:
        arrow = {"arrowstyle": "->", "color": COLORS["green"]}
        down = {"xy": (center, -0.9), "xytext": (center, -half)}
        ax.annotate("", arrowprops=arrow, **down)
        n, k = shape
        words = f"layer {3 - i // 2}\nbias\n{n} × {n}\n"
        words += f"weight\n{n * k} × {n * k}"
        ax.text(center, -0.95, words, ha="center", va="top")
    edge = center - half
ax.set(xlim=(-6.35, 0.6), ylim=(-2.7, 0.8), aspect="equal")
ax.set_axis_off()
_ = describe(
    fig,
    "From right to left, a matrix of 3 by 3 at the outputs becomes one of 5 by"
    " 5 behind the last layer's weight, another of 5 by 5 before the sigmoid,"
    " then two of 6 by 6. At each layer an arrow leads down to the blocks of"
    " its bias and its weight.",
)

# %%
# BackPACK's products
# -------------------
#
# Page 3 takes its products from `BackPACK <https://openreview.net/forum?id=BJlrF24twB>`__. An
# *extension* chooses the curvature. BackPACK follows the backward pass through all modules that
# were given to ``extend``. On each parameter ``p``, BackPACK leaves a function, ``getattr(p,
# extension.savefield)``, which multiplies the parameter's block by V vectors at once. The products
# with all unit vectors are the columns of the block.

import copy
import warnings

from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from torch import nn

# Torch warns of BackPACK's hook on the first layer, harmlessly.
warnings.filterwarnings("ignore", "Full backward hook is firing")


def backpack_blocks(extension):
    net = extend(copy.deepcopy(tiny))  # extend leaves hooks in the modules
    loss_function = extend(nn.CrossEntropyLoss())
    inputs = images.clone().requires_grad_()  # or torch warns of hooks
    with backpack(extension):
        loss_function(net(inputs), labels).backward()
    blocks = []
    for p in net.parameters():
        product = getattr(p, extension.savefield)
        unit_vectors = torch.eye(p.numel()).to(p).view(-1, *p.shape)
        blocks.append(product(unit_vectors).reshape(p.numel(), -1))
    return blocks


for name, extension, dense in ("Hessian", HMP(), H), ("GGN", GGNMP(), G):
    error = difference(backpack_blocks(extension), blocks_of(dense))
    print(f"BackPACK's {name}: relative difference {error:.1e}")
    assert error < 1e-12

# %%
# How does BackPACK compute the PCH? Take the definition above, and a variant that multiplies by
# :math:`\delta` twice, :math:`\sigma''(a) \odot \delta \odot \delta`. How far is BackPACK's PCH
# from each of the two, and how far is the GGN?

for modify in ("abs", "clip"):
    residual = RESIDUALS[f"PCH, {modify}"]
    theirs = backpack_blocks(PCHMP(modify=modify))
    once = curvature_blocks(x_init, residual)
    twice = curvature_blocks(
        x_init, lambda s2, d, residual=residual: residual(s2, d * d)
    )
    errors = [difference(theirs, blocks) for blocks in (once, twice)]
    print(f"{modify:4}            to δ once   to δ twice")
    print(f"BackPACK's PCH   {errors[0]:.1e}     {errors[1]:.1e}")
    ggn = [difference(b, blocks_of(G)) for b in (once, twice)]
    print(f"GGN              {ggn[0]:.1e}     {ggn[1]:.1e}")
    assert min(errors) < 1e-12
    assert ggn[1] < ggn[0] / 100

# %%
# BackPACK 1.7.1 multiplies by :math:`\delta` twice. In a mean over N images, :math:`\delta`
# contains the factor 1/N, and :math:`\delta^2` contains 1/N²: so hardly any residual is left, and
# BackPACK's variant is here nearly the GGN. On page 3, PCH means this variant, as in the published
# run. The next section uses the definition.
#
# Spectra
# -------
#
# How do the eigenvalues of the four curvatures differ, and does training change them? First, train
# the tiny network with dense matrices: the block-diagonal GGN, :math:`\lambda = 0.01` and
# :math:`\gamma = 0.1`.

eye = torch.eye(len(x_init), dtype=x_init.dtype)
x = x_init
for _ in range(100):
    C = torch.block_diag(*curvature_blocks(x, RESIDUALS["GGN"]))
    v = torch.linalg.solve(C + 0.01 * eye, -grad(loss)(x))
    x = x + 0.1 * v
x_trained = x

for name, x in (("initialisation", x_init), ("trained", x_trained)):
    correct = (outputs(x).argmax(1) == labels).double().mean()
    print(f"{name}: loss {loss(x):.3f}, accuracy {correct:.2f}")
assert loss(x_trained) < 0.1 * loss(x_init)

# %%
# Each mark of the next figure is one eigenvalue of the block-diagonal matrix. The axis is linear up
# to :math:`10^{-5}` and logarithmic beyond. The output counts the negative eigenvalues, and has the
# smallest and the largest eigenvalue.


def spectrum(x, name):
    blocks = curvature_blocks(x, RESIDUALS[name])
    return torch.linalg.eigvalsh(torch.block_diag(*blocks))


# %%

# Draw and count the eigenvalues of the four curvatures.
fig, axes = plt.subplots(2, 1, figsize=(5, 4.4), sharex=True)
for ax, x in zip(axes, (x_init, x_trained), strict=True):
    title = "at initialisation" if x is x_init else "trained"
    print(title)
    for row, name in enumerate(RESIDUALS):
        mu = spectrum(x, name)
        up, down = mu[mu > -1e-14], mu[mu < -1e-14]
        ax.plot(up, 0 * up + row, "|", ms=12, c=COLORS["blue"])
        ax.plot(down, 0 * down + row, "x", c=COLORS["red"])
        print(
            f"  {name:9}  negative: {len(down):2}  {mu[0]:8.1e} {mu[-1]:.2f}"
        )
        assert (len(down) > 0) == (name == "Hessian")
    ax.set_xscale("symlog", linthresh=1e-5)
    ax.set(yticks=range(4), yticklabels=RESIDUALS, ylim=(3.5, -0.5))
    ax.set_title(title, size=10)
axes[1].set(xlabel="eigenvalue", xticks=[-1e-3, 0, 1e-3, 1e-1])
fig.tight_layout()
_ = describe(
    fig,
    "Two panels with one row of eigenvalues per curvature, on a logarithmic"
    " scale to both sides of zero. Only the Hessian has negative ones, marked"
    " by crosses; after training they are fewer and smaller.",
)

# %%
# Only the Hessian has negative eigenvalues (crosses). After training, they are fewer, and close to
# 0. How did training change :math:`R`, the difference between the blocks of the Hessian and of the
# GGN?

residuals = []
for name, x in (("initialisation", x_init), ("trained", x_trained)):
    H_x, G_x = (curvature_blocks(x, RESIDUALS[k]) for k in ("Hessian", "GGN"))
    R_x = torch.block_diag(*H_x) - torch.block_diag(*G_x)
    low, high = torch.linalg.eigvalsh(R_x)[[0, -1]]
    print(f"{name}: norm {R_x.norm():.1e},")
    print(f"    eigenvalues from {low:.1e} to {high:.1e}")
    residuals.append((R_x.norm(), low, high))

# %%

# Check the most negative eigenvalues, and those of the residual.
negative = [spectrum(x, "Hessian") for x in (x_init, x_trained)]
counts = [(mu < -1e-14).sum() for mu in negative]
assert counts[1] < counts[0]
assert 0 > negative[1][0] > 0.1 * negative[0][0]
(before, low, high), (after, low_trained, high_trained) = residuals
assert after > 3 * before
assert -low > 5 * high and high_trained > 5 * -low_trained
assert 0 > low_trained > 0.1 * low

# %%
# The norm of :math:`R` has grown more than threefold: its largest eigenvalue has grown, and its
# negative eigenvalues are now close to 0. All four curvatures have a few large eigenvalues and many
# eigenvalues close to 0.
#
# Damping moves every eigenvalue :math:`\mu` to :math:`\mu + \lambda`. The next figure shows the
# sizes of the eigenvalues at initialisation, from the largest eigenvalue to the smallest (negative
# ones as crosses), and as a dashed line the positive eigenvalues after damping with :math:`\lambda
# = 10^{-3}`. Sizes below :math:`10^{-7}` are drawn as :math:`10^{-7}`.

# Draw the eigenvalues with and without damping.
fig, axes = plt.subplots(2, 2, figsize=(5, 4.4), sharex=True, sharey=True)
for ax, name in zip(axes.flat, RESIDUALS, strict=True):
    mu = spectrum(x_init, name).flip(0)
    k = torch.arange(len(mu))
    size, down, up = mu.abs().clamp(min=1e-7), mu < -1e-14, mu + 1e-3 > 0
    ax.plot(k[~down], size[~down], ".", ms=3, c=COLORS["blue"])
    ax.plot(k[down], size[down], "x", ms=4, c=COLORS["red"])
    ax.plot(k[up], (mu + 1e-3)[up], "--", c=COLORS["orange"])
    ax.set(yscale="log")
    ax.set_title(name, size=10)
for ax in axes[1]:
    ax.set_xlabel("index")
for ax in axes[:, 0]:
    ax.set_ylabel("|eigenvalue|")
fig.tight_layout()
_ = describe(
    fig,
    "Four panels of eigenvalues falling from about 0.6 over seven orders of"
    " magnitude. Damped, they level off at 0.001. For the Hessian the"
    " negative eigenvalues rise again in size to about 0.006 at the end, and"
    " the damped line ends where they are larger in size than the damping.",
)

# %%
# For the three semi-definite curvatures, no damped eigenvalue is below :math:`\lambda`, and the
# condition number, the largest eigenvalue over the smallest, drops from infinity to at most
# :math:`\mu_1 / \lambda + 1`. (`Page B <plot_b_how_fast_how_exact.html>`__ bounds the steps of CG
# by the condition number.) The damped Hessian is positive definite only if :math:`\lambda` exceeds
# the size of the most negative eigenvalue.

for lam in (1e-3, 1e-2):
    print(f"λ = {lam}:")
    for name in RESIDUALS:
        mu = spectrum(x_init, name) + lam
        condition = f"condition number {mu[-1] / mu[0]:.0f}"
        print(f"    {name:9}", condition if mu[0] > 0 else "indefinite")
        assert (mu[0] > 0) == (lam == 1e-2 or name != "Hessian")

# %%
# Check yourself
# --------------
#
# .. fold:: All sigmoids are replaced by ReLUs, whose second derivative is zero wherever the
#     derivative exists. Do the blocks of the four curvatures still differ?
#
#    No: with :math:`\sigma'' = 0`, the residual :math:`r` is zero in every layer. (The full Hessian
#    and the full GGN still differ outside the blocks.)
#
# .. fold:: The labels are drawn from the model's own probabilities. What does the empirical Fisher
#     approach as more and more labels are drawn?
#
#    The Fisher matrix: the mean over drawn labels approaches the mean with the model's
#    probabilities.
#
# .. fold:: Exercise: run ``curvature_blocks`` at ``x_init`` with a residual of your own, ``lambda
#     s2, d: (s2 * d).abs() / 10``. Call ``difference`` twice, each time with the blocks of the GGN:
#     for your blocks, and for those of the PCH with abs. How large is the ratio of the results?
#
#    A tenth: the recursion is linear in :math:`H_z` and :math:`r`.

# Check the answers.
G_blocks = blocks_of(G)
tenth = curvature_blocks(x_init, lambda s2, d: (s2 * d).abs() / 10)
whole = curvature_blocks(x_init, RESIDUALS["PCH, abs"])
ratio = difference(tenth, G_blocks) / difference(whole, G_blocks)
assert abs(ratio - 0.1) < 1e-9

drawn = torch.multinomial(share, 10_000, replacement=True)  # per image
sampled = torch.stack([(drawn == c).double().mean(1) for c in range(3)], 1)
sampled = torch.einsum("nc,nci,ncj->ij", sampled, g, g) / len(images)
assert (sampled - fisher).norm() < 0.01 * fisher.norm()

rectified = copy.deepcopy(tiny)
rectified[1], rectified[3] = nn.ReLU(), nn.ReLU()
outputs = outputs_of(rectified, images)
J, H_L = jacrev(outputs)(x_init), loss_hessians(outputs(x_init))
G = torch.einsum("nki,nkl,nlj->ij", J, H_L, J)
H = jacrev(grad(loss))(x_init)
assert difference(blocks_of(H), blocks_of(G)) < 1e-12
assert (H - G).norm() > 0.01 * G.norm()
