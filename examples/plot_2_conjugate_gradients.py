r"""
2. Conjugate gradients from scratch
===================================

A Newton step, as `page 1 <plot_1_newton_step.html>`__ derives it, is the
solution of a linear system :math:`A x = b`: the matrix is the damped curvature
:math:`A = C + \lambda I`, the right-hand side the negative gradient
:math:`b = -g`, and the solution :math:`x` is the step: what page 1 calls
:math:`v`, not the parameters. :math:`A` is too large to store, but its product
with a vector costs no more than a few gradients.

Conjugate gradients (CG) solve the system from such products alone. This page
builds the method, watches it work, and finds out when to stop it and what can
go wrong. It is due to Hestenes and Stiefel, `Methods of Conjugate Gradients
for Solving Linear Systems (1952) <https://doi.org/10.6028/jres.049.044>`__;
the classic explanation is Shewchuk's `An Introduction to the Conjugate
Gradient Method Without the Agonizing Pain (1994)
<https://www.cs.cmu.edu/~quake-papers/painless-conjugate-gradient.pdf>`__.

To run this page yourself, download it from its end, and install its package:
``pip install`` and the address that stands on the site's `front page
<../index.html#run-it-yourself>`__.
"""

# %%
# A quadratic to minimise
# -----------------------
#
# For a symmetric positive definite :math:`A`, solving :math:`A x = b` and
# minimising the quadratic model
#
# .. math:: \phi(x) = \tfrac{1}{2} x^\top A x - b^\top x
#
# are the same task, because the gradient of the model is :math:`A x - b`. The
# negative gradient, which points downhill, is the residual
# :math:`r = b - A x` (unrelated to the residual of page 1): it also says how
# far the equation is from being solved.
#
# From any point :math:`x`, along any direction :math:`p`, the model is a
# parabola, with the slope :math:`\alpha\, p^\top A p - p^\top r` at
# :math:`x + \alpha p`. It is lowest where the slope is zero:
#
# .. math:: \alpha = \frac{p^\top r}{p^\top A p}.
#
# Everything below repeats this one step, and only the choice of :math:`p` is
# open. **Gradient descent** takes :math:`p = r`, straight downhill, here with the
# best step size at every step. **Conjugate gradients** add a multiple
# :math:`\beta` of the last direction to :math:`r`; the next section says how
# much of it, and why.

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
# After a step along :math:`p`, the model is as low as it gets in that
# direction: the new residual has :math:`p^\top r = 0`. A later step along another
# direction, :math:`p_+`, changes the residual by a multiple of :math:`A p_+`. It
# leaves the earlier work intact exactly if
#
# .. math:: p^\top A p_+ = 0.
#
# Such directions are called conjugate, or A-orthogonal. For
# :math:`p_+ = r + \beta p` this is one equation with one unknown, solved by
#
# .. math:: \beta = -\frac{r^\top A p}{p^\top A p},
#
# the line of ``descend`` that tells the two methods apart. How much does it
# change for two unknowns?

A = torch.tensor([[2.0, -1.8], [-1.8, 2.5]]).double()
b = torch.tensor([0.9, -0.1]).double()
solution = torch.linalg.solve(A, b)

gradient_descent = descend(A, b, steps=10, conjugate=False)
conjugate = descend(A, b, steps=2, conjugate=True)

missing = (gradient_descent[-1] - solution).norm() / solution.norm()
print(f"gradient descent: {missing:.0%} of the way left after 10 steps")
assert missing > 0.05
torch.testing.assert_close(conjugate[-1], solution, rtol=1e-12, atol=0)

# %%
# Gradient descent is still on its way after ten steps. The conjugate
# directions arrive in two, up to rounding. Where do their paths part?
#
# The left figure shows both over the contours of the model, dashed where it is
# negative. The right one shows the same in the coordinates
# :math:`y = S^\top x` with :math:`A = S S^\top`, which turn the valley into a
# round bowl: there, :math:`p^\top A p_+` is the ordinary inner product, so that
# conjugate directions meet at a right angle.

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
fig, axes = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
for ax, (name, (A_view, b_view, T)) in zip(axes, views.items(), strict=True):
    contours(ax, A_view, b_view, solution @ T / 2, 0.9)
    ax.plot(*(gradient_descent @ T).T, "o--", color=COLORS["orange"], ms=4)
    ax.plot(*(conjugate @ T).T, "s-", color=COLORS["blue"], ms=5)
    ax.set(xlabel=f"${name}_1$", ylabel=f"${name}_2$")
axes[0].legend(["gradient descent", "conjugate gradients"], loc="upper left")
_ = describe(
    fig,
    "Left: elliptic contours. From the origin, gradient descent zigzags along"
    " the valley; conjugate gradients turn once and hit the minimum. Right:"
    " the same paths over circles, where the conjugate turn is a right angle.",
)

# %%

# Check the angles: conjugate, and parallel.
first, second = conjugate.diff(dim=0)
assert abs(first @ A @ second) < 1e-12 * first.norm() * second.norm()
one, _, three = gradient_descent.diff(dim=0)[:3]
torch.testing.assert_close(three / three.norm(), one / one.norm())

# %%
# Both begin with the same step. Gradient descent then turns at a right angle in
# the left figure, every time, so that its third step is parallel to its first and
# repairs what the second one undid. The conjugate path turns at a right angle in
# the right figure. There the contours are circles. The first step runs along a
# tangent of the circle on which it ends; the second one, at a right angle to it,
# along the radius to the centre.
#
# What if the valley is longer, and the start another one? Keep the solution and
# the eigenvectors of :math:`A`, and let :math:`\kappa` be the ratio of its two
# eigenvalues. From where does gradient descent arrive at once, and from where
# is it slowest? Try it: drag the start, and move :math:`\kappa` and the steps, in
# the figure on the site. In the script and the notebook, change the next two
# lines.

kappa, steps = 10.0, 10
x_0 = torch.tensor([0.0, 0.0]).double()

# %%

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
print(f"slowest: {left[10]:.0%} of the way left after 10 steps")
torch.testing.assert_close(left, rate ** torch.arange(21).double())
assert way_left(False, 1, at_once)[1][1] < 1e-12
assert (
    way_left(True, 2)[1][2] < 1e-12 and way_left(True, 2, slow)[1][2] < 1e-12
)

# %%

# Draw the paths, and the part of the way that is left.
from cgn_tutorial.pages.plotting import explorable

fig, axes = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
contours(axes[0], A_kappa, A_kappa @ solution, solution, 1.6)
for by_cg, style, color, label in (
    (False, "o--", "orange", "gradient descent"),
    (True, "s-", "blue", "conjugate gradients"),
):
    path, left = way_left(by_cg, 2 if by_cg else 20)
    shown = {"color": COLORS[color], "ms": 4}
    axes[0].plot(*path[: steps + 1].T, style, **shown)
    axes[1].semilogy(left, style, **shown, label=label)
axes[1].axvline(steps, color="gray", lw=0.5)
axes[0].set(xlabel="$x_1$", ylabel="$x_2$")
axes[1].set(xlabel="steps", ylabel="part of the way left", ylim=(1e-3, 1.8))
axes[1].legend()
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
# From an axis of the ellipses, :math:`r` points at the solution, and one step is
# enough. From a start :math:`\kappa` times as far along the long axis as along
# the short one, each step of gradient descent leaves the part
# :math:`(\kappa - 1) / (\kappa + 1)` of the way, as the code checks. No start is
# slower in the long run (see `How fast <#how-fast>`__). Conjugate gradients
# take at most two steps, from anywhere, for any :math:`\kappa`.
#
# Does it work for more than two unknowns, where each direction is made
# conjugate to the last one only? For a random system with twelve of them, take
# all the steps and look at the cosines between them, in the inner product
# :math:`u^\top A v`.

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
print(f"conjugate directions: largest cosine {off_diagonal.abs().max():.0e}")
assert off_diagonal.abs().max() < 1e-10
assert cosines_gd[:-2, 2:].diagonal().min() > 0.5

# %%

# Draw the cosines of all pairs of steps.
fig, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
for ax, picture in zip(axes, (cosines_gd, cosines_cg), strict=True):
    image = ax.imshow(picture, vmin=0, vmax=1, cmap="cividis")
    ax.set(xlabel="step", ylabel="step", xticks=[0, 5, 11], yticks=[0, 5, 11])
axes[0].set_title("gradient descent")
axes[1].set_title("conjugate gradients")
_ = fig.colorbar(image, ax=axes, label="|cosine|, A inner product")
_ = describe(
    fig,
    "Two matrices of cosines between twelve steps. For gradient descent, a"
    " chequerboard: every second step repeats. For conjugate gradients, only"
    " the diagonal differs from zero.",
)

# %%
# Gradient descent repeats itself: each step has a cosine above one half with
# the step two before. The conjugate steps have nothing in
# common, any two of them. Each settles one direction for good, so that twelve
# steps solve for twelve unknowns. The next section shows why being conjugate
# to the last direction is enough.
#
# The algorithm
# -------------
#
# Write :math:`r_k` and :math:`p_k` for the residuals and the directions, and
# start from :math:`x_0 = 0`, so that :math:`r_0 = p_0 = b`. Three observations
# make the method as cheap as it can be.
#
# **The residual need not be computed afresh.** Since
# :math:`x_{k+1} = x_k + \alpha_k p_k`, it is
#
# .. math:: r_{k+1} = r_k - \alpha_k A p_k .
#
# One product per step, :math:`A p_k`, does everything.
#
# **Residuals are orthogonal to one another.** Suppose that the directions up
# to :math:`p_k` are conjugate. Then no step spoils what an earlier one has done,
# and :math:`r_{k+1}` is orthogonal to all of :math:`p_0, \ldots, p_k`. It is then
# orthogonal to all earlier residuals, too, since each of them is a combination
# of directions, :math:`r_i = p_i - \beta_{i-1}\, p_{i-1}`. This makes the step
# length simpler. As :math:`r_k` is orthogonal to :math:`p_{k-1}`,
#
# .. math::
#
#    \begin{aligned}
#    p_k^\top r_k &= (r_k + \beta_{k-1}\, p_{k-1})^\top r_k = r_k^\top r_k , \\
#    \alpha_k &= \frac{r_k^\top r_k}{p_k^\top A p_k} .
#    \end{aligned}
#
# **One earlier direction is enough.** The next direction,
# :math:`p_{k+1} = r_{k+1} + \beta_k\, p_k`, must be conjugate to
# :math:`p_0, \ldots, p_k`. By the first observation, :math:`A p_i` is
# :math:`(r_i - r_{i+1}) / \alpha_i`, a difference of two residuals. For
# :math:`i < k`, by the second one, :math:`r_{k+1}` is orthogonal to both, so that
# :math:`r_{k+1}^\top A p_i = 0`; and :math:`p_k^\top A p_i = 0`, as these
# directions are conjugate. So :math:`p_{k+1}` is conjugate to them, whatever
# :math:`\beta_k`. Only :math:`p_k` is left. There, as
# :math:`r_{k+1}^\top r_k = 0`,
#
# .. math::
#
#    \begin{aligned}
#    r_{k+1}^\top A p_k
#    &= \frac{r_{k+1}^\top (r_k - r_{k+1})}{\alpha_k}
#    = -\frac{r_{k+1}^\top r_{k+1}}{\alpha_k} , \\
#    p_k^\top A p_k &= \frac{r_k^\top r_k}{\alpha_k} .
#    \end{aligned}
#
# The quotient of the two, with a minus sign, is
#
# .. math::
#
#    \beta_k = -\frac{r_{k+1}^\top A p_k}{p_k^\top A p_k}
#    = \frac{r_{k+1}^\top r_{k+1}}{r_k^\top r_k} .
#
# With it, :math:`p_{k+1}` is conjugate to all before it, if those are conjugate
# to one another. So, one after the other, all are: :math:`p_1` to :math:`p_0`,
# then :math:`p_2` to both, and so on.
#
# This is the whole method. It remembers four vectors, however many steps it
# takes: ``x``, ``r``, ``p`` and ``Ap``.


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
# The ``cg`` that this tutorial trains with takes the same steps, for a matrix
# given as a function. This is their source; ``M`` is a `preconditioner
# <#preconditioning>`__, without which ``z`` is the residual ``r`` and ``rz``
# the number :math:`r^\top r`.

import inspect
import math

from cgn_tutorial import cgn

print(inspect.getsource(cgn._steps))

# %%
# Around this loop, ``cg`` looks at each step before it accepts it. Is the
# residual small enough, or the budget spent (`When to stop <#when-to-stop>`__)?
# Has rounding spoiled it (`Rounding <#rounding>`__)? Is the curvature
# :math:`p^\top A p` positive (`Negative curvature <#negative-curvature>`__)? Are
# all numbers finite? On a GPU, it waits for the device once per step, to fetch the
# numbers that decide. Its callback collects the iterates, which are those of
# ``descend`` and of ``textbook_cg``.

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
# How fast
# --------
#
# Nobody waits for as many steps as there are unknowns: a network has millions.
# How fast does the error shrink on the way? From here on, :math:`x` without an
# index is the solution, and :math:`e_k = x_k - x` the error.
#
# **What CG minimises.** After :math:`k` steps, the residual is orthogonal to all
# :math:`k` directions: among all of their combinations, :math:`x_k` is the one
# with the lowest model. These are the combinations of :math:`b, A b, \ldots,
# A^{k-1} b`. To see it, write residuals and directions as polynomials in
# :math:`A`, times :math:`b`. Both begin with :math:`b`. From step to step, the
# degree of :math:`r_{k+1} = r_k - \alpha_k A p_k` grows by one, and that of
# :math:`p_{k+1} = r_{k+1} + \beta_k\, p_k` with it. So the :math:`k` directions
# are among these combinations. Being conjugate, they are linearly independent:
# their combinations have :math:`k` dimensions. Those of the :math:`k` vectors
# :math:`b, A b, \ldots, A^{k-1} b` cannot have more. So both are the same.
#
# As :math:`b = A x`, the model can be read as a distance to the solution,
#
# .. math::
#
#    \begin{aligned}
#    \phi(x_k) - \phi(x)
#    &= \tfrac{1}{2} x_k^\top A x_k - x^\top A x_k + \tfrac{1}{2} x^\top A x \\
#    &= \tfrac{1}{2} e_k^\top A e_k = \tfrac{1}{2} \lVert e_k \rVert_A^2 ,
#    \end{aligned}
#
# in the norm :math:`\lVert e \rVert_A = \sqrt{e^\top A e}`, the A-norm.
#
# **The residual is a polynomial.** As a combination of these vectors, :math:`x_k`
# is a polynomial in :math:`A`, times :math:`b`. So :math:`r_k = b - A x_k` is
# :math:`\pi(A)\, b`, with a polynomial :math:`\pi` of degree :math:`k`, or less,
# that has :math:`\pi(0) = 1`. Every such polynomial belongs to some combination,
# and CG takes the best one. The error is :math:`e_k = -A^{-1} r_k = \pi(A)\,
# e_0`: in an eigenvector's direction, with the eigenvalue :math:`\mu_i`, it is
# :math:`\pi(\mu_i)` times what it was. The squared A-norm sums the squares over these
# directions, each times its :math:`\mu_i`.
#
# **So any polynomial gives a bound.** CG's error is at most that of any other
# choice of :math:`\pi`, so that for each of them
#
# .. math::
#
#    \frac{\lVert e_k \rVert_A}{\lVert e_0 \rVert_A}
#    \le \max_i\, \lvert \pi(\mu_i) \rvert .
#
# Let all eigenvalues lie between :math:`\mu_n` and :math:`\mu_1`, with the
# condition number :math:`\kappa = \mu_1 / \mu_n`. The line :math:`\pi(\mu) = 1 -
# 2 \mu / (\mu_1 + \mu_n)` has the values :math:`\pm (\kappa - 1) / (\kappa + 1)`
# at :math:`\mu_n` and :math:`\mu_1`, and smaller ones between. A step of gradient
# descent of the constant size :math:`\eta = 2 / (\mu_1 + \mu_n)` multiplies the
# error by :math:`I - \eta A`, which is this line: it leaves at most the part
# :math:`(\kappa - 1) / (\kappa + 1)` of the A-norm. From the same point, a step
# of the best size, :math:`\alpha`, leaves no more. So :math:`k` steps of either
# kind of gradient descent leave at most the :math:`k`-th power of that part. CG
# can do better. Of all polynomials of degree :math:`k` that are 1 at zero, that
# of Chebyshev is the smallest between :math:`\mu_n` and :math:`\mu_1`, and gives
# CG the bound
#
# .. math::
#
#    \frac{\lVert e_k \rVert_A}{\lVert e_0 \rVert_A}
#    \le 2 \left( \frac{\sqrt{\kappa} - 1}{\sqrt{\kappa} + 1} \right)^k
#
# (`Shewchuk (1994)
# <https://www.cs.cmu.edu/~quake-papers/painless-conjugate-gradient.pdf>`__
# computes it). For a large :math:`\kappa` the bracket is about :math:`\exp(-2 /
# \sqrt{\kappa})`, so that a factor :math:`\varepsilon` takes about
# :math:`\tfrac{1}{2} \sqrt{\kappa} \ln(2 / \varepsilon)` steps, in place of
# :math:`\tfrac{1}{2} \kappa \ln(1 / \varepsilon)`.
#
# Diagonal matrices are enough to try it: rotating the axes rotates all the
# iterates, and nothing else. That is checked first.

eigenvalues = torch.linspace(1, 20, n).double()
options = {"tol": 0, "atol": 0, "maxiter": n}
_, path_diagonal = solve(eigenvalues.mul, Q.T @ b_12, **options)
torch.testing.assert_close(path_diagonal @ Q.T, path)


def errors(eigenvalues, steps):
    b = torch.ones_like(eigenvalues)
    result, path = solve(eigenvalues.mul, b, tol=1e-12, maxiter=steps)
    error = (eigenvalues * (path - b / eigenvalues) ** 2).sum(1).sqrt()
    return error / error[0], torch.tensor(result.solve.residuals) / b.norm()


# %%
# Do the curves follow the bound, the dashed lines? Here are three matrices
# with 3000 eigenvalues each, spread evenly between 1 and :math:`\kappa`.

# Solve, check the bound, and draw the errors and the residuals.
fig, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
products = {}
for kappa, color in ((10, "blue"), (100, "green"), (1000, "orange")):
    error, residual = errors(torch.linspace(1, kappa, 3000).double(), 250)
    rate = (kappa**0.5 - 1) / (kappa**0.5 + 1)
    bound = 2 * rate ** torch.arange(251).double()
    assert (error <= bound[: len(error)]).all() and (error.diff() < 0).all()
    style = {"color": COLORS[color], "marker": "os^"[len(products)], "ms": 4}
    style |= {"markevery": 25, "label": f"κ = {kappa}"}
    axes[0].semilogy(bound, "--", lw=1, color=COLORS[color])
    axes[0].semilogy(error, **style)
    axes[1].semilogy(residual, **style)
    products[kappa] = (error > 1e-6).sum().item()
print("products to an error below 1e-6, by κ:", products)
assert 8 < products[1000] / products[10] < 11
axes[0].legend()
for ax, name in zip(axes, ("error (A-norm)", "residual"), strict=True):
    ax.set(xlabel="products", ylabel=f"relative {name}", ylim=(1e-9, 10))
_ = describe(
    fig,
    "Errors and residuals of conjugate gradients fall on a"
    " logarithmic axis, the steeper the smaller the condition number. Each"
    " error curve stays below its dashed bound, and close to it at first.",
)

# %%
# They stay below it; for a condition number of 1000 the curve bends away, for
# the bound knows the two ends of the spectrum only. A :math:`\kappa` a hundred
# times as large takes about nine times the products.
#
# The error shrinks at every step, because CG minimises it. In practice the
# solution is unknown, and what is seen is the residual. As :math:`\lVert e_k
# \rVert_A^2 = r_k^\top A^{-1} r_k`, the squared residual lies between
# :math:`\mu_n` and :math:`\mu_1` times the squared error. So :math:`\lVert r_k
# \rVert / \lVert r_0 \rVert` and :math:`\lVert e_k \rVert_A / \lVert e_0
# \rVert_A` differ by a factor of at most :math:`\sqrt{\kappa}`, in either
# direction.
#
# The error can be estimated, though. In step :math:`k`, the slope of the model
# along :math:`p_k` goes from :math:`-p_k^\top r_k` straight to zero. So the model
# falls by :math:`\tfrac{1}{2} \alpha_k\, p_k^\top r_k = \tfrac{1}{2} \alpha_k \lVert
# r_k \rVert^2`, and :math:`\lVert e_k \rVert_A^2` by twice that, :math:`\alpha_k
# \lVert r_k \rVert^2`, a number that the method has at hand. Summed over the last
# five steps, these are the squared error of five steps ago, less the squared error
# of now (Strakoš and Tichý, `On error estimation in the conjugate gradient method
# <https://etna.math.kent.edu/vol.13.2002/pp56-80.dir/pp56-80.pdf>`__, 2002). How
# close does the root of that sum come to the error of five steps ago?

# Compare the estimate with the error.
for kappa in (10, 100, 1000):
    error, residual = errors(torch.linspace(1, kappa, 3000).double(), 250)
    error, residual = error[error > 1e-8], residual[: (error > 1e-8).sum()]
    assert residual.div(error).log().abs().max() < 0.5 * math.log(kappa)
    seen = (1 - (error[5:] / error[:-5]) ** 2).sqrt()
    print(f"κ = {kappa:4d}: {seen.min():.0%} to {seen.max():.0%} of the error")
    assert seen.min() > (0.6 if kappa == 1000 else 0.9) and seen.max() < 1

# %%
# So the estimate tells, five steps late, how large the error was. It is never too
# large. For a condition number of 1000 it is more than six tenths of the error,
# for the smaller ones more than nine tenths.
#
# Clustered eigenvalues
# ---------------------
#
# Is the condition number the whole story? The bound by a polynomial asks for
# small values at the eigenvalues only; what it does between them does not matter.
# Let the eigenvalues lie in three clusters, around :math:`c_1, c_2` and
# :math:`c_3`. A polynomial of degree 3 has a zero in each:
#
# .. math::
#
#    \pi(\mu) = \Bigl(1 - \frac{\mu}{c_1}\Bigr) \Bigl(1 - \frac{\mu}{c_2}\Bigr)
#    \Bigl(1 - \frac{\mu}{c_3}\Bigr) .
#
# If each cluster is a single value, :math:`\pi` is zero there, and CG is done
# after three steps. If the clusters are narrow, :math:`\pi` is small on them, at
# most :math:`\omega`, say. Then three steps leave at most :math:`\omega` of the
# error, six steps at most :math:`\omega^2`, by the square of :math:`\pi`, and so
# on.
#
# Here are three clusters of width 1. If ``b`` is all ones and the matrix
# diagonal, the entries of :math:`r_k = \pi(A)\, b` are the values of CG's
# polynomial at the eigenvalues. To draw it between the clusters as well, add
# unknowns with eigenvalues on a grid. Their entries of ``b`` are so tiny,
# :math:`10^{-9}`, that the solve takes no notice of them; their entries of
# :math:`r_k`, divided by :math:`10^{-9}`, are the values there.

clusters = torch.tensor([20.0, 300.0, 1000.0]).double()
clustered = (clusters[:, None] + torch.linspace(-0.5, 0.5, 100)).flatten()
grid = torch.linspace(0, 1050, 200).double()
weights = torch.cat([torch.ones(300), torch.full((200,), 1e-9)]).double()
both = torch.cat([clustered, grid])
_, path = solve(both.mul, weights, maxiter=3)
polynomials = ((weights - both * path) / weights)[:, 300:]

spectra = {
    "spread evenly": torch.linspace(20, 1000, 300).double(),
    "in three clusters": clustered,
    "three values": clusters.repeat_interleave(100),
}
curves = {name: errors(values, 60)[0] for name, values in spectra.items()}
for name, error in curves.items():
    print(f"{name:17s}: {(error > 1e-6).sum():2d} products to 1e-6")

omega = (1 - clustered[:, None] / clusters).prod(1).abs().max()
left = [f"{part:.1g}" for part in curves["in three clusters"][:13:3]]
print(f"ω = {omega:.2f}, left after 0, 3, 6, 9, 12 steps: {', '.join(left)}")
for k, part in enumerate(curves["in three clusters"]):
    assert part <= omega ** (k // 3)
assert (curves["three values"] > 1e-6).sum() == 3
assert (curves["in three clusters"] > 1e-6).sum() < 15
assert (curves["spread evenly"] > 1e-6).sum() > 40

# %%

# Draw the polynomials, and the errors over the products.
fig, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
styles = {"blue": "-", "orange": "--", "green": "-."}.items()
for k, (color, style) in enumerate(styles, start=1):
    axes[0].plot(
        grid, polynomials[k], style, c=COLORS[color], label=f"k = {k}"
    )
axes[0].plot(clusters, [0, 0, 0], "o", color="black", ms=4)
axes[0].axhline(0, color="gray", lw=0.5)
axes[0].set(xlabel="eigenvalue", ylabel="polynomial", ylim=(-1.1, 1.1))
for (color, style), name in zip(styles, curves, strict=True):
    axes[1].semilogy(curves[name], style, c=COLORS[color], label=name)
axes[1].set(xlabel="products", ylabel="relative error (A-norm)")
axes[1].set_ylim(1e-9, 10)
for ax in axes:
    ax.legend(fontsize=8)
_ = describe(
    fig,
    "Left: polynomials of degree one to three, all one at zero; the third"
    " passes through zero at the three clusters. Right: with evenly spread"
    " eigenvalues the error falls slowly, with three clusters in stairs,"
    " several times as fast; with three values it drops to zero at step 3.",
)

# %%
# On the left, CG's polynomial of degree 3 has found all three clusters, the black
# dots. On the right, all three matrices have nearly the same condition number.
# Three distinct values take three steps, whatever the number of unknowns, and
# narrow clusters about a dozen here. A curvature matrix with a few large
# eigenvalues and a crowd of tiny ones, which damping moves together to
# :math:`\lambda`, is of the easy kind (there are some among the `spectra
# <plot_1_newton_step.html#spectra>`__ of page 1).
#
# Rounding
# --------
#
# In exact arithmetic CG ends after at most as many steps as there are unknowns.
# Does it in floating point? Take 60 unknowns and a condition number of 1000, and go
# on for three times as long, with the loop above and nothing around it. There are
# two residuals now: the one that the recurrence carries along, and
# :math:`b - A x_k`, computed here in float64 for both number formats. Both are
# divided by :math:`\lVert b \rVert`, and held against the precision of the
# format, the distance from 1 to the next number: 1.2e-7 in float32, 2.2e-16 in
# float64.

from itertools import islice


def two_residuals(dtype, kappa=1e3, steps=180):
    eigenvalues = torch.logspace(0, math.log10(kappa), 60, dtype=dtype)
    b = torch.ones(60, dtype=dtype)
    loop = cgn._steps(eigenvalues.mul, lambda r: r, 0 * b, b)
    path = [(0 * b, b), *((x, r) for *_, x, r in islice(loop, steps))]
    x, r = (torch.stack(v).double() for v in zip(*path, strict=True))
    true = b.double() - eigenvalues.double() * x
    norm = b.double().norm()
    largest = kappa * x.norm(dim=1).max() / norm
    return r.norm(dim=1) / norm, true.norm(dim=1) / norm, largest


# %%

# Draw both residuals in both formats, and check the floor.
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for dtype, color in ((torch.float32, "orange"), (torch.float64, "blue")):
    carried, true, _ = two_residuals(dtype)
    name = str(dtype).removeprefix("torch.")
    ax.semilogy(carried, "--", c=COLORS[color], label=f"{name}, recurrence")
    ax.semilogy(true, c=COLORS[color], label=f"{name}, b − A x")
    best = true.min() / torch.finfo(dtype).eps
    print(f"{name}: {true[60]:.0e} after 60 products,", end=" ")
    print(f"at best {best:.0f} times the precision")
    assert true[60] > 1e-4 and true.max() > 1.5 and best > 1
    assert carried[-1] < 0.1 * true[-1]
    assert (carried / true - 1)[true > 0.01].abs().max() < 0.01
ax.axvline(60, color="gray", lw=0.5)
ax.set(xlabel="products", ylabel="relative residual", ylim=(1e-17, 10))
ax.legend(loc="lower left", fontsize=8)
_ = describe(
    fig,
    "Relative residuals in float32 and float64. Neither is small after 60"
    " products, the thin vertical line. The recurrence's residuals go on"
    " falling, the true ones level off, in float32 higher.",
)

# %%
# After 60 products, the thin line, neither is done: rounding spoils the conjugacy
# to directions long past, and CG has to repeat itself. It gets there later. But
# :math:`b - A x_k` does not fall below a floor, while the residual of the
# recurrence goes on falling: the two drift apart. As long as the relative residual
# is above one hundredth, they agree to a percent: the tolerance of training, 0.1,
# means what it says.
#
# How high is the floor? In each step, :math:`x_k` and :math:`r_k` are rounded,
# each on its own. The rounding of :math:`x_k` changes :math:`b - A x_k` by up to
# the precision times :math:`\lVert A \rVert \lVert x_k \rVert`, and the residual
# of the recurrence knows nothing of it. Greenbaum, `Estimating the Attainable
# Accuracy of Recursively Computed Residual Methods
# <https://doi.org/10.1137/S0895479895284944>`__, 1997, bounds the floor by a
# multiple of the largest of these changes. The next lines print the floor and the
# largest change, in units of the precision times :math:`\lVert b \rVert`, for two
# condition numbers, in float64.

for kappa, steps in ((1e3, 400), (1e6, 2000)):
    _, true, largest = two_residuals(torch.float64, kappa, steps)
    floor = true.min() / torch.finfo(torch.float64).eps
    print(f"κ = {kappa:.0e}: floor {floor:2.0f}, largest change {largest:.0e}")
    assert 1 < floor < largest

# %%
# The floor rises with the condition number, here far less than the bound allows
# for.
#
# ``cg`` adds up what rounding may have changed. As soon as that may matter, ``cg``
# computes :math:`b - A x_k`, for one more product, and goes on from there. If
# :math:`b - A x_k` no longer falls, the solve ends with the reason
# ``"stagnation"``. SciPy's ``cg`` stops by the recurrence. How do both fare on 400
# unknowns with a condition number of 10,000, in float32?

from scipy.sparse import linalg

V = torch.linalg.qr(torch.randn(400, 400).double()).Q
A = (V * torch.logspace(0, 4, 400).double() @ V.T).float()
b = torch.randn(400)


def true_residual(x):
    return (b.double() - A.double() @ x.double()).norm() / b.norm()


theirs, failed = linalg.cg(A.numpy(), b.numpy(), rtol=1e-5, maxiter=4000)
theirs = true_residual(torch.from_numpy(theirs))
x, ours = cg(A.mv, b, tol=1e-5)
print(f"SciPy: {'failed' if failed else 'converged'} at {theirs:.0e}")
print(f"cg: {ours.reason} at {true_residual(x):.0e}")
assert not failed and theirs > 10 * 1e-5
assert ours.reason == "stagnation"
assert 0.5 < ours.residuals[-1] / b.norm() / true_residual(x) < 2

double, loose = cg(A.double().mv, b.double()), cg(A.mv, b, tol=1e-3)
assert double.solve.converged and true_residual(double.x) < 1.1e-5
assert loose.solve.converged and true_residual(loose.x) < 1.1e-3

# %%
# What SciPy takes for converged misses the tolerance by more than a factor of
# ten. After ``"stagnation"``, solve in float64, or ask for what float32 can give:
# here a tolerance of 1e-3, as the last lines check. A good preconditioner gets
# further, too: see the end of the `next section <#preconditioning>`__.
#
# One thing more follows from the figure above. As neither format was done after 60
# products, the number of unknowns is no limit to rely on. Without a ``maxiter``,
# ``cg`` allows ten products for each unknown, as SciPy does.

eigenvalues = torch.logspace(0, 4, 60).double()
b = torch.ones(60).double()
limited, unlimited = cg(eigenvalues.mul, b, maxiter=60), cg(eigenvalues.mul, b)
print(f"{unlimited.solve.products} products for {b.numel()} unknowns")
highest = max(limited.solve.residuals) / b.norm()
print(f"the residual is at most {highest:.1f} times its start")
assert not limited.solve.converged and highest > 2
assert unlimited.solve.converged and unlimited.solve.products > 2 * b.numel()

# %%
# On the way, the residual is larger than at the start: what CG makes smaller at
# every step is the error in its norm, not the residual.
#
# Preconditioning
# ---------------
#
# What if the unknowns have different units? Scaling them badly raises the
# condition number, and undoing it lowers it again. A preconditioner ``M`` is a
# cheap approximation of :math:`A^{-1}`, symmetric positive definite. The
# algorithm replaces the residual by :math:`z = M r` as the raw material of
# directions, and :math:`r^\top r` by :math:`r^\top z`. What does that solve?
# Scale the unknowns, :math:`y = E x` with a diagonal matrix :math:`E`: then
# :math:`A x = b` becomes
#
# .. math:: (E^{-1} A E^{-1})\, y = E^{-1} b .
#
# Run CG on this system, and write its residuals as :math:`E^{-1} r` and its
# directions as :math:`E p`. Then its inner products are :math:`r^\top E^{-2}\, r`
# and :math:`p^\top A p`. Its next direction is :math:`E p_+ = E^{-1} r_+ + \beta
# E p`, or :math:`p_+ = E^{-2} r_+ + \beta p`. That is the algorithm with :math:`M
# = E^{-2}`. The simplest choice divides by the diagonal of :math:`A`, so that the
# rescaled matrix has ones on its diagonal:

n = 100
W = torch.randn(n, n).double()
scales = torch.logspace(-1, 1, n).double()
A = scales[:, None] * (torch.eye(n) + W @ W.T / n) * scales
b = torch.randn(n).double()


def M(r):
    return r / A.diagonal()


plain, _ = solve(A.mv, b, maxiter=999)
scaled, path = solve(A.mv, b, maxiter=999, M=M)
print(
    f"products: {plain.solve.products} without M, {scaled.solve.products} with it"
)
assert (
    plain.solve.converged and plain.solve.products > 5 * scaled.solve.products
)

E = A.diagonal().sqrt()  # M = 1 / E²
_, rescaled = solve(
    (A / E / E[:, None]).mv, b / E, maxiter=scaled.solve.products
)
torch.testing.assert_close(rescaled / E, path[: len(rescaled)])

# In float32, past what rounding allows for:
A, b = A.float(), b.float()
ends = [true_residual(cg(A.mv, b, tol=1e-7, M=N).x) for N in (None, M)]
print(f"float32: residual {ends[0]:.0e} without M, {ends[1]:.0e} with it")
assert ends[0] > 1.3 * ends[1]

# %%

# Draw the residuals with and without M.
fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
ax.semilogy(plain.solve.residuals, "--", c=COLORS["orange"], label="without M")
ax.semilogy(scaled.solve.residuals, c=COLORS["blue"], label="with M")
ax.axhline(1e-5 * b.norm(), color="gray", lw=0.5)
ax.set(xlabel="products", ylabel="residual")
ax.legend()
_ = describe(
    fig,
    "With the preconditioner, the residual falls to the tolerance in a few"
    " steps. Without it, it stays up for several times as many.",
)

# %%
# The iterates are those of the rescaled system, as the code checks. In float32, the
# solve with ``M`` ends at a smaller residual. The thin line is the tolerance,
# :math:`10^{-5}\, \lVert b \rVert` where none is asked for. In both solves it
# bounds the residual :math:`r` itself, not that of the rescaled system, :math:`E^{-1} r`. For a
# network, BackPACK computes the diagonal of the GGN: the `benchmarks
# <../benchmarks.html#what-else-was-tried>`__ compare its price with the products
# that it saves. Preconditioners that cost less are due to Martens (2010) and to
# Chapelle and Erhan, "Improved Preconditioner for Hessian Free Optimization"
# (2011). The tutorial goes without ``M``, and relies on damping.
#
# Damping
# -------
#
# From here on, a real matrix: the curvature of the tutorial's network with
# respect to the 250 weights of its first layer, on a mini-batch of 64 images.
# A short training with Adam leads to a point where the curvature is
# interesting; then BackPACK leaves the products with the generalized
# Gauss-Newton matrix (`GGN <plot_1_newton_step.html#generalized-gauss-newton>`__)
# and with the `Hessian <plot_1_newton_step.html#hessian>`__ on the weights.
# They run in float64.

# Train the tutorial's network with Adam for 150 steps.
import warnings

from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP

from cgn_tutorial.pages import make_model, mnist_loader, train

# Torch warns of BackPACK's hook on the first layer, harmlessly.
warnings.filterwarnings("ignore", "Full backward hook is firing")

torch.manual_seed(0)
model, loss_function = make_model(), torch.nn.CrossEntropyLoss()
adam = torch.optim.Adam(model.parameters(), lr=5e-3)
loader = mnist_loader()
_ = train(model, loss_function, adam, loader, steps=150)

# %%

images, labels = next(iter(loader))
model, loss_function = extend(model.double()), extend(loss_function)
loss = loss_function(model(images.double()), labels)
with backpack(GGNMP(), HMP()):
    loss.backward()
weight = model[0].weight
g = weight.grad.flatten()


def damped(product, damping):
    @torch.no_grad()
    def A(v):
        return product(v.view(1, *weight.shape)).flatten() + damping * v

    return A


print(f"loss {loss:.2f}, ‖g‖ = {g.norm():.3f}, {g.numel()} weights")

# %%
# Let :math:`\mu_1` be the largest eigenvalue of the GGN, and :math:`\mu_n` the
# smallest, which is not negative. Damping adds :math:`\lambda` to both, and brings
# the condition number down to
#
# .. math::
#
#    \kappa = \frac{\mu_1 + \lambda}{\mu_n + \lambda}
#    \le 1 + \frac{\mu_1}{\lambda} .
#
# By the bound above, a damping ten times as small allows for
# :math:`\sqrt{10} \approx 3` times as many products. How many does it take?

dampings = {0.1: "-", 1e-2: "--", 1e-3: "-.", 1e-4: ":"}
ggn = {damping: damped(weight.ggnmp, damping) for damping in dampings}
solves = {lam: cg(A, -g, tol=1e-2) for lam, A in ggn.items()}
print("damping  products  length of the step")
for damping, result in solves.items():
    length = result.x.norm()
    print(f"{damping:7g}  {result.solve.products:8d}  {length:18.2f}")

products = torch.tensor([result.solve.products for result in solves.values()])
lengths = torch.stack([result.x.norm() for result in solves.values()])
assert (products.diff() > 0).all() and (lengths.diff() > 0).all()
assert (products[1:] / products[:-1] < 10**0.5).all() and products[-1] < 50

# %%

# Draw the residuals for the four dampings.
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
colors = ("blue", "green", "orange", "purple")
for (damping, result), color in zip(solves.items(), colors, strict=True):
    relative = torch.tensor(result.solve.residuals) / g.norm()
    style, label = dampings[damping], f"λ = {damping:g}"
    ax.semilogy(relative, style, marker=".", c=COLORS[color], label=label)
ax.set(xlabel="products", ylabel="relative residual")
ax.set_xticks(range(0, int(products.max()) + 1, 3))
ax.legend()
_ = describe(
    fig,
    "Relative residuals of four solves. The smaller the damping, the more"
    " products it takes to bring the residual to a hundredth.",
)

# %%
# Less damping costs products, and lengthens the step, most of all where the
# curvature is small. The growth stays below the factor :math:`\sqrt{10}`, and the
# solves take far fewer products than there are unknowns.
#
# When to stop
# ------------
#
# A step is taken on a model that is only local, of a loss on one mini-batch.
# It need not be exact: Dembo, Eisenstat and Steihaug, `Inexact Newton Methods
# <https://doi.org/10.1137/0719025>`__ (1982), show how loose a solve may be for
# Newton's method to converge all the same. ``cg`` ends as soon as
#
# .. math::
#
#    \lVert r_k \rVert \le
#    \max(\mathrm{tol} \cdot \lVert b \rVert, \mathrm{atol}),
#
# or after ``maxiter`` products. Each option has its task:
#
# - ``tol`` is the accuracy, relative to the gradient: 0.1 asks for one digit,
#   whatever the scale of the loss.
# - ``atol`` is the size, in the units of the gradient, below which a residual
#   counts as zero. A gradient smaller than that costs no product, and its step is
#   zero.
# - ``maxiter`` is the budget: the solve takes at most so many products, and
#   returns the iterate it has reached.

A = ggn[1e-4]
assert cg(A, -g, tol=0.1).solve.products < cg(A, -g, tol=0.01).solve.products
assert cg(A, 1e-9 * g, tol=0.1, atol=1e-8).solve.products == 0
assert cg(A, -g, maxiter=4).solve.products == 4

# %%
# Is a loose solve any good? For an optimizer, two things count. The first is
# whether the step points downhill, :math:`b^\top x_k = -g^\top x_k > 0`. It does.
# By the first observation above, :math:`b = r_k + \sum_{i<k} \alpha_i A p_i`, and
# :math:`p_k` is conjugate to all :math:`p_i` in that sum, so that :math:`b^\top
# p_k = r_k^\top p_k = \lVert r_k \rVert^2`. Hence
#
# .. math::
#
#    b^\top x_k = \sum_{i < k} \alpha_i \lVert r_i \rVert^2 > 0
#
# as long as all :math:`p_i^\top A p_i > 0`. The second is how much of the model's
# possible decrease the step reaps. The part that it misses is :math:`\phi(x_k) -
# \phi(x) = \tfrac{1}{2} \lVert e_k \rVert_A^2`, half the squared error, which CG
# minimises. How small is that part, relative to the whole decrease, when the
# residual is small?


def quadratic_model(path, A, b):
    return torch.stack([x @ A(x) / 2 - b @ x for x in path])


result, path = solve(A, -g, tol=1e-4)
model_values = quadratic_model(path, A, -g)
assert (
    abs(-result.solve.decrease / model_values[-1] - 1) < 1e-9
)  # cg reports it, too
missing = 1 - model_values / model_values[-1]
relative = torch.tensor(result.solve.residuals) / g.norm()
assert (path[1:] @ -g > 0).all() and (relative.diff() > 0).any()
assert (model_values[relative > 1e-3].diff() < 0).all()

k = (relative <= 0.1).int().argmax()  # where tol = 0.1 stops
print(f"tol 0.1: after {k} of {result.solve.products} products,")
print(f"{missing[k]:.1%} of the decrease is missing")
assert k < result.solve.products / 2 and missing[k] < 0.1

# %%

# Draw the residual and the missing decrease.
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.semilogy(relative, "o-", c=COLORS["orange"], ms=4, label="residual")
ax.semilogy(
    missing[:-1], "s--", c=COLORS["blue"], ms=4, label="missing decrease"
)
ax.axhline(0.1, color="gray", lw=0.5)
ax.set(xlabel="products", ylabel="part left", ylim=(1e-4, 2))
ax.legend()
_ = describe(
    fig,
    "The residual and the missing part of the model's decrease, both relative"
    " to their start. The residual goes up and down on its way, the model"
    " value falls at every product.",
)

# %%
# The residual rises now and then, the model value falls at every product. Where
# the residual crosses the thin line, a tolerance of 0.1, more than nine tenths of
# the decrease are reaped, for less than half of the products that a residual of
# 1e-4 takes, even at this small damping. That is why training runs with so loose
# a tolerance. Martens, `Deep learning via Hessian-free optimization (2010)
# <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`__, goes one
# step further and stops by the progress of the model value itself.
#
# Negative curvature
# ------------------
#
# The argument above needs :math:`p^\top A p > 0` for every direction. The
# Hessian of a network does not promise that. What happens without it? The
# smallest example has one direction of each kind:
#
# .. math::
#
#    A = \begin{bmatrix} 1 & 0 \\ 0 & -2 \end{bmatrix}, \qquad
#    b = \begin{bmatrix} 1 \\ 2 \end{bmatrix}.
#
# Plain CG, ``negative_curvature="ignore"``, takes these steps:

diagonal = torch.tensor([1.0, -2.0]).double()
b = torch.tensor([1.0, 2.0]).double()
plain, path = solve(diagonal.mul, b, negative_curvature="ignore")
model_values = quadratic_model(path, diagonal.mul, b)
steps = path.diff(dim=0)
for k in range(2):
    curvature = steps[k] @ (diagonal * steps[k]) / (steps[k] @ steps[k])
    x1, x2 = path[k + 1].tolist()
    print(f"step {k + 1}: pᵀAp / pᵀp = {curvature:5.2f},", end=" ")
    print(f"x = ({x1:.2f}, {x2:.2f}), model {model_values[k + 1]:.2f}")

torch.testing.assert_close(path[1], -5 / 7 * b)
torch.testing.assert_close(path[2], b / diagonal)
assert (model_values[1:] > 0).all() and (path[1:] @ b < 0).all()

# %%
# The first direction is :math:`p = b = (1, 2)`, downhill, with
# :math:`p^\top A p = 1 - 8 = -7`. Along it the model falls without end; its
# only stationary point is a maximum, at :math:`\alpha = 5 / (-7)`, and that is
# where the formula goes: backwards, uphill. The second step then solves the
# system, but the solution :math:`(1, -1)` is a saddle point, higher than the
# start. As a step for an optimizer, both iterates point uphill. What can be
# done instead?

stopped = cg(diagonal.mul, b)
print(f"{stopped.solve.reason}: x = {stopped.x.tolist()}")
assert (
    stopped.solve.reason == "negative curvature"
    and stopped.solve.products == 1
)
torch.testing.assert_close(stopped.x, b)

# %%

# Draw the saddle, and both solves.
fig, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
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
# The remedy is due to Dembo and Steihaug, `Truncated-Newton algorithms for
# large-scale unconstrained optimization (1983)
# <https://doi.org/10.1007/BF02592055>`__: stop
# at the first direction with :math:`p^\top A p \le 0`. Up to there all
# curvatures are positive, so that by the sum above :math:`b^\top x_k > 0`: the
# iterate points downhill. If it is the very first direction, there is no
# iterate yet, and ``cg`` returns :math:`b = -g`, a step of gradient descent.
# (Steihaug, `The Conjugate Gradient Method and Trust Regions in Large Scale
# Optimization (1983) <https://doi.org/10.1137/0720042>`__, bounds the length of
# the step, and follows the direction to that bound.)
#
# Does it matter for the network? Here is the Hessian of its first layer, with
# the tutorial's damping and tolerance, solved in both ways.

A = damped(weight.hmp, 1e-2)
options = {"tol": 0.1, "maxiter": 40}
stopped, _ = solve(A, -g, **options)
plain, path = solve(A, -g, negative_curvature="ignore", **options)
model_values = quadratic_model(path, A, -g)
last = stopped.solve.products - 1
print(
    f"stopped after {stopped.solve.products} products: {stopped.solve.reason}"
)
print(f"model value {model_values[last]:.3f}")
print(f"plain CG after {plain.solve.products} products: {plain.solve.reason}")
print(f"model value {model_values[-1]:.3f}")

assert stopped.solve.reason == "negative curvature" and -g @ stopped.x > 0
torch.testing.assert_close(stopped.x, path[last])
assert model_values[last + 1] > model_values[last]
assert (model_values[last + 1 :].diff() > 0).any()
assert plain.solve.products > 2 * stopped.solve.products
assert -model_values[last] > loss

# %%

# Draw the quadratic model over the products.
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
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
# The two solves agree until the first direction of negative curvature. There
# one ends, with a step that points downhill. The other one steps to a maximum
# along that direction, its model value jumps up and then goes on up and down,
# for several times the products. What it converges to is the solution of the
# system, but that is a saddle point of the model, not a minimum: as the small
# example shows, it need not even be lower than the start. Nor is the stopped step
# to be taken at its word: its model promises a decrease larger than the loss, which
# cannot fall below zero.
#
# Against SciPy
# -------------
#
# Is this the method that everybody else calls CG? SciPy's ``cg`` solves the
# damped GGN system on the same products, with the same stopping rule.

import numpy as np


def product(v):
    return ggn[1e-3](torch.from_numpy(v)).numpy()


operator = linalg.LinearOperator((250, 250), product, dtype=np.float64)
theirs = []
linalg.cg(
    operator,
    -g.numpy(),
    rtol=0.1,
    callback=lambda x: theirs.append(x.copy()),
)
result, ours = solve(ggn[1e-3], -g, tol=0.1)
theirs = torch.tensor(np.array(theirs))
difference = (theirs - ours[1:]).norm() / theirs.norm()
print(f"{len(theirs)} iterates each, relative difference {difference:.0e}")
assert len(theirs) == result.solve.products and difference < 1e-10

# %%
# The same iterates, up to rounding. What the tutorial's ``cg`` adds is what
# training asks for: tensors of any shape on any device, a stop at negative
# curvature, and a residual that can be trusted.
#
# A product, a damping and a tolerance are all that a Newton step needs. `Page 3
# <plot_3_matrix_free_optimization.html>`__ makes an optimizer of them.
#
# Check yourself
# --------------
#
# .. fold:: One matrix has the condition number 100, another one 10,000. How many
#     times as many products does the bound allow for the second, to the same
#     accuracy?
#
#    About ten times as many: it goes with :math:`\sqrt{\kappa}`.
#
# .. fold:: A matrix of a million rows has four distinct eigenvalues. After how many
#     products does CG end, without rounding?
#
#    After four at most: there is a polynomial of degree four that is 1 at zero
#    and zero at all of them.
#
# .. fold:: The first product of a solve finds :math:`p^\top A p < 0`. What does
#     ``cg`` return, and is it a direction downhill?
#
#    The right-hand side :math:`b = -g`. It is, since
#    :math:`g^\top b = -\lVert g \rVert^2 < 0`.

# Check the first two answers.
steps = []
for kappa in (100, 10_000):
    rate = (kappa**0.5 - 1) / (kappa**0.5 + 1)
    steps.append(math.log(2e6) / -math.log(rate))  # to an error of 1e-6
assert abs(steps[1] / steps[0] - 10) < 0.1

four = torch.tensor([1.0, 2.0, 5.0, 9.0]).double().repeat(250)
assert cg(four.mul, torch.randn(1000).double(), tol=1e-10).solve.products == 4
