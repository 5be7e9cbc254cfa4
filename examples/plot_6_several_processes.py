r"""
6. Several processes, one Newton step
=====================================

What if a batch is too large for one device, or too slow on it? Several
processes share it, each with a copy of the network. Gradients are then
averaged, as every data-parallel training does. A Newton step

.. math::

   (C + \lambda I)\, v = -g

needs more: the curvature :math:`C` of the whole batch, too, of which each
process knows a part. This page finds out which pieces of a step have to be
exchanged and which have not, trains in two processes, and gives a script for
your own machines.

To run this page yourself, download it from its end, and install its package:
``pip install`` and the address that stands on the site's `front page
<../index.html#run-it-yourself>`__.
"""

# %%
# What is a sum over data
# -----------------------
#
# The loss of a batch of :math:`N` samples is a mean. Process :math:`i` of
# :math:`P` has :math:`n_i` of them, and computes the mean :math:`L_i` over its
# own, so that
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
# What is linear in the loss is a weighted mean as well: the gradient, the
# Hessian, and its product with any direction :math:`p`. So is that of the
# `generalized Gauss-Newton matrix
# <plot_1_newton_step.html#generalized-gauss-newton>`__ (GGN), since
# :math:`J^\top H_L J` is a sum with one term per sample. With 64 images
# in four shards of equal size, the weights are 1/4. The network is a small one,
# with room for a layer in its middle:

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


# %%


def with_layer(layer):
    torch.manual_seed(0)
    first, last = nn.Linear(784, 20), nn.Linear(20, 10)
    modules = nn.Flatten(), first, layer, nn.Sigmoid(), last
    return nn.Sequential(*modules).double()


model = with_layer(nn.Identity())
g, product = curvature_of(model, images, labels)
p = torch.randn_like(g)
parts = [curvature_of(model, *shard) for shard in shards]

mean_g = sum(g_i for g_i, _ in parts) / 4
averaged = sum(product_i(p) for _, product_i in parts) / 4
print(f"gradient: relative difference {difference(mean_g, g):.0e}")
print(f"product:  relative difference {difference(averaged, product(p)):.0e}")
assert difference(mean_g, g) < 1e-12
assert difference(averaged, product(p)) < 1e-12

# %%
# The step itself is no such mean: it is not linear in the curvature. Let each
# process solve with a curvature of its own and the gradient of all, and average
# what comes out. That is another step:

from cgn_tutorial import cg

LAM = 0.01


def step_of(product, g):
    """The Newton step, to high accuracy."""
    return cg(lambda p: product(p) + LAM * p, -g, tol=1e-9).x


v = step_of(product, g)
mean_v = sum(step_of(product_i, g) for _, product_i in parts) / 4
print(f"mean of the steps: relative difference {difference(mean_v, v):.2f}")
assert difference(mean_v, v) > 0.05

# %%
# What breaks the mean
# --------------------
#
# The loss has to be a sum of one term per sample, and the same function in
# every process. Three habits are at odds with that. **BatchNorm** in train mode
# normalises by the mean and the variance of its own shard. **Dropout** draws
# masks of its own in every process, so that each has another network. And a
# **sum** over the samples in place of a mean is averaged to a :math:`P`-th of
# what it is on the whole batch.


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
    print(f"{label:15}: relative difference {gaps[label]:.0e}")

# %%
# The last is a matter of scale: three quarters are missing, of the gradient and
# of the curvature alike. But :math:`\lambda` is not scaled with them, so the step
# is another one. With the first two, the processes still agree on one step. But
# each part of the batch has statistics, or masks, of its own, so that it is not
# the step that one process would take with the whole batch.

assert gaps["nothing special"] < 1e-12
assert min(gaps["BatchNorm"], gaps["dropout"]) > 1e-3
assert abs(gaps["a sum"] - 3 / 4) < 1e-12

# %%
# What lies on the parameters
# ---------------------------
#
# In `conjugate gradients <plot_2_conjugate_gradients.html>`__ (CG), the data
# enter through :math:`g` and through the products alone. So the processes
# average these, and each process does all the rest for itself: inner products,
# step lengths and the stopping test are the same in all processes, to the last
# bit, if all start from the same numbers.
#
# The optimizer takes gradients and products from the parameters, where the
# backward pass has left them. ``whole_batch`` replaces what lies there by
# averages, between the backward pass and ``step()``. Nothing else changes. This
# is the method that averages, by one message, an all-reduce. The attribute
# ``weight`` is :math:`n_i / N`:

import inspect
from textwrap import dedent

from cgn_tutorial import Share

print(dedent(inspect.getsource(Share.mean)))

# %%
# For a product, ``compute`` is the product of this process, and ``like`` the
# vector. If a process fails, the other processes still wait for its answer. So a
# process that fails sends NaN, and NaN makes every process raise.
#
# ``whole_batch`` takes the optimizer, and the number of samples that this
# process has. The network is wrapped as always. This is the script's training
# loop:

from cgn_tutorial.pages import train_parallel

print(inspect.getsource(train_parallel.train))

# %%
# With BackPACK's products, wrap the extended network,
# ``DistributedDataParallel(extend(model))``, and not the other way round.
# Without a wrapper, ``whole_batch`` averages the gradients, too. Then the shards
# may also differ in size.
#
# Two processes, for real
# -----------------------
#
# ``torchrun`` starts the script as often as it is told to, and tells the
# processes of each other. From Python, that is a module to run. (The address
# keeps it from asking for the name of this machine.)

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


two = losses_of(2)
print(" ".join(f"{loss:.3f}" for loss in two[::4]))

# %%
# And one process, on the same batches. It trains once more with the images of
# each batch in another order, which changes nothing but the order in which they
# are added up.

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

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
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
# The curves lie on each other. What differs is rounding: in single precision,
# sums depend on their order, and training amplifies that, as the last line
# shows, where nothing but the order was changed.
#
# On your own machines
# --------------------
#
# The script is `train_parallel.py <../train_parallel.py>`__. On one machine, with
# as many processes as it has GPUs:
#
# .. code-block:: bash
#
#    torchrun --standalone --nproc-per-node 2 train_parallel.py
#
# And on four, with eight GPUs each, the same command on all of them:
#
# .. code-block:: bash
#
#    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#    torchrun --nnodes 4 --nproc-per-node 8 \
#        --rdzv-backend c10d --rdzv-endpoint node0:29500 --max-restarts 3 \
#        train_parallel.py --checkpoint /shared/checkpoint.pt
#
# There ``node0`` is one of the four. If a process dies, the others raise an
# error instead of waiting for it. Then ``torchrun`` starts all of them again, and
# they go on from the checkpoint, to the same result. (The first line keeps the
# new processes from looking for each other where the old ones were.)
#
# ``whole_batch`` compares the options and the parameters of all processes. One
# that has drifted away, for instance from another seed or without the checkpoint,
# makes all of them raise.
#
# How many processes?
# -------------------
#
# Each product costs a message, and a message takes time however small the share
# of the batch becomes. With :math:`k` all-reduces in a step, each in
# :math:`2 (P - 1)` rounds of a latency :math:`\alpha`, and with :math:`T` for the
# work that is shared, a step takes about
#
# .. math::
#
#    t(P) \approx \frac{T}{P} + 2\, k\, \alpha\, (P - 1),
#    \quad
#    P^* = \sqrt{\frac{T}{2\, k\, \alpha}}
#
# seconds: the least at :math:`P^*`. With 40 products, half a second of work and
# 50 microseconds of latency:

T, k, alpha = 0.5, 40, 50e-6
best = (T / (2 * k * alpha)) ** 0.5
print(f"the best number of processes: {best:.0f}")

# %%
# Ten times the work would pay for three times the processes. The `benchmarks
# <../benchmarks.html#several-processes>`__ have measured times and bytes, and the
# formula with the bandwidth.
#
# Check yourself
# --------------
#
# .. fold:: Four processes have 100, 100, 100 and 20 samples. With which weight does the
#     last one count in a product?
#
#    With 20/320, a sixteenth.
#
# .. fold:: Why is it not enough to average the steps of all processes?
#
#    A step is not linear in the curvature: the mean of solutions is not the
#    solution for the mean matrix.
#
# .. fold:: Two seconds of work, 40 products, 50 microseconds of latency: how many
#     processes give the shortest step?
#
#    :math:`\sqrt{2 / (2 \cdot 40 \cdot 5 \cdot 10^{-5})} \approx 22`.

# Check the answers that are numbers.
assert 20 / 320 == 1 / 16
assert round((2 / (2 * 40 * 50e-6)) ** 0.5) == 22
