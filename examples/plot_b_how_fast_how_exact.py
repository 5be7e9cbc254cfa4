r"""
B. How fast, how exact
======================

How many products do conjugate gradients (CG) take to a given accuracy, and how exact can the
solution be? This page derives the bounds of `page 2 <plot_2_conjugate_gradients.html>`__, shows for
which matrices CG is faster than the bound, and follows CG into rounding. Here :math:`A` is
symmetric positive definite, :math:`x` is the solution of :math:`A x = b`, :math:`x_k` is the
iterate after :math:`k` steps, and :math:`e_k = x_k - x` is the error.

*About 25 minutes to read, and one to run.* To run this page, ``pip install`` the package, as the
`front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# What CG minimises
# -----------------
#
# After :math:`k` steps, the residual :math:`r_k`, the negative gradient of the quadratic model, is
# orthogonal to all :math:`k` directions (`page 2
# <plot_2_conjugate_gradients.html#the-algorithm>`__). So no combination of the directions has a
# lower model value than :math:`x_k`. The combinations of the directions are the combinations of
# :math:`b, A b, \ldots, A^{k-1} b`.
#
# .. fold:: Why are the combinations the same?
#
#    The first residual and the first direction are :math:`b`, and :math:`r_{k+1} = r_k - \alpha_k A
#    p_k` and :math:`p_{k+1} = r_{k+1} + \beta_k\, p_k` add one power of :math:`A` in each step. So
#    the :math:`k` directions are combinations of :math:`b, A b, \ldots, A^{k-1} b`. Conjugate
#    directions are linearly independent, so their combinations have :math:`k` dimensions. The
#    combinations of :math:`b, \ldots, A^{k-1} b` have at most :math:`k` dimensions: so both are the
#    same.
#
# As :math:`b = A x`, the model at :math:`x_k` exceeds the model at :math:`x` by
#
# .. math::
#
#    \begin{aligned}
#    \tfrac{1}{2} x_k^\top A x_k - x^\top A x_k + \tfrac{1}{2} x^\top A x
#    &= \tfrac{1}{2} e_k^\top A e_k \\
#    &= \tfrac{1}{2} \lVert e_k \rVert_A^2 ,
#    \end{aligned}
#
# in the norm :math:`\lVert e \rVert_A = \sqrt{e^\top A e}`, the A-norm. So among these
# combinations, :math:`x_k` has the smallest error in the A-norm.
#
# How fast
# --------
#
# **The error is a polynomial in A.** The iterate :math:`x_k` is a polynomial in :math:`A`, times
# :math:`b`. So :math:`r_k = b - A x_k` is :math:`\pi(A)\, b`, with a polynomial :math:`\pi` of
# degree :math:`k` at most and :math:`\pi(0) = 1`. The error is :math:`e_k = -A^{-1} r_k = \pi(A)\,
# e_0`: along an eigenvector with the eigenvalue :math:`\mu_i`, the first error is multiplied by
# :math:`\pi(\mu_i)`. Of all such polynomials, CG has the one with the smallest error.
#
# **Any polynomial gives a bound.** For each such :math:`\pi`,
#
# .. math::
#
#    \frac{\lVert e_k \rVert_A}{\lVert e_0 \rVert_A}
#    \le \max_i\, \lvert \pi(\mu_i) \rvert .
#
# Let :math:`\mu_n` be the smallest eigenvalue, :math:`\mu_1` the largest, and :math:`\kappa = \mu_1
# / \mu_n` the condition number.
#
# **Degree one bounds gradient descent.** A step of gradient descent of the size :math:`\eta = 2 /
# (\mu_1 + \mu_n)` multiplies the error by :math:`\pi(A)`, with :math:`\pi(\mu) = 1 - \eta \mu`.
# This line is :math:`\pm (\kappa - 1) / (\kappa + 1)` at :math:`\mu_n` and :math:`\mu_1`, and
# smaller in size between. The best :math:`\alpha` in each step does at least as well. So :math:`k`
# steps multiply the A-norm of the error by at most the :math:`k`-th power of :math:`(\kappa - 1) /
# (\kappa + 1)`.
#
# **Degree k bounds CG.** Of all polynomials of degree :math:`k` that are 1 at zero, a shifted and
# scaled polynomial of Chebyshev has the smallest maximum of :math:`\lvert \pi \rvert` between
# :math:`\mu_n` and :math:`\mu_1`. This polynomial gives CG the bound (`Shewchuk, 1994
# <https://www.cs.cmu.edu/~quake-papers/painless-conjugate-gradient.pdf>`__)
#
# .. math::
#
#    \frac{\lVert e_k \rVert_A}{\lVert e_0 \rVert_A}
#    \le 2 \left( \frac{\sqrt{\kappa} - 1}{\sqrt{\kappa} + 1} \right)^k .
#
# For a large :math:`\kappa` the bracket is about :math:`\exp(-2 / \sqrt{\kappa})`. So an error of
# :math:`\varepsilon` times the first takes at most about :math:`\tfrac{1}{2} \sqrt{\kappa} \ln(2 /
# \varepsilon)` steps of CG, or :math:`\tfrac{1}{2} \kappa \ln(1 / \varepsilon)` steps of gradient
# descent.
#
# To try the bound, diagonal matrices are enough: a rotation of the axes rotates all iterates alike.

# Define solve, which keeps the iterates, and errors; check a rotation.
import math

import torch

from cgn_tutorial import cg


def solve(A, b, **options):
    path = [torch.zeros_like(b)]
    result = cg(A, b, callback=path.append, **options)
    return result, torch.stack(path)


torch.manual_seed(0)
n = 12
eigenvalues = torch.linspace(1, 20, n).double()
Q = torch.linalg.qr(torch.randn(n, n).double()).Q
b = torch.randn(n).double()
options = {"tol": 0, "atol": 0, "maxiter": n}
_, path = solve((Q @ torch.diag(eigenvalues) @ Q.T).mv, b, **options)
_, path_diagonal = solve(eigenvalues.mul, Q.T @ b, **options)
torch.testing.assert_close(path_diagonal @ Q.T, path)


def errors(eigenvalues, steps):
    b = torch.ones_like(eigenvalues)
    result, path = solve(eigenvalues.mul, b, tol=1e-12, maxiter=steps)
    error = (eigenvalues * (path - b / eigenvalues) ** 2).sum(1).sqrt()
    return error / error[0], torch.tensor(result.solve.residuals) / b.norm()


# %%
# Three matrices have 3000 eigenvalues each, spread evenly between 1 and :math:`\kappa`. How close
# do the errors come to their bounds, the dashed lines?

# Solve, check the bound, and draw the errors and the residuals.
from matplotlib import pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe

fig, axes = plt.subplots(2, 1, figsize=(5, 4.6), sharex=True)
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
print("products to an error below 1e-6:")
print(", ".join(f"κ = {k}: {count}" for k, count in products.items()))
assert 8 < products[1000] / products[10] < 11
axes[0].legend()
for ax, name in zip(axes, ("error (A-norm)", "residual"), strict=True):
    ax.set(ylabel=f"relative {name}", ylim=(1e-9, 10))
axes[1].set_xlabel("products")
fig.tight_layout()
_ = describe(
    fig,
    "Errors and residuals of conjugate gradients fall on a"
    " logarithmic axis, the steeper the smaller the condition number. Each"
    " error curve stays below its dashed bound, and close to it at first.",
)

# %%
# With a hundred times the :math:`\kappa`, CG takes about nine times the products; by the bound,
# :math:`\sqrt{100} = 10` times.
#
# A solve knows the residual, and not the error. As :math:`\lVert e_k \rVert_A^2 = r_k^\top A^{-1}
# r_k`, the relative residual and the relative error differ by a factor of at most
# :math:`\sqrt{\kappa}`, in either direction.
#
# The error can be estimated, five steps late. In step :math:`k`, the model falls by
# :math:`\tfrac{1}{2} \alpha_k \lVert r_k \rVert^2`, and so :math:`\lVert e_k \rVert_A^2` by twice
# this. Over five steps,
#
# .. math::
#
#    \sum_{j=k-5}^{k-1} \alpha_j \lVert r_j \rVert^2
#    = \lVert e_{k-5} \rVert_A^2 - \lVert e_k \rVert_A^2 .
#
# If the error falls fast, the last term is small, and the root of the sum is close to the error
# five steps ago (`Strakoš and Tichý, 2002
# <https://etna.math.kent.edu/vol.13.2002/pp56-80.dir/pp56-80.pdf>`__). How close?

for kappa in (10, 100, 1000):
    error, residual = errors(torch.linspace(1, kappa, 3000).double(), 250)
    error, residual = error[error > 1e-8], residual[: (error > 1e-8).sum()]
    assert residual.div(error).log().abs().max() < 0.5 * math.log(kappa)
    seen = (1 - (error[5:] / error[:-5]) ** 2).sqrt()
    print(f"κ = {kappa:4d}: {seen.min():.0%} to {seen.max():.0%} of the error")
    assert seen.min() > (0.6 if kappa == 1000 else 0.9) and seen.max() < 1

# %%
# The estimate is never too large, and here at least six tenths of the error.
#
# Clustered eigenvalues
# ---------------------
#
# The polynomial has to be small at the eigenvalues, and may be large between them. Let the
# eigenvalues lie in three clusters, around :math:`c_1, c_2` and :math:`c_3`. A polynomial of degree
# 3 can have a zero in each cluster:
#
# .. math::
#
#    \pi(\mu) = \Bigl(1 - \frac{\mu}{c_1}\Bigr) \Bigl(1 - \frac{\mu}{c_2}\Bigr)
#    \Bigl(1 - \frac{\mu}{c_3}\Bigr) .
#
# If each cluster is a single value, CG is done after three steps. If the clusters are narrow,
# :math:`\lvert \pi \rvert` is at most some small :math:`\omega` on the clusters: after three steps,
# the error is at most :math:`\omega` times the first, after six steps :math:`\omega^2` times (by
# :math:`\pi^2`, of degree 6), and so on.
#
# Three matrices have eigenvalues that are spread evenly, that lie in three clusters of width 1, or
# that are three single values:

clusters = torch.tensor([20.0, 300.0, 1000.0]).double()
clustered = (clusters[:, None] + torch.linspace(-0.5, 0.5, 100)).flatten()
# Unknowns with eigenvalues on a grid show CG's polynomial between the clusters.
# Their entries of b are too small to change the solve.
grid = torch.linspace(0, 1050, 200).double()
weights = torch.cat([0 * clustered + 1, 0 * grid + 1e-9])
both = torch.cat([clustered, grid])
_, path = solve(both.mul, weights, maxiter=3)
polynomials = ((weights - both * path) / weights)[:, len(clustered) :]

spectra = {
    "spread evenly": torch.linspace(20, 1000, 300).double(),
    "in clusters": clustered,
    "single values": clusters.repeat_interleave(100),
}
curves = {name: errors(values, 60)[0] for name, values in spectra.items()}
for name, error in curves.items():
    print(
        f"{name:13s}: {(error > 1e-6).sum():2d} products to an error of 1e-6"
    )

omega = (1 - clustered[:, None] / clusters).prod(1).abs().max()
left = [f"{part:.1g}" for part in curves["in clusters"][3:13:3]]
print(f"ω = {omega:.2f}, errors after 3, 6, 9, 12 steps:")
print(", ".join(left))

# %%

# Check the three curves.
for k, part in enumerate(curves["in clusters"]):
    assert part <= omega ** (k // len(clusters))
assert (curves["single values"] > 1e-6).sum() == len(clusters)
assert (curves["in clusters"] > 1e-6).sum() < 15
assert (curves["spread evenly"] > 1e-6).sum() > 40

# %%

# Draw the polynomials, and the errors over the products.
fig, axes = plt.subplots(2, 1, figsize=(5, 4.8))
styles = {"blue": "-", "orange": "--", "green": "-."}.items()
for k, (color, style) in enumerate(styles, start=1):
    axes[0].plot(
        grid, polynomials[k], style, c=COLORS[color], label=f"k = {k}"
    )
axes[0].plot(clusters, 0 * clusters, "o", color="black", ms=4)
axes[0].axhline(0, color="gray", lw=0.5)
axes[0].set(xlabel="eigenvalue", ylabel="polynomial", ylim=(-1.1, 1.1))
for (color, style), name in zip(styles, curves, strict=True):
    axes[1].semilogy(curves[name], style, c=COLORS[color], label=name)
axes[1].set(xlabel="products", ylabel="relative error")
axes[1].set_ylim(1e-9, 10)
for ax in axes:
    ax.legend()
fig.tight_layout()
_ = describe(
    fig,
    "Above: polynomials of degree one to three, all one at zero; the third"
    " passes through zero at the three clusters. Below: with evenly spread"
    " eigenvalues the error falls slowly, with three clusters in stairs,"
    " several times as fast; with three values it drops to zero at step 3.",
)

# %%
# CG's polynomial of degree 3 is almost zero at all three clusters, the black dots. The three
# matrices have nearly the same condition number, but three single values take three products, three
# narrow clusters about a dozen, and evenly spread eigenvalues several times as many. The curvature
# matrices of page A have `a few large eigenvalues and many tiny ones
# <plot_a_positive_curvature.html#spectra>`__; damping moves the tiny ones to a narrow cluster at
# :math:`\lambda`.
#
# Preconditioning
# ---------------
#
# A preconditioner ``M`` is a symmetric positive definite approximation of :math:`A^{-1}` that is
# cheap to apply. The algorithm builds its directions from :math:`z = M r` in place of :math:`r`,
# and replaces :math:`r^\top r` by :math:`r^\top z`. If :math:`M = E^{-2}`, with a diagonal matrix
# :math:`E`, then the algorithm is CG for the rescaled unknowns :math:`E x`:
#
# .. math:: (E^{-1} A E^{-1})\, (E x) = E^{-1} b .
#
# .. fold:: Why is CG with M the same as CG on the rescaled system?
#
#    Run CG on the rescaled system. Write the residuals as :math:`E^{-1} r` and the directions as
#    :math:`E p`. The inner products are then :math:`r^\top E^{-2}\, r` and :math:`p^\top A p`. The
#    next direction is :math:`E p_+ = E^{-1} r_+ + \beta E p`, or :math:`p_+ = E^{-2} r_+ + \beta
#    p`: the algorithm with :math:`M = E^{-2}`.
#
# The simplest preconditioner divides by the diagonal of :math:`A`. Take 100 unknowns, with scales
# from 0.1 to 10:

n = 100
W = torch.randn(n, n).double()
scales = torch.logspace(-1, 1, n).double()
A = scales[:, None] * (torch.eye(n) + W @ W.T / n) * scales
b = torch.randn(n).double()


def M(r):
    return r / A.diagonal()


plain, _ = solve(A.mv, b, maxiter=999)
scaled, path = solve(A.mv, b, maxiter=999, M=M)
print(f"products without M: {plain.solve.products}", end=", ")
print(f"with M: {scaled.solve.products}")

# %%

# Check both solves, and the rescaled system.
assert plain.solve.converged
assert plain.solve.products > 5 * scaled.solve.products

E = A.diagonal().sqrt()  # M = 1 / E²
_, rescaled = solve(
    (A / E / E[:, None]).mv, b / E, maxiter=scaled.solve.products
)
torch.testing.assert_close(rescaled / E, path[: len(rescaled)])

# %%

# Draw the residuals with and without M.
fig, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
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
# Both solves stop by the residual :math:`r`, at the thin line. (Without ``M``, rounding makes the
# solve longer than its 100 unknowns: see the next section.) On images, this tutorial uses no
# preconditioner (the `benchmarks <../benchmarks.html#what-else-was-tried>`__ say why); on least
# squares, `page 7 <plot_7_where_it_wins.html>`__ does.
#
# Rounding
# --------
#
# In exact arithmetic, CG takes at most as many steps as there are unknowns, and the residual of the
# recurrence, :math:`r_{k+1} = r_k - \alpha_k A p_k`, is :math:`b - A x_k`. And with rounding? Take
# 60 unknowns, a condition number of 1000 and 180 steps of the bare loop of ``cg``. The precision of
# a format is the distance from 1 to the next number, 1.2e-7 in float32 and 2.2e-16 in float64.

from itertools import islice

from cgn_tutorial import cgn


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
fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for dtype, color in ((torch.float32, "orange"), (torch.float64, "blue")):
    carried, true, _ = two_residuals(dtype)
    name = str(dtype).removeprefix("torch.")
    ax.semilogy(carried, "--", c=COLORS[color], label=f"{name}, recurrence")
    ax.semilogy(true, c=COLORS[color], label=f"{name}, b − A x")
    best = true.min() / torch.finfo(dtype).eps
    print(f"{name}: b − A x is {true[60]:.0e} after 60 products,")
    print(f"    and at best {best:.0f} times the precision")
    assert true[60] > 1e-4 and true.max() > 1.5 and best > 1
    assert carried[-1] < 0.1 * true[-1]
    assert (carried / true - 1)[true > 0.01].abs().max() < 0.01
ax.axvline(60, color="gray", lw=0.5)
ax.set(xlabel="products", ylabel="relative residual", ylim=(1e-17, 10))
ax.legend(loc="lower left")
_ = describe(
    fig,
    "Relative residuals in float32 and float64. Neither is small after 60"
    " products, the thin vertical line. The recurrence's residuals go on"
    " falling, the true ones level off, in float32 higher.",
)

# %%
# After 60 products, the thin line, the residual is not small in either format. Later, :math:`b - A
# x_k` stops at a floor, while the residual of the recurrence goes on falling. While the residuals
# are above 0.01, the two agree to one percent. The tolerance of training, 0.1, is far from the
# floor.
#
# How high is the floor? The rounding of :math:`x_k` changes :math:`b - A x_k` by up to the
# precision times :math:`\lVert A \rVert \lVert x_k \rVert`. `Greenbaum (1997)
# <https://doi.org/10.1137/S0895479895284944>`__ bounds the floor by a multiple of the largest of
# these changes, over all steps :math:`k`. In two examples, the floor is far lower than the largest
# change. (The unit of both numbers is the precision times :math:`\lVert b \rVert`.)

for kappa, steps in ((1e3, 400), (1e6, 2000)):
    _, true, largest = two_residuals(torch.float64, kappa, steps)
    floor = true.min() / torch.finfo(torch.float64).eps
    print(f"κ = {kappa:.0e}: floor {floor:2.0f}, largest change {largest:.0e}")
    assert 1 < floor < largest / 10

# %%
# Drift and its cure
# ------------------
#
# ``cg`` estimates how far the two residuals have drifted apart. If the drift matters, ``cg``
# computes :math:`b - A x_k`, for one more product. Then there are three cases:
#
# - :math:`b - A x_k` meets the tolerance: the solve has converged.
# - :math:`b - A x_k` has at least halved since its last computation: CG starts again from
#   :math:`x_k`.
# - Otherwise, the solve ends with the reason ``"stagnation"``.
#
# SciPy's ``cg`` stops by the residual of the recurrence. For a system of 400 unknowns with a
# condition number of 10,000, in float32, and a tolerance of 1e-5, how large is :math:`b - A x`,
# relative to :math:`b`, at the end?

from scipy.sparse import linalg

V = torch.linalg.qr(torch.randn(400, 400).double()).Q
A_400 = (V * torch.logspace(0, 4, 400).double() @ V.T).float()
b_400 = torch.randn(400)


def true_residual(A, b, x):
    return (b.double() - A.double() @ x.double()).norm() / b.norm()


theirs, failed = linalg.cg(
    A_400.numpy(), b_400.numpy(), rtol=1e-5, maxiter=4000
)
theirs = true_residual(A_400, b_400, torch.from_numpy(theirs))
x, ours = cg(A_400.mv, b_400, tol=1e-5)
found = true_residual(A_400, b_400, x)
print(f"SciPy: {'failed' if failed else 'converged'} at {theirs:.0e}")
print(f"cg: {ours.reason} at {found:.0e}")

# %%

# Check both ends, and what helps: float64, or a looser tolerance.
assert not failed and theirs > 10 * 1e-5
assert ours.reason == "stagnation"
assert 0.5 < ours.residuals[-1] / b_400.norm() / found < 2
double = cg(A_400.double().mv, b_400.double())
loose = cg(A_400.mv, b_400, tol=1e-3)
assert double.solve.converged
assert true_residual(A_400, b_400, double.x) < 1.1e-5
assert loose.solve.converged
assert true_residual(A_400, b_400, loose.x) < 1.1e-3

# %%
# SciPy reports convergence, but the solution misses the tolerance by more than a factor of ten.
# After ``"stagnation"``, solve in float64, or take a tolerance that float32 can reach, here 1e-3. A
# good preconditioner helps, too, here for the badly scaled matrix above:

A, b, ends = A.float(), b.float(), []
for name, N in (("without M", None), ("with M", M)):
    end = true_residual(A, b, cg(A.mv, b, tol=1e-7, M=N).x)
    print(f"float32, {name}: residual {end:.1e}")
    ends.append(end)
assert ends[0] > 1.3 * ends[1]

# %%
# Apart from rounding, SciPy's ``cg`` and ours take the same steps, here with the damped GGN of the
# network of page 3:

# Solve with both, and compare the iterates.
import numpy as np
from torch.nn.utils import parameters_to_vector

from cgn_tutorial import GGN
from cgn_tutorial.pages import load_mnist, make_model

images, labels = (t[:64] for t in load_mnist(train=False).tensors)
model = make_model().double()
z = model(images.double())
loss = torch.nn.functional.cross_entropy(z, labels)
g = parameters_to_vector(
    torch.autograd.grad(loss, model.parameters(), retain_graph=True)
)
(ggn,) = GGN([model.parameters()]).backward(loss, z)


def damped(v):
    return ggn(v[None])[0] + 1e-3 * v


def product(v):
    return damped(torch.from_numpy(v)).detach().numpy()


shape = (len(g), len(g))
operator = linalg.LinearOperator(shape, product, dtype=np.float64)
theirs = []
linalg.cg(
    operator,
    -g.numpy(),
    rtol=1e-3,
    callback=lambda x: theirs.append(x.copy()),
)
result, ours = solve(damped, -g, tol=1e-3)
theirs = torch.tensor(np.array(theirs))
difference = (theirs - ours[1:]).norm() / theirs.norm()
print(f"{len(theirs)} iterates each, relative difference {difference:.0e}")
assert len(theirs) == result.solve.products and difference < 1e-10

# %%
# Above, 60 products were not enough for 60 unknowns. So without a ``maxiter``, ``cg`` allows ten
# products for each unknown, as SciPy does. The residual may also become larger than at the start:
# CG lowers the A-norm of the error at every step, and not the residual.

eigenvalues = torch.logspace(0, 4, 60).double()
b = torch.ones(60).double()
limited = cg(eigenvalues.mul, b, maxiter=60)
unlimited = cg(eigenvalues.mul, b)
print(f"{unlimited.solve.products} products for {b.numel()} unknowns")
highest = max(limited.solve.residuals) / b.norm()
print(f"largest residual: {highest:.1f} times the first")

# %%

# Check both solves.
assert not limited.solve.converged and highest > 2
assert unlimited.solve.converged and unlimited.solve.products > 2 * b.numel()

# %%
# Check yourself
# --------------
#
# .. fold:: A matrix of a million rows has four distinct eigenvalues. After how many products does
#     CG end, in exact arithmetic?
#
#    Four at most: some polynomial of degree four is 1 at zero, and zero at all four eigenvalues.
#
# .. fold:: A solve in float32 ends with the reason ``"stagnation"``. Does a larger ``maxiter``
#     help?
#
#    No: :math:`b - A x_k` has reached its floor. Solve in float64, raise the tolerance, or use a
#    preconditioner.
#
# .. fold:: Exercise: in the line ``clusters``, add a fourth cluster at 600. Does :math:`\omega`
#     fall? Do the four clusters take fewer products than the three clusters?
#
#    :math:`\omega` falls from 0.06 to 0.04. But each power of :math:`\omega` now takes four
#    products, and the solve takes 14 products in place of 12. Four single values take four.

# Check the answers.
four = torch.tensor([1.0, 2.0, 5.0, 9.0]).double().repeat(250)
assert cg(four.mul, torch.randn(1000).double(), tol=1e-10).solve.products == 4

longer = cg(A_400.mv, b_400, tol=1e-5, maxiter=8000).solve
assert longer.reason == "stagnation"

clusters = torch.tensor([20.0, 300.0, 600.0, 1000.0]).double()
four_clusters = clusters[:, None] + torch.linspace(-0.5, 0.5, 100)
smaller = (1 - four_clusters.reshape(-1, 1) / clusters).prod(1).abs().max()
assert abs(omega - 0.06) < 0.005 and abs(smaller - 0.04) < 0.005
assert (curves["in clusters"] > 1e-6).sum() == 12
assert (errors(four_clusters.flatten(), 60)[0] > 1e-6).sum() == 14
assert (errors(clusters.repeat_interleave(100), 60)[0] > 1e-6).sum() == 4
