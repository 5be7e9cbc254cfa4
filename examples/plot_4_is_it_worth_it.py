r"""
4. Is it worth it?
==================

Are Newton steps worth their price? `Page 3 <plot_3_matrix_free_optimization.html>`__
trained a network in 50 Newton steps. But a Newton step costs as much as several
gradients, and plain gradient descent is a weak rival. On this page, Newton steps race
by the clock against tuned Adam, Muon and others: the results of the `full experiments
<../experiments.html>`__, and a part of the race again, from two new seeds.

``CGN`` (conjugate-gradient Newton) takes the Newton steps of page 3, with a block for
`each layer <plot_5_any_architecture.html#blocks-parameter-layer-network>`__ and the
generalized Gauss-Newton matrix as :math:`C`. ``CGN + Adam`` and ``CGN + Muon`` take
Newton steps in the last layer or layers, and Adam's or Muon's steps in the others.

*About 15 minutes to read, and two to run.* To run this page, ``pip install`` the
package, as the `front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# The rules
# ---------
#
# Each of eight contenders has 40 random settings, from a search space of its own:
# learning rates, constant or falling; momenta; both :math:`\beta` of Adam; batch sizes;
# and running averages of the weights. All contenders but CGN and L-BFGS were then tuned
# by hand as well: 20 further settings for SGD and for RMSprop, and about 36 each for
# Adam, Muon, CGN + Adam and CGN + Muon.
#
# A goal is a test accuracy. For each goal, a contender's best settings were chosen on
# held-out training images and two seeds. The race has five other seeds and the 10,000
# test images. The `full rules <../experiments.html#the-rules>`__ name two choices that
# used test images.
#
# Which step moves the weights of which layer? Here are five contenders, at their fastest
# settings to 90 %:

# The settings.
from cgn_tutorial.pages.races import Setting

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
    {"lr": 1.0, "damping": 5e-3, "tol": 0.3, "maxiter": 3, "last": 2}
    | {"max_length": 0.2, "adam_lr": 0.02, "betas": (0.5, 0.99)},
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

# %%

# Draw which step moves which layer.
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from cgn_tutorial.pages.plotting import COLORS, describe

LAYERS = ["conv 1", "conv 2", "linear 1", "linear 2"]
OTHERS = {"Muon": ["Muon", "Muon", "Muon", "Adam"], "Adam": ["Adam"] * 4}


def steps_of(setting):
    """Whose step moves the weights of each layer."""
    newton = setting.options.get("last", 4 * (setting.method == "CGN"))
    other = OTHERS.get(setting.method.removeprefix("CGN + "), [])
    return [*other[: 4 - newton], *["Newton"] * newton]


figure, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
hues = {"Newton": "blue", "Adam": "orange", "Muon": "purple"}
for row, setting in enumerate((CGN, WITH_ADAM, WITH_MUON, ADAM, MUON)):
    ax.text(-0.1, row, setting.method, ha="right", va="center")
    for column, step in enumerate(steps_of(setting)):
        box = Rectangle((column, row - 0.4), 0.95, 0.8, fc=COLORS[hues[step]])
        ax.add_patch(box).set_alpha(0.35)
        ax.text(column + 0.475, row, step, ha="center", va="center")
for column, layer in enumerate(LAYERS):
    ax.text(column + 0.475, -0.6, layer, ha="center")
ax.set(xlim=(-1.4, 4), ylim=(4.5, -1))
ax.set_axis_off()
_ = describe(
    figure,
    "Five contenders and four layers. CGN takes Newton steps in all layers, CGN + Adam"
    " in the two linear layers, CGN + Muon in the last layer only. Muon's last layer"
    " takes Adam's steps.",
)

# %%
# Who wins?
# ---------
#
# The figure shows the seconds and the steps to a test error of 10, 5 and 3 percent, for
# each of five runs. (Small shifts up and down keep the contenders apart.) A hollow
# point at the right edge is a run that did not reach the error.

from cgn_tutorial.pages.races import load_experiments, race

found = load_experiments()
races = found["races"]["sigmoid CNN"]
ERRORS = {"90%": 10, "95%": 5, "97%": 3}  # in percent

# %%

# Draw the work-precision diagrams.
import statistics

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
# The table has medians over the five seeds: seconds, and then steps, to each accuracy.
# (Accuracy is tested after certain steps only, so that some numbers are equal.) "Never"
# means that most runs did not get there.


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
# **Muon is the fastest** to each goal. Muon (`Jordan, 2024
# <https://kellerjordan.github.io/posts/muon/>`__) computes no curvature: in a hidden
# layer, Muon keeps a running mean of the gradients, sets all singular values of this
# mean to about 1, and steps along the result. CGN + Muon is second, and takes up to one
# and a half times as long. Adam, with :math:`\beta_1 = 0.5` and an average of the
# weights, and CGN + Adam take three to four times as long as Muon. CGN, tuned by search
# alone, is slower than Adam, and reaches 97 % in no run. By steps, Muon and CGN + Muon
# are the first two as well.
#
# So on this network, whose gradients vanish, curvature is not the fastest way, and
# Newton steps in the last layer do not make a well-tuned Muon faster.
#
# The experiments have `two more networks <../experiments.html#who-wins>`__, with 12
# random settings for each contender. On a perceptron with five layers of sigmoids, Muon
# is again the first to 90 and 95 %, and CGN + Muon the second. On this CNN with ReLUs,
# Muon is the first to 90 and 95 %, and Adam to 97 %.

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
# The five contenders of the first figure race again, from two new seeds:

SEEDS = (5, 6)
reached = {}
for seed in SEEDS:
    settings = [MUON, ADAM, CGN, WITH_ADAM, WITH_MUON]
    for run in race(settings, seed, goals=[0.9], seconds=60):
        test, method = run.reached(0.9), run.setting.method
        reached.setdefault(method, []).append(test)
        took_here = f"{test.steps:4d} steps {test.seconds:5.2f} s"
        print(f"seed {seed}, to 90 %: {method:10} {took_here}")

# %%
# Compare the steps with the table. The seconds depend on the machine.

# Check the steps.
for one in zip(*reached.values(), strict=True):
    muon, adam, cgn, with_adam, with_muon = (test.steps for test in one)
    assert max(muon, cgn, with_muon) < with_adam < adam

# %%
# Where does the time of a step go? Here are milliseconds per step, at each contender's
# fastest setting to 90 %. (Adam has batches of 32 images, CGN of 128, the others of
# 64.) "Products" and "rest" are the two parts of the solves. "Gradient" is all else:
# forward and backward passes, and the steps of Adam and Muon.

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
# The solves of CGN + Muon take a sixth of the step. If the solves took no time, CGN +
# Muon would be as fast as Muon to 90 %, and still slower to 95 and 97 %.

# Check it.
parts = {part: float(cost["CGN + Muon"][part]) for part in PARTS}
batches = [s.batch_size for s in (ADAM, MUON, CGN, WITH_ADAM, WITH_MUON)]
assert batches == [32, 64, 128, 64, 64]
share = (parts["Products"] + parts["Rest of the solves"]) / parts["All"]
assert 0.14 < share < 0.2
ahead = {
    goal: (1 - share) * typical(goal, "CGN + Muon") / typical(goal, "Muon")
    for goal in ERRORS
}
assert 0.9 < ahead["90%"] < 1.1 < min(ahead["95%"], ahead["97%"])

# %%
# What does the work?
# -------------------
#
# Does a Newton step help by its length, or by its direction? Replace the Newton steps
# of some layers by gradient steps, in two ways. The first way keeps the length: each
# gradient step is as long as the Newton step in its place. The second way takes
# gradient steps at the rate :math:`\gamma/\lambda = 10`, the steps that Newton's
# formula gives for :math:`C = 0`. The settings are those of page 3, with a block per
# layer. Three seeds are recorded; some ways run here from a fourth:

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

print("Mean loss of steps 41 to 50, if these layers take gradient steps:")
print(" " * 33 + "  recorded           here")
for way, losses in found["ablation"].items():
    way = way.strip(", ")
    if way not in WAYS and not way.endswith("as long"):
        continue
    three = "".join(f"{loss:6.2f}" for loss in losses)
    here = f"{late[way]:.2f}" if way in late else ""
    print(f"{way:33}{three}   {here}")

# %%
# With gradient steps at the rate :math:`\gamma/\lambda` in both linear layers, the loss
# does not fall. With gradient steps as long as Newton's, the loss falls, even if all
# layers take gradient steps. So a part of what curvature gives is the length of each
# layer's step. The rest is the direction: at equal lengths, gradient steps end at a
# higher loss from each seed. The direction matters more in the linear layers than in
# the convolutions.
#
# Does the direction also matter in CGN + Muon, whose Newton steps move the last layer
# alone? Medians of three seeds:

print("last layer, steps to:   90 %      95 %")
for row in found["beside Muon"]:
    steps = [row[f"Steps to {goal}"].split()[0] for goal in ("90%", "95%")]
    print(f"{row['Step of the last layer']:22} {steps[0]:>5} {steps[1]:>9}")

# %%
# There, the direction matters little: with gradient steps as long as Newton's, the run
# takes less than a fifth more steps. At the rate :math:`\gamma/\lambda` (here 60,
# before ``max_length`` shortens the step), the run takes 1.5 times as many steps to 90
# %, and 1.7 times as many to 95 %.

# Check it, seed by seed.
newton, as_long, flat = (
    [int(row[f"Steps to {goal}"].split()[0]) for goal in ("90%", "95%")]
    for row in found["beside Muon"]
)
last = WITH_MUON.options
assert abs(last["lr"] / last["damping"] - 60) < 1e-9
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
# How to choose
# -------------
#
# - **Which method?** On mini-batches as here: Muon, or Adam with :math:`\beta_1 = 0.5`,
#   each with an average of the weights. The guide `When to use what
#   <../guides/when.html>`__ has other kinds of problems.
# - **Which setting first?** The damping, in factors of 3; then the step size, 0.1 to
#   0.4 if there are several blocks, or up to 1 with a ``max_length``: see `Choosing
#   <../guides/choosing.html>`__.
# - **If Newton steps, in which layers?** In the last ones, whose products cost the
#   least. Let Muon move the other layers.
# - **Which batch?** 64 or 128 images: on this network, no larger batch was among the
#   best for Newton steps.
# - **Damping that adapts?** On mini-batches, a good constant was better: see `the
#   autoencoder <../experiments.html#the-autoencoder>`__ of the experiments.
#
# On least squares to many digits, Newton steps are among the fastest methods: see `page
# 7 <plot_7_where_it_wins.html>`__.
#
# Check yourself
# --------------
#
# .. fold:: Exercise: in the settings of the race above, make the damping of ``NEWTON``
#     ten times as large, and run the race again. How many steps does CGN take to 90 %?
#
#    From both seeds, CGN takes more than twice as many steps as before.
#
# .. fold:: One method takes 30 steps to a goal, and each step costs as much as three
#     gradients. Another method takes 100 steps of one gradient each. Which method is
#     faster?
#
#    The first method: its steps cost 90 gradients, against 100.
#
# .. fold:: In the ablation, why are the gradient steps as long as the Newton steps?
#
#    So that one thing changes: the direction. The rate :math:`\gamma / \lambda` changes
#    direction and length, and its result cannot say which of them matters.

# Check the answers.
import dataclasses

options = CGN.options | {"damping": 10 * CGN.options["damping"]}
damped = dataclasses.replace(CGN, options=options)
for seed, before in zip(SEEDS, reached["CGN"], strict=True):
    (run,) = race([damped], seed, goals=[0.9], steps=100)
    after = run.reached(0.9)
    assert after is None or after.steps > 2 * before.steps
assert 30 * 3 < 100
