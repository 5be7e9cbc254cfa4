"""What the last step's solves did, for TensorBoard."""

from typing import Any

from cgn_tutorial import CGNOptimizer


def log_solves(writer: Any, optimizer: CGNOptimizer, step: int) -> None:
    """Write what the solves of the last step did."""
    for (name, *_), solve in optimizer.solves.items():
        writer.add_scalar(f"products/{name}", solve.products, step)
        writer.add_scalar(f"converged/{name}", solve.converged, step)
    writer.add_scalar("predicted", optimizer.predicted, step)
