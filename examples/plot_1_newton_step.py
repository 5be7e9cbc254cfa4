r"""
1. From a quadratic model to a matrix-free step
===============================================

Gradient descent knows which way is down, not how far. Newton's method also looks at how the slope
changes, the *curvature*, and steps straight to where a quadratic model of the loss has its minimum:

.. math::

    (C + \lambda I)\, v = -g, \qquad x \leftarrow x + \gamma v .

This page builds that formula up from one dimension: what the gradient :math:`g`, the curvature
:math:`C`, the damping :math:`\lambda` and the step size :math:`\gamma` do, which matrices serve as
:math:`C` for a neural network, and how to use a matrix too large to store.

To run this page yourself, download it from its end, and install its package:
``pip install`` and the address that stands on the site's `front page
<../index.html#run-it-yourself>`__.
"""

# %%
# The local quadratic model
# -------------------------
#
# Close to a point :math:`x`, a smooth loss :math:`L` looks like a parabola in the step :math:`v`,
# with the same value, slope and curvature:
#
# .. math::
#
#     q(v) = L(x) + g v + \tfrac{1}{2} C v^2
#
# with :math:`g = L'(x)` and :math:`C = L''(x)`. Its slope :math:`g + C v` vanishes at :math:`v = -g
# / C`: the **Newton step**. There is no minus sign left for the update, :math:`x \leftarrow x + v`:
# :math:`v` already points downhill, as long as :math:`C > 0`. Automatic differentiation gives both
# derivatives.

import torch
from torch.func import grad


def loss(x):
    return 1 - torch.exp(-(x**2) / 2)


def newton_step(x, lam=0.0):
    g, C = grad(loss)(x), grad(grad(loss))(x)
    return -g / (C + lam)


# %%
# Where does the step land from three different points? Each panel shows the loss (solid), the
# parabola (dashed) that touches it at the start (circle), and where the step lands (cross).

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
fig, axes = plt.subplots(1, 3, figsize=(7, 3), sharey=True)
for ax, start in zip(axes, (good, far, lying), strict=True):
    draw_step(ax, start)
    ax.set_title(f"from x = {start:.1f}")
_ = axes[0].set_ylabel("loss")
_ = describe(
    fig,
    "Three panels of the same bell-shaped valley. From 0.4 the Newton step"
    " lands near the minimum, from 0.8 it overshoots to the other side, and"
    " from 1.5 it climbs away from the minimum.",
)

# %%
# From 0.4, the parabola is a good model, and one step lands near the minimum. From 0.8, it is too
# flat: the step **overshoots** and the loss is higher than before. From 1.5, the curvature is
# negative, and the model **lies**: its only stationary point is a maximum, and the step climbs to
# it.

for start in (good, far, lying):
    end = start + newton_step(start)
    before, after = loss(start), loss(end)
    print(f"{start:.1f} -> {end:5.2f}: loss {before:.2f} -> {after:.2f}")

assert abs(good + newton_step(good)) < 0.1
assert loss(far + newton_step(far)) > loss(far)
assert grad(grad(loss))(lying) < 0
assert lying + newton_step(lying) > lying  # away from the minimum at 0

# %%
# Step size and damping
# ---------------------
#
# There are two remedies. The **step size** :math:`\gamma` goes only part of the way,
# :math:`x + \gamma v`. The **damping** :math:`\lambda` adds :math:`\tfrac{1}{2} \lambda v^2` to
# the model, a price on long steps: the curvature becomes :math:`C + \lambda`. Does either help
# where the full step failed?

# Draw three attempts to mend the step.
fig, axes = plt.subplots(1, 3, figsize=(7, 3), sharey=True)
draw_step(axes[0], far, gamma=0.5)
axes[0].set(title="x = 0.8, γ = 0.5", ylabel="loss")
draw_step(axes[1], lying, gamma=0.5)
axes[1].set_title("x = 1.5, γ = 0.5")
draw_step(axes[2], lying, lam=0.8)
axes[2].set_title("x = 1.5, λ = 0.8")
_ = describe(
    fig,
    "Half the step from 0.8 lands near the minimum; half the step from 1.5"
    " still climbs; with damping 0.8 the parabola at 1.5 opens upwards and"
    " the step goes down towards the minimum.",
)

assert loss(far + 0.5 * newton_step(far)) < loss(far)
assert loss(lying + 0.5 * newton_step(lying)) > loss(lying)
assert loss(lying + newton_step(lying, lam=0.8)) < loss(lying)

# %%
# A smaller :math:`\gamma` mends the overshoot, but not the lie: half a step uphill is still uphill.
# A damping larger than the size of the negative curvature, :math:`\lambda > -C`, turns the
# parabola over, and the step points downhill again.
#
# How much damping is enough, and how much is too much? On the left is the step from :math:`x =
# 1.5`, on the right the loss after it, for every :math:`\lambda`. To try other starts, other
# :math:`\lambda` and :math:`\gamma`, move the sliders below the figure on the site. In the script
# and the notebook, change the next line.

x, lam, gamma = torch.tensor(1.5), 0.8, 1.0

# %%

# Draw the step, and the loss after it over the damping.
from cgn_tutorial.pages.plotting import explorable

dampings = torch.linspace(0, 2, 201)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
draw_step(left, x, gamma, lam)
left.set_ylabel("loss")
orange = COLORS["orange"]
right.plot(dampings, loss(x + gamma * newton_step(x, dampings)), c=orange)
right.plot(lam, loss(x + gamma * newton_step(x, lam)), "X", c=orange, ms=9)
right.axhline(loss(x), color="gray", lw=0.5)
right.axvspan(0, max(0, -grad(grad(loss))(x)), color="gray", alpha=0.2)
right.set(xlabel="damping λ", title="loss after the step")
_ = describe(
    fig,
    "Left: from 1.5, the step with damping 0.8 lands near the minimum. Right:"
    " the loss after the step is higher than before up to a damping of 0.57,"
    " falls to zero at 0.73, and slowly rises from there.",
)
settings = {"x": x.item(), "lambda": lam, "gamma": gamma}
_ = explorable(fig, "parabola", settings)

# %%
# In the shaded part, :math:`\lambda < -C`, the step climbs, whatever :math:`\gamma`. Right beside
# it the parabola is almost flat, and the step overshoots by far. Then the loss after the step falls
# below the one before, the thin line, and soon it is lowest. From there on, more damping only
# shortens the step.

C = grad(grad(loss))(lying)
after = loss(lying + newton_step(lying, dampings))
best = dampings[after.argmin()]
print(
    f"-C = {-C:.2f}, and the loss after the step is lowest at λ = {best:.2f}"
)
lower = dampings[after < loss(lying)]
assert abs(lower.min() - 0.57) < 0.01 and abs(best - 0.73) < 0.01
assert (after[dampings < -C] > loss(lying)).all() and best > -C
assert after[dampings > -C][0] > 0.99
assert (after[dampings > best].diff() > 0).all() and after[-1] < loss(lying)

# %%
# Two dimensions
# --------------
#
# With several parameters, :math:`g` is the gradient, :math:`C` a symmetric matrix, and the damped
# model is
#
# .. math::
#
#     q(v) = L(x) + g^\top v + \tfrac{1}{2}\, v^\top (C + \lambda I)\, v .
#
# Its gradient :math:`g + (C + \lambda I)\, v` vanishes where :math:`v` solves the linear system at
# the top of this page. If all eigenvalues of :math:`C + \lambda I` are positive, this is the
# minimum, and :math:`v` points downhill: :math:`g^\top v = -v^\top (C + \lambda I)\, v < 0`.
#
# What does that buy? Take :math:`L(x) = \tfrac{1}{2} (x_1^2 + 20\, x_2^2)`, where the second
# parameter curves 20 times as much as the first. Gradient descent has one step size for both.

C = torch.diag(torch.tensor([1.0, 20.0]))
start = torch.tensor([10.0, 1.0])
eta = 2 / (1 + 20)  # the constant step size that converges fastest

descent = [start]
while descent[-1].norm() > 0.01 * start.norm():
    descent.append(descent[-1] - eta * (C @ descent[-1]))
descent = torch.stack(descent)
newton = start + torch.linalg.solve(C, -(C @ start))  # its gradient is C x

print(f"gradient descent, to 1 % of the distance: {len(descent) - 1} steps")
print(f"Newton, distance left after one step: {newton.norm():.1e}")
assert len(descent) - 1 == 47
assert newton.norm() < 1e-6

# %%
# What do the two paths look like, and what lies between them as the damping grows? Below is the
# path of each method, then the end of the damped Newton step for every :math:`\lambda` from
# :math:`10^{-3}` to :math:`10^4`.

eye, g = torch.eye(2), C @ start
ends = []
for lam in torch.logspace(-3, 4, 80):
    ends.append(start + torch.linalg.solve(C + lam * eye, -g))
damped = torch.stack(ends)
one_step = torch.stack([start, newton])
downhill = torch.stack([start, start - 0.08 * g])

# %%

# Draw both paths, and the ends of the damped steps, over the contours.
first = torch.linspace(-2, 12, 99)
second = torch.linspace(-1.5, 1.5, 99)[:, None]
fig, axes = plt.subplots(2, 1, figsize=(7, 3.8), sharex=True)
for ax in axes:
    value = (first**2 + 20 * second**2) / 2
    ax.contour(first, second[:, 0], value, colors="gray", linewidths=0.5)
    ax.set(aspect="equal", ylabel="second parameter")
blue, orange, green = COLORS["blue"], COLORS["orange"], COLORS["green"]
axes[0].plot(*descent.T, "o-", ms=3, c=blue, label="gradient descent")
axes[0].plot(*one_step.T, "X--", c=orange, label="Newton")
axes[1].plot(
    *damped.T, c=green, label="Newton, λ from $10^4$ (right) to $10^{-3}$"
)
axes[1].plot(*downhill.T, ":", c=blue, label="−g")
for ax in axes:
    ax.legend(loc="upper left", fontsize=8, framealpha=0.5)
_ = axes[1].set_xlabel("first parameter")
_ = describe(
    fig,
    "Two panels of long, flat elliptic contours. Gradient descent zigzags"
    " across the valley in ever smaller steps, Newton goes straight to the"
    " centre. The damped Newton steps form a curve that leaves the start"
    " along the negative gradient and ends in the centre.",
)

# %%
# Gradient descent bounces between the steep walls and creeps along the flat floor. Newton divides
# each direction by its own curvature: along an eigenvector of :math:`C` with eigenvalue
# :math:`\mu`, the step is :math:`-g_\mu / (\mu + \lambda)`, with the component :math:`g_\mu` of
# :math:`g`. Directions with :math:`\mu \gg \lambda` take the undamped Newton step, directions with
# :math:`\mu \ll \lambda` a gradient step :math:`-g_\mu / \lambda`. A damping far above all
# eigenvalues is gradient descent with the learning rate :math:`\gamma / \lambda`.

lam = 1e4
v = torch.linalg.solve(C + lam * eye, -g)
assert torch.allclose(v, -g / lam, rtol=20 / lam)

# %%
# Which directions does one damping hold back? Below are the step for one :math:`\lambda`, and the
# part of the way to the minimum that it goes in each direction, for every :math:`\lambda`. To
# try others, move the sliders below the figure on the site. In the script and the notebook, change
# the next line.

lam, gamma = 1.0, 1.0
curvatures = C.diagonal()
end = start + gamma * torch.linalg.solve(C + lam * eye, -g)
part = gamma * curvatures / (curvatures + lam)
assert torch.allclose(1 - end / start, part)
print(f"λ = {lam}: x₁ goes {part[0]:.0%} of its way, x₂ {part[1]:.0%}")

# %%

# Draw the step, and the part of the way over the damping.
dampings = torch.logspace(-3, 4, 80)
parts = gamma * curvatures / (curvatures + dampings[:, None])
fig, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.4))
value = (first**2 + 20 * second**2) / 2
top.contour(first, second[:, 0], value, colors="gray", linewidths=0.5)
top.plot(*(start * (1 - parts)).T, c=green)
top.plot(*start, "o", c=orange)
top.plot(*end, "X", c=orange, ms=9)
top.set(aspect="equal", xlabel="first parameter", ylabel="second parameter")
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
# Each direction has a threshold of its own: where :math:`\lambda` is its curvature :math:`\mu`, it
# goes half as far as without damping. A damping between the two leaves less than half of the way in
# the flat direction, and more than half in the steep one. The step size :math:`\gamma` knows no
# directions: it shortens both alike.
#
# Hessian
# -------
#
# Which matrix should :math:`C` be for a network? The first answer is the **Hessian**, all second
# derivatives of the loss: :math:`H = \nabla^2 L(x)`. It drops nothing, so that :math:`q` agrees
# with the loss to second order. Where all its eigenvalues are at least 0, it is called positive
# semi-definite. That it is so at one point does not make it so at others; a loss for which it is so
# everywhere is convex. The loss of a network is not: the model may lie.
#
# A network small enough to look at the whole matrix: three layers with 113 parameters, for the
# digits 0, 1 and 2 shrunk to 3 × 3 pixels, in double precision. All of its parameters form one
# vector :math:`x`, as in the formulas.

from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, one_hot
from torch.nn.utils import parameters_to_vector

from cgn_tutorial.pages import load_mnist

images, labels = load_mnist(train=False).tensors
few = (labels < 3).nonzero().flatten()[:100]
images = adaptive_avg_pool2d(images[few], 3).flatten(1).double()
labels = labels[few]

torch.manual_seed(0)
tiny = nn.Sequential(
    nn.Linear(9, 6),
    nn.Sigmoid(),
    nn.Linear(6, 5),
    nn.Sigmoid(),
    nn.Linear(5, 3),
).double()
x_init = parameters_to_vector(tiny.parameters()).detach()
assert len(x_init) == 113

# %%
# The network as a function of that vector, which ``split`` cuts into weights and biases, and its
# Hessian by automatic differentiation:


# The network's outputs as a function of one vector.
def split(net, x):
    sizes = [p.numel() for p in net.parameters()]
    pairs = zip(net.parameters(), x.split(sizes), strict=True)
    return [part.view_as(p) for p, part in pairs]


def outputs_of(net, inputs):
    names = [name for name, _ in net.named_parameters()]

    def outputs(x):
        parameters = dict(zip(names, split(net, x), strict=True))
        return functional_call(net, parameters, (inputs,))

    return outputs


# %%

outputs = outputs_of(tiny, images)


def loss(x):
    return cross_entropy(outputs(x), labels)


H = jacrev(grad(loss))(x_init)  # the gradient's Jacobian
smallest, largest = torch.linalg.eigvalsh(H)[[0, -1]]
print(f"eigenvalues of the Hessian from {smallest:.4f} to {largest:.4f}")
assert smallest < 0

# %%
# Generalized Gauss-Newton
# ------------------------
#
# The loss is a composition: parameters give outputs :math:`z(x)`, outputs give the loss
# :math:`\ell(z)`. With the Jacobian :math:`J = \partial z / \partial x` and the Hessian
# :math:`H_L = \nabla_z^2 \ell` of the loss alone, the chain rule, applied twice, gives
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
# where :math:`k` counts the outputs of all images. The **generalized Gauss-Newton** matrix (GGN)
# :math:`G` keeps the first term and drops the *residual* :math:`R`, the curvature of the network
# itself. It is the exact Hessian for a network that is linear in its
# parameters, and close to it where the outputs' gradients :math:`\partial \ell / \partial z_k` are
# small. It is positive semi-definite whenever the loss is convex in the *outputs*, as
# cross-entropy and squared error are:
# :math:`v^\top J^\top H_L\, J\, v = (J v)^\top H_L\, (J v) \ge 0`.
# `Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent" (2002)
# <https://doi.org/10.1162/08997660260028683>`__, defines it for any such pair of network
# and loss.
#
# How large are the three factors? Here they are for one image, not to scale: as many parameters as
# the network above has, and its three outputs.

# Draw the GGN as the product of its three factors.
from matplotlib.patches import Rectangle

n, k = len(x_init), 3
fig, ax = plt.subplots(figsize=(5.6, 2.4))
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
    ax.text(left + width + 0.12, -0.16, after, ha="center", fontsize=14)
    left += width + 0.24
ax.text(1.62, -0.6, "a product with v, from right to left:", size=9)
ax.text(1.62, -0.79, f"v: {n} numbers → J v: {k} → $H_L$ J v: {k}", size=9)
ax.text(1.62, -0.98, f"→ Jᵀ $H_L$ J v: {n}", size=9)
ax.set(xlim=(-0.05, left - 0.15), ylim=(-1.05, 0.15), aspect="equal")
ax.set_axis_off()
_ = describe(
    fig,
    "The matrix G, 113 by 113, as the product of three: a tall one, 113 by 3,"
    " a square of 3 by 3, and a wide one, 3 by 113. A vector of 113 numbers"
    " becomes one of 3, and again one of 113.",
)

# %%
# All that the parameters have to say to the loss passes through the few outputs. A product with a
# vector from right to left never forms the large square.
#
# Relatives of it go by other names. Where the loss is a negative log-likelihood, as cross-entropy
# is, the model gives each possible label a probability. For each label, take the gradient :math:`g`
# that an image would have if the label were the true one, and average the products :math:`g g^\top`
# with these probabilities. Averaged over the images as well, they are the **Fisher** matrix. For
# softmax and cross-entropy it equals the GGN (`Martens, "New Insights and Perspectives on the
# Natural Gradient Method" (2020) <https://arxiv.org/abs/1412.1193>`__). The **empirical Fisher**
# takes :math:`g g^\top` for the label in the data alone, and is in general neither the Fisher
# matrix nor the GGN (`Kunstner, Hennig and Balles, "Limitations of the Empirical Fisher
# Approximation for Natural Gradient Descent" (2019) <https://arxiv.org/abs/1905.12558>`__). K-FAC
# approximates each layer's block of the Fisher by a Kronecker product of two small matrices, which
# can be stored and inverted, where this tutorial multiplies by the block itself.


def loss_hessians(z):  # H_L of softmax and cross-entropy, per image
    share = z.softmax(dim=1)
    outer = share[:, :, None] * share[:, None, :]
    return (share.diag_embed() - outer) / len(z)


# %%

J = jacrev(outputs)(x_init)  # [images, outputs, parameters]
H_L = loss_hessians(outputs(x_init))
G = torch.einsum("nki,nkl,nlj->ij", J, H_L, J)
residual = (H - G).norm() / H.norm()
smallest = torch.linalg.eigvalsh(G)[0]
print(f"the residual has {residual:.0%} of the Hessian's norm")
print(f"smallest eigenvalue of the GGN: {smallest:.1e}")
assert smallest > -1e-14

# An image's gradient is Jᵀ times that with respect to z. So the Fisher matrix
# is Jᵀ F J, where F averages the products of the latter: F is H_L again.
share = outputs(x_init).softmax(dim=1)
gradients = share[:, None] - torch.eye(3).double()
F = torch.einsum("nc,nci,ncj->nij", share, gradients, gradients) / len(share)
torch.testing.assert_close(F, H_L)

# %%
# Positive-curvature Hessian
# --------------------------
#
# Can the residual be repaired instead of dropped? Follow the Hessian backwards through the
# network, layer by layer, for one image. A linear layer computes :math:`z = W h + b`, and its input
# :math:`h = \sigma(a)` is the sigmoid of :math:`a`, the output of the linear layer below. Let
# :math:`H_z`, :math:`H_h` and :math:`H_a` be the Hessians of the loss with respect to :math:`z`,
# :math:`h` and :math:`a`.
#
# **Through the weight.** :math:`z` is linear in :math:`h`, with the Jacobian :math:`W`:
#
# .. math:: H_h = W^\top H_z W .
#
# **Through the sigmoid.** With :math:`\delta = \partial L / \partial h`, the chain rule gives
# :math:`\partial L / \partial a_i = \sigma'(a_i)\, \delta_i`. Differentiate that once more, with
# respect to :math:`a_j`: the change of :math:`\delta_i` gives :math:`\sigma'(a_i)\, (H_h)_{ij}\,
# \sigma'(a_j)`, and the change of :math:`\sigma'(a_i)` gives, for :math:`i = j` only,
# :math:`r_i = \sigma''(a_i)\, \delta_i`. As matrices,
#
# .. math::
#
#     \begin{aligned}
#     H_a &= \operatorname{diag}(\sigma'(a))\, H_h \operatorname{diag}(\sigma'(a))
#         + \operatorname{diag}(r), \\
#     r &= \sigma''(a) \odot \delta .
#     \end{aligned}
#
# **And on.** :math:`a` is what the layer below calls :math:`z`, so that :math:`H_a` is the
# :math:`H_z` with which that layer goes on.
#
# Such recursions are used by `Botev, Ritter and Barber, "Practical Gauss-Newton Optimisation for
# Deep Learning" (2017) <https://arxiv.org/abs/1706.03662>`__, and, for many kinds of layers, by
# `Dangel, Harmeling and Hennig, "Modular Block-diagonal Curvature Approximations for Feedforward
# Architectures" (2020) <https://arxiv.org/abs/1902.01813>`__.
#
# The recursion starts with :math:`H_z = H_L`, which is positive semi-definite for a convex loss,
# and every term stays so but one: :math:`r`, which has entries of either sign. Through :math:`r`,
# the curvature of the network itself comes in. Set it to 0, and the recursion only multiplies
# :math:`H_L` from both sides by the Jacobians of the weights and sigmoids that it passes. Their
# product is the Jacobian of the outputs with respect to a layer's :math:`z`. The Jacobian of
# :math:`z` with respect to the layer's own parameters is still missing: the next section multiplies
# by it, too, from both sides. The product of the two Jacobians is the layer's part of :math:`J`. So
# without :math:`r`, what comes out are blocks of :math:`J^\top H_L\, J`, the GGN.
#
# The **positive-curvature Hessian** (PCH) replaces :math:`r` by :math:`|r|` (*abs*) or by
# :math:`\max(r, 0)` (*clip*), in every layer. So *abs* drops the sign of :math:`r`, *clip* its
# negative part, and the PCH is positive semi-definite since all terms now are. It is not the
# Hessian with its negative eigenvalues cut off. The idea is due to `Chen, Chou and Chang, "BDA-PCH:
# Block-Diagonal Approximation of Positive-Curvature Hessian for Training Neural Networks" (2018)
# <https://arxiv.org/abs/1802.06502>`__.
#
# Four curvatures, then, differ in one function, of :math:`\sigma''(a)` and :math:`\delta`:

RESIDUALS = {
    "Hessian": lambda s2, delta: s2 * delta,
    "GGN": lambda s2, delta: 0 * delta,
    "PCH, abs": lambda s2, delta: (s2 * delta).abs(),
    "PCH, clip": lambda s2, delta: (s2 * delta).clamp(min=0),
}

# %%
# Block-diagonal
# --------------
#
# The recursion never needs the whole matrix. It yields the second derivatives *within* a layer: in
# :math:`z = W h + b`, adding :math:`t` to :math:`b_i` adds :math:`t` to :math:`z_i`, and adding
# :math:`t` to :math:`W_{ij}` adds :math:`t h_j` to :math:`z_i`. So for one image
#
# .. math::
#
#     \frac{\partial^2 L}{\partial b_i\, \partial b_k} = (H_z)_{ik}, \qquad
#     \frac{\partial^2 L}{\partial W_{ij}\, \partial W_{kl}} = (H_z)_{ik}\, h_j h_l ,
#
# and both are summed over the images. Here, a **block** is the square part of the matrix that
# belongs to one parameter tensor, a weight or a bias. A block-diagonal curvature keeps these blocks
# and drops everything between two tensors. The two blocks above are positive semi-definite if
# :math:`H_z` is: a change of the bias or the weight changes :math:`z` by some :math:`u`, and the
# curvature along it is :math:`u^\top H_z\, u \ge 0`. So are the blocks of any positive
# semi-definite matrix: choose :math:`v` zero outside the block.


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
# Are these really the blocks of the dense matrices from automatic differentiation?


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
# They are. What does the recursion do, then? Here it is on a single image, from right to left, as
# it runs: the Hessian of the loss arrives at the outputs of the last layer. Each layer leaves the
# blocks of its bias and its weight behind, and hands on a matrix of the size of its input.

# Run the recursion, and draw the matrices that the first image meets.
from matplotlib.colors import SymLogNorm

met = []
for W_l, _, H_z, H_h in recursion(x_init, RESIDUALS["Hessian"]):
    met += [("$H_z$", W_l.shape, H_z[0]), ("$H_h$", None, H_h[0])]
met = met[:-1]  # nothing is below the first layer

fig, ax = plt.subplots(figsize=(6.6, 3.1))
steps, edge = ("σ′ · σ′ + r", "$W^⊤$ · W"), 0.0
for i, (name, shape, matrix) in enumerate(met):
    half = 0.07 * len(matrix)
    center = edge - (1.05 + half if i else 0)
    extent = (center - half, center + half, -half, half)
    norm = SymLogNorm(1e-3, vmin=-1, vmax=1)
    ax.imshow(matrix / matrix.abs().max(), "PuOr", extent=extent, norm=norm)
    ax.text(center, 0.58, name, ha="center", size=9)
    if i:
        ends = {"xy": (center + half, 0), "xytext": (edge, 0)}
        arrow = {"arrowstyle": "->", "color": "gray"}
        ax.annotate("", arrowprops=arrow, **ends)
        middle = (center + half + edge) / 2
        ax.text(middle, 0.12, steps[i % 2], ha="center", size=8)
    if shape:
        arrow = {"arrowstyle": "->", "color": COLORS["green"]}
        down = {"xy": (center, -0.9), "xytext": (center, -half)}
        ax.annotate("", arrowprops=arrow, **down)
        n, k = shape
        words = f"layer {3 - i // 2}\nbias: $H_z$, {n} × {n}\nweight: each\n"
        words += f"entry times $h_j h_l$,\n{n * k} × {n * k}"
        ax.text(center, -0.95, words, ha="center", va="top", size=9)
    edge = center - half
ax.set(xlim=(-8.0, 0.7), ylim=(-2.4, 0.8), aspect="equal")
ax.set_axis_off()
_ = describe(
    fig,
    "From right to left, a matrix of 3 by 3 at the outputs becomes one of 5 by"
    " 5 behind the last layer's weight, another of 5 by 5 before the sigmoid,"
    " then two of 6 by 6. At each layer an arrow leads down to the blocks of"
    " its bias and its weight.",
)

# %%
# Through a weight, :math:`H_z` turns into :math:`H_h`; through a sigmoid, into the next
# :math:`H_z`. A sigmoid is also where the residual gets into the blocks, as the diagonal :math:`r`,
# and the only place where it does. Left as it is there, :math:`r` makes the blocks of the Hessian;
# set to zero, those of the GGN; made positive, those of the two PCHs.
#
# How much of the matrix do the blocks hold? Here are the full Hessian and the full GGN, each row
# and column one parameter, with the blocks outlined. Colours are linear up to :math:`10^{-4}` and
# logarithmic beyond.

# Where each tensor's block begins, and how it is called.
names = ["W₁", "b₁", "W₂", "b₂", "W₃", "b₃"]
sizes = torch.tensor([p.numel() for p in tiny.parameters()])
edges = sizes.cumsum(0) - sizes

# %%

# Draw both matrices, with the blocks outlined.
norm = SymLogNorm(1e-4, vmin=-0.2, vmax=0.2)
fig, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for ax, title, matrix in zip(axes, ("Hessian", "GGN"), (H, G), strict=True):
    image = ax.imshow(matrix, cmap="PuOr", norm=norm)
    for edge, size in zip(edges - 0.5, sizes, strict=True):
        square = Rectangle((edge, edge), size, size, fill=False)
        square.set(ec=COLORS["green"], lw=1.5)
        ax.add_patch(square)
    centres = (edges + sizes / 2 - 0.5).tolist()
    ax.set(title=title, xticks=centres, yticks=centres)
    ax.set(xticklabels=names, yticklabels=names)
fig.colorbar(image, ax=axes, label="second derivative", shrink=0.8)
_ = describe(
    fig,
    "Two symmetric 113 by 113 matrices with six outlined squares on the"
    " diagonal, one per tensor. The largest entries belong to the last layer."
    " Both have large entries outside the squares; the Hessian shows stripes"
    " between different layers that the GGN lacks.",
)

# %%
# The last layer curves most, and much lies outside the outlines: what a block-diagonal curvature
# drops is not small. The stripes that only the Hessian has belong to the residual.

shares = []
for matrix in (H, G):
    inside = torch.block_diag(*blocks_of(matrix)).norm() / matrix.norm()
    shares.append(inside.item() ** 2)
print("share of the squared entries inside the blocks, Hessian and GGN:")
print([f"{share:.0%}" for share in shares])
assert all(0.4 < share < 0.6 for share in shares)

# %%
# Products without matrices
# -------------------------
#
# The network of page 3 has 21,840 parameters. How large are its matrices, and those of a network
# with a billion parameters?

from cgn_tutorial.pages import make_model

model = make_model()
for n in sum(p.numel() for p in model.parameters()), 10**9:
    print(f"{n:13,d} parameters: vector {4 * n / 1e9:.2g} GB,", end=" ")
    print(f"matrix {4 * n**2 / 1e9:.2g} GB")

# %%
# Nobody stores the second one. Yet solvers such as `conjugate gradients
# <plot_2_conjugate_gradients.html>`__ only need its **product** with a vector. That takes a few
# vectors, and the memory of what a backward pass keeps: its graph and the activations. The Hessian
# is the Jacobian of the gradient and symmetric, so that one more backward pass, through the
# gradient, gives :math:`H v`. That the product needs no matrix is due to `Pearlmutter, "Fast Exact
# Multiplication by the Hessian" (1994) <https://doi.org/10.1162/neco.1994.6.1.147>`__, who
# differentiates forwards along :math:`v`. The GGN's product is read off its definition from right
# to left: :math:`J v`, then :math:`H_L (J v)`, then :math:`J^\top (H_L J v)`.
#
# PyTorch's ``vjp`` gives the value of a function, and a second function that multiplies by the
# transpose of its Jacobian, :math:`u \mapsto J^\top u`. How does one multiply by :math:`J` itself?
# That second function is linear, and its Jacobian is :math:`J^\top`, whatever :math:`u`. So ``vjp``
# of it multiplies by the transpose of :math:`J^\top`, which is :math:`J` (Jamie Townsend, "A new
# trick for calculating Jacobian vector products", 2017).

from functools import partial

from torch.func import vjp


def hessian_product(loss, x, v):
    return vjp(grad(loss), x)[1](v)[0]


def ggn_product(outputs, loss_of_outputs, x, v):
    z, Jt = vjp(outputs, x)
    Jv = vjp(lambda u: Jt(u)[0], torch.zeros_like(z))[1](v)[0]
    HJv = hessian_product(loss_of_outputs, z, Jv)
    return Jt(HJv)[0]


# %%

loss_of_outputs = partial(cross_entropy, target=labels)
v = torch.randn_like(x_init)
Hv = hessian_product(loss, x_init, v)
Gv = ggn_product(outputs, loss_of_outputs, x_init, v)
for name, product, dense in (("H v", Hv, H @ v), ("GGN v", Gv, G @ v)):
    error = ((product - dense).norm() / dense.norm()).item()
    print(f"{name}: relative difference to the dense product {error:.1e}")
    assert error < 1e-12

# %%
# Nothing in these lines knows the size of the network. What does one product cost, in gradients?
# Measured here with the 21,840 parameters and a batch of 64 images:

# What to time: a gradient and three products.
import statistics
import time

from cgn_tutorial import GGN

digits, classes = (t[:64] for t in load_mnist(train=False).tensors)
f = outputs_of(model, digits)
x = parameters_to_vector(model.parameters()).detach()
v = torch.randn_like(x)
ell = partial(cross_entropy, target=classes)
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
# The first two products start from the weights each time. The last one keeps the graph of a single
# forward pass, which serves for all products of a step; it comes from the package, and `page 5
# <plot_5_any_architecture.html#products-by-automatic-differentiation>`__ shows how. A product costs
# a few gradients at most, however many parameters there are: this is what makes it possible
# to train with curvature, as in `Martens, "Deep learning via Hessian-free
# optimization" (2010) <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`__.
#
# Page 3 takes its products, one per block, from `BackPACK
# <https://openreview.net/forum?id=BJlrF24twB>`__, a library that follows the backward pass through
# the modules that are registered with it, by ``extend``. On each parameter ``p`` it leaves a
# function that multiplies V vectors at once, ``[V, *p.shape] → [V, *p.shape]``. An *extension*,
# such as ``GGNMP()``, says which curvature it multiplies with. The function is then an attribute of
# ``p``, whose name is the extension's ``savefield``. Is it the same matrix? All unit vectors at
# once give all of its columns. As ``extend`` leaves its hooks in the modules, BackPACK gets a copy
# of the network.

import copy
import warnings

from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP

# Torch warns of BackPACK's hook on the first layer, harmlessly.
warnings.filterwarnings("ignore", "Full backward hook is firing")


def backpack_blocks(extension):
    net = extend(copy.deepcopy(tiny))
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


# %%

for name, extension, dense in ("Hessian", HMP(), H), ("GGN", GGNMP(), G):
    error = difference(backpack_blocks(extension), blocks_of(dense))
    print(f"BackPACK's {name}: relative difference {error:.1e}")
    assert error < 1e-12

# %%
# And the PCH? Compare it with the definition above, and with a variant in which the residual
# contains :math:`\delta` twice, :math:`\sigma''(a) \odot \delta \odot \delta`.

for modify in ("abs", "clip"):
    residual = RESIDUALS[f"PCH, {modify}"]
    theirs = backpack_blocks(PCHMP(modify=modify))
    once = curvature_blocks(x_init, residual)
    twice = curvature_blocks(x_init, lambda s2, d, r=residual: r(s2, d * d))
    errors = [difference(theirs, blocks) for blocks in (once, twice)]
    print(f"PCH, {modify}: δ once {errors[0]:.1e}, twice {errors[1]:.1e}")
    ggn = [difference(b, blocks_of(G)) for b in (once, twice)]
    print(f"    distance to the GGN {ggn[0]:.1e}, {ggn[1]:.1e}")
    assert min(errors) < 1e-12
    assert ggn[1] < ggn[0] / 100

# %%
# BackPACK 1.7.1 multiplies by :math:`\delta` twice, where the definition does so once. With a mean
# over many images :math:`\delta` is small, and its square all but removes the residual. This
# variant is still positive semi-definite. It does not depend on the sign of :math:`\delta`, and is
# here hardly more than the GGN. Page 3 uses it under the name of PCH, as did the published run that
# page 3 repeats. The spectra below are those of the definition.
#
# Spectra
# -------
#
# A solver meets the matrix through its eigenvalues. How do those of the four curvatures differ, and
# does training change them? First, train the tiny network by the formula this page began with:
# block-diagonal GGN, :math:`\lambda = 0.01` and :math:`\gamma = 0.1`, as on page 3, but with dense
# matrices.

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
# Below, each mark is one eigenvalue of the block-diagonal matrix, on an axis that is linear up to
# :math:`10^{-5}` and logarithmic beyond. The printed table lists, for both points, how many are
# negative beyond rounding, the smallest and the largest.


def spectrum(x, name):
    blocks = curvature_blocks(x, RESIDUALS[name])
    return torch.linalg.eigvalsh(torch.block_diag(*blocks))


# %%

# Draw and count the eigenvalues of the four curvatures.
fig, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
for ax, x in zip(axes, (x_init, x_trained), strict=True):
    print("at initialisation" if x is x_init else "trained")
    for row, name in enumerate(RESIDUALS):
        mu = spectrum(x, name)
        up, down = mu[mu > -1e-14], mu[mu < -1e-14]
        ax.plot(up, 0 * up + row, "|", ms=14, c=COLORS["blue"])
        ax.plot(down, 0 * down + row, "x", c=COLORS["red"])
        print(
            f"  {name:9}  negative: {len(down):2}  {mu[0]:8.1e} {mu[-1]:.2f}"
        )
        assert (len(down) > 0) == (name == "Hessian")
    ax.set_xscale("symlog", linthresh=1e-5)
    ax.set(xlabel="eigenvalue", xticks=[-1e-3, 0, 1e-3, 1e-1])
axes[0].set(title="at initialisation", yticks=range(4))
axes[0].set(yticklabels=RESIDUALS, ylim=(3.5, -0.5))
_ = axes[1].set_title("trained")
_ = describe(
    fig,
    "Two panels with one row of eigenvalues per curvature, on a logarithmic"
    " scale to both sides of zero. Only the Hessian has negative ones, marked"
    " by crosses; after training they are fewer and smaller.",
)

# %%
# Only the Hessian has negative eigenvalues (crosses), more of them at initialisation. With
# training the predicted probabilities approach the labels, the loss's gradient shrinks, with it
# :math:`\delta`, and with that the residual: the most negative eigenvalue is now close to 0. All
# four have a few large eigenvalues and many close to 0.

lowest = [spectrum(x, "Hessian")[0] for x in (x_init, x_trained)]
assert 0 > lowest[1] > 0.1 * lowest[0]

# %%
# What does damping do to each spectrum? It moves every eigenvalue :math:`\mu` to :math:`\mu +
# \lambda`. Below are the sizes of the eigenvalues at initialisation, from the largest eigenvalue to
# the smallest. Crosses are negative ones. The dashed line is the same after damping with
# :math:`\lambda = 10^{-3}`, and ends where it gets negative. Sizes below :math:`10^{-7}` are drawn
# as :math:`10^{-7}`.

# Draw the eigenvalues with and without damping.
fig, axes = plt.subplots(1, 4, figsize=(7, 3), sharey=True)
for ax, name in zip(axes, RESIDUALS, strict=True):
    mu = spectrum(x_init, name).flip(0)
    k = torch.arange(len(mu))
    size, down, up = mu.abs().clamp(min=1e-7), mu < -1e-14, mu + 1e-3 > 0
    ax.plot(k[~down], size[~down], ".", ms=3, c=COLORS["blue"])
    ax.plot(k[down], size[down], "x", ms=4, c=COLORS["red"])
    ax.plot(k[up], (mu + 1e-3)[up], "--", c=COLORS["orange"])
    ax.set(yscale="log", title=name, xlabel="index")
_ = axes[0].set_ylabel("|eigenvalue|")
_ = describe(
    fig,
    "Four panels of eigenvalues falling from about 0.6 over seven orders of"
    " magnitude. Damped, they level off at 0.001. For the Hessian the"
    " negative eigenvalues rise again in size to about 0.006 at the end, and"
    " the damped line breaks off before them.",
)

# %%
# Damping is a floor for the three semi-definite ones: eigenvalues far above :math:`\lambda` hardly
# change, those near 0 become about :math:`\lambda`. The Hessian's eigenvalues below
# :math:`-\lambda` stay negative, until :math:`\lambda` exceeds the size of the most negative one.
# The condition number, the largest eigenvalue :math:`\mu_1` over the smallest, drops from infinity
# to :math:`\mu_1 / \lambda + 1` for the three semi-definite ones; it `bounds how many steps
# conjugate gradients take <plot_2_conjugate_gradients.html#how-fast>`__.

for lam in (1e-3, 1e-2):
    print(f"λ = {lam}:")
    for name in RESIDUALS:
        mu = spectrum(x_init, name) + lam
        condition = f"condition number {mu[-1] / mu[0]:.0f}"
        print(f"    {name:9}", condition if mu[0] > 0 else "indefinite")
        assert (mu[0] > 0) == (lam == 1e-2 or name != "Hessian")

# %%
# Null direction of the softmax
# -----------------------------
#
# Why is the smallest eigenvalue of the GGN 0, up to rounding? Adding the same number to all outputs
# of an image does not change their softmax. The loss is constant along such a direction,
# :math:`H_L` times a vector of ones is 0, and so is :math:`G` times any change of the parameters
# that shifts all outputs alike: for example of the last bias, by ones.

u = torch.zeros_like(x_init)
u[-3:] = 1  # the last bias

g = grad(loss)(x_init)
print(f"|G u| = {(G @ u).norm():.1e},  |g · u| = {abs(g @ u):.1e}")
assert (G @ u).norm() < 1e-14
assert abs(g @ u) < 1e-14

# %%
# Then :math:`G v = -g` has no unique solution: with :math:`v`, also :math:`v + t u` solves it, for
# any :math:`t`. Small batches add more null directions. Each image adds at most the number of
# classes less one to the rank: 64 images of ten classes reach at most 64 × 9 = 576 of 21,840.

few = torch.einsum("nki,nkl,nlj->ij", J[:5], H_L[:5], J[:5])
rank = torch.linalg.matrix_rank(few).item()
print(f"rank of the GGN on 5 images of 3 classes: {rank} of {len(few)}")
assert rank <= 5 * 2

# %%
# What does such a model look like, and what does damping change? Take a single image, two outputs
# with equal probabilities, and the two outputs themselves as parameters.

# Draw the model of two outputs, without damping and with it.
g2 = torch.tensor([-0.5, 0.5])
C2 = torch.tensor([[0.25, -0.25], [-0.25, 0.25]])
line = torch.linspace(-3, 3, 99)
v2 = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
fig, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharey=True)
for ax, lam in zip(axes, (0.0, 0.2), strict=True):
    damped = C2 + lam * torch.eye(2)
    q = v2 @ g2 + ((v2 @ damped) * v2).sum(-1) / 2
    ax.contour(line, line, q, levels=12, colors="gray", linewidths=0.5)
    ax.set(aspect="equal", xlabel="change of output 1", title=f"λ = {lam}")
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
# Undamped, the model is a trough: every point of the dashed line is a minimum. With damping, the
# length of the step counts as well: a single minimum is left, straight across the trough. In
# formulas: multiply :math:`(G + \lambda I)\, v = -g` by :math:`u^\top`. As
# :math:`G u = 0` and :math:`g^\top u = 0`, what remains is :math:`\lambda\, u^\top v = 0`. The
# damped step does not move along the null direction at all.

v = torch.linalg.solve(G + 0.01 * eye, -g)
print(f"|v| = {v.norm():.2f},  |u · v| = {abs(u @ v):.1e}")
assert abs(u @ v) < 1e-12

# %%
# All of the pieces are in place: a curvature, in blocks, through products, damped. What is missing
# is a solver that asks for nothing but products: `conjugate gradients
# <plot_2_conjugate_gradients.html>`__. Then
# `the optimizer <plot_3_matrix_free_optimization.html>`__ puts them together.
#
# Check yourself
# --------------
#
# .. fold:: A parameter has the gradient 0.2 and the curvature −0.1. Which dampings make its step
#     point downhill, and how long is it at a damping of 0.5?
#
#    All above 0.1: then :math:`C + \lambda` is positive. At 0.5 the step is
#    :math:`v = -0.2 / (-0.1 + 0.5) = -0.5`.
#
# .. fold:: A network has a million parameters and ten outputs, and a batch 64 images. What is the
#     largest rank that its GGN can have? Does that hold for the Hessian?
#
#    At most :math:`64 \cdot 9 = 576`: the null direction of the softmax takes one of the ten
#    outputs away. For the Hessian it does not hold, as the residual
#    :math:`\sum_k (\partial \ell / \partial z_k) \nabla^2 z_k` may have any rank.
#
# .. fold:: All sigmoids are replaced by ReLUs, whose second derivative is zero wherever it exists.
#     How do the blocks of the four curvatures differ now?
#
#    Not at all: with :math:`\sigma'' = 0`, the residual :math:`r` is zero in every layer, and all
#    four are the GGN's. The full Hessian and the full GGN still differ, outside the blocks, as
#    :math:`z` has second derivatives with respect to the weights of two layers.

# Check the first and the last answer.
assert abs(-0.2 / (-0.1 + 0.5) + 0.5) < 1e-12

rectified = copy.deepcopy(tiny)
rectified[1], rectified[3] = nn.ReLU(), nn.ReLU()
outputs = outputs_of(rectified, images)
J, H_L = jacrev(outputs)(x_init), loss_hessians(outputs(x_init))
G = torch.einsum("nki,nkl,nlj->ij", J, H_L, J)
H = jacrev(grad(loss))(x_init)
assert difference(blocks_of(H), blocks_of(G)) < 1e-12
assert (H - G).norm() > 0.01 * G.norm()
