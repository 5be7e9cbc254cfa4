r"""
3. Matrix-free second-order optimization
========================================

Can an optimizer train a network in 50 steps, if gradient descent has not even
begun to by then? This page writes one that does. At each step it asks for the
curvature of the loss, solves a linear system for the Newton step by conjugate
gradients (CG), and never stores a matrix: it only multiplies vectors with the
block diagonal of a curvature matrix, matrix-free. It is tried on MNIST, with a
convolutional network full of sigmoids. Each of them multiplies the gradient
that flows back through it by at most one quarter, so that the first layers
receive the least: gradients vanish.

At the parameters :math:`x_t`, replace the loss :math:`L` by its local
quadratic model,

.. math::

   q(v) = L(x_t) + g^\top v
                + \tfrac{1}{2} v^\top (C + \lambda I)\, v ,

and step towards its minimum,

.. math::

   (C + \lambda I)\, v = -g, \qquad x_{t+1} = x_t + \gamma v .

(`Page 1 <plot_1_newton_step.html#two-dimensions>`__ derives both.)
Here :math:`x_t` is the vector of all parameters at step :math:`t`, and :math:`g`
the gradient of the loss there. :math:`C` is a curvature matrix: the Hessian, or
a relative of it that is positive semi-definite. The `damping
<plot_1_newton_step.html#step-size-and-damping>`__ :math:`\lambda`, times the
identity :math:`I`, shortens the step, most of all where the curvature is small.
:math:`v` is the Newton step, which already points downhill if
:math:`C + \lambda I` is positive definite, and :math:`\gamma` the step size.

The batches of 64 images are those of the published run. Second-order methods
usually have larger ones; `page 4 <plot_4_is_it_worth_it.html#who-wins>`__ tells
what 256 and 1,024 change.

The optimizer, the experiment and the published figures are those of BackPACK's
example `Matrix-free second-order optimization
<https://docs.backpack.pt/en/master/use_cases/example_cg_newton.html>`__
(Felix Dangel, Frederik Kunstner and Philipp Hennig, `BackPACK: Packing more
into backprop <https://openreview.net/forum?id=BJlrF24twB>`__, ICLR 2020),
which itself builds on `PyTorch's MNIST example
<https://github.com/pytorch/examples/tree/main/mnist>`__. Text and code here
are our own.

To run this page yourself, download it from its end, and install its package:
``pip install`` and the address that stands on the site's `front page
<../index.html#run-it-yourself>`__.
"""

# %%
# Two layers, one of them shrunk
# ------------------------------
#
# What may curvature do about vanishing gradients? If a parameter's effect on the
# outputs shrinks by a factor :math:`s`, its gradient shrinks by :math:`s`, and
# what the outputs contribute to its curvature by :math:`s^2`. Gradient descent
# then takes a step :math:`s` times as long, where one :math:`1 / s` times as long
# is needed. A step divided by the curvature is just that. But the division is
# damped: :math:`\lambda` is added to the curvature, and where it is the larger of
# the two, the step is the gradient over :math:`\lambda`, whatever the curvature.
# Take two parameters, the gradient of both 1 and the curvature of both 1, and
# shrink the second one:

import torch

from cgn_tutorial.pages.plotting import COLORS, describe

LAM = 1e-2
s = torch.tensor([1.0, 0.3, 0.01])  # the first, and two ways to shrink another
g, C = s, s**2
for i in range(3):
    print(
        f"s = {s[i]:.2f}: gradient {g[i]:.2f}, curvature {C[i]:.4f},", end=" "
    )
    print(f"step {g[i] / C[i]:.0f}, damped {g[i] / (C[i] + LAM):.2f}")

# %%

# Draw gradient, curvature and steps of both, and the damped step over s.
from matplotlib import pyplot as plt

figure, (left, right) = plt.subplots(
    1, 2, figsize=(7, 3.2), sharey=True, layout="constrained"
)
bars = {"gradient": g, "curvature": C, "step g / C": g / C}
bars["damped step"] = g / (C + LAM)
for i, (shift, color) in enumerate(
    ((-0.27, "gray"), (0, "blue"), (0.27, "orange"))
):
    style = {"width": 0.25, "color": COLORS[color]}
    style["label"] = f"shrunk, s = {s[i]:g}" if i else "not shrunk"
    left.bar(torch.arange(4) + shift, [v[i] for v in bars.values()], **style)
left.set_xticks(range(4), [name.replace(" ", "\n", 1) for name in bars])
left.set(yscale="log", ylim=(1e-5, 2e3), ylabel="size")
left.legend(fontsize=8, loc="upper left", frameon=False)
line = torch.logspace(-3, 0, 100)
right.loglog(line, 1 / line, "--", c=COLORS["gray"], label="g / C")
right.loglog(line, line / (line**2 + LAM), c=COLORS["green"], label="damped")
right.loglog(line, line, ":", c=COLORS["gray"], label="gradient")
right.axvline(LAM**0.5, color="gray", lw=0.5)
right.text(LAM**0.5 * 1.15, 3e-5, "s² = λ")
right.set(xlabel="s, how far it is shrunk", xlim=(1e-3, 1))
right.legend(fontsize=8)
for ax in (left, right):
    ax.minorticks_off()
_ = describe(
    figure,
    "Left: bars of gradient, curvature, step and damped step of a parameter"
    " that is not shrunk, and of one that is shrunk by 0.3 or by 0.01. The"
    " undamped step grows as the gradient shrinks, the damped one grows for"
    " 0.3 and is back at 1 for 0.01. Right: over s, the damped step follows the"
    " undamped one down to where s squared is the damping, and then falls with"
    " the gradient.",
)

# %%
# Down to where :math:`s^2` is the damping, the thin line, the step grows as it
# should. From there on it falls with the gradient, and is :math:`1 / \lambda`
# times as long as the gradient. Both cases occur in the network of this page, and
# `a table below <#what-the-step-does-in-each-layer>`__ says where.

damped = line / (line**2 + LAM)
peak = line[damped.argmax()]
assert abs(peak / LAM**0.5 - 1) < 0.05
assert abs(damped[0] * LAM / line[0] - 1) < 0.01

# %%
# Configuration
# -------------
#
# The settings are those of the published run. The device is an accelerator if
# this machine has one, else the CPU.

# What this page imports.
import warnings

from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from torch import nn

from cgn_tutorial import CGNOptimizer, cg
from cgn_tutorial.pages import (
    accuracy,
    default_device,
    load_published_run,
    make_model,
    mnist_loader,
    train,
)

# Torch warns of BackPACK's hook on the first layer, harmlessly.
warnings.filterwarnings("ignore", "Full backward hook is firing")

# %%
# Solves stop at a relative residual of 0.1, which is loose, or after at most
# 20 iterations.

BATCH_SIZE = 64
LR = 0.1  # the step size gamma
DAMPING = 1e-2  # lambda
STOP = {"maxiter": 20, "tol": 0.1, "atol": 1e-6}
STEPS = 51  # iterations 0 to 50
PRINT_EVERY = 10
SEED = 0
device = default_device()

# %%
# MNIST's 60,000 training images come with the package, normalised. A loader
# shuffles them with torch's global generator, so that the seed, set before
# each model is made, also fixes the batches: all runs with the same seed see the
# same ones.

loader = mnist_loader(BATCH_SIZE)
loss_function = nn.CrossEntropyLoss()
print(f"{len(loader.dataset):,} images, {len(loader)} batches")

# %%
# The model has two convolutions and two linear layers, with sigmoids between
# them: 21,840 parameters.

model = make_model()
print(model)
assert sum(p.numel() for p in model.parameters()) == 21_840

# %%
# How slow is this model for gradient descent? Compare the gradient's length in
# each layer at the start.

torch.manual_seed(SEED)
model = make_model()
inputs, targets = next(iter(loader))
loss_function(model(inputs), targets).backward()
norms = {
    name: p.grad.norm().item()
    for name, p in model.named_parameters()
    if name.endswith("weight")
}
for name, norm in norms.items():
    print(f"{name:10}  ‖g‖ = {norm:.4f}")

# %%
# The first convolution's gradient is less than a hundredth of the last
# layer's: with one step size for both, gradient descent moves it less than a
# hundredth as far.

first, *_, last = norms.values()
assert first < last / 100

# %%
# Writing the optimizer
# ---------------------
#
# BackPACK computes the `block diagonal
# <plot_1_newton_step.html#block-diagonal>`__ of the curvature: one block
# :math:`C_i` for each parameter tensor, the weight or the bias of a layer, and
# nothing between different ones. So the system falls apart into small ones,
# and each parameter :math:`x^{(i)}` with gradient :math:`g_i` gets its own:
#
# .. math::
#
#    (C_i + \lambda I)\, v_i = -g_i , \qquad
#    x^{(i)} \leftarrow x^{(i)} + \gamma v_i .
#
# Written as :math:`A x = b`, with :math:`A = C_i + \lambda I`, :math:`b = -g_i`
# and the step :math:`v_i` as the unknown :math:`x`, each is solved by `CG
# <plot_2_conjugate_gradients.html#the-algorithm>`__, the package's ``cg``. CG needs
# nothing but the products :math:`A p` with vectors :math:`p` of its choice, and
# stops as soon as the residual :math:`r = b - A x` is small, relative to
# :math:`b` or absolutely,
#
# .. math::
#
#    \lVert b - A x \rVert
#    \le \max(\mathrm{tol} \cdot \lVert b \rVert,\ \mathrm{atol}) ,
#
# or after ``maxiter`` products (`when to stop
# <plot_2_conjugate_gradients.html#when-to-stop>`__ says what each is for). A
# loose tolerance is enough for a step downhill: from zero, and as long as it
# meets positive curvature only, every iterate of CG is one. What a tighter one
# costs, and what it brings here, is in the `benchmarks
# <../benchmarks.html#what-else-was-tried>`__.
#
# BackPACK leaves the product with :math:`C_i` on the parameter, as a function
# ``ggnmp`` of one or more vectors.


def newton_step(p):
    """The solution v of (C + λI) v = −g, for one parameter."""

    def A(v):
        return p.ggnmp(v[None])[0] + DAMPING * v

    return cg(A, -p.grad, **STOP).x


class NewtonCG(torch.optim.Optimizer):
    """Move each parameter by γ times its Newton step."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """Solve for all parameters, then move all of them."""
        (group,) = self.param_groups
        steps = [newton_step(p) for p in group["params"]]
        for p, v in zip(group["params"], steps, strict=True):
            p.add_(v, alpha=group["lr"])


# %%
# Training with the GGN
# ---------------------
#
# The generalized Gauss–Newton matrix (GGN) is the first of the four curvature
# matrices to try. BackPACK follows the passes through each module, so ``extend``
# makes model and loss known to it, once.

torch.manual_seed(SEED)
model = extend(make_model().to(device))
loss_function = extend(nn.CrossEntropyLoss())
optimizer = NewtonCG(model.parameters(), LR)

# %%
# The training loop is the usual one, but for one line: inside
# ``with backpack(GGNMP())``, ``backward()`` leaves products as well as gradients.
# Progress is measured by the loss of the mini-batch, and by its accuracy: the
# share of images whose largest output is their label.

losses, accuracies = [], []
for i, (inputs, targets) in zip(range(STEPS), loader, strict=False):
    inputs, targets = inputs.to(device), targets.to(device)

    optimizer.zero_grad()
    outputs = model(inputs)
    loss = loss_function(outputs, targets)
    with backpack(GGNMP()):
        loss.backward()
    optimizer.step()

    losses.append(loss.item())
    accuracies.append(accuracy(outputs, targets))
    if i % PRINT_EVERY == 0:
        print(f"{i:2d}: {losses[-1]:.5f}, {accuracies[-1]:.5f}")

# %%
# Within 50 steps the loss falls from 2.3, which is what guessing costs
# (ln 10), to below 0.5, and more than four of five images of the last batch
# are recognised.

assert losses[0] > 2.3 > 0.5 > losses[-1]
assert accuracies[-1] > 0.8

# %%

# Draw the loss and the accuracy.
from cgn_tutorial.pages.plotting import plot_histories

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
left.plot(losses, color=COLORS["blue"])
left.set(xlabel="iteration", ylabel="mini-batch loss")
right.plot(accuracies, color=COLORS["blue"])
right.set(xlabel="iteration", ylabel="mini-batch accuracy", ylim=(0, 1))
figure.tight_layout()
_ = describe(
    figure,
    "Training with the GGN. Left: the mini-batch loss stays near 2.3 for some "
    "fifteen iterations, then falls to about 0.5 by iteration 31. Right: the accuracy rises "
    "from 0.1 to above 0.8 over the same iterations.",
)

# %%
# What the package adds
# ---------------------
#
# The package's ``CGNOptimizer``, for conjugate-gradient Newton, takes the same
# steps, and its ``train`` is the loop above, plus a clock.

SOLVER = {"lr": LR, "damping": DAMPING, **STOP}


def newton(extension, **options):
    return lambda p: CGNOptimizer(p, extension, **SOLVER, **options)


def run(make_optimizer, seed=SEED, log_every=PRINT_EVERY):
    torch.manual_seed(seed)
    model = extend(make_model().to(device))
    return train(
        model,
        loss_function,
        make_optimizer(model.parameters()),
        loader,
        steps=STEPS,
        log_every=log_every,
    )


histories = {"GGN": run(newton(GGNMP()))}
gap = max(
    abs(a - b) for a, b in zip(histories["GGN"].loss, losses, strict=True)
)
print(f"largest difference between the losses: {gap:g}")

# %%
# On a CPU, they are equal to the last bit. What the package adds:
#
# - blocks of several parameters: `a layer, or the whole network
#   <plot_5_any_architecture.html#blocks-parameter-layer-network>`__;
# - checks before anything moves: an error names the parameter, and the remedy;
# - weight decay, `a bound on the step <plot_4_is_it_worth_it.html#who-wins>`__,
#   ``max_length``, and `a warm start
#   <plot_4_is_it_worth_it.html#where-do-fixed-settings-fail>`__ of the solves;
# - how each solve went, ``optimizer.solves``;
# - ``whole_batch``, for `several processes <plot_6_several_processes.html>`__.
#
# Optimizer and ``cg`` are one file to copy that needs nothing but PyTorch, `cgn.py
# <../cgn.py>`__.

assert gap == 0 if device.type == "cpu" else gap < 2e-3

# %%
# What the step does in each layer
# --------------------------------
#
# For each layer's weight, on one batch, before and after this training: how
# long is the gradient :math:`g`; how much does the GGN curve at most, which is
# its largest eigenvalue; how much longer than the gradient is the step
# :math:`v`; and does it point along :math:`-g`? Twenty products with a vector
# that is normalised in between turn it to the eigenvector of the largest
# eigenvalue.


def measure(model):
    inputs, targets = (t.to(device) for t in loader.dataset[:BATCH_SIZE])
    model.zero_grad()
    with backpack(GGNMP()):
        loss_function(model(inputs), targets).backward()
    return [
        layer_row(layer.weight) for layer in model if hasattr(layer, "weight")
    ]


@torch.no_grad()
def layer_row(p):
    v, u = newton_step(p), p.grad
    for _ in range(20):
        u = p.ggnmp((u / u.norm())[None])[0]
    g, ratio = p.grad.norm(), v.norm() / p.grad.norm()
    cosine = -(p.grad * v).sum() / g / v.norm()
    return [number.item() for number in (g, u.norm(), ratio, cosine)]


# %%

torch.manual_seed(SEED)
tables = {
    "before": measure(extend(make_model().to(device))),
    "after": measure(model),
}
LAYERS = ["conv 1", "conv 2", "linear 1", "linear 2"]
for when, rows in tables.items():
    print(f"{when:10}     ‖g‖   curvature   ‖v‖/‖g‖   cosine of v and −g")
    for name, row in zip(LAYERS, rows, strict=True):
        g, top, ratio, cosine = row
        print(
            f"{name:8}  {g:8.4f}   {top:9.5f}   {ratio:7.1f}   {cosine:6.2f}"
        )

# %%

# Draw the curvature and the step of each layer.
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
for (when, rows), color, marker in zip(
    tables.items(), ("blue", "orange"), "os", strict=True
):
    style = {"c": COLORS[color], "marker": marker, "ms": 5, "label": when}
    left.plot([row[1] for row in rows], range(4), **style)
    right.plot([row[2] for row in rows], range(4), **style)
left.axvline(DAMPING, color="gray", ls="--")
_ = left.text(DAMPING * 1.2, 3.3, "λ", color="gray")
left.set(xscale="log", xlabel="largest curvature", yticks=range(4))
left.set(yticklabels=LAYERS, ylim=(3.5, -0.5))
right.set(xscale="log", xlabel="‖v‖ / ‖g‖")
right.axvline(1 / DAMPING, color="gray", ls="--")
_ = right.text(0.75 / DAMPING, 3.3, "1/λ", color="gray", ha="right")
right.legend()
for ax in (left, right):
    ax.minorticks_off()
figure.tight_layout()
_ = describe(
    figure,
    "Four layers, before and after training. Left: before training, the"
    " largest curvature of both convolutions is below the damping, that of"
    " both linear layers far above it; after training it is above it in all."
    " Right: before training, the convolutions' steps are nearly 100 times as"
    " long as their gradients, the last layer's about as long as its gradient;"
    " after training, all are 10 to 50 times as long.",
)

# %%
# Before training, the curvature of both convolutions is below the damping.
# Their steps are close to :math:`-g / \lambda`: gradient steps, with a
# learning rate of nearly :math:`\gamma / \lambda = 10`. The linear layers curve
# more than that, and their steps are shorter, the last one's by more than a
# hundred. All four still point roughly along :math:`-g`. So at first, what the
# curvature brings to this network is much like a learning rate of its own for
# each layer, where SGD has one for all. By the end of these steps, the curvature
# of the convolutions has grown more than a hundredfold, that of all layers is
# above the damping, and the steps no longer point along the gradient.

before, after = (torch.tensor(rows).T for rows in tables.values())
assert (before[1, :2] < DAMPING).all() and (before[1, 2:] > 10 * DAMPING).all()
assert (before[2, :2] > 0.7 / DAMPING).all() and (before[3, :2] > 0.95).all()
assert before[2, 3] < 0.01 / DAMPING and (before[3] > 0.85).all()
assert (after[1] > DAMPING).all() and (
    after[1, :2] > 100 * before[1, :2]
).all()
assert (after[3] < 0.95).all()

# %%
# Is this also why the network trains? A table cannot tell: it shows what the
# steps are, not what would happen without them. `Page 4
# <plot_4_is_it_worth_it.html#what-does-the-work>`__ takes curvature away, layer
# by layer, to find out.
#
# Four curvatures against gradient descent
# ----------------------------------------
#
# Now four curvature matrices against stochastic gradient descent (SGD) at five
# learning rates. The matrices are
#
# - the `GGN <plot_1_newton_step.html#generalized-gauss-newton>`__, which drops
#   the second derivatives of the network and keeps those of the loss: always
#   positive semi-definite;
# - the `Hessian <plot_1_newton_step.html#hessian>`__, which drops nothing and
#   has negative eigenvalues;
# - two `positive-curvature Hessians
#   <plot_1_newton_step.html#positive-curvature-hessian>`__ (PCH), proposed by
#   Sheng-Wei Chen, Chun-Nan Chou and Edward Y. Chang, `BDA-PCH: Block-Diagonal
#   Approximation of Positive-Curvature Hessian for Training Neural Networks
#   <https://arxiv.org/abs/1802.06502>`__ (2018). They keep the second derivatives
#   of the sigmoids, times the gradient that arrives there, but make negative
#   products positive (abs) or zero (clip). BackPACK's version multiplies by that
#   gradient twice, which all but removes this part: `page 1
#   <plot_1_newton_step.html#products-without-matrices>`__ measures how close to
#   the GGN it comes, for a small network.
#
# The published run lets CG go on when it meets negative curvature, so the
# Hessian's first run here does that, too.


def sgd(lr):
    return lambda p: torch.optim.SGD(p, lr)


OPTIMIZERS = {
    "Hessian": newton(HMP(), negative_curvature="ignore"),
    "PCH-abs": newton(PCHMP(modify="abs")),
    "PCH-clip": newton(PCHMP(modify="clip")),
    **{f"SGD, lr={lr:g}": sgd(lr) for lr in (10, 1, 0.1, 0.01, 0.001)},
}

# %%

# Train these eight, too.
for label, make_optimizer in OPTIMIZERS.items():
    print(label)
    histories[label] = run(make_optimizer)
assert max(histories["SGD, lr=10"].loss) > 3

# %%
# The left column shows all nine runs on one scale, the right column the same
# runs on a scale that tells apart those that do not move. Dashed lines are
# SGD. The GGN and the two PCH lie almost on top of each other: look for their
# markers. On the right they soon leave the picture. With a learning rate of 10,
# SGD starts with a jump that leaves both panels of the loss.

# Draw all nine runs, on two scales each.
figure, axes = plt.subplots(2, 2, figsize=(7, 6))
for row, name in zip(axes, ("loss", "accuracy"), strict=True):
    for ax in row:
        plot_histories(ax, histories, name)
axes[0, 0].set(ylim=(0, 3))
axes[0, 1].set(ylim=(2.25, 2.55))
axes[1, 0].set(ylim=(0, 1))
axes[1, 1].set(ylim=(0, 0.25))
handles, labels = axes[0, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
figure.tight_layout(rect=(0, 0.14, 1, 1))
_ = describe(
    figure,
    "Mini-batch loss and accuracy of nine runs over 50 iterations. The GGN and "
    "both positive-curvature Hessians fall from 2.3 to below 0.5 and reach an "
    "accuracy above 0.8. The Hessian with plain CG and SGD at all five "
    "learning rates never fall below 2.2, around an accuracy of 0.1; with a "
    "learning rate of 10, SGD jumps up and down most.",
)

# %%
# The GGN and BackPACK's two PCH, which are nearly the same matrix, leave the
# plateau together; in these 50 steps, the six others do not.

for label in ("GGN", "PCH-abs", "PCH-clip"):
    assert histories[label].loss[-1] < 0.5
    assert histories[label].accuracy[-1] > 0.8
for label in OPTIMIZERS.keys() - {"GGN", "PCH-abs", "PCH-clip"}:
    assert min(histories[label].loss) > 2.2

# %%
# How much damping?
# -----------------
#
# All these runs have the same damping. What does another one change? Train with
# the GGN at five dampings, count the products, and compare each layer's first
# step with its gradient. Move along :math:`\lambda` below the figure on the
# site; anywhere else, all runs are in one picture.

dampings = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def damped(damping):
    options = SOLVER | {"damping": damping}
    return lambda p: CGNOptimizer(p, GGNMP(), **options)


by_damping = [
    histories["GGN"] if lam == DAMPING else run(damped(lam), log_every=None)
    for lam in dampings
]

# %%
# The first step's length, as in the table above: on the plateau, at the
# parameters that every run starts from.


def first_steps(damping):
    torch.manual_seed(SEED)
    model = extend(make_model().to(device))
    optimizer = damped(damping)(model.parameters())
    weights = [layer.weight for layer in model if hasattr(layer, "weight")]
    before = [p.detach().clone() for p in weights]
    batch = [tuple(loader.dataset[:BATCH_SIZE])]
    train(model, loss_function, optimizer, batch, steps=1)
    pairs = zip(weights, before, strict=True)
    return [((p - x).norm() / LR / p.grad.norm()).item() for p, x in pairs]


ratio = [first_steps(lam) for lam in dampings]
print("damping   late loss   products   ‖v‖/‖g‖ of " + ", ".join(LAYERS))
for lam, history, row in zip(dampings, by_damping, ratio, strict=True):
    late_loss, total = sum(history.loss[-10:]) / 10, sum(history.products)
    print(f"{lam:7g}   {late_loss:9.2f}   {total:8d}", end="   ")
    print("".join(f"{number:10.1f}" for number in row))

# %%

# Draw the runs, and the first steps over the damping.
from cgn_tutorial.pages.plotting import explorable

figure, axes = plt.subplot_mosaic(
    [["loss", "steps"], ["products", "steps"]],
    figsize=(7, 4.4),
    height_ratios=[2, 1],
    layout="constrained",
)
colors, styles = list(COLORS.values()), ("-", "--", "-.", ":", "-")
for i, (lam, history) in enumerate(zip(dampings, by_damping, strict=True)):
    style = {"ls": styles[i], "c": colors[i], "lw": 1.2}
    axes["loss"].plot(history.loss, **style, label=f"λ = {lam:g}")
    axes["products"].plot(history.products, **style)
axes["loss"].set(ylabel="mini-batch loss", ylim=(0, 3))
axes["products"].set(xlabel="iteration", ylabel="products per step")
right = axes["steps"]
for i, name in enumerate(LAYERS):
    lengths = [row[i] for row in ratio]
    right.loglog(
        dampings, lengths, marker="os^D"[i], c=colors[i], ms=4, label=name
    )
right.loglog(dampings, [1 / lam for lam in dampings], "--", c="gray")
right.text(0.15, 10, "1/λ", color="gray")
right.set(xlabel="damping λ", ylabel="first step, ‖v‖ / ‖g‖", ylim=(0.2, 2e4))
right.minorticks_off()
for name in ("loss", "steps"):
    axes[name].legend(fontsize=8, frameon=False)
_ = describe(
    figure,
    "Left: the loss falls soonest with the two smallest dampings, later with"
    " 0.01, and not at all with 0.1 and 1; the smaller the damping, the more"
    " products each step takes. Right: the convolutions' first"
    " steps are as long as the gradient over the damping; those of the linear"
    " layers hardly grow as the damping shrinks.",
)
data = {
    "run": dampings.index(DAMPING),
    "dampings": dampings,
    "loss": [[round(x, 4) for x in history.loss] for history in by_damping],
    "products": [history.products for history in by_damping],
    "ratio": ratio,
    "layers": LAYERS,
}
_ = explorable(figure, "runs", data)

# %%
# On the right, as long as the damping is above a layer's curvature, the step is
# :math:`-g / \lambda`, the dashed line: ten times less damping makes it ten times
# as long. The linear layers' steps grow less and less once :math:`\lambda` is
# below their curvature, and below 0.01 hardly at all. On the left, with dampings
# of 0.1 and 1 the loss stays on the plateau for all of these steps. With 0.001 it
# falls sooner than with 0.01, for about twice the products. With 0.0001 it falls
# as soon, for still more of them, but does not stay as low.

# Check what the next lines say.
late_losses = [sum(history.loss[-10:]) / 10 for history in by_damping]
totals = [sum(history.products) for history in by_damping]
soonest = [
    next((i for i, x in enumerate(history.loss) if x < 1), STEPS)
    for history in by_damping
]
assert max(soonest[:2]) < soonest[2] - 5 and soonest[3:] == [STEPS, STEPS]
assert late_losses[1] < late_losses[0]
assert totals == sorted(totals, reverse=True)
assert 1.5 < totals[1] / totals[2] < 2.5
first_step = torch.tensor(ratio)
assert (first_step[3:, :2] * torch.tensor(dampings[3:])[:, None] > 0.9).all()
assert (first_step[0, 2:] < 1.3 * first_step[2, 2:]).all()
table = torch.tensor([row[2] for row in tables["before"]])
assert torch.allclose(first_step[2], table, rtol=1e-3)

# %%
# Why does the Hessian stall?
# ---------------------------
#
# CG assumes that the quadratic model curves upwards. Along a direction
# :math:`p` of `negative curvature
# <plot_2_conjugate_gradients.html#negative-curvature>`__,
# :math:`p^\top A p \le 0`, it has no minimum, and CG's step length leads to
# its maximum instead: a step in the wrong direction. By default, ``cg``
# notices and stops there. It returns the iterate that it has reached, or, on
# its first step, the negative gradient: either way, a direction downhill.
# (Ron Dembo and Trond Steihaug, `Truncated-Newton algorithms for large-scale
# unconstrained optimization <https://doi.org/10.1007/BF02592055>`__, 1983.)
# This is the Hessian once more, with that rule, from three seeds, and the GGN
# from the same ones.

stopping = [run(newton(HMP()), seed, log_every=None) for seed in range(3)]
with_ggn = [histories["GGN"]]
with_ggn += [run(newton(GGNMP()), seed, log_every=None) for seed in (1, 2)]

# %%
# How often did it stop that way? Each step solves eight systems, one for the
# weight and one for the bias of each of the four layers.

stops = [
    sum(solve.reason == "negative curvature" for solve in solves.values())
    for solves in stopping[0].solves
]
share = sum(stops) / (8 * STEPS)
print(f"{share:.0%} of all solves stop at negative curvature")
assert sum(count <= 4 for count in stops) > 0.6 * STEPS
assert all(len(solves) == 8 for solves in stopping[0].solves)

# %%

# Draw the losses, and how many solves stopped.
compared = {
    "GGN": histories["GGN"],
    "Hessian, plain CG": histories["Hessian"],
    **{f"CG that stops, seed {i}": run for i, run in enumerate(stopping)},
}
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
plot_histories(left, compared, "loss")
left.set(ylim=(0, 5.4))  # with room for the legend
left.legend(frameon=False, loc="upper left")
right.stairs(stops, fill=True, color=COLORS["green"])
right.set(xlabel="iteration", ylabel="solves that stop, of 8", ylim=(0, 8))
figure.tight_layout()
_ = describe(
    figure,
    "Left: the loss with the Hessian and CG that stops at negative curvature"
    " leaves 2.3, unevenly and later than with the GGN, differently for each"
    " seed; with plain CG it stays at 2.3. Right, for seed 0: in every"
    " iteration, at least one of the eight solves stops at negative curvature,"
    " and in most iterations not more than four.",
)

# %%
# Plain CG and the first run with the rule start alike and multiply with the same
# kind of matrix; they differ only in whether CG goes on. With the rule, the loss
# leaves the plateau, but each seed takes its own way. How far do they get in
# these 51 steps? A run may also blow up. Its curve then leaves the figure, and the
# last line tells the highest loss.


def late(history):
    """The mean loss of the last ten steps."""
    return sum(history.loss[-10:]) / 10


for seed, pair in enumerate(zip(with_ggn, stopping, strict=True)):
    ggn, hessian = map(late, pair)
    print(f"seed {seed}: GGN {ggn:.2f}, Hessian that stops {hessian:.2f}")
    assert ggn < hessian
highest = max(max(history.loss) for history in stopping)
print(f"highest loss of the Hessian that stops: {highest:.1f}")
assert min(stops) >= 1
assert min(stopping[0].loss) < 2 < 2.2 < min(histories["Hessian"].loss)

# %%
# From none of the three seeds does it get as far as the GGN.
#
# What to take home
# -----------------
#
# Three of the runs, from the same weights on the same batches:

# Draw three runs, and write beside each which it is.
best = min(
    (label for label in OPTIMIZERS if label.startswith("SGD")),
    key=lambda label: late(histories[label]),
)
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for label, color, style, place, name in (
    (best, "gray", "--", (50, 2.42), "SGD, the best of five rates"),
    ("Hessian", "orange", "-.", (50, 2.12), "the Hessian, with plain CG"),
    ("GGN", "blue", "-", (18, 1.2), "Newton-CG, with the GGN"),
):
    ink = COLORS[color]
    ax.plot(histories[label].loss, style, color=ink, lw=2)
    ax.text(*place, name, color=ink, ha="right", size=12)
ax.set(xlabel="step", ylabel="loss of the batch", xlim=(0, 50), ylim=(0, 2.8))
for side in ("top", "right"):
    ax.spines[side].set_visible(False)
_ = describe(
    figure,
    "The loss of three runs over 50 steps. Gradient descent at the best of five"
    " learning rates, and Newton's method with the Hessian and plain CG, do not"
    " get below 2.2. Newton-CG with the GGN falls to below 0.5.",
)

# %%
# - In these 50 steps, SGD does not train this model, at any of five learning
#   rates that span four orders of magnitude. A step of SGD is also much
#   cheaper, and 50 are few: in hundreds of them it gets there, too, and `page 4
#   <plot_4_is_it_worth_it.html>`__ asks who wins by the clock.
# - Newton steps solved by CG do train it, with the GGN. BackPACK's two PCH are
#   so close to the GGN here that they count as one method with it.
# - The Hessian is not positive semi-definite, and plain CG fails on it. Stopping
#   CG at negative curvature helps; the GGN in its place helps more.
#
# This is one model, one data set and mostly one seed, with settings that the
# published example chose. Nothing here says that second-order methods win in
# general.

products = {label: sum(h.products) for label, h in histories.items()}
for label in ("GGN", "Hessian", "PCH-abs", "PCH-clip"):
    print(f"{label:8}  {products[label] / STEPS:.0f} products per step")

# %%
# What a product costs, compared with a gradient, is measured on `page 1
# <plot_1_newton_step.html#products-without-matrices>`__.
#
# Published and reproduced
# ------------------------
#
# The published run printed loss and accuracy every ten iterations. Here they
# are above the ones that this page computed while it was built, and below, for
# each run, the largest difference in the loss, and in the accuracy, counted in
# images of the 64.

published = load_published_run()
assert published["config"] == SOLVER | {"batch_size": BATCH_SIZE, "seed": SEED}
iterations = published["iterations"]
print("  iteration         " + "".join(f"{i:8d}" for i in iterations))
difference = {}
for label, figures in published["runs"].items():
    print(f"\n{label}")
    for name in ("loss", "accuracy"):
        there = figures[name]
        here = [getattr(histories[label], name)[i] for i in iterations]
        gap = max(abs(a - b) for a, b in zip(there, here, strict=True))
        difference[label, name] = gap
        print(f"  {name:8} published" + "".join(f" {a:.5f}" for a in there))
        print(f"  {name:8} here     " + "".join(f" {a:.5f}" for a in here))

# %%
# SGD repeats the published losses to within 1e-4, the GGN and both PCH to
# within 2e-3, the accuracies of these eight runs to within one image. Of plain
# CG on the Hessian we only check that it stays above a loss of 2.2 and under an
# accuracy of 0.2.

for label in histories:
    loss = difference[label, "loss"]
    images = round(BATCH_SIZE * difference[label, "accuracy"])
    print(f"{label:14}  loss {loss:.5f}  accuracy {images} of 64")
    if label == "Hessian":
        here = [histories[label].accuracy[i] for i in iterations]
        assert max(here) < 0.2
    else:
        assert loss < (1e-4 if label.startswith("SGD") else 2e-3)
        assert images <= 1

# %%
# Check yourself
# --------------
#
# .. fold:: A layer's largest curvature is 1e-4. With the settings of this page, which
#     learning rate of SGD takes about the same step in it?
#
#    :math:`\gamma / \lambda = 0.1 / 0.01 = 10`: next to the damping, the
#    curvature does not count.
#
# .. fold:: A parameter's effect on the outputs is halved. What becomes of its gradient,
#     its curvature and its undamped Newton step?
#
#    The gradient is halved, the curvature quartered, so that the step doubles.
#
# .. fold:: Along CG's first direction, :math:`b = -g`, the damped curvature is negative.
#     Where does plain CG go?
#
#    To the maximum of the model along that line: :math:`\alpha = r^\top r /
#    p^\top A p` is negative, so that it goes along :math:`g`, uphill.

# Check the first two answers.
assert abs(0.1 / (1e-4 + 0.01) / 10 - 1) < 0.02
assert (0.5 / 0.25) / (1 / 1) == 2
