r"""
4. Is it worth it?
==================

And Adam? `Page 3 <plot_3_matrix_free_optimization.html>`__ trained a network in
50 steps, on which 50 steps of gradient descent do nothing. But a Newton step
costs several times a gradient step, SGD is not the rival to beat, and a table
of what each layer's step looks like does not say which part of it is needed.
This page asks, by experiments that could have come out otherwise:

1. What does the work? Curvature is taken away, from one part of the layers or
   the other.
2. Who wins? Adam and Newton steps race by the clock, to a test
   accuracy on all 10,000 test images, each at its best settings.
3. Where do fixed settings fail, and does damping that adapts help?
4. How to choose, then, and when to leave it?

What is computed here is a part, from three seeds for the first two questions and
one for the others. The grids that the settings were chosen from, five seeds,
other batch sizes and another network are on the page `Experiments in full
<../experiments.html>`__; that page's tables are the ones to quote.

As before, a step solves :math:`(C + \lambda I)\, v = -g` by conjugate gradients
(CG) on products with the generalized Gauss-Newton matrix (GGN), with gradient
:math:`g`, damping :math:`\lambda` and step size :math:`\gamma`. Unlike on page 3, a
block is not one parameter but `one layer
<plot_5_any_architecture.html#blocks-parameter-layer-network>`__, its weight and
its bias. CGN, for conjugate-gradient Newton, is short for all of this.

To run this page yourself, download it from its end, and install its package:
``pip install`` and the address that stands on the site's `front page
<../index.html#run-it-yourself>`__.
"""

# %%
# What does the work?
# -------------------
#
# The package's ``race`` trains settings in turns, from the same weights on the
# same batches. First the settings of page 3, with one block per layer. The
# option ``without_curvature`` lists layers, counted from 0, whose curvature is
# replaced by zero: what remains in those is :math:`v = -g / \lambda`, a gradient
# step.

import statistics

from cgn_tutorial.pages.races import Setting, race, step_rates

SEEDS = range(3)
MAIN = {"lr": 0.1, "damping": 1e-2, "tol": 0.1, "maxiter": 20}
ZERO = {
    "GGN everywhere": (),
    "zero in both convolutions": (0, 1),
    "zero in all but the last layer": (0, 1, 2),
    "zero in both linear layers": (2, 3),
}
NEWTON = [
    Setting("CGN", MAIN | {"without_curvature": layers})
    for layers in ZERO.values()
]
losses = {label: [] for label in ZERO}
for seed in SEEDS:
    runs = race(NEWTON, seed, steps=51)
    for label, run in zip(ZERO, runs, strict=True):
        losses[label].append(run.losses)

# %%
# Then SGD for 200 steps, with one learning rate for all, of which three are
# tried, and with one for each of the eight parameters. These are read off the
# Newton steps: over the first 15, the median of how far each parameter moves,
# per length of its gradient.

ONE, EACH = "SGD, one of three rates", "SGD, a rate per parameter"
rates = [step_rates(NEWTON[0], seed) for seed in SEEDS]
print("the rates of seed 0:", " ".join(f"{rate:.2g}" for rate in rates[0]))
losses |= {ONE: [], EACH: []}
for seed in SEEDS:
    settings = [
        Setting("SGD", {"lr": lr}) for lr in (0.3, 1.0, 3.0, rates[seed])
    ]
    *one, each = (run.losses for run in race(settings, seed, steps=200))
    losses[ONE] += one
    losses[EACH].append(each)

# %%

# Draw the losses of all runs.
from matplotlib import pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe

figure, axes = plt.subplots(3, 2, figsize=(7, 6), sharey=True)
for ax, (label, runs) in zip(axes.flat, losses.items(), strict=True):
    for run in runs:
        ax.plot(run, color=COLORS["blue"], lw=1)
    ax.axvline(50, color="gray", lw=1, ls=":")
    ax.set(ylim=(0, 2.6), xlim=(0, 200 if len(run) > 51 else 51))
    ax.set_title(label, fontsize=9)
for ax in axes[-1]:
    ax.set(xlabel="step")
for ax in axes[:, 0]:
    ax.set(ylabel="mini-batch loss")
figure.tight_layout()
_ = describe(
    figure,
    "The mini-batch loss of six ways to step, three seeds each. With the GGN"
    " in every layer it falls from 2.3 to below 0.6 in 50 steps; with zero in"
    " both convolutions it falls later and less far; with zero in all but the"
    " last layer it stays above 1.5, and with zero in both linear layers above"
    " 2.2. SGD with one rate stays at 2.3 for 200 steps. With a rate per"
    " parameter it falls slowly from step 40 on, to 0.7 after 200.",
)

# %%


def late(label, until=51):
    """The mean loss of ten steps, for each seed."""
    return [statistics.mean(run[until - 10 : until]) for run in losses[label]]


for label in ZERO:
    print(f"{label:31}", " ".join(f"{loss:.2f}" for loss in late(label)))
for label in (ONE, EACH):
    for until in (51, 200):
        found = " ".join(f"{loss:.2f}" for loss in late(label, until))
        print(f"{label}, {until:3d} steps: {found}")

# %%
# How to read it. Without the curvature of the convolutions the network still
# leaves the plateau, on all three seeds, but does not get as far in 50 steps.
# Without that of the first linear layer as well, it gets less far again. And
# with curvature in the convolutions alone, it does not train. So in these first
# steps the curvature of the linear layers does most of the work; their products
# are also `the cheapest
# <plot_5_any_architecture.html#what-a-product-costs>`__.
#
# Is it a matter of rates alone? With one rate for all, SGD is still on the plateau
# after 200 steps. (In the full tables, one run of fifteen has begun to leave it.)
# At rates that were read off the Newton steps, it leaves it: a rate for each
# parameter is enough to train this network. But in 200 steps SGD does not get as
# far as Newton steps in 51. Whether other rates would need fewer was not tried.

# Check it, seed by seed.
for curved, convolutions, last, linear in zip(*map(late, ZERO), strict=True):
    assert curved < convolutions < last
    assert convolutions < 1.6 and linear > 2.2
assert min(late(ONE) + late(ONE, until=200)) > 2.2
assert max(late(EACH, until=200)) < 1.2
assert min(late(EACH, until=200)) > max(late("GGN everywhere"))

# %%
# Who wins?
# ---------
#
# The first result suggests a division of labour: Newton steps for the linear
# layers, and Adam for the convolutions. ``CGN + Adam`` below is that, two
# optimizers in one loop. ``CGN, bounded`` has an option that page 3 did not need:
# ``max_length`` bounds :math:`\gamma \sqrt{v^\top (C + \lambda I) v}`, the length
# of a step in the metric of its own curvature. On the `full map
# <../experiments.html#a-map-of-damping-and-budget>`__ it lets the smallest
# damping train with the most products, which it does not without.
#
# Each method races at the settings that were the fastest to 90 % in its grid,
# chosen on other seeds. (SGD and momentum had grids, too, and were slower.) What
# is tested is a running average of the weights, for all methods. Its factor, such
# as 0.95 for Adam, is from the grids, too: the fewer steps, the smaller.

BUDGET = (1, 2, 10, 10)  # the most products, for each of the four layers
CGN = {"lr": 0.15, "damping": 5e-4, "tol": 0.3, "maxiter": BUDGET}
BOUNDED = CGN | {"damping": 2e-4, "maxiter": 20, "max_length": 0.2}
LINEAR = CGN | {"damping": 3e-3, "maxiter": 5, "max_length": 0.2}
BEST = {
    "Adam": Setting("Adam", {"lr": 5e-3}, average=0.95),
    "CGN": Setting("CGN", CGN, average=0.5),
    "CGN, bounded": Setting("CGN", BOUNDED, average=0.5),
    "CGN + Adam": Setting("CGN + Adam", LINEAR, average=0.9),
}

# %%
# A race ends at a test accuracy of 90 %, or after 500 steps.

GOAL = 0.9
runs = {label: [] for label in BEST}
for seed in SEEDS:
    of_seed = race(list(BEST.values()), seed, goal=GOAL, steps=500)
    for label, run in zip(BEST, of_seed, strict=True):
        runs[label].append(run)

# %%

# Draw the test accuracy over steps and over seconds.
figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharey=True)
styles = zip(
    ("orange", "blue", "purple", "green"), ("--", "-", ":", "-"), strict=True
)
for (label, of_seeds), (color, line) in zip(runs.items(), styles, strict=True):
    for seed, run in enumerate(of_seeds):
        steps, seconds, _, accuracies = zip(*run.tests, strict=True)
        style = {"color": COLORS[color], "ls": line, "lw": 1}
        name = label if seed == 0 else None
        axes[0].plot(steps, accuracies, label=name, **style)
        axes[1].plot(seconds, accuracies, **style)
axes[0].set(xlabel="step", xscale="log", ylabel="test accuracy")
axes[1].set(xlabel="seconds")
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="lower center", ncols=4, frameon=False)
figure.tight_layout(rect=(0, 0.08, 1, 1))
_ = describe(
    figure,
    "Test accuracy of four methods, three seeds each. Left, over steps on a"
    " logarithmic axis: both kinds of CGN reach 90 percent first, then CGN with"
    " Adam, then Adam after hundreds. Right, over seconds, they are closer"
    " together.",
)

# %%
# The median over the seeds, of steps, of seconds, and of the same time in
# gradients: how many forward and backward passes fit into it.


def typical(label, name):
    """A column of the table; runs that did not get there took for ever."""
    reached = [run.reached(GOAL) for run in runs[label]]
    return statistics.median(
        getattr(test, name) if test else float("inf") for test in reached
    )


for label in BEST:
    print(f"{label:12} {typical(label, 'steps'):5.0f} steps ", end="")
    print(f"{typical(label, 'seconds'):5.2f} s ", end="")
    print(f"{typical(label, 'gradients'):5.0f} gradients")
fastest = min(BEST, key=lambda label: typical(label, "seconds"))
print(f"The fastest here, by its median: {fastest}")

# %%
# By steps, Newton wins by far. By the clock, the products take most of that back,
# and what remains depends on the machine: read the last line above, and `the
# full tables <../experiments.html#who-wins>`__. What those say, over five seeds:
#
# - To 90 %, at batch 64, CGN in all layers is the fastest, in less than half of
#   Adam's time. To 95 %, Adam is faster than CGN in all layers, which got to 97 %
#   with none of its settings, in six seconds for each.
# - CGN with Adam for the convolutions is ahead of Adam, momentum and SGD to 90
#   and 95 %, at batches of 64, 256 and 1,024. To 97 % it is behind momentum and
#   Adam at batch 64, but ahead at 256, where it is faster than all others at any
#   batch size. (At 1,024, nothing got to 97 % in its time.)
# - A control has Adam everywhere, with one rate for the convolutions and another
#   for the linear layers. Wherever CGN with Adam is ahead of Adam, it is ahead of
#   this control as well. So there is more to Newton steps than such a rate.
# - With ReLU in place of sigmoids, Adam wins, to 90, 95 and 97 %.

assert 2 * typical("CGN", "steps") < typical("Adam", "steps")
assert typical("CGN + Adam", "steps") < typical("Adam", "steps")

# %%
# Where do fixed settings fail?
# -----------------------------
#
# A harder problem: a deep autoencoder of sigmoids, which squeezes an image into
# 30 numbers and back, with PyTorch's default initialisation. At first it learns
# to answer with the mean image, a squared error of 53, and stays there. Here, the
# whole network is one block, the step size is 1, a batch has 500 images.
#
# Two things change from step to step in what follows. A **warm start** begins a
# solve at 0.95 of the last step, rather than at zero: James Martens, `Deep
# learning via Hessian-free optimization
# <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`__ (2010). And
# **damping that adapts**, the rule of Levenberg and Marquardt: compare how much
# the loss fell with how much the quadratic model :math:`q` had promised,
#
# .. math::
#
#    \rho = \frac{L(x + \gamma v) - L(x)}{q(\gamma v) - q(0)} ,
#
# lower :math:`\lambda` by a third if :math:`\rho > 3/4`, raise it by a half if
# :math:`\rho < 1/4`, and take the step back if the loss rose. In the package,
# ``LevenbergMarquardt(optimizer).step(loss, evaluate)`` takes a step by `this rule
# <../api.html#cgn_tutorial.LevenbergMarquardt>`__.

from cgn_tutorial.pages.autoencoder import train_autoencoder

WAYS = {
    "Adam": {"damping": None, "lr": 5e-3, "steps": 320},
    "λ = 3": {"damping": 3.0, "adapt_to": None, "steps": 48},
    "λ = 3 at first, adapts": {"damping": 3.0, "steps": 48},
    "λ = 0.03, from zero": {"adapt_to": None, "warm_start": 0, "steps": 30},
    "λ = 0.03": {"adapt_to": None, "steps": 30},
}
found = {label: train_autoencoder(0, **way) for label, way in WAYS.items()}
for label, tests in found.items():
    steps, seconds, error, damping = tests[-1]
    print(f"{label:23} {steps:3d} steps {seconds:5.1f} s  error {error:.1f}")

# %%

# Draw the squared error over steps and over seconds.
figure, axes = plt.subplots(1, 2, figsize=(7, 3.3), sharey=True)
styles = zip(
    ("orange", "gray", "green", "purple", "blue"),
    ("--", ":", "-", "-.", "-"),
    strict=True,
)
for (label, tests), (color, line) in zip(found.items(), styles, strict=True):
    steps, seconds, errors, _ = zip(*tests, strict=True)
    style = {"color": COLORS[color], "ls": line}
    axes[0].plot(steps, errors, label=label, **style)
    axes[1].plot(seconds, errors, **style)
axes[0].set(xlabel="step", xscale="log", ylabel="squared error per image")
axes[0].set(ylim=(38, 62))
axes[1].set(xlabel="seconds")
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="lower center", ncols=3, frameon=False)
figure.tight_layout(rect=(0, 0.14, 1, 1))
_ = describe(
    figure,
    "Squared error of the autoencoder. Left, over steps: with a damping of"
    " 0.03 and a warm start it leaves 53 within 20 steps, with damping that"
    " adapts from 3 later, and with a constant damping of 3, or with solves"
    " from zero, not at all. Adam leaves it after 50 steps or more. Right, over"
    " seconds: Adam is ahead.",
)

# %%
# With :math:`\lambda = 3` nothing happens; where it adapts, from the same start,
# the error leaves 53. But a good constant does better than the rule, provided
# that solves start warm: from zero, at the same damping and the same `tolerance
# on the whole network
# <plot_5_any_architecture.html#what-a-tolerance-on-the-whole-network-allows>`__,
# it stays where it is. `The full tables <../experiments.html#the-autoencoder>`__
# have the same on three seeds, and Martens' stop by the progress of the model in
# place of a tolerance: with it, solves are longer, and get less far in the same
# time.
#
# Per step, Newton is far ahead of Adam here. Per second, it is Adam by far, and
# no damping has changed that.

error = {label: tests[-1].error for label, tests in found.items()}
adam = {test.steps: test.error for test in found["Adam"]}
at_30 = min(value for steps, value in adam.items() if steps <= 30)
assert error["λ = 3"] > 52 and error["λ = 0.03, from zero"] > 52
assert error["λ = 3 at first, adapts"] < error["λ = 3"] - 1
assert error["λ = 0.03"] < 50 < at_30
assert min(steps for steps, value in adam.items() if value < 52) > 50

# %%
# What must the loss be compared on? Here, on the batch that the step was made
# for. Compared on another one, the damping of two runs of three grows beyond
# :math:`10^9`, and they come to a halt: the full tables have that, too.
#
# How to choose
# -------------
#
# Damping and the budget of products are the knobs to turn first. A small map,
# from one seed, of the steps to 90 % and the time they take:

for damping in (2e-4, 5e-4, 1e-2):
    for maxiter in (2, 20):
        options = CGN | {"damping": damping, "maxiter": maxiter}
        setting = Setting("CGN", options, average=0.5)
        (run,) = race([setting], 0, goal=GOAL, steps=100)
        test = run.reached(GOAL)
        took = f"{test.steps:3d} steps, {test.seconds:.2f} s" if test else "no"
        print(f"λ = {damping:<7g} at most {maxiter:2d} products: {took}")

# %%
# `The full map <../experiments.html#a-map-of-damping-and-budget>`__ has more of
# it, and shows what a bound on the length does to it. In words, where to begin:
#
# - **Which layers?** Those near the loss: their products cost least, and here
#   they do the work. Let Adam have the rest.
# - **Which blocks?** One per layer. The whole network only with a warm start, or
#   with a tight tolerance.
# - **Step size**: well below 1 for several blocks, 0.15 to 0.5 in the tables. For
#   the whole network, 1 on the autoencoder and 0.2 on page 5.
# - **Bound on the length**: 0.2. It costs no product.
# - **Damping**: 2e-4 to 3e-3 with that bound. Without it, the smallest with which
#   no run loses the accuracy that it had reached. Try factors of 3.
# - **Tolerance and products**: 0.3, and 5 to 20 products at most; 1 or 2 where a
#   product costs nearly as much as a gradient.
# - **Batch**: 64 for the shortest way to 90 %, 256 for that to 97 %.
# - **Average of the weights**: yes, with a factor of 0.5 where some thirty steps
#   are enough, up to 0.95 for hundreds.
#
# And when not? Where a first-order method's loss goes down from the first steps
# on, as with ReLU here: there, Adam wins. Where the last percent counts and the
# batch has to be small. Where there is no time to tune: a damping that is too
# small without a bound on the step, or too large, never gets there on the full
# map. And on the autoencoder, where Adam takes many more steps in the same time.
#
# Check yourself
# --------------
#
# .. fold:: One method gets there in 30 steps of twelve gradients each, another one in
#     300 steps of one gradient. Which is the faster?
#
#    The second: 300 gradients against 360.
#
# .. fold:: With a damping of 0.03, the loss fell by a tenth of what the model had
#     promised. What does the rule of Levenberg and Marquardt do?
#
#    It keeps the step, as the loss is lower, and raises the damping to 0.045, as
#    :math:`\rho = 0.1` is below 1/4.
#
# .. fold:: What would the first experiment have shown if the curvature of the first
#     linear layer were of no use?
#
#    That the loss falls as well with zero in all but the last layer as with zero
#    in both convolutions.

# Check the first two answers.
assert 30 * 12 > 300 * 1 and 0.1 < 1 / 4
assert abs(0.03 * 3 / 2 - 0.045) < 1e-12
