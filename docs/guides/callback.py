"""What the last step's solves did, for TensorBoard."""

from typing import Any

from cgn_tutorial import CGNOptimizer


def log_solves(writer: Any, optimizer: CGNOptimizer, step: int) -> None:
    """Write what the solves of the last step did."""
    for solve in optimizer.solves:
        writer.add_scalar(f"products/{solve.names[0]}", solve.products, step)
        writer.add_scalar(f"converged/{solve.names[0]}", solve.converged, step)
    writer.add_scalar("predicted", optimizer.predicted, step)
