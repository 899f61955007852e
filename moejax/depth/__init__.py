"""Which tokens run a block: choice, weights, schedules and causal rules. Pure functions."""

from moejax.depth.gates import gate_of
from moejax.depth.losses import DecisionSums, decision_sums
from moejax.depth.rank import attention_rank, layers_of_lowest_rank, shortest_pattern
from moejax.depth.schedules import (
    linear_decay,
    recursion_indices,
    shifted_cosine_decay,
    warmed_up,
)
from moejax.depth.select import (
    Selection,
    choose,
    first_come,
    number_of,
    runs_of,
    select,
)

__all__ = [
    "DecisionSums",
    "Selection",
    "attention_rank",
    "choose",
    "decision_sums",
    "first_come",
    "gate_of",
    "linear_decay",
    "layers_of_lowest_rank",
    "number_of",
    "recursion_indices",
    "runs_of",
    "select",
    "shifted_cosine_decay",
    "shortest_pattern",
    "warmed_up",
]
