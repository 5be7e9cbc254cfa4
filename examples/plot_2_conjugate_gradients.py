r"""
2. Conjugate gradients from scratch
===================================

How do products with a matrix solve a linear system? A Newton step (`page 1
<plot_1_newton_step.html>`__) is the solution of a system :math:`A x = b`. The
matrix is the damped curvature, :math:`A = C + \lambda I`. The right-hand side
is the negative gradient, :math:`b = -g`. On this page, :math:`x` is the step,
which page 1 calls :math:`v`. The matrix is too large to store, but a product
with :math:`A` costs only a few gradients.

The method of conjugate gradients (CG; `Hestenes and Stiefel, 1952
<https://doi.org/10.6028/jres.049.044>`__) solves the system by such products
alone. How does CG work, when should CG stop, and what happens at negative
curvature? The classic explanation is Shewchuk's `An Introduction to the
Conjugate Gradient Method Without the Agonizing Pain (1994)
<https://www.cs.cmu.edu/~quake-papers/painless-conjugate-gradient.pdf>`__.

*About 25 minutes to read, and one to run.* To run this page, ``pip install``
the package, as the `front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# A quadratic to minimise
# -----------------------
#
# Let :math:`A` be symmetric positive definite. Then solving :math:`A x = b` and
# minimising the quadratic model
#
# .. math:: \phi(x) = \tfrac{1}{2} x^\top A x - b^\top x
#
# are the same task: the gradient of the model is :math:`A x - b`. The residual
# :math:`r = b - A x` is the negative gradient.
#
# Along any direction :math:`p` from :math:`x`, the model is a parabola. At
# :math:`x + \alpha p`, the slope along :math:`p` is :math:`\alpha\, p^\top A p
# - p^\top r`, and the parabola is lowest at
#
# .. math:: \alpha = \frac{p^\top r}{p^\top A p}.
#
# Two methods repeat this step, with different directions. **Gradient descent**
# takes :math:`p = r`. **Conjugate gradients** take :math:`r` plus :math:`\beta`
# times the last direction; the next section derives :math:`\beta`.

import torch


def descend(A, b, steps, conjugate):
    x, r, p, path = 0 * b, b, b, [0 * b]
    for _ in range(steps):
        alpha = (p @ r) / (p @ A @ p)
        x = x + alpha * p
        r = b - A @ x
        beta = -(r @ A @ p) / (p @ A @ p) if conjugate else 0
        p = r + beta * p
        path.append(x)
    return torch.stack(path)


# %%
# Directions that do not undo each other
# --------------------------------------
#
# After a step along :math:`p`, the slope along :math:`p` is zero: :math:`p^\top
# r = 0`. A later step along :math:`p_+` changes the residual by a multiple of
# :math:`A p_+`. The slope along :math:`p` stays zero exactly if
#
# .. math:: p^\top A p_+ = 0.
#
# Such directions are called conjugate. For :math:`p_+ = r + \beta p` the
# condition is one equation with one unknown, and the solution is
#
# .. math:: \beta = -\frac{r^\top A p}{p^\top A p}.
#
# What difference does :math:`\beta` make with two unknowns?

A = torch.tensor([[2.0, -1.8], [-1.8, 2.5]]).double()
b = torch.tensor([0.9, -0.1]).double()
solution = torch.linalg.solve(A, b)

gradient_descent = descend(A, b, steps=10, conjugate=False)
conjugate = descend(A, b, steps=2, conjugate=True)

missing = (gradient_descent[-1] - solution).norm() / solution.norm()
print(f"gradient descent, 10 steps: {missing:.0%} of the way left")
assert missing > 0.05
torch.testing.assert_close(conjugate[-1], solution, rtol=1e-12, atol=0)

# %%
# Two steps of CG reach the solution, up to rounding. The left panel shows both
# paths over the contours of the model. The right panel shows the paths in the
# coordinates :math:`y = S^\top x`, with :math:`A = S S^\top`. In :math:`y`, the
# contours are circles, and conjugate directions meet at a right angle.

# Draw the contours of the quadratic model.
from matplotlib import pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe


def contours(ax, A, b, center, size):
    u = torch.linspace(-size, size, 99).double()
    x = center + torch.cartesian_prod(u, u)
    model = ((x @ A) * x).sum(1) / 2 - x @ b
    ax.tricontour(*x.T, model, 12, colors="gray", linewidths=0.5)
    ax.set_aspect("equal")


# %%

# Draw both paths, in x and in y.
S = torch.linalg.cholesky(A)
views = {"x": (A, b, torch.eye(2).double())}
views["y"] = torch.eye(2).double(), torch.linalg.solve(S, b), S
fig, axes = plt.subplots(1, 2, figsize=(5, 2.9), layout="constrained")
for ax, (name, (A_view, b_view, T)) in zip(axes, views.items(), strict=True):
    contours(ax, A_view, b_view, solution @ T / 2, 0.9)
    ax.plot(*(gradient_descent @ T).T, "o--", color=COLORS["orange"], ms=4)
    ax.plot(*(conjugate @ T).T, "s-", color=COLORS["blue"], ms=5)
    ax.set(xlabel=f"${name}_1$", ylabel=f"${name}_2$")
names = ["gradient descent", "conjugate gradients"]
fig.legend(axes[0].lines, names, loc="outside upper center", ncols=2)
_ = describe(
    fig,
    "Left: elliptic contours. From the origin, gradient descent zigzags along"
    " the valley; conjugate gradients turn once and hit the minimum. Right:"
    " the same paths over circles, where the conjugate turn is a right angle.",
)

# %%

# Check the angles between the steps.
first, second = conjugate.diff(dim=0)
assert abs(first @ A @ second) < 1e-12 * first.norm() * second.norm()
one, _, three = gradient_descent.diff(dim=0)[:3]
torch.testing.assert_close(three / three.norm(), one / one.norm())

# %%
# Gradient descent turns at a right angle in the left panel. So the third step
# is parallel to the first step, and repairs what the second step undid. CG
# turns at a right angle in the right panel. There, the first step ends where it
# is tangent to a circle. The second step is at a right angle to this tangent,
# and so leads along the radius to the centre.
#
# What if the valley is longer, and the start is another one? Let :math:`\kappa`
# be the larger eigenvalue of :math:`A` over the smaller one. From which start
# does gradient descent arrive at once, and from which start is gradient descent
# slowest? On this site, drag the start, and move the sliders; elsewhere, change
# the next two lines.

kappa, steps = 10.0, 10
x_0 = torch.tensor([0.0, 0.0]).double()

# %%

# Walk both ways, and check the fastest and the slowest start.
flat, steep = torch.linalg.eigh(A).eigenvectors.T
A_kappa = torch.outer(flat, flat) + kappa * torch.outer(steep, steep)


def way_left(conjugate, steps, x_0=x_0):
    b = A_kappa @ (solution - x_0)  # the steps start at 0
    path = x_0 + descend(A_kappa, b, steps, conjugate)
    error = (path - solution).norm(dim=1)
    return path, error / error[0]


at_once, slow = solution + steep, solution + kappa * flat + steep
rate = (kappa - 1) / (kappa + 1)
left = way_left(False, 20, slow)[1]
torch.testing.assert_close(left, rate ** torch.arange(21).double())
assert way_left(False, 1, at_once)[1][1] < 1e-12
for start in (x_0, slow):
    assert way_left(True, 2, start)[1][2] < 1e-12

# %%

# Draw the paths, and the part of the way that is left.
from cgn_tutorial.pages.plotting import explorable

fig, axes = plt.subplots(1, 2, figsize=(5, 2.9), layout="constrained")
contours(axes[0], A_kappa, A_kappa @ solution, solution, 1.6)
for by_cg, style, color in (
    (False, "o--", "orange"),
    (True, "s-", "blue"),
):
    path, left = way_left(by_cg, 2 if by_cg else 20)
    shown = {"color": COLORS[color], "ms": 4}
    axes[0].plot(*path[: steps + 1].T, style, **shown)
    axes[1].semilogy(left, style, **shown)
axes[1].axvline(steps, color="gray", lw=0.5)
axes[0].set(xlabel="$x_1$", ylabel="$x_2$")
axes[1].set(xlabel="steps", ylabel="part of the way left", ylim=(1e-3, 1.8))
fig.legend(axes[0].lines, names, loc="outside upper center", ncols=2)
_ = describe(
    fig,
    "Left: gradient descent zigzags towards the solution, conjugate gradients"
    " arrive in two steps. Right: the part of the way left falls on a straight"
    " line on its logarithmic axis for gradient descent, and out of the"
    " picture at step 2 for conjugate gradients.",
)
settings = {"kappa": kappa, "steps": steps, "start": x_0.tolist()}
settings |= {"solution": solution.tolist(), "flat": flat.tolist()}
_ = explorable(fig, "paths", settings)

# %%
# From a start on an axis of the ellipses, one step is enough: :math:`r` points
# at the solution. Gradient descent is slowest from a start that is
# :math:`\kappa` times as far from the solution along the long axis as along the
# short axis. From there, each step multiplies the distance by :math:`(\kappa -
# 1) / (\kappa + 1)`. CG takes at most two steps, from any start, for any
# :math:`\kappa`.
#
# CG makes each direction conjugate to the last direction only. Is this enough
# for more than two unknowns? For a random system with twelve unknowns, the next
# figure shows the cosines between the steps, in the inner product :math:`u^\top
# A v`.

torch.manual_seed(0)
n = 12
Q = torch.linalg.qr(torch.randn(n, n).double()).Q
A_12 = Q @ torch.diag(torch.linspace(1, 20, n).double()) @ Q.T
b_12 = torch.randn(n).double()


def cosines(path, A):
    steps = path.diff(dim=0)
    products = steps @ A @ steps.T
    lengths = products.diagonal().sqrt()
    return (products / lengths / lengths[:, None]).abs()


cosines_gd = cosines(descend(A_12, b_12, n, conjugate=False), A_12)
cosines_cg = cosines(descend(A_12, b_12, n, conjugate=True), A_12)
off_diagonal = cosines_cg - torch.eye(n)
largest = off_diagonal.abs().max()
print(f"largest cosine between two steps of CG: {largest:.0e}")
assert largest < 1e-10
assert cosines_gd[:-2, 2:].diagonal().min() > 0.5

# %%

# Draw the cosines of all pairs of steps.
fig, axes = plt.subplots(1, 2, figsize=(5, 2.4), layout="constrained")
for ax, picture in zip(axes, (cosines_gd, cosines_cg), strict=True):
    image = ax.imshow(picture, vmin=0, vmax=1, cmap="cividis")
    ax.set(xlabel="step", xticks=[0, 5, 11], yticks=[0, 5, 11])
axes[0].set(ylabel="step")
axes[0].set_title("gradient descent", size=10)
axes[1].set_title("conjugate gradients", size=10)
_ = fig.colorbar(image, ax=axes, label="|cosine|", shrink=0.8)
_ = describe(
    fig,
    "Two matrices of cosines between twelve steps. For gradient descent, a"
    " chequerboard: every second step repeats. For conjugate gradients, only"
    " the diagonal differs from zero.",
)

# %%
# In gradient descent, each step resembles the step before the last. Each step
# of CG settles one direction for good, and twelve steps solve for twelve
# unknowns.
#
# The algorithm
# -------------
#
# Write :math:`r_k` and :math:`p_k` for the residuals and the directions, and
# start from :math:`x_0 = 0`, so that :math:`r_0 = p_0 = b`. Three observations
# make the method cheap:
#
# - **One product a step is enough.** Since :math:`x_{k+1} = x_k + \alpha_k
#   p_k`, the next residual is :math:`r_{k+1} = r_k - \alpha_k A p_k`.
# - **Each residual is orthogonal** to all other residuals.
# - **One earlier direction is enough.** If :math:`p_{k+1}` is conjugate to
#   :math:`p_k`, then :math:`p_{k+1}` is conjugate to all earlier directions.
#
# Then :math:`\alpha_k` and :math:`\beta_k` need only residuals and one product:
#
# .. math::
#
#    \alpha_k = \frac{r_k^\top r_k}{p_k^\top A p_k}, \qquad
#    \beta_k = \frac{r_{k+1}^\top r_{k+1}}{r_k^\top r_k} .
#
# .. fold:: Why are the residuals orthogonal? Why is one earlier direction
#     enough?
#
#    Suppose that the directions up to :math:`p_k` are conjugate. Then the
#    slopes along all earlier directions stay zero: :math:`r_{k+1}` is
#    orthogonal to :math:`p_0, \ldots, p_k`. Each earlier residual is a
#    combination of these directions, :math:`r_i = p_i - \beta_{i-1}\, p_{i-1}`.
#    So :math:`r_{k+1}` is orthogonal to all earlier residuals. The
#    orthogonality also simplifies the step length: :math:`p_k^\top r_k = (r_k +
#    \beta_{k-1}\, p_{k-1})^\top r_k = r_k^\top r_k`.
#
#    The next direction, :math:`p_{k+1} = r_{k+1} + \beta_k\, p_k`, must be
#    conjugate to all earlier directions. By the first observation, :math:`A p_i
#    = (r_i - r_{i+1}) / \alpha_i`. For :math:`i < k`, both residuals are
#    orthogonal to :math:`r_{k+1}`: so :math:`r_{k+1}^\top A p_i = 0`. Also
#    :math:`p_k^\top A p_i = 0`, since the earlier directions are conjugate. So
#    :math:`p_{k+1}` is conjugate to :math:`p_i`, for any :math:`\beta_k`. The
#    last case is :math:`i = k`, with :math:`r_{k+1}^\top A p_k = -r_{k+1}^\top
#    r_{k+1} / \alpha_k` and :math:`p_k^\top A p_k = r_k^\top r_k / \alpha_k`.
#    Conjugacy asks for :math:`\beta_k = -(r_{k+1}^\top A p_k) / (p_k^\top A
#    p_k)`, the ratio above.
#
# The loop below is the whole method.


def textbook_cg(A, b, steps):
    x, r, p, path = 0 * b, b, b, [0 * b]
    for _ in range(steps):
        Ap = A @ p
        alpha = (r @ r) / (p @ Ap)
        x, r_next = x + alpha * p, r - alpha * Ap
        beta = (r_next @ r_next) / (r @ r)
        r, p = r_next, r_next + beta * p
        path.append(x)
    return torch.stack(path)


# %%
# Besides ``b``, CG holds four vectors, for any number of steps: ``x``, ``r``,
# ``p`` and ``Ap``. How much memory is this for a network?

from cgn_tutorial.pages import make_model

network = sum(p.numel() for p in make_model().parameters())
for n_parameters in network, 10**9:
    size = 4 * 4 * n_parameters / 1e6  # four vectors of four-byte numbers
    print(f"{n_parameters:,} parameters: {size:,.1f} MB")

# %%
# The package's ``cg`` takes the same steps, for a matrix given as a function.
# Here is its loop. (``M`` is an optional `preconditioner
# <plot_b_how_fast_how_exact.html#preconditioning>`__. Without ``M``, ``z`` is
# equal to ``r``.)

import inspect
import math

from cgn_tutorial import cgn

print(inspect.getsource(cgn._steps))

# %%
# Around this loop, ``cg`` decides when to stop.

# Define solve, which keeps the iterates, and compare all three loops.
from cgn_tutorial import cg


def solve(A, b, **options):
    path = [torch.zeros_like(b)]
    result = cg(A, b, callback=path.append, **options)
    return result, torch.stack(path)


result, path = solve(A_12.mv, b_12, tol=0, atol=0, maxiter=n)
assert result.solve.products == n
torch.testing.assert_close(path, textbook_cg(A_12, b_12, n))
torch.testing.assert_close(path, descend(A_12, b_12, n, conjugate=True))

# %%
# How fast, with damping
# ----------------------
#
# Let :math:`\kappa` be the condition number of :math:`A`, the largest
# eigenvalue over the smallest. To divide the error by 1000, in the norm of page
# B, CG takes at most about
#
# .. math:: \tfrac{1}{2} \sqrt{\kappa} \ln 2000
#
# steps; for gradient descent, the bound is :math:`\tfrac{1}{2} \kappa \ln
# 1000`. `Page B <plot_b_how_fast_how_exact.html>`__ derives both bounds.
#
# Damping lowers :math:`\kappa`: if the eigenvalues of the curvature lie between
# 0 and :math:`\mu_1`, then :math:`\kappa \le 1 + \mu_1 / \lambda`. So if
# :math:`\lambda` is far below :math:`\mu_1`, a tenth of the damping makes the
# bound about :math:`\sqrt{10} \approx 3` times as large.
#
# How many products does CG take for a network? Take the `GGN
# <plot_1_newton_step.html#generalized-gauss-newton>`__ of the network of page
# 3, for the 250 weights of the first layer, after a short training with Adam.
# The library BackPACK leaves two functions on the weight: ``ggnmp`` multiplies
# by the GGN, and ``hmp`` by the `Hessian <plot_1_newton_step.html#hessian>`__.
# CG stops once the residual is a hundredth of the gradient.

# Train with Adam for 150 steps, and let BackPACK leave the products.
import warnings

from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP

from cgn_tutorial.pages import mnist_loader, train

# Torch warns of BackPACK's hook on the first layer, harmlessly.
warnings.filterwarnings("ignore", "Full backward hook is firing")

torch.manual_seed(0)
model, loss_function = make_model(), torch.nn.CrossEntropyLoss()
adam = torch.optim.Adam(model.parameters(), lr=5e-3)
loader = mnist_loader()
_ = train(model, loss_function, adam, loader, steps=150)

images, labels = next(iter(loader))
model, loss_function = extend(model.double()), extend(loss_function)
loss = loss_function(model(images.double()), labels)
with backpack(GGNMP(), HMP()):
    loss.backward()
weight = model[0].weight
g = weight.grad.flatten()

# %%


def damped(product, damping):
    @torch.no_grad()
    def A(v):
        return product(v.view(1, *weight.shape)).flatten() + damping * v

    return A


dampings = {0.1: "-", 1e-2: "--", 1e-3: "-.", 1e-4: ":"}
ggn = {damping: damped(weight.ggnmp, damping) for damping in dampings}
solves = {lam: cg(A, -g, tol=1e-2) for lam, A in ggn.items()}
print("damping  products  length of the step")
for damping, result in solves.items():
    length = result.x.norm()
    print(f"{damping:7g}  {result.solve.products:8d}  {length:18.2f}")

# %%

# Check how products and lengths grow.
products = torch.tensor([result.solve.products for result in solves.values()])
lengths = torch.stack([result.x.norm() for result in solves.values()])
assert (products.diff() > 0).all() and (lengths.diff() > 0).all()
assert (products[1:] / products[:-1] < 10**0.5).all() and products[-1] < 50

# %%

# Draw the residuals for the four dampings.
fig, ax = plt.subplots(figsize=(5, 2.7), layout="constrained")
colors = ("blue", "green", "orange", "purple")
for (damping, result), color in zip(solves.items(), colors, strict=True):
    relative = torch.tensor(result.solve.residuals) / g.norm()
    style, label = dampings[damping], f"λ = {damping:g}"
    ax.semilogy(relative, style, marker=".", c=COLORS[color], label=label)
ax.set(xlabel="products", ylabel="relative residual")
ax.set_xticks(range(0, int(products.max()) + 1, 4))
ax.legend()
_ = describe(
    fig,
    "Relative residuals of four solves. The smaller the damping, the more"
    " products it takes to bring the residual to a hundredth.",
)

# %%
# With less damping, CG takes more products, and the step is longer. A tenth of
# the damping multiplies the products by less than :math:`\sqrt{10}`. All four
# solves take far fewer products than there are unknowns, 250.
#
# When to stop
# ------------
#
# The quadratic model is only local, and far from the minimum, an exact solution
# is rarely worth its price (`Dembo, Eisenstat and Steihaug, 1982
# <https://doi.org/10.1137/0719025>`__). ``cg`` ends as soon as
#
# .. math::
#
#    \lVert r_k \rVert \le
#    \max(\mathrm{tol} \cdot \lVert b \rVert, \mathrm{atol}),
#
# or after ``maxiter`` products.
#
# - ``tol`` bounds the residual relative to the gradient.
# - ``atol`` is the size below which a residual counts as zero. If the gradient
#   itself is below ``atol``, the step is zero.
# - ``maxiter`` is the largest number of products.

# Check the three options.
A = ggn[1e-4]
assert cg(A, -g, tol=0.1).solve.products < cg(A, -g, tol=0.01).solve.products
assert cg(A, 1e-9 * g, tol=0.1, atol=1e-8).solve.products == 0
assert cg(A, -g, maxiter=4).solve.products == 4

# %%
# Is an inexact step good enough for an optimizer? First, the step must point
# downhill. If all :math:`p_i^\top A p_i > 0`, every iterate after :math:`x_0 =
# 0` does:
#
# .. math::
#
#    -g^\top x_k = b^\top x_k
#    = \sum_{i < k} \alpha_i \lVert r_i \rVert^2 > 0 .
#
# .. fold:: Why is this so?
#
#    The first observation gives :math:`b = r_k + \sum_{i<k} \alpha_i A p_i`.
#    The direction :math:`p_k` is conjugate to each :math:`p_i` in the sum, so
#    that :math:`b^\top p_k = r_k^\top p_k = \lVert r_k \rVert^2`. The iterate
#    is :math:`x_k = \sum_{i<k} \alpha_i p_i`, and the product with :math:`b` is
#    the sum above.
#
# Second, the step should reach most of the decrease that the quadratic model
# allows. Which part is missing, if CG stops at a tolerance of 0.1? Take the
# smallest of the four dampings, and compare with a long solve:

A, tol = ggn[1e-4], 0.1


def quadratic_model(path, A, b):
    return torch.stack([x @ A(x) / 2 - b @ x for x in path])


result, path = solve(A, -g, tol=1e-4)
model_values = quadratic_model(path, A, -g)
missing = 1 - model_values / model_values[-1]
relative = torch.tensor(result.solve.residuals) / g.norm()
k = (relative <= tol).int().argmax()  # where the solve would stop
print(f"tol {tol}: after {k} of {result.solve.products} products,")
print(f"{missing[k]:.1%} of the decrease is missing")

# %%

# Check the residual, the model value, and the part that is missing.
assert abs(-result.solve.decrease / model_values[-1] - 1) < 1e-9
assert (path[1:] @ -g > 0).all() and (relative.diff() > 0).any()
assert (model_values[relative > 1e-3].diff() < 0).all()
assert k < result.solve.products / 2 and missing[k] < 0.1

# %%

# Draw the residual and the missing decrease.
fig, ax = plt.subplots(figsize=(5, 2.7), layout="constrained")
ax.semilogy(relative, "o-", c=COLORS["orange"], ms=4, label="residual")
ax.semilogy(
    missing[:-1], "s--", c=COLORS["blue"], ms=4, label="missing decrease"
)
ax.axhline(tol, color="gray", lw=0.5)
ax.set(xlabel="products", ylabel="part left", ylim=(1e-4, 2))
ax.legend()
_ = describe(
    fig,
    "The residual and the missing part of the model's decrease, both relative"
    " to their start. The residual goes up and down on its way, the model"
    " value falls at every product.",
)

# %%
# The residual rises now and then; the model value falls at every product. The
# thin line is the tolerance of 0.1. A solve that stops there takes less than
# half of the products, and reaches more than nine tenths of the decrease.
# (`Martens, 2010
# <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`__, stops by
# the progress of the model value instead.)
#
# Negative curvature
# ------------------
#
# For the Hessian of a network, :math:`p^\top A p` may be negative. The smallest
# example has one direction of positive curvature and one of negative curvature:
#
# .. math::
#
#    A = \begin{bmatrix} 1 & 0 \\ 0 & -2 \end{bmatrix}, \qquad
#    b = \begin{bmatrix} 1 \\ 2 \end{bmatrix}.
#
# By default, ``cg`` stops at negative curvature. *Plain CG*, with the option
# ``negative_curvature="ignore"``, goes on:

diagonal = torch.tensor([1.0, -2.0]).double()
b = torch.tensor([1.0, 2.0]).double()
plain, path = solve(diagonal.mul, b, negative_curvature="ignore")
model_values = quadratic_model(path, diagonal.mul, b)
steps = path.diff(dim=0)
for k in range(2):
    curvature = steps[k] @ (diagonal * steps[k]) / (steps[k] @ steps[k])
    x1, x2 = path[k + 1].tolist()
    print(f"step {k + 1}: pᵀAp / pᵀp = {curvature:5.2f},")
    print(f"  x = ({x1:.2f}, {x2:.2f}), model {model_values[k + 1]:.2f}")

stopped = cg(diagonal.mul, b)
print(f"cg stops, {stopped.solve.reason}: x = {stopped.x.tolist()}")

# %%

# Check both solves.
torch.testing.assert_close(path[1], -5 / 7 * b)
torch.testing.assert_close(path[2], b / diagonal)
assert (model_values[1:] > 0).all() and (path[1:] @ b < 0).all()
assert stopped.solve.reason == "negative curvature"
assert stopped.solve.products == 1
torch.testing.assert_close(stopped.x, b)

# %%

# Draw the saddle, and both solves.
fig, ax = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
contours(ax, torch.diag(diagonal), b, torch.zeros(2), 2.1)
ax.plot(*path.T, "o--", color=COLORS["orange"], label="plain CG")
ends = torch.stack([path[0], stopped.x])
ax.plot(*ends.T, "s-", color=COLORS["blue"], label="stopped")
ax.set(xlabel="$x_1$", ylabel="$x_2$")
ax.legend(loc="lower right")
_ = describe(
    fig,
    "Contours of a saddle. From the origin, plain CG first goes backwards,"
    " uphill, then to the saddle point. The stopped solve goes along b,"
    " downhill.",
)

# %%
# The first direction, :math:`p = b = (1, 2)`, points downhill, and
# :math:`p^\top A p = 1 - 8 = -7`. Along :math:`p`, the model falls without end,
# and has a maximum behind the start, at :math:`\alpha = -5 / 7`. Plain CG steps
# to this maximum: backwards and uphill. The second step solves the system, at
# the saddle point :math:`(1, -1)`, higher than the start.
#
# The remedy is to stop at the first direction with :math:`p^\top A p \le 0`
# (`Dembo and Steihaug, 1983 <https://doi.org/10.1007/BF02592055>`__). All
# earlier directions have positive curvature, so the last iterate points
# downhill. If the first direction has no positive curvature, then ``cg``
# returns :math:`b = -g`, a step of gradient descent.
#
# Does the remedy matter for the network? Solve with the Hessian of the first
# layer in both ways:

lam = 1e-2
A = damped(weight.hmp, lam)
options = {"tol": 0.1, "maxiter": 40}
stopped, _ = solve(A, -g, **options)
plain, path = solve(A, -g, negative_curvature="ignore", **options)
model_values = quadratic_model(path, A, -g)
last = stopped.solve.products - 1
for name, result, value in (
    ("stopped", stopped, model_values[last]),
    ("plain CG", plain, model_values[-1]),
):
    print(f"{name}, {result.solve.products} products, model {value:.3f}:")
    print(f"    {result.solve.reason}")
print(f"loss {loss:.3f}")

# %%

# Check both solves.
assert stopped.solve.reason == "negative curvature" and -g @ stopped.x > 0
torch.testing.assert_close(stopped.x, path[last])
assert model_values[last + 1] > model_values[last]
assert (model_values[last + 1 :].diff() > 0).any()
assert plain.solve.products > 2 * stopped.solve.products
assert plain.solve.converged and model_values[-1] > 0
assert -model_values[last] > loss

# %%

# Draw the quadratic model over the products.
fig, ax = plt.subplots(figsize=(5, 2.7), layout="constrained")
ax.plot(model_values, "o--", c=COLORS["orange"], ms=4, label="plain CG")
ax.plot(model_values[: last + 1], "s-", c=COLORS["blue"], label="stopped")
ax.axhline(0, color="gray", lw=0.5)
ax.set(xlabel="products", ylabel="quadratic model")
ax.legend()
_ = describe(
    fig,
    "The quadratic model over the products. Up to the first negative"
    " curvature it falls; there the stopped solve ends. Plain CG jumps up"
    " and goes on, up and down.",
)

# %%
# Both solves take the same steps until the first direction of negative
# curvature. There, the stopped solve ends. Plain CG steps to the maximum along
# this direction, and the model value jumps up. Plain CG takes several times as
# many products, and ends near a saddle point of the model, here higher than the
# start.
#
# The stopped step is not safe, either: the model promises a decrease larger
# than the whole loss, and a cross-entropy cannot fall below zero.
#
# `Page 3 <plot_3_matrix_free_optimization.html>`__ makes an optimizer of these
# parts.
#
# Check yourself
# --------------
#
# .. fold:: One matrix has the condition number 100, another matrix 10,000. By
#     which factor do the bounds on the products differ?
#
#    By a factor of about ten: the bound grows with :math:`\sqrt{\kappa}`.
#
# .. fold:: The first product of a solve finds :math:`p^\top A p < 0`. What does
#     ``cg`` return, and does the result point downhill?
#
#    ``cg`` returns the right-hand side :math:`b = -g`. The result points
#    downhill, since :math:`g^\top b = -\lVert g \rVert^2 < 0`.
#
# .. fold:: Exercise: run ``result = cg(damped(weight.hmp, lam), -g,
#     **options)`` once more with ``lam = 0.03``. How does the solve end? How
#     large is the decrease that the model promises, ``result.solve.decrease``?
#
#    The solve converges after five products, and the model promises a decrease
#    of 0.042, a small part of the loss.

# Check the first answer and the exercise.
steps = []
for kappa in (100, 10_000):
    rate = (kappa**0.5 - 1) / (kappa**0.5 + 1)
    steps.append(math.log(2e6) / -math.log(rate))  # to an error of 1e-6
assert abs(steps[1] / steps[0] - 10) < 0.1

result = cg(damped(weight.hmp, 0.03), -g, **options)
assert result.solve.converged and result.solve.products == 5
assert abs(result.solve.decrease - 0.042) < 0.0005
assert result.solve.decrease < 0.1 * loss
