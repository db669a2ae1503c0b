"""What the frameworks' batch norms mean by their arguments, and what they call their state."""

from __future__ import annotations

from typing import Literal, NamedTuple

Convention = Literal["torch", "keras", "onnx"]


class Rules(NamedTuple):
    eps: float
    momentum: float
    momentum_of_old: bool  # whether momentum is the weight of the old value
    ddof: int  # of the running variance
    needs_two: bool  # whether one value per feature is refused in training
    keys: tuple[str, str, str, str]  # gamma, beta, mean, variance in the state


CONVENTIONS = {
    "torch": Rules(1e-5, 0.1, False, 1, True, ("weight", "bias", "running_mean", "running_var")),
    "keras": Rules(1e-3, 0.99, True, 0, False, ("gamma", "beta", "moving_mean", "moving_variance")),
    "onnx": Rules(1e-5, 0.9, True, 0, False, ("scale", "B", "input_mean", "input_var")),
}
BATCHES = "num_batches_tracked"  # in the torch state alone
