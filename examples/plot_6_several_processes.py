r"""
6. Several processes, one Newton step
=====================================

What if a batch does not fit on one device, or takes too long there? Several
processes share the batch. Each process has a copy of the network and a part of
the batch, and the processes average their gradients. A Newton step

.. math::

   (C + \lambda I)\, v = -g

also needs the curvature :math:`C` of the whole batch, and each process knows its
own part only. What must the processes exchange?

*About 10 minutes to read, and one to run.* To run this page, ``pip install`` the
package, as the `front page <../index.html#run-it-yourself>`__ says.
"""

# %%
# Sums over data
# --------------
#
# The loss of a batch is the mean of the losses :math:`\ell_n` of :math:`N`
# samples. Process :math:`i` of :math:`P` has :math:`n_i` samples, with the mean
# loss :math:`L_i`, the gradient :math:`g_i` and the curvature :math:`C_i`:
#
# .. math::
#
#    \begin{aligned}
#    L &= \frac{1}{N} \sum_{n=1}^{N} \ell_n = \sum_{i=1}^{P} \frac{n_i}{N} L_i, \\
#    g &= \sum_i \frac{n_i}{N}\, g_i,
#    \qquad
#    C p = \sum_i \frac{n_i}{N}\, C_i\, p.
#    \end{aligned}
#
# This holds for the Hessian and for the `generalized Gauss-Newton matrix
# <plot_1_newton_step.html#generalized-gauss-newton>`__ (GGN), and for any vector
# :math:`p`. Try 64 images in four shards of 16 images:

# Split 64 images, and make a small network, with one layer to exchange.
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cgn_tutorial import GGN
from cgn_tutorial.pages import load_mnist

images, labels = (t[:64] for t in load_mnist().tensors)
images = images.double()
shards = list(zip(images.chunk(4), labels.chunk(4), strict=True))


def curvature_of(model, inputs, targets, loss_function=cross_entropy):
    """The gradient and the product of the whole network's GGN."""
    model.zero_grad()
    z = model(inputs)
    loss = loss_function(z, targets)
    (product,) = GGN([model.parameters()]).backward(loss, z)
    g = torch.cat([x.grad.flatten() for x in model.parameters()])
    return g, lambda p: product(p[None])[0]


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def with_layer(layer):
    torch.manual_seed(0)
    first, last = nn.Linear(784, 20), nn.Linear(20, 10)
    modules = nn.Flatten(), first, layer, nn.Sigmoid(), last
    return nn.Sequential(*modules).double()


# %%

model = with_layer(nn.Identity())
whole = g, product = curvature_of(model, images, labels)
p = torch.randn_like(g)
parts = [curvature_of(model, *shard) for shard in shards]

mean_g = sum(g_i for g_i, _ in parts) / 4
averaged = sum(product_i(p) for _, product_i in parts) / 4
print(f"gradient: relative difference {difference(mean_g, g):.0e}")
print(f"product:  relative difference {difference(averaged, product(p)):.0e}")
assert difference(mean_g, g) < 1e-12
assert difference(averaged, product(p)) < 1e-12

# %%
# The Newton step is not linear in the curvature. If each process solves with its
# own curvature, and with the gradient of the whole batch, then the mean of the
# four steps is not the step of the whole batch:

from cgn_tutorial import cg

LAM = 0.01


def step_of(product, g):
    """The Newton step, to high accuracy."""
    return cg(lambda p: product(p) + LAM * p, -g, tol=1e-9).x


v = step_of(product, g)
mean_v = sum(step_of(product_i, g) for _, product_i in parts) / 4
print(f"mean of the steps: relative difference {difference(mean_v, v):.2f}")
assert difference(mean_v, v) > 1

# %%
# The difference is larger than the step itself.
#
# What breaks the mean
# --------------------
#
# **BatchNorm** in training mode normalises by the statistics of one shard.
# **Dropout** draws other masks, as one process would from another seed. If the
# loss is a **sum** over the samples, then the average over :math:`P` processes is
# a :math:`P`-th of the whole sum. How far are the averaged products from the
# products of the whole batch?

# Compare averaged products with those of the whole batch.


def summed(z, targets):
    return cross_entropy(z, targets, reduction="sum")


CASES = {
    "nothing special": (nn.Identity(), cross_entropy),
    "BatchNorm": (nn.BatchNorm1d(20), cross_entropy),
    "dropout": (nn.Dropout(0.2), cross_entropy),
    "a sum": (nn.Identity(), summed),
}
gaps = {}
for label, (layer, loss_function) in CASES.items():
    model = with_layer(layer)
    g, product = curvature_of(model, images, labels, loss_function)
    p = torch.randn_like(g)
    Cp = product(p)
    averaged = torch.zeros_like(g)
    for shard in shards:
        _, product_i = curvature_of(model, *shard, loss_function)
        averaged += product_i(p) / 4
    gaps[label] = difference(averaged, Cp)
    print(f"{label:15}: relative difference {gaps[label]:.2g}")

# %%
# With a sum and four processes, gradient and curvature are a quarter of what they
# should be, and the same :math:`\lambda` damps four times as strongly. With
# BatchNorm or dropout, all processes take the same step, but another step than
# one process with the whole batch.

# Check the differences.
assert gaps["nothing special"] < 1e-12
assert min(gaps["BatchNorm"], gaps["dropout"]) > 1e-3
assert abs(gaps["a sum"] - 3 / 4) < 1e-12

# %%
# What the processes exchange
# ---------------------------
#
# `Conjugate gradients <plot_2_conjugate_gradients.html>`__ (CG) use the data in
# two places only: the gradient and the products. The processes average these two,
# and each process does the rest for itself, with the same numbers.
#
# Between the backward pass and ``step()``, ``whole_batch`` replaces the products
# by averages over all processes, and returns a ``Share``: this process's part of
# the batch, with the weight :math:`n_i / N`. Each average is a call of the method
# ``mean``, with one message, an all-reduce:

import inspect
from textwrap import dedent

from cgn_tutorial import Share

print(dedent(inspect.getsource(Share.mean)))

# %%
# For a product, ``compute`` returns this process's product, and ``like`` is a
# tensor of the same shape. If ``compute`` fails, the process sends NaN, and every
# process raises an error.
#
# Here is the training loop. As usual in PyTorch, ``replica`` is the network
# within ``DistributedDataParallel``. One line is new, the call of ``whole_batch``
# with the number of samples of this process. (``share`` serves to print the mean
# loss.)

from cgn_tutorial.pages import train_parallel

source = inspect.getsource(train_parallel.train)
loop = source[source.index("    for step in") : source.index("losses.append")]
print(dedent(loop).rstrip())

# %%
# ``DistributedDataParallel`` averages the gradients with equal weights, and
# ``whole_batch`` raises an error if the shards differ in size. Without this
# wrapper, ``whole_batch`` averages the gradients itself, and the sizes may
# differ. With BackPACK's products, wrap the extended network:
# ``DistributedDataParallel(extend(model))``.
#
# Train in two processes
# ----------------------
#
# ``torchrun`` starts the script once per process. The output has every fourth
# loss:

# Start torchrun, and read the losses.
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, BATCH_SIZE = 20, 256


def losses_of(processes):
    """The losses of a training in several processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--standalone", "--local-addr=127.0.0.1"]
    torchrun += [f"--nproc-per-node={processes}"]
    torchrun += ["-m", "cgn_tutorial.pages.train_parallel"]
    sizes = [f"--steps={STEPS}", f"--batch-size={BATCH_SIZE}"]
    with tempfile.TemporaryDirectory() as folder:
        losses = Path(folder) / "losses.json"
        subprocess.run(
            [*torchrun, *sizes, f"--losses={losses}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=True,
        )
        return json.loads(losses.read_text())


# %%

two = losses_of(2)
print("losses:", " ".join(f"{loss:.3f}" for loss in two[::4]))

# %%
# One process trains on the same batches, and once more with the images of each
# batch in reverse order:

# Train in one process.
from cgn_tutorial import CGNOptimizer, layers
from cgn_tutorial.pages import make_model

images, labels = load_mnist().tensors


def train_alone(reverse=False):
    torch.manual_seed(0)
    model = make_model()
    curvature = GGN(layers(model))
    options = train_parallel.OPTIONS
    optimizer = CGNOptimizer(model.parameters(), curvature, **options)
    losses = []
    for step in range(STEPS):
        batch = train_parallel.batch_of(step, BATCH_SIZE)
        batch = batch.flip(0) if reverse else batch
        optimizer.zero_grad()
        z = model(images[batch])
        loss = cross_entropy(z, labels[batch])
        curvature.backward(loss, z)
        optimizer.step()
        losses.append(loss.item())
    return losses


one, reordered = train_alone(), train_alone(reverse=True)

# %%

# Draw both losses.
from matplotlib import pyplot as plt

from cgn_tutorial.pages.plotting import COLORS, describe

figure, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
axes.plot(one, color=COLORS["orange"], lw=4, label="one process")
axes.plot(two, color=COLORS["blue"], lw=1.5, ls="--", label="two processes")
axes.set(xlabel="step", ylabel="loss of the whole batch")
axes.set(xticks=range(0, STEPS, 5))
axes.legend()
_ = describe(
    figure,
    "The loss over 20 steps, in one process as a wide line and in two as a"
    " dashed one on top of it. Both stay at 2.3 for a few steps and then fall"
    " to below 1; no difference is to be seen.",
)

# %%


# Compare the losses.
def largest(losses):
    """The largest difference from one process."""
    return max(abs(a - b) for a, b in zip(losses, one, strict=True))


print(f"two processes: {abs(two[0] - one[0]):.0e} in the first loss,", end=" ")
print(f"at most {largest(two):.0e} in {STEPS} steps")
print(f"one process, in another order: at most {largest(reordered):.0e}")
assert abs(two[0] - one[0]) < 1e-6
assert largest(two) < 0.005
assert two[-1] < 1

# %%
# The curves lie on each other. The last line shows what rounding does without a
# second process: a sum in single precision depends on the order of its terms.
#
# On your own machines
# --------------------
#
# The script is `train_parallel.py <../train_parallel.py>`__. On one machine with
# two GPUs:
#
# .. code-block:: bash
#
#    torchrun --standalone --nproc-per-node 2 train_parallel.py
#
# With four machines of eight GPUs each, one of them called ``node0``, run on
# every machine:
#
# .. code-block:: bash
#
#    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#    torchrun --nnodes 4 --nproc-per-node 8 \
#        --rdzv-backend c10d --rdzv-endpoint node0:29500 --max-restarts 3 \
#        train_parallel.py --checkpoint /shared/checkpoint.pt
#
# If a process dies, the other processes raise an error, and ``torchrun`` starts
# all again, up to three times, from the checkpoint. (The first line keeps the new
# processes from looking for each other at the address of the old ones.) If
# options or parameters differ between processes, ``whole_batch`` raises an error
# in all of them. The tests run several processes on CPUs, and one on a GPU;
# several GPUs were not tested.
#
# How many processes?
# -------------------
#
# Each product costs an all-reduce. Let a step have :math:`k` all-reduces, and
# take :math:`T` seconds in one process. An all-reduce among :math:`P` processes
# in a ring takes :math:`2 (P - 1)` rounds, and a round of a short message takes
# the latency :math:`\alpha`. Then a step takes about
#
# .. math::
#
#    t(P) \approx \frac{T}{P} + 2\, k\, \alpha\, (P - 1)
#
# seconds, and is fastest with :math:`P^* = \sqrt{T / (2 k \alpha)}` processes.
# With 40 all-reduces and a latency of 50 microseconds:

# Draw the speed-up for two amounts of work.
k, alpha = 40, 50e-6
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
processes = torch.arange(1, 65)
axes.plot(processes, processes, ":", color=COLORS["gray"])
axes.text(17, 22, "no messages", color=COLORS["gray"], ha="right")
for T, color, line in ((0.5, "blue", "-"), (5.0, "orange", "--")):
    seconds = T / processes + 2 * k * alpha * (processes - 1)
    faster = T / seconds
    best = int(faster.argmax())
    axes.plot(processes, faster, line, color=COLORS[color])
    axes.plot(processes[best], faster[best], "o", color=COLORS[color])
    words = f"{T:g} s of work"
    axes.text(processes[best], faster[best] + 1, words, color=COLORS[color])
    print(
        f"{T:g} s of work: {processes[best]} processes are fastest, ", end=""
    )
    print(f"{faster[best]:.1f} times as fast as one")
    assert abs(processes[best] - (T / (2 * k * alpha)) ** 0.5) < 1
axes.set(xlabel="processes", ylabel="times as fast as one", ylim=(0, 26))
_ = describe(
    figure,
    "How many times as fast a step is, over the number of processes, by the"
    " formula. With half a second of work, the speed-up is greatest at 11"
    " processes, and falls from there on. With five seconds, the greatest is at"
    " 35 processes. Without messages, the speed-up is the number of processes.",
)

# %%
# With ten times the work, the best number of processes is about three times as
# large. For measured times and bytes, see the `benchmarks
# <../benchmarks.html#several-processes>`__.
#
# Check yourself
# --------------
#
# .. fold:: Four processes have 100, 100, 100 and 20 samples. Which weight does
#     the last process have in a product?
#
#    20/320, a sixteenth.
#
# .. fold:: Why is it not enough to average the steps of all processes?
#
#    The mean of solutions is not the solution for the mean matrix.
#
# .. fold:: Change the code: double the damping ``LAM``, and average the steps of
#     the four shards again. Is the mean closer to the step of the whole batch?
#
#    Yes. The larger the damping, the closer is each step to :math:`-g / \lambda`,
#    which is the same in all processes.

# Check the answers.
assert 20 / 320 == 1 / 16
before, LAM = difference(mean_v, v), 2 * LAM
g, product = whole
v = step_of(product, g)
mean_v = sum(step_of(product_i, g) for _, product_i in parts) / 4
print(
    f"{before:.2f} before, {difference(mean_v, v):.2f} with twice the damping"
)
assert difference(mean_v, v) < before
