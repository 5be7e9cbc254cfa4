r"""
1. From a quadratic model to a matrix-free step
===============================================

Gradient descent knows which way is down. Newton's method also measures how the slope changes, the
*curvature*, and steps to the minimum of a quadratic model of the loss:

.. math::

    (C + \lambda I)\, v = -g, \qquad x \leftarrow x + \gamma v .

This page builds the formula from one dimension up. What do the gradient :math:`g`, the curvature
:math:`C`, the damping :math:`\lambda` and the step size :math:`\gamma` do? Which matrix is
:math:`C` for a neural network? How can a solver use a matrix that no memory holds?

*About 25 minutes to read, and one to run.* In a hurry? `The tutorial in 20 minutes
<index.html#way-through>`__. To run this page, ``pip install`` the package as the `front page
<../index.html#run-it-yourself>`__ says.
"""

# %%
# The local quadratic model
# -------------------------
#
# Close to a point :math:`x`, a smooth loss :math:`L` looks like a parabola in the step :math:`v`:
#
# .. math::
#
#     q(v) = L(x) + g v + \tfrac{1}{2} C v^2
#
# with the slope :math:`g = L'(x)` and the curvature :math:`C = L''(x)`. The parabola is flat at the
# **Newton step**, :math:`v = -g / C`. The update :math:`x \leftarrow x + v` has no minus sign:
# :math:`v` contains the sign.

import torch
from torch.func import grad


def loss(x):
    return 1 - torch.exp(-(x**2) / 2)


def newton_step(x, lam=0.0):
    g, C = grad(loss)(x), grad(grad(loss))(x)
    return -g / (C + lam)


# %%
# Where does the step land from three different points? Each panel shows the loss (solid), the
# parabola (dashed) that touches the loss at the start (circle), and the end of the step (cross).

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
# parabola is too flat: the step **overshoots**, and the loss rises. From 1.5, the curvature is
# negative, and the model **lies**: the parabola has only a maximum, and the step climbs to the
# maximum.

# Check the three steps.
assert abs(good + newton_step(good)) < 0.1
assert loss(far + newton_step(far)) > loss(far)
assert grad(grad(loss))(lying) < 0
assert lying + newton_step(lying) > lying  # away from the minimum at 0

# %%
# Step size and damping
# ---------------------
#
# Two remedies exist. The **step size** :math:`\gamma` goes a part of the way, :math:`x + \gamma v`.
# The **damping** :math:`\lambda` puts a price on long steps: it adds :math:`\tfrac{1}{2} \lambda
# v^2` to the model, and the curvature becomes :math:`C + \lambda`. Which remedy mends which step?

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
# A smaller :math:`\gamma` mends the overshoot, but half a step uphill still climbs. A damping
# :math:`\lambda > -C` turns the parabola over, and the step points downhill.
#
# How much damping is enough? The right panel shows the loss after the step from :math:`x = 1.5`,
# for every :math:`\lambda`. On the site, move the sliders; elsewhere, change the next line.

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
# In the shaded part, :math:`\lambda < -C`, the step climbs. Just to the right, the parabola is
# almost flat, and the step overshoots by far. From :math:`\lambda = 0.57` on, the step lowers the
# loss; at 0.73 the loss is lowest. More damping only shortens the step.

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
# system at the top of this page. If all eigenvalues of :math:`C + \lambda I` are positive, then
# :math:`v` is the minimum of the model and points downhill: :math:`g^\top v = -v^\top (C + \lambda
# I)\, v < 0`.
#
# What does the system buy? Take :math:`L(x) = \tfrac{1}{2} (x_1^2 + 20\, x_2^2)`, a valley. The
# second parameter curves 20 times as much as the first.

C = torch.diag(torch.tensor([1.0, 20.0]))
start = torch.tensor([10.0, 1.0])
eta = 2 / (1 + 20)  # the constant step size that converges fastest

descent = [start]
while descent[-1].norm() > 0.01 * start.norm():
    descent.append(descent[-1] - eta * (C @ descent[-1]))
descent = torch.stack(descent)
newton = start + torch.linalg.solve(C, -(C @ start))  # its gradient is C x

print("steps to 1 % of the distance:")
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
# Gradient descent bounces between the steep walls. Newton divides each direction by its own
# curvature: along an eigenvector of :math:`C` with the eigenvalue :math:`\mu`, the step is
# :math:`-g_\mu / (\mu + \lambda)`, where :math:`g_\mu` is the component of :math:`g`. A direction
# with :math:`\mu \gg \lambda` takes the Newton step. A direction with :math:`\mu \ll \lambda` takes
# a gradient step, :math:`-g_\mu / \lambda`.
#
# Which directions does one damping hold back? The lower panel shows which part of the way to the
# minimum the step goes in each direction, for every :math:`\lambda`. On the site, move the sliders;
# elsewhere, change the next line.

lam, gamma = 1.0, 1.0

# %%

# Compute the step, and the part of the way.
eye, g = torch.eye(2), C @ start
curvatures = C.diagonal()
end = start + gamma * torch.linalg.solve(C + lam * eye, -g)
part = gamma * curvatures / (curvatures + lam)
print(f"λ = {lam}: x₁ goes {part[0]:.0%} of its way, x₂ {part[1]:.0%}")
assert torch.allclose(1 - end / start, part)

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
# Each direction has a threshold: at :math:`\lambda = \mu`, the step goes half the way. A damping
# between the two curvatures holds back the flat direction and spares the steep one. The step size
# :math:`\gamma` shortens both directions alike.
#
# Null directions
# ---------------
#
# What if a direction has no curvature at all? Take one image, two classes, and the two outputs
# themselves as parameters. The softmax turns outputs into probabilities, and adding the same number
# to both outputs changes no probability. So the loss is constant along :math:`u = (1, 1)`.

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
# Undamped, the model is a trough: every point of the dashed line is a minimum. With damping, a
# single minimum is left, straight across the trough. To see why, multiply :math:`(C + \lambda I)\,
# v = -g` by :math:`u^\top`. Since :math:`C u = 0` and :math:`g^\top u = 0`, what remains is
# :math:`\lambda\, u^\top v = 0`: the damped step does not move along a null direction.
#
# Hessian
# -------
#
# Which matrix is :math:`C` for a network? The first answer is the **Hessian**,
# :math:`H = \nabla^2 L(x)`, all second derivatives of the loss. With :math:`C = H`, the model
# :math:`q` agrees with the loss to second order.
#
# Take a network whose matrices fit on a page: three layers and 113 parameters, for the digits 0, 1
# and 2, shrunk to 3 × 3 pixels. One vector holds all parameters.

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
# The Hessian has negative eigenvalues: the model may lie.
#
# Generalized Gauss-Newton
# ------------------------
#
# The loss is a composition: parameters give outputs :math:`z(x)`, outputs give the loss
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
# :math:`G` (GGN) keeps the first term and drops the *residual* :math:`R`, with the curvature of the
# network itself. If the loss is convex in the *outputs*, as cross-entropy and squared error are,
# then no eigenvalue of the GGN is negative: :math:`v^\top J^\top H_L\, J\, v = (J v)^\top H_L\, (J
# v) \ge 0`. Such a matrix is called positive semi-definite. (A loss that is not convex in the
# outputs, such as :math:`\ln(1 + z^2)`, may give the GGN negative eigenvalues.) See `Schraudolph,
# "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent" (2002)
# <https://doi.org/10.1162/08997660260028683>`__.
#
# The three factors for one image, not to scale:

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
# The parameters act on the loss only through the few outputs.

z = outputs(x_init)
J = jacrev(outputs)(x_init).flatten(0, 1)  # [100 images · 3 outputs, 113]
H_L = jacrev(grad(loss_of_outputs))(z).reshape(len(J), len(J))
G = J.T @ H_L @ J

smallest = torch.linalg.eigvalsh(G)[0]
print(f"the residual has {(H - G).norm() / H.norm():.0%} of H's norm")
print(f"smallest eigenvalue of the GGN: {smallest:.1e}")
assert smallest > -1e-14
bent = grad(grad(lambda z: torch.log(1 + z**2)))  # a loss that is not convex
assert bent(torch.tensor(2.0)) < 0

# %%
# Up to rounding, the smallest eigenvalue is zero. The GGN has null directions: adding 1 to all last
# biases shifts all outputs alike, and the softmax does not notice. A small batch leaves more of
# them: for N images of K classes, the rank is at most N (K − 1), for 64 images of ten classes 576.

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
# The positive-curvature Hessian (PCH) repairs the residual instead of dropping it. `Page A
# <plot_a_positive_curvature.html>`__ derives the PCH, and relates the GGN to the Fisher matrix.
#
# Block-diagonal
# --------------
#
# A **block** is the square part of the matrix that belongs to one parameter tensor, a weight or a
# bias. A block-diagonal curvature keeps the blocks and drops the rest. The blocks of a positive
# semi-definite matrix are positive semi-definite: choose :math:`v` zero outside the block. How much
# of the matrix do the blocks (outlined) hold? Each row and column is one parameter.

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
fig.colorbar(
    image, ax=axes, label="second derivative", location="bottom", shrink=0.8
)
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
    print(f"{name}: {share:.0%} inside the blocks")
    assert 0.4 < share < 0.6
    assert (matrix.abs() == matrix.abs().max()).nonzero().min() >= edges[4]

# %%
# The last layer curves most. A block-diagonal curvature drops about half of the squared entries.
# The stripes that only the Hessian has belong to the residual.
#
# Products without matrices
# -------------------------
#
# The network of page 3 has 21,840 parameters. How large is its matrix, and the matrix of a billion
# parameters?

from cgn_tutorial.pages import make_model

model = make_model()
for n in sum(p.numel() for p in model.parameters()), 10**9:
    print(f"{n:,} parameters: vector {4 * n / 1e9:.2g} GB,")
    print(f"    matrix {4 * n**2 / 1e9:.2g} GB")

# %%
# Nobody stores the second matrix. Yet some solvers only need the **product** of the matrix with a
# vector. The Hessian is the Jacobian of the gradient: a backward pass through the gradient gives
# :math:`H v` (`Pearlmutter, "Fast Exact Multiplication by the Hessian" (1994)
# <https://doi.org/10.1162/neco.1994.6.1.147>`__, differentiates forwards along :math:`v`). The
# product with the GGN follows the picture from right to left: :math:`J v`, then
# :math:`H_L (J v)`, then :math:`J^\top (H_L J v)`.
#
# PyTorch's ``vjp`` returns a function's value and the product :math:`u \mapsto J^\top u`. This
# product is a linear function with the Jacobian :math:`J^\top`, and its own ``vjp`` multiplies by
# :math:`J` (Jamie Townsend, "A new trick for calculating Jacobian vector products", 2017).

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
    print(f"{name}: relative difference {error:.1e}")
    assert error < 1e-12

# %%
# What does one product cost, in gradients, with 21,840 parameters and a batch of 64 images?

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
# A product costs a few gradients, however many parameters the network has: so training with
# curvature is possible (`Martens, "Deep learning via Hessian-free optimization" (2010)
# <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`__). The last product keeps the
# graph of one forward pass for all products of a step; `page 5
# <plot_5_any_architecture.html#products-by-automatic-differentiation>`__ shows how.
#
# What is missing is a solver that asks for nothing but products: `page 2
# <plot_2_conjugate_gradients.html>`__.
#
# Check yourself
# --------------
#
# .. fold:: A parameter has the gradient 0.2 and the curvature −0.1. Which dampings make its step
#     point downhill, and how long is the step at a damping of 0.5?
#
#    All dampings above 0.1 do: :math:`C + \lambda` is then positive. At 0.5 the step is
#    :math:`v = -0.2 / (-0.1 + 0.5) = -0.5`.
#
# .. fold:: A network has a million parameters and ten outputs, and a batch has 64 images. What is
#     the largest rank that the GGN can have? Does the Hessian obey the same limit?
#
#    The rank of the GGN is at most :math:`64 \cdot 9 = 576`: the null direction of the softmax
#    takes away one of the ten outputs. The Hessian obeys no such limit: the residual :math:`R` may
#    have any rank.
#
# .. fold:: Exercise: in the line ``x, lam, gamma`` above the first sliders, set ``lam = 0.45``.
#     Does the step lower the loss? Halve ``gamma`` until the step does. Which ``gamma`` is enough?
#
#    The damping 0.45 exceeds :math:`-C = 0.41`, and the step points downhill. The parabola is
#    almost flat, and the whole step overshoots: the loss rises. A ``gamma`` of 0.5 is still too
#    large, and 0.25 is enough.

# Check the answers.
assert abs(-0.2 / (-0.1 + 0.5) + 0.5) < 1e-12


def bell(x):  # the loss of the exercise
    return 1 - torch.exp(-(x**2) / 2)


g, C = grad(bell)(lying), grad(grad(bell))(lying)
v = -g / (C + 0.45)
assert abs(-C - 0.41) < 0.005 and v < 0
for gamma, lower in ((1, False), (0.5, False), (0.25, True)):
    assert (bell(lying + gamma * v) < bell(lying)) == lower
