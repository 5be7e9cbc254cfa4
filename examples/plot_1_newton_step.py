r"""
1. From a quadratic model to a matrix-free step
===============================================

What is a Newton step, and how does a step use a matrix that is too large to store? Gradient descent
follows the slope of the loss. Newton's method also measures the *curvature*, the change of the
slope, builds a quadratic model of the loss, and steps towards the minimum of this model:

.. math::

    (C + \lambda I)\, v = -g, \qquad x \leftarrow x + \gamma v .

Here :math:`x` are the parameters, :math:`g` is the gradient, :math:`C` the curvature, :math:`v` the
step, :math:`\lambda` the damping and :math:`\gamma` the step size. This page builds the formula
from one dimension up, chooses the matrix :math:`C` for a neural network, and multiplies by
:math:`C` without storing it.

*About 25 minutes to read, and one to run.* To run this page, ``pip install`` the package, as the
`front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# The local quadratic model
# -------------------------
#
# Close to a point :math:`x`, a parabola :math:`q` in the step :math:`v` approximates a smooth loss
# :math:`L(x + v)`:
#
# .. math::
#
#     q(v) = L(x) + g v + \tfrac{1}{2} C v^2
#
# with the slope :math:`g = L'(x)` and the curvature :math:`C = L''(x)`. The slope of the parabola
# is zero at the **Newton step**, :math:`v = -g / C`. Take the loss :math:`L(x) = 1 - \exp(-x^2 /
# 2)`, with the minimum at 0:

import torch
from torch.func import grad


def loss(x):
    return 1 - torch.exp(-(x**2) / 2)


def newton_step(x, lam=0.0):
    g, C = grad(loss)(x), grad(grad(loss))(x)
    return -g / (C + lam)


# %%
# Here are the steps from three points. The solid line is the loss, and the dashed line is the
# parabola. The circle is the start, and the cross is the end of the step.

# Draw the loss, the parabola that touches it, and the step.
import matplotlib.pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe


def draw_step(ax, x, gamma=1.0, lam=0.0):
    v = torch.linspace(-4, 4, 200)
    g, C = grad(loss)(x), grad(grad(loss))(x) + lam
    end = x + gamma * newton_step(x, lam)
    ax.plot(v, loss(v), color="black")
    ax.plot(x + v, loss(x) + g * v + C * v**2 / 2, "--", c=COLORS["blue"])
    ax.plot([x, end], [loss(x), loss(end)], ":", c=COLORS["orange"])
    ax.plot(x, loss(x), "o", c=COLORS["orange"])
    ax.plot(end, loss(end), "X", c=COLORS["orange"], ms=9)
    ax.set(xlabel="x", xlim=(-3, 3), ylim=(-0.25, 1.25))


# %%

# Draw the steps from the three starts.
good, far, lying = torch.tensor([0.4, 0.8, 1.5])
fig, axes = plt.subplots(1, 3, figsize=(5, 2.4), sharey=True)
for ax, start in zip(axes, (good, far, lying), strict=True):
    draw_step(ax, start)
    ax.set_title(f"from x = {start:.1f}", size=10)
_ = axes[0].set_ylabel("loss")
_ = describe(
    fig,
    "Three panels of the same bell-shaped valley. From 0.4 the Newton step"
    " lands near the minimum, from 0.8 it overshoots to the other side, and"
    " from 1.5 it climbs away from the minimum.",
)

# %%

for start in (good, far, lying):
    end = start + newton_step(start)
    before, after = loss(start), loss(end)
    print(f"{start:.1f} -> {end:5.2f}: loss {before:.2f} -> {after:.2f}")

# %%
# From 0.4, the parabola is a good model, and the step lands near the minimum. From 0.8, the
# curvature of the parabola is too small: the step **overshoots**, and the loss rises. From 1.5, the
# curvature is negative, and the model **misleads**: the parabola has a maximum and no minimum, and
# the step climbs towards the maximum.

# Check the three steps.
assert abs(good + newton_step(good)) < 0.1
assert loss(far + newton_step(far)) > loss(far)
assert grad(grad(loss))(lying) < 0
assert lying + newton_step(lying) > lying  # away from the minimum at 0

# %%
# Step size and damping
# ---------------------
#
# Two numbers can mend a bad step. With a **step size** :math:`\gamma` below 1, the update :math:`x
# + \gamma v` goes a part of the way. The **damping** :math:`\lambda` makes long steps expensive:
# the model gains the term :math:`\tfrac{1}{2} \lambda v^2`, and the curvature becomes :math:`C +
# \lambda`. Three attempts:

# Draw three attempts to mend the step.
fig, axes = plt.subplots(1, 3, figsize=(5, 2.5), sharey=True)
draw_step(axes[0], far, gamma=0.5)
axes[0].set(ylabel="loss")
axes[0].set_title("x = 0.8\nγ = 0.5", size=10)
draw_step(axes[1], lying, gamma=0.5)
axes[1].set_title("x = 1.5\nγ = 0.5", size=10)
draw_step(axes[2], lying, lam=0.8)
axes[2].set_title("x = 1.5\nλ = 0.8", size=10)
_ = describe(
    fig,
    "Half the step from 0.8 lands near the minimum; half the step from 1.5"
    " still climbs; with damping 0.8 the parabola at 1.5 opens upwards and"
    " the step goes down towards the minimum.",
)

# %%

# Check the three attempts.
assert loss(far + 0.5 * newton_step(far)) < loss(far)
assert loss(lying + 0.5 * newton_step(lying)) > loss(lying)
assert loss(lying + newton_step(lying, lam=0.8)) < loss(lying)

# %%
# A smaller :math:`\gamma` mends the overshoot from 0.8. From 1.5, half the step still climbs. A
# damping :math:`\lambda > -C` makes :math:`C + \lambda` positive, and the step points downhill.
#
# How much damping is enough? The left panel shows one step from :math:`x = 1.5`. The right panel
# shows the loss after the step, for each :math:`\lambda`; the thin line is the loss before the
# step. On this site, move the sliders; elsewhere, change the next line.

x, lam, gamma = torch.tensor(1.5), 0.8, 1.0

# %%

# Draw the step, and the loss after it over the damping.
from cgn_tutorial.pages.plotting import explorable

dampings = torch.linspace(0, 2, 201)
fig, (left, right) = plt.subplots(1, 2, figsize=(5, 2.6), sharey=True)
draw_step(left, x, gamma, lam)
left.set_ylabel("loss")
orange = COLORS["orange"]
right.plot(dampings, loss(x + gamma * newton_step(x, dampings)), c=orange)
right.plot(lam, loss(x + gamma * newton_step(x, lam)), "X", c=orange, ms=9)
right.axhline(loss(x), color="gray", lw=0.5)
right.axvspan(0, max(0, -grad(grad(loss))(x)), color="gray", alpha=0.2)
right.set(xlabel="damping λ")
right.set_title("loss after the step", size=10)
_ = describe(
    fig,
    "Left: from 1.5, the step with damping 0.8 lands near the minimum. Right:"
    " the loss after the step is higher than before up to a damping of 0.57,"
    " falls to zero at 0.73, and slowly rises from there.",
)
settings = {"x": x.item(), "lambda": lam, "gamma": gamma}
_ = explorable(fig, "parabola", settings)

# %%
# In the shaded part, :math:`\lambda < -C`, the step climbs. Just to the right, :math:`C + \lambda`
# is almost zero, and the step overshoots by far. From :math:`\lambda = 0.57` on, the step lowers
# the loss, and at 0.73 most. More damping only shortens the step.

# Check the loss after the step.
C = grad(grad(loss))(lying)
after = loss(lying + newton_step(lying, dampings))
best = dampings[after.argmin()]
lower = dampings[after < loss(lying)]
assert abs(lower.min() - 0.57) < 0.01 and abs(best - 0.73) < 0.01
assert (after[dampings < -C] > loss(lying)).all() and best > -C
assert after[dampings > -C][0] > 0.99
assert (after[dampings > best].diff() > 0).all() and after[-1] < loss(lying)

# %%
# Two dimensions
# --------------
#
# With several parameters, :math:`g` is the gradient, :math:`C` is a symmetric matrix, and the
# damped model is
#
# .. math::
#
#     q(v) = L(x) + g^\top v + \tfrac{1}{2}\, v^\top (C + \lambda I)\, v .
#
# The gradient of the model, :math:`g + (C + \lambda I)\, v`, vanishes if :math:`v` solves the
# system at the top of this page. If all eigenvalues of :math:`C + \lambda I` are positive, then the
# model is lowest at :math:`v`, and :math:`v` points downhill: :math:`g^\top v = -v^\top (C +
# \lambda I)\, v < 0`.
#
# Take a valley, :math:`L(x) = \tfrac{1}{2} (x_1^2 + 20\, x_2^2)`. The curvature along :math:`x_2`
# is 20 times the curvature along :math:`x_1`.

C = torch.diag(torch.tensor([1.0, 20.0]))
start = torch.tensor([10.0, 1.0])
eta = 2 / (1 + 20)  # the constant step size that converges fastest

descent = [start]
while descent[-1].norm() > 0.01 * start.norm():
    descent.append(descent[-1] - eta * (C @ descent[-1]))
descent = torch.stack(descent)
newton = start + torch.linalg.solve(C, -(C @ start))  # its gradient is C x

print("steps to 1 % of the distance at the start:")
print(f"gradient descent {len(descent) - 1}, Newton 1")
assert len(descent) - 1 == 47
assert newton.norm() < 1e-6

# %%

# Draw both paths over the contours.
blue, orange, green = COLORS["blue"], COLORS["orange"], COLORS["green"]
first = torch.linspace(-2, 12, 99)
second = torch.linspace(-1.5, 1.5, 99)[:, None]


def draw_valley(ax):
    value = (first**2 + 20 * second**2) / 2
    ax.contour(first, second[:, 0], value, colors="gray", linewidths=0.5)
    ax.set(aspect="equal", xlabel="$x_1$", ylabel="$x_2$")


fig, ax = plt.subplots(figsize=(5, 2))
draw_valley(ax)
ax.plot(*descent.T, "o-", ms=3, c=blue, label="gradient descent")
ax.plot(*torch.stack([start, newton]).T, "X--", c=orange, label="Newton")
fig.legend(loc="outside upper center", ncols=2)
_ = describe(
    fig,
    "Long, flat elliptic contours. Gradient descent zigzags across the valley"
    " in ever smaller steps; Newton goes straight to the centre.",
)

# %%
# Gradient descent bounces between the steep walls. Newton's method divides each component of the
# gradient by its own curvature. Let :math:`g_\mu` be the component of :math:`g` along an
# eigenvector of :math:`C` with the eigenvalue :math:`\mu`. In this direction, the damped step is
# :math:`-g_\mu / (\mu + \lambda)`: nearly the Newton step if :math:`\mu \gg \lambda`, and nearly a
# gradient step, :math:`-g_\mu / \lambda`, if :math:`\mu \ll \lambda`.
#
# The upper panel shows one damped step, and the ends of all damped steps as a curve. The lower
# panel shows, for each :math:`\lambda` and each direction, which part of the way to the minimum the
# step goes.

lam, gamma = 1.0, 1.0

# %%

# Compute the step, and the part of the way.
eye, g = torch.eye(2), C @ start
curvatures = C.diagonal()
end = start + gamma * torch.linalg.solve(C + lam * eye, -g)
part = gamma * curvatures / (curvatures + lam)
print(f"λ = {lam}: x₁ goes {part[0]:.0%} of its way, x₂ {part[1]:.0%}")
assert torch.allclose(1 - end / start, part)
assert part[0] <= part[1]  # x₁ is the flat direction

much = 1e4  # far above all eigenvalues: gradient descent
v = torch.linalg.solve(C + much * eye, -g)
assert torch.allclose(v, -g / much, rtol=20 / much)

# %%

# Draw the step, and the part of the way over the damping.
dampings = torch.logspace(-3, 4, 80)
parts = gamma * curvatures / (curvatures + dampings[:, None])
fig, (top, bottom) = plt.subplots(2, 1, figsize=(5, 4.4))
draw_valley(top)
top.plot(*(start * (1 - parts)).T, c=green)
top.plot(*start, "o", c=orange)
top.plot(*end, "X", c=orange, ms=9)
for i, (color, style) in enumerate(((blue, "-"), (COLORS["purple"], "--"))):
    name = f"x{'₁₂'[i]}, curvature {curvatures[i]:.0f}"
    bottom.semilogx(dampings, parts[:, i], style, c=color, label=name)
    bottom.plot(lam, part[i], "o", c=color)
bottom.set(xlabel="damping λ", ylabel="part of the way", ylim=(0, 1.25))
bottom.legend(loc="lower left")
fig.tight_layout()
_ = describe(
    fig,
    "Above: the damped step with λ = 1 lands on the valley's floor, half way"
    " to the minimum. Below: the part of the way falls from one to zero as the"
    " damping grows, around 1 for the first parameter and around 20 for the"
    " second.",
)
settings = {"lambda": lam, "gamma": gamma}
settings |= {"start": start.tolist(), "mu": curvatures.tolist()}
_ = explorable(fig, "valley", settings)

# %%
# At :math:`\lambda = \mu` and :math:`\gamma = 1`, the step goes half the way. Damping shortens the
# step more along the flat direction. The step size :math:`\gamma` shortens both directions alike.
#
# Null directions
# ---------------
#
# What happens along a *null direction* :math:`u`, a direction without curvature, :math:`C u = 0`?
# The smallest example has one image and two classes, and the two outputs are the parameters. If the
# same number is added to both outputs, the softmax gives the same probabilities. So the loss is
# constant along :math:`u = (1, 1)`.

from torch.func import jacrev
from torch.nn.functional import cross_entropy


def two_outputs(z):
    return cross_entropy(z, torch.tensor(0))


g2 = grad(two_outputs)(torch.zeros(2))
C2 = jacrev(grad(two_outputs))(torch.zeros(2))  # the gradient's Jacobian
u = torch.ones(2)
print(f"g = {g2.tolist()}")
print(f"C = {C2.tolist()}")
print(f"C u = {(C2 @ u).tolist()}, g · u = {g2 @ u:.0f}")
assert (C2 @ u).norm() == 0 and g2 @ u == 0

# %%

# Draw the model of two outputs, without damping and with it.
line = torch.linspace(-3, 3, 99)
v2 = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
fig, axes = plt.subplots(1, 2, figsize=(5, 2.7), sharey=True)
for ax, lam in zip(axes, (0.0, 0.2), strict=True):
    damped = C2 + lam * eye
    q = v2 @ g2 + ((v2 @ damped) * v2).sum(-1) / 2
    ax.contour(line, line, q, levels=12, colors="gray", linewidths=0.5)
    ax.set(aspect="equal", xlabel="change of output 1")
    ax.set_title(f"λ = {lam}", size=10)
axes[0].plot(line, line - 2, "--", c=COLORS["orange"])  # all minima
axes[1].plot(*torch.linalg.solve(damped, -g2), "X", c=COLORS["orange"])
axes[0].set(ylabel="change of output 2", ylim=(-3, 3))
_ = describe(
    fig,
    "Contours of the quadratic model of two outputs. Without damping they are"
    " parallel diagonal lines, and the minima form a line. With damping they"
    " are ellipses around a single minimum.",
)

# %%

# Check the minima.
minima = torch.stack([line, line - 2], 1)
torch.testing.assert_close(minima @ C2, -g2.expand_as(minima))
v = torch.linalg.solve(damped, -g2)
assert abs(u @ v) < 1e-6

# %%
# Without damping (left), the model is a trough, and each point of the dashed line is a minimum.
# With damping (right), a single minimum is left, and the step to this minimum is at a right angle
# to the trough. To see why, multiply :math:`(C + \lambda I)\, v = -g` by :math:`u^\top`. Since
# :math:`u^\top C = 0` and :math:`u^\top g = 0`, what remains is :math:`\lambda\, u^\top v = 0`: the
# damped step has no component along :math:`u`.
#
# Hessian
# -------
#
# Which matrix is :math:`C` for a network? The first answer is the **Hessian**, :math:`H = \nabla^2
# L(x)`, the matrix of all second derivatives of the loss.
#
# Take a network so small that a figure can show its matrices: three layers, 113 parameters, and 100
# images of the digits 0, 1 and 2, shrunk to 3 × 3 pixels. The vector :math:`x` holds all
# parameters.

from torch.nn.utils import parameters_to_vector

from cgn_tutorial.pages import load_tiny_mnist, make_tiny_model, outputs_of

images, labels = load_tiny_mnist()
torch.manual_seed(0)
tiny = make_tiny_model()
x_init = parameters_to_vector(tiny.parameters()).detach()
outputs = outputs_of(tiny, images)


def loss_of_outputs(z):
    return cross_entropy(z, labels)


def loss(x):
    return loss_of_outputs(outputs(x))


H = jacrev(grad(loss))(x_init)
smallest, largest = torch.linalg.eigvalsh(H)[[0, -1]]
print(f"{len(H)} eigenvalues, from {smallest:.3f} to {largest:.3f}")
assert len(H) == 113 and smallest < 0

# %%
# The Hessian has negative eigenvalues: the model may mislead.
#
# Generalized Gauss-Newton
# ------------------------
#
# The loss is a composition: the parameters give outputs :math:`z(x)`, and the outputs give the loss
# :math:`\ell(z)`. Let :math:`J = \partial z / \partial x` be the Jacobian of the outputs and
# :math:`H_L = \nabla_z^2 \ell` the Hessian of the loss with respect to the outputs. The chain rule,
# applied twice, gives
#
# .. math::
#
#     \begin{aligned}
#     \nabla L &= J^\top \nabla_z \ell, &
#     H &= G + R, \\
#     G &= J^\top H_L\, J, &
#     R &= \sum_k \frac{\partial \ell}{\partial z_k} \nabla^2 z_k ,
#     \end{aligned}
#
# where :math:`k` counts the outputs of all images. The **generalized Gauss-Newton** matrix
# :math:`G` (GGN; `Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient
# Descent" (2002) <https://doi.org/10.1162/08997660260028683>`__) keeps the first term. The GGN
# drops the *residual* :math:`R`, which contains the second derivatives of the network itself.
#
# Cross-entropy and squared error are convex in the *outputs*. For such losses, no eigenvalue of the
# GGN is negative, as :math:`v^\top G\, v = (J v)^\top H_L\, (J v) \ge 0`: the GGN is *positive
# semi-definite*. If a loss is not convex in the outputs, as :math:`\ln(1 + z^2)`, then the GGN may
# have negative eigenvalues.
#
# Here are the three factors for one image, not to scale:

# Draw the GGN as the product of its three factors.
from matplotlib.patches import Rectangle

n, k = len(x_init), 3
fig, ax = plt.subplots(figsize=(5, 2.3))
left = 0.0
for name, rows, columns, color, after in (
    ("G", n, n, "green", "="),
    ("Jᵀ", n, k, "blue", "·"),
    ("$H_L$", k, k, "orange", "·"),
    ("J", k, n, "blue", ""),
):
    width, height = (1.0 if size == n else 0.3 for size in (columns, rows))
    box = Rectangle((left, -height), width, height, color=COLORS[color])
    ax.add_patch(box).set_alpha(0.35)
    ax.text(left + width / 2, -height / 2, name, ha="center", va="center")
    ax.text(left + width / 2, 0.04, f"{rows} × {columns}", ha="center")
    ax.text(left + width + 0.16, -0.16, after, ha="center", fontsize=14)
    left += width + 0.32
ax.text(1.7, -0.6, "a product with v:", size=10)
ax.text(1.7, -0.79, f"v: {n} numbers → J v: {k}", size=10)
ax.text(1.7, -0.98, f"→ $H_L$ J v: {k} → Jᵀ $H_L$ J v: {n}", size=10)
ax.set(xlim=(-0.05, left - 0.2), ylim=(-1.05, 0.15), aspect="equal")
ax.set_axis_off()
_ = describe(
    fig,
    "The matrix G, 113 by 113, as the product of three: a tall one, 113 by 3,"
    " a square of 3 by 3, and a wide one, 3 by 113. A vector of 113 numbers"
    " becomes one of 3, and again one of 113.",
)

# %%
# For all 100 images:

z = outputs(x_init)
J = jacrev(outputs)(x_init).flatten(0, 1)  # [100 images · 3 outputs, 113]
H_L = jacrev(grad(loss_of_outputs))(z).reshape(len(J), len(J))
G = J.T @ H_L @ J

smallest = torch.linalg.eigvalsh(G)[0]
print(f"norm of the residual: {(H - G).norm() / H.norm():.0%} of H's")
print(f"smallest eigenvalue of the GGN: {smallest:.1e}")
assert smallest > -1e-14
bent = grad(grad(lambda z: torch.log(1 + z**2)))  # a loss that is not convex
assert bent(torch.tensor(2.0)) < 0

# %%
# Up to rounding, the smallest eigenvalue of the GGN is zero: the GGN has null directions. For
# instance, let :math:`u` add 1 to all biases of the last layer. Then all outputs rise by 1, and the
# softmax stays the same. A small batch leaves more null directions: if the loss is cross-entropy, N
# images of K classes give the GGN a rank of at most N (K − 1).

u = torch.zeros_like(x_init)
u[-3:] = 1  # the last bias
g = grad(loss)(x_init)
v = torch.linalg.solve(G + 0.01 * torch.eye(len(G)), -g)
print(f"|G u| = {(G @ u).norm():.0e}, |g · u| = {abs(g @ u):.0e}")
print(f"damped step: |v| = {v.norm():.2f}, |u · v| = {abs(u @ v):.0e}")

few = 5 * 3  # the outputs of 5 images
G_few = J[:few].T @ H_L[:few, :few] @ J[:few]
rank = torch.linalg.matrix_rank(G_few).item()
print(f"5 images of 3 classes: rank {rank} of {len(G)}")

# %%

# Check the null directions.
assert (G @ u).norm() < 1e-14
assert abs(g @ u) < 1e-14
assert abs(u @ v) < 1e-12
assert rank <= 5 * 2

# %%
# The *positive-curvature Hessian* (PCH) changes the residual so that no eigenvalue is negative;
# `page A <plot_a_positive_curvature.html>`__ derives the PCH.
#
# Block-diagonal
# --------------
#
# Smaller systems are easier to solve. A **block** is the square part of the matrix that belongs to
# some of the parameters, here to one tensor, a weight or a bias. A block-diagonal curvature keeps
# the blocks and drops the rest, and each block has a system of its own. The blocks of a positive
# semi-definite matrix are positive semi-definite: if :math:`v` is zero outside a block, then
# :math:`v^\top G\, v` contains the entries of the block alone.
#
# The next figure outlines the blocks. Each row and each column belongs to one parameter.

# Draw both matrices, with the blocks outlined.
from matplotlib.colors import SymLogNorm

names = ["W₁", "b₁", "W₂", "b₂", "W₃", "b₃"]
sizes = torch.tensor([p.numel() for p in tiny.parameters()])
edges = sizes.cumsum(0) - sizes
norm = SymLogNorm(1e-4, vmin=-0.2, vmax=0.2)
fig, axes = plt.subplots(1, 2, figsize=(5, 3.3), layout="constrained")
for ax, title, matrix in zip(axes, ("Hessian", "GGN"), (H, G), strict=True):
    image = ax.imshow(matrix, cmap="PuOr", norm=norm)
    for edge, size in zip(edges - 0.5, sizes, strict=True):
        square = Rectangle((edge, edge), size, size, fill=False)
        square.set(ec=COLORS["green"], lw=1.5)
        ax.add_patch(square)
    centres = (edges + sizes / 2 - 0.5).tolist()
    ax.set_title(title, size=10)
    ax.set(xticks=centres[::2], yticks=centres[::2])
    ax.set(xticklabels=names[::2], yticklabels=names[::2])
fig.colorbar(image, ax=axes, label="entry", location="bottom", shrink=0.8)
_ = describe(
    fig,
    "Two symmetric 113 by 113 matrices with six outlined squares on the"
    " diagonal, one per tensor. The largest entries belong to the last layer."
    " Both have large entries outside the squares; the Hessian shows stripes"
    " between different layers that the GGN lacks.",
)

# %%


def blocks_of(matrix):
    n = sizes.tolist()
    return [row.split(n, dim=1)[i] for i, row in enumerate(matrix.split(n))]


for name, matrix in (("Hessian", H), ("GGN", G)):
    inside = torch.block_diag(*blocks_of(matrix)).norm() / matrix.norm()
    share = inside.item() ** 2
    print(f"{name}: {share:.0%} of the squared norm in the blocks")
    assert 0.4 < share < 0.6
    assert (matrix.abs() == matrix.abs().max()).nonzero().min() >= edges[4]

# %%
# Here, a block-diagonal curvature drops about half of the squared norm. The Hessian has stripes
# that the GGN lacks: the stripes are part of the residual.
#
# Products without matrices
# -------------------------
#
# How much memory does the matrix take, for the network of page 3 and for a billion parameters?

from cgn_tutorial.pages import make_model

model = make_model()
for n in sum(p.numel() for p in model.parameters()), 10**9:
    print(f"{n:,} parameters: vector {4 * n / 1e6:,.2f} MB,")
    print(f"    matrix {4 * n**2 / 1e9:,.1f} GB")

# %%
# No machine stores four billion gigabytes. Yet some solvers need only the **product** of the matrix
# with a vector. The Hessian is symmetric, and is the Jacobian of the gradient. So a backward pass
# through the gradient, from :math:`v`, gives :math:`H v` (compare `Pearlmutter, 1994
# <https://doi.org/10.1162/neco.1994.6.1.147>`__). The product with the GGN applies the three
# factors one by one, from right to left: :math:`J v`, then :math:`H_L (J v)`, then :math:`J^\top
# (H_L J v)`.
#
# PyTorch's ``vjp`` returns the value of a function, and a second function, ``Jt``, which multiplies
# by :math:`J^\top`. The function ``Jt`` is linear. So the ``vjp`` of ``Jt`` multiplies by the
# transpose of :math:`J^\top`, which is :math:`J` (`Townsend, 2017
# <https://j-towns.github.io/2017/06/12/A-new-trick.html>`__). Two ``vjp`` give :math:`J v`:

from torch.func import vjp


def hessian_product(loss, x, v):
    return vjp(grad(loss), x)[1](v)[0]


def ggn_product(outputs, loss_of_outputs, x, v):
    z, Jt = vjp(outputs, x)
    Jv = vjp(lambda u: Jt(u)[0], torch.zeros_like(z))[1](v)[0]
    HJv = hessian_product(loss_of_outputs, z, Jv)
    return Jt(HJv)[0]


v = torch.randn_like(x_init)
Hv = hessian_product(loss, x_init, v)
Gv = ggn_product(outputs, loss_of_outputs, x_init, v)
for name, product, dense in (("H v", Hv, H @ v), ("G v", Gv, G @ v)):
    error = ((product - dense).norm() / dense.norm()).item()
    print(f"{name}: difference to the dense product {error:.1e}")
    assert error < 1e-12

# %%
# How long does a product take, in gradients, for the network of page 3 and 64 images?

# What to time: a gradient and three products.
import statistics
import time

from cgn_tutorial import GGN
from cgn_tutorial.pages import load_mnist

digits, classes = (t[:64] for t in load_mnist(train=False).tensors)
f = outputs_of(model, digits)
x = parameters_to_vector(model.parameters()).detach()
v = torch.randn_like(x)


def ell(z):
    return cross_entropy(z, classes)


candidates = {
    "gradient": lambda: grad(lambda x: ell(f(x)))(x),
    "Hessian product": lambda: hessian_product(lambda x: ell(f(x)), x, v),
    "GGN product": lambda: ggn_product(f, ell, x, v),
}

z = model(digits)
(kept,) = GGN([model.parameters()]).backward(ell(z), z)
candidates["GGN product, graph kept"] = lambda: kept(v[None])

# %%

# Time them in turns, and print the medians.
seconds = {name: [] for name in candidates}
for _ in range(11):  # in turns, so that all meet the same load
    for name, function in candidates.items():
        begin = time.perf_counter()
        function()
        seconds[name].append(time.perf_counter() - begin)
medians = {k: statistics.median(v) for k, v in seconds.items()}
for name, median in medians.items():
    print(f"{name:23}: {median / medians['gradient']:.1f} gradients")

# %%
# A product costs a few gradients, whatever the number of parameters: this makes training with
# curvature possible (`Martens, 2010
# <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`__). In the last line, all
# products of a step share the graph of one forward pass, and a product costs about one gradient;
# `page 5 <plot_5_any_architecture.html#products-by-automatic-differentiation>`__ shows how.
#
# `Page 2 <plot_2_conjugate_gradients.html>`__ builds a solver that needs products alone.
#
# Check yourself
# --------------
#
# .. fold:: A parameter has the gradient 0.2 and the curvature −0.1. Which dampings make its step
#     point downhill, and what is the step at a damping of 0.5?
#
#    All dampings above 0.1. At 0.5 the step is :math:`v = -0.2 / (-0.1 + 0.5) = -0.5`.
#
# .. fold:: A network has a million parameters and ten outputs, a batch has 64 images, and the loss
#     is cross-entropy. What is the largest rank that the GGN can have? Does the Hessian obey the
#     same limit?
#
#    The rank of the GGN is at most :math:`64 \cdot 9 = 576`: the null direction of the softmax
#    takes away one of the ten outputs. The Hessian has no such limit: the residual :math:`R` may
#    have any rank.
#
# .. fold:: Exercise: in the line ``x, lam, gamma`` above the first sliders, set ``lam = 0.45``.
#     Does the step lower the loss? Halve ``gamma`` until the step lowers the loss. Which ``gamma``
#     is enough?
#
#    The damping 0.45 exceeds :math:`-C = 0.41`, and the step points downhill. But :math:`C +
#    \lambda` is almost zero, and the whole step overshoots. A ``gamma`` of 0.5 is still too large,
#    and 0.25 is enough.

# Check the answers.
assert abs(-0.2 / (-0.1 + 0.5) + 0.5) < 1e-12


def bell(x):  # the loss of the exercise
    return 1 - torch.exp(-(x**2) / 2)


g, C = grad(bell)(lying), grad(grad(bell))(lying)
v = -g / (C + 0.45)
assert abs(-C - 0.41) < 0.005 and v < 0
for gamma, lower in ((1, False), (0.5, False), (0.25, True)):
    assert (bell(lying + gamma * v) < bell(lying)) == lower
