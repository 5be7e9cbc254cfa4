r"""
4. Is it worth it?
==================

In 50 steps, `page 3 <plot_3_matrix_free_optimization.html>`__ trained a network on
which 50 steps of gradient descent do nothing. But a Newton step costs several
gradients, and plain gradient descent is not the rival to beat. Here, Newton steps
race by the clock against rivals that were tuned, by random search and by hand. The
page shows what the `full experiments <../experiments.html>`__ found, and repeats a
part of them from two fresh seeds.

A step solves :math:`(C + \lambda I)\, v = -g` by conjugate gradients (CG), with
the generalized Gauss-Newton matrix (GGN) :math:`C`, the gradient :math:`g` and the
damping :math:`\lambda`, and moves by :math:`\gamma v`. A block is `one
layer <plot_5_any_architecture.html#blocks-parameter-layer-network>`__. ``CGN``, for
conjugate-gradient Newton, is short for all of this. ``CGN + Adam`` and ``CGN +
Muon`` take Newton steps in the last layers, and Adam's or Muon's steps in the others.

*About 20 minutes to read, and two to run.* To run this page, ``pip install`` the
package as the `front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# The rules
# ---------
#
# Each of eight contenders draws 40 settings at random, from a search space of its own:
# rates, momenta, both :math:`\beta` of Adam, batches of 64 to 1,024 images, averages of
# the weights, and constant or falling rates. The contenders that got far were then
# tuned by hand: about 36 further settings, or 20 for SGD and RMSprop. Settings are
# chosen by their accuracy on held-out training images, on two tuning seeds. What is
# chosen races from five other seeds, on the 10,000 test images. The `full rules
# <../experiments.html#the-rules>`__ name two exceptions.
#
# Who wins?
# ---------
#
# Seconds and steps to a test error of 10, 5 and 3 percent. Every point is a run. A
# hollow point at the right edge is a run that did not get there, in five seconds or
# before its rate had fallen to zero.

from cgn_tutorial.pages.races import Setting, load_experiments, race

found = load_experiments()
races = found["races"]["sigmoid CNN"]
ERRORS = {"90%": 10, "95%": 5, "97%": 3}  # in percent

# %%

# Draw the work-precision diagrams.
import statistics

from matplotlib import pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe

STYLES = {
    "CGN": ("blue", "o"),
    "CGN + Adam": ("orange", "s"),
    "CGN + Muon": ("purple", "*"),
    "Adam": ("orange", "^"),
    "Muon": ("purple", "D"),
    "RMSprop": ("red", "v"),
    "SGD": ("gray", "P"),
    "L-BFGS": ("gray", "X"),
}


def took(goal, contender, unit="seconds"):
    """What each run took, infinite for a run that did not arrive."""
    entry = races[goal].get(contender, {unit: [None]})
    return [float("inf") if t is None else t for t in entry[unit]]


figure, axes = plt.subplots(2, 1, figsize=(5, 6.6), layout="constrained")
for ax, unit, edge in zip(axes, ("seconds", "steps"), (8, 900), strict=True):
    for i, (contender, (color, marker)) in enumerate(STYLES.items()):
        size = 8 if marker == "*" else 5
        style = {"color": COLORS[color], "marker": marker, "ms": size, "lw": 0}
        for goal, error in ERRORS.items():
            height = error * 1.03 ** (3.5 - i)  # side by side
            for t in took(goal, contender, unit):
                hollow = {} if t < edge else {"mfc": "none"}
                ax.plot(min(t, edge), height, **style, **hollow)
        ax.plot([], [], label=contender, **style)
    ax.set(xscale="log", yscale="log", xlabel=unit, xlim=(None, 1.2 * edge))
    ax.minorticks_off()
    ax.set_yticks([10, 5, 3], ["10 %", "5 %", "3 %"])
    ax.set(ylabel="test error")
axes[0].set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
axes[1].set_xticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=3)
_ = describe(
    figure,
    "Test error over seconds and over steps, eight contenders, five runs each, on"
    " logarithmic axes. Over seconds, Muon's points are the leftmost at each error,"
    " and those of CGN with Muon follow. Over steps, these two are the leftmost at"
    " 10 and 5 percent.",
)

# %%
# The same as medians over the seeds:


def typical(goal, contender, unit="seconds"):
    """The median over the runs."""
    return statistics.median(took(goal, contender, unit))


print(
    "seconds, steps".ljust(14),
    "".join(f"{'to ' + goal:>15}" for goal in ERRORS),
)
for contender in STYLES:
    cells = []
    for goal in ERRORS:
        seconds = typical(goal, contender)
        steps = typical(goal, contender, "steps")
        arrived = seconds < float("inf")
        cells.append(f"{seconds:.2f} {steps:5.0f}" if arrived else "never")
    print(contender.ljust(14), "".join(f"{cell:>15}" for cell in cells))

# %%
# **Muon wins**, to each goal. Muon computes no curvature. It replaces the mean gradient
# of a hidden layer, a matrix, by a nearby one with singular values close to 1: Keller
# Jordan, `Muon <https://kellerjordan.github.io/posts/muon/>`__ (2024). CGN + Muon comes
# second to each goal, at up to one and a half times Muon's time. Adam, with
# :math:`\beta_1 = 0.5` and an average of the weights, and CGN + Adam follow, level with
# each other, at three to four times Muon's time. CGN in all layers, tuned by search
# alone, is slower, and gets to 97 % in none of its runs. By steps, too, Muon and CGN +
# Muon are ahead of all others.
#
# So even if gradients vanish, curvature is not the fastest way here, and Newton steps
# in the last layer do not make a well-tuned Muon faster. But if each contender had
# tried only `one or two random settings
# <../experiments.html#what-does-the-tuning-cost>`__, then CGN + Muon would be the first
# to 90 %.
#
# Two more networks had 12 settings each, and `no tuning by hand
# <../experiments.html#who-wins>`__. On **a perceptron with five layers of sigmoids**,
# Muon and CGN + Muon are first and second again to 90 and 95 %, and nothing gets to
# 97 %. On the **CNN with ReLUs**, Muon is first to 90 and 95 %, and Adam to 97 %.

# Check it.
for goal in ERRORS:
    ranked = sorted(STYLES, key=lambda name: typical(goal, name))
    assert ranked[:2] == ["Muon", "CGN + Muon"]
    assert set(ranked[2:4]) == {"Adam", "CGN + Adam"}
    assert typical(goal, ranked[1]) < 1.5 * typical(goal, "Muon")
    assert typical(goal, ranked[3]) < 1.15 * typical(goal, ranked[2])
    slower = [typical(goal, name) / typical(goal, "Muon") for name in ranked]
    assert min(slower[2:4]) > 3
    assert max(slower[2:4]) < 4
assert min(took("97%", "CGN")) == float("inf")
for goal in ERRORS:
    ranked = sorted(STYLES, key=lambda name: typical(goal, name, "steps"))
    assert set(ranked[:2]) == {"Muon", "CGN + Muon"}

for network in ("sigmoid MLP", "ReLU CNN"):
    for goal, entries in found["races"][network].items():
        medians = {}
        for contender, entry in entries.items():
            times = [
                float("inf") if t is None else t for t in entry["seconds"]
            ]
            medians[contender] = statistics.median(times)
        ranked = sorted(medians, key=medians.get)
        if goal != "97%":
            assert ranked[0] == "Muon"
            assert network == "ReLU CNN" or ranked[1] == "CGN + Muon"
        elif network == "ReLU CNN":
            assert ranked[0] == "Adam"
        else:
            assert min(medians.values()) == float("inf")

# %%
# Part of the race again, here and now: the settings that were the fastest to 95 % race
# to 90 %. A test comes whenever the number of steps has grown by a half since the last
# test, and later by a seventh.

LAST = {"channels_last": True}  # a layout in memory, which is faster here
MUON = Setting(
    "Muon",
    {"lr": 0.5, "momentum": 0.6, "adam_lr": 0.03, "betas": (0.5, 0.95)},
    average=0.8,
    **LAST,
)
ADAM = Setting(
    "Adam",
    {"lr": 0.015, "betas": (0.5, 0.95)},
    batch_size=32,
    average=0.9,
    **LAST,
)
NEWTON = {"lr": 0.38, "damping": 4.4e-3, "tol": 0.1, "max_length": 0.5}
CGN = Setting(
    "CGN",
    NEWTON | {"maxiter": (1, 2, 10, 10)},  # for each of the four layers
    batch_size=128,
    average=0.9,
    schedule="linear",
    horizon=188,
    **LAST,
)
WITH_ADAM = Setting(
    "CGN + Adam",
    {"lr": 0.35, "damping": 6e-3, "tol": 0.5, "maxiter": 2, "last": 1}
    | {"adam_lr": 0.02, "betas": (0.5, 0.9)},
    average=0.9,
    **LAST,
)
WITH_MUON = Setting(
    "CGN + Muon",
    {"lr": 0.3, "damping": 5e-3, "tol": 0.5, "maxiter": 2, "last": 1}
    | {"max_length": 0.2, "muon_lr": 0.5, "momentum": 0.6}
    | {"adam_lr": 0.03, "betas": (0.5, 0.95)},
    average=0.8,
    schedule="linear",
    horizon=110,
    **LAST,
)
SEEDS = (5, 6)
reached = {}
for seed in SEEDS:
    settings = [MUON, ADAM, CGN, WITH_ADAM, WITH_MUON]
    for run in race(settings, seed, goals=[0.9], seconds=6):
        test, method = run.reached(0.9), run.setting.method
        reached.setdefault(method, []).append(test)
        took_here = f"{test.steps:4d} steps {test.seconds:5.2f} s"
        print(f"seed {seed}  {method:10} {took_here}")

# %%
# The order by seconds depends on the machine: compare the steps.

# Check the steps.
for one in zip(*reached.values(), strict=True):
    muon, adam, cgn, with_adam, with_muon = (test.steps for test in one)
    assert max(muon, cgn, with_muon) < with_adam < adam

# %%
# Where does the time of a step go? Milliseconds, from the full experiments, after 30
# steps at the fastest setting to 90 %. The solves consist of products and the rest;
# "gradient" is all else: the passes, and the steps of Adam and Muon.

PARTS = {
    "All": "all",
    "Gradient, graph, Adam, Muon": "gradient",
    "Products": "products",
    "Rest of the solves": "rest",
}
cost = {row.pop("Milliseconds per step"): row for row in found["costs"]}
print(" " * 12, "".join(f"{short:>10}" for short in PARTS.values()))
for contender, parts in cost.items():
    cells = [float(parts[part]) for part in PARTS]
    print(f"{contender:12}", "".join(f"{cell:10.1f}" for cell in cells))

# %%
# Would faster solves win? Of a step of CGN + Muon, the solves take a sixth. If the
# solves took no time, CGN + Muon would be level with Muon to 90 %, and still be behind
# to 95 and 97 %.

# Check it.
parts = {part: float(cost["CGN + Muon"][part]) for part in PARTS}
share = (parts["Products"] + parts["Rest of the solves"]) / parts["All"]
assert 0.14 < share < 0.2
ahead = {
    goal: (1 - share) * typical(goal, "CGN + Muon") / typical(goal, "Muon")
    for goal in ERRORS
}
assert 0.9 < ahead["90%"] < 1.1 < min(ahead["95%"], ahead["97%"])

# %%
#
# What does the work?
# -------------------
#
# Is it a Newton step's length, or its direction? Take the curvature away from some
# layers, and keep the length: at each step, a layer's gradient is scaled to be as long
# as the Newton step that it replaces. A second control takes the curvature for zero,
# which leaves gradient steps at the rate :math:`\gamma/\lambda = 10`. The settings are
# those of page 3; three seeds are recorded, and one runs here:

MAIN = {"lr": 0.1, "damping": 1e-2, "tol": 0.1, "maxiter": 20}
LINEAR = {"without_curvature": (2, 3)}  # of four layers, counted from 0
WAYS = {
    "none": {},
    "both linear layers, as long": LINEAR | {"keep_length": True},
    "both linear layers, rate γ/λ": LINEAR,
}
settings = [Setting("CGN", MAIN | options) for options in WAYS.values()]
late = {}
for way, run in zip(WAYS, race(settings, SEEDS[0], steps=51), strict=True):
    late[way] = statistics.mean(run.losses[-10:])

print("Mean loss of steps 41 to 50, with gradient steps in these layers:")
for way, losses in found["ablation"].items():
    way = way.strip(", ")
    if way not in WAYS and not way.endswith("as long"):
        continue
    three = "".join(f"{loss:6.2f}" for loss in losses)
    here = f"{late[way]:.2f}" if way in late else ""
    print(f"{way:33}{three}   {here}")

# %%
# At the rate :math:`\gamma/\lambda`, gradient steps in both linear layers do not train.
# If gradient steps are as long as Newton's, the network trains, even with gradient
# steps in all layers. So a part of what curvature gives is the length of each layer's
# step. The rest is direction: with equal lengths, gradient steps end at a higher loss,
# in any part and on every seed, most of all in the linear layers.
#
# And in CGN + Muon, where Newton steps move the last layer alone? Medians of three seeds:

for row in found["beside Muon"]:
    steps = [row[f"Steps to {goal}"].split()[0] for goal in ("90%", "95%")]
    print(f"{row['Step of the last layer']:22} steps {steps[0]}, {steps[1]}")

# %%
# There, direction counts for little: gradient steps as long as Newton's need a few more
# steps to 90 and 95 %.

# Check it, seed by seed.
newton, as_long, flat = (
    [int(row[f"Steps to {goal}"].split()[0]) for goal in ("90%", "95%")]
    for row in found["beside Muon"]
)
for a, b, c in zip(newton, as_long, flat, strict=True):
    assert a < b < 1.2 * a and 1.45 * a < c < 1.75 * a
ablation = found["ablation"]
curved = ablation["none, "]
for way, as_long in ablation.items():
    if way.endswith("as long"):
        assert all(a < b for a, b in zip(curved, as_long, strict=True))
assert max(ablation["all layers, as long"]) < 2.2
assert min(ablation["both linear layers, rate γ/λ"]) > 2.2
assert max(ablation["both convolutions, as long"]) < min(
    ablation["both linear layers, as long"]
)
assert late["none"] < late["both linear layers, as long"] < 2.2
assert late["both linear layers, rate γ/λ"] > 2.2

# %%
#
# A longer plateau
# ----------------
#
# A deep autoencoder of sigmoids (784, 250, 100, 30 units, and back) first learns the
# mean image, a squared error of 53, and may stay there. Here the whole network is one
# block, and :math:`\gamma = 1`. A **warm start** begins a solve at 0.95 of the last
# step. **Damping that adapts** looks at how much the loss fell, compared with how much
# the quadratic model :math:`q` had promised:
#
# .. math::
#
#    \rho = \frac{L(x + \gamma v) - L(x)}{q(\gamma v) - q(0)} .
#
# The rule of Levenberg and Marquardt lowers :math:`\lambda` by a third if :math:`\rho >
# 3/4`, and raises :math:`\lambda` by a half if :math:`\rho < 1/4`. If the loss is not
# lower, the rule takes the step back: `LevenbergMarquardt
# <../api.html#cgn_tutorial.LevenbergMarquardt>`__. Recorded, after about 15 seconds
# each:

autoencoder = found["autoencoder"]
del autoencoder["λ adapts to another batch"]  # see the full experiments
for way, runs in autoencoder.items():
    taken, error = (
        statistics.median(runs[name]) for name in ("steps", "error")
    )
    print(f"{way:28} {taken:5.0f} steps  error {error:5.1f}")

# %%
# With :math:`\lambda = 3`, or with solves from zero, the error stays at 53. If
# :math:`\lambda` adapts from 3, the error leaves 53. A good constant does better, if
# solves start warm. In the same seconds, Adam is ahead of all.

# Check it.
error = {way: runs["error"] for way, runs in autoencoder.items()}
assert min(error["λ = 3"] + error["λ = 0.03, solves from zero"]) > 52
assert max(error["λ adapts, from 3"]) < 51
assert max(error["λ = 0.03"]) < min(error["λ adapts, from 0.03"])
adams = [e for way in error if way.startswith("Adam") for e in error[way]]
rest = [e for way in error if not way.startswith("Adam") for e in error[way]]
assert max(adams) < min(rest)

# %%
# How to choose
# -------------
#
# - **Which method?** On mini-batches as here, Muon, or Adam with :math:`\beta_1`
#   turned down, and an average of the weights. `When to use what
#   <../guides/when.html>`__ sorts problems by kind.
# - **Which knob first?** The damping, in factors of 3; then the step size, 0.1 to 0.4
#   for several blocks. The `guide to all settings <../guides/choosing.html>`__ says
#   where to begin.
# - **Which layers?** The last ones, whose products cost least. Let Muon have the rest.
# - **Which batch?** 64 or 128: on this network, the search chose no larger ones for
#   Newton steps.
#
# On another kind of problem, least squares to many digits, Newton steps are among the
# best: see `page 7 <plot_7_where_it_wins.html>`__.
#
# Check yourself
# --------------
#
# **Change a number.** In the race above, make the damping of ``NEWTON`` ten times as
# large, and run the cell again. Watch the steps of CGN.
#
# .. fold:: What happens?
#
#    CGN needs more than twice as many steps, on both seeds.
#
# .. fold:: One method gets there in 30 steps of three gradients each, another one in
#     100 steps of one gradient. Which is the faster?
#
#    The first: 90 gradients against 100. With four gradients a step it is the second.
#
# .. fold:: With a damping of 0.03, the loss fell by a tenth of what the model had
#     promised. What does the rule of Levenberg and Marquardt do?
#
#    It keeps the step, as the loss is lower, and raises the damping to 0.045, as
#    :math:`\rho = 0.1` is below 1/4.

# Check the answers.
import dataclasses

options = CGN.options | {"damping": 10 * CGN.options["damping"]}
damped = dataclasses.replace(CGN, options=options)
for seed, before in zip(SEEDS, reached["CGN"], strict=True):
    (run,) = race([damped], seed, goals=[0.9], steps=100)
    after = run.reached(0.9)
    assert after is None or after.steps > 2 * before.steps
assert 30 * 3 < 100 < 30 * 4 and 0.1 < 1 / 4
assert abs(0.03 * 3 / 2 - 0.045) < 1e-12
