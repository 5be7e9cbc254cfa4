r"""Train the tutorial's network in several processes, on one machine or on many.

On one machine, with a process per GPU, or several processes that share the cores:

    torchrun --standalone --nproc-per-node 2 train_parallel.py

On several machines, run the same command on each machine. `node0` is the name of one machine, and
`/shared` is a folder that all machines see:

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 \
        --max-restarts 3 train_parallel.py --checkpoint /shared/checkpoint.pt

If a process dies, the other processes raise an error. Then torchrun starts all processes again, and
the training goes on from the checkpoint. (Without the variable, torchrun passes on the addresses of
the processes that ended.) A machine that cannot resolve its own name needs
`--local-addr 127.0.0.1` in the first command.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cgn_tutorial import GGN, CGNOptimizer, layers, whole_batch
from cgn_tutorial.pages import load_mnist, make_model

OPTIONS: dict[str, Any] = {"lr": 0.15, "damping": 2e-3, "maxiter": 10, "tol": 0.3}


def batch_of(step: int, batch_size: int, seed: int = 0) -> Tensor:
    """The numbers of the images in the whole batch of a step, for any number of processes."""
    return torch.randint(
        60_000, (batch_size,), generator=torch.Generator().manual_seed(seed + step)
    )


def train(
    steps: int, batch_size: int, checkpoint: Path | None, device: torch.device
) -> tuple[nn.Module, list[float]]:
    """Train, from the checkpoint if it exists; return the model and the loss of each batch."""
    i, processes = distributed.get_rank(), distributed.get_world_size()
    images, labels = load_mnist().tensors

    torch.manual_seed(0)
    model = make_model().to(device)
    replica = DistributedDataParallel(model)
    curvature = GGN(layers(model))
    optimizer = CGNOptimizer(model.parameters(), curvature, **OPTIONS)
    losses: list[float] = []
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
        if i == 0:
            print(f"goes on from step {len(losses)}", flush=True)

    for step in range(len(losses), steps):
        mine = batch_of(step, batch_size).chunk(processes)[i]
        inputs = images[mine].to(device)
        targets = labels[mine].to(device)
        optimizer.zero_grad()
        outputs = replica(inputs)
        loss = cross_entropy(outputs, targets)
        curvature.backward(loss, outputs)
        share = whole_batch(optimizer, len(inputs))
        optimizer.step()

        losses.append(share.loss(loss.item))  # to print only
        if i == 0:
            print(f"step {step:3}: loss {losses[-1]:.5f}", flush=True)
            if checkpoint:
                save(checkpoint, model, optimizer, losses)
    return model, losses


def save(checkpoint: Path, model: nn.Module, optimizer: CGNOptimizer, losses: list[float]) -> None:
    """Write a checkpoint, and replace the old checkpoint only when the new one is complete."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    torch.save(state, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)


def main() -> None:
    """Take part in the training that torchrun has started."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024, help="of all processes together")
    parser.add_argument("--checkpoint", type=Path, help="a file, written after each step")
    parser.add_argument("--losses", type=Path, help="a file for the losses, as JSON")
    arguments = parser.parse_args()

    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=timedelta(minutes=2))
    if arguments.batch_size % distributed.get_world_size():
        parser.error("under DistributedDataParallel, all processes need the same number of samples")
    _, losses = train(arguments.steps, arguments.batch_size, arguments.checkpoint, device)
    if arguments.losses and distributed.get_rank() == 0:
        arguments.losses.write_text(json.dumps(losses))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
