"""A routing record without a model: two layers, three experts and one that gives nothing."""

import numpy as np

from moejax.analysis.routing_record import RoutingRecord
from moejax.data.vocabulary import NUM_SPECIAL


def make_record(seed: int) -> RoutingRecord:
    """Counts are fixed; the choices of the rows are drawn by ``seed``."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(24).reshape(2, 12)
    tokens[0] += NUM_SPECIAL
    tokens[1] %= NUM_SPECIAL
    pieces = np.full((2, 12), "", "U12")
    pieces[0, :6] = ["BOS", "a<b", " red", " app", "le", "BOI"]
    # Another text's marks, which nobody wants to see.
    pieces[1, 4:9] = ["EOI", "EOS", "BOS", "BOI", "BOI"]
    experts = np.argsort(rng.random((2, 2, 12, 4)))[..., :2].astype(np.int32)
    experts[:, 0, 2, 0] = 3
    return RoutingRecord(
        layers=np.array([1, 3]),
        iterations=np.array([0, 0]),
        experts=np.array([4, 4]),
        num_ffn=np.array([3, 3]),
        modalities=np.array(["text", "image"]),
        weightless=np.array(["zero 0"]),
        tokens=np.array([30.0, 20.0]),
        chosen=np.array([[[30, 20, 10, 0], [10, 10, 10, 10]], [[0, 0, 0, 60], [40, 0, 0, 0]]]),
        kept=np.array([[[20, 20, 10, 0], [10, 10, 10, 10]], [[0, 0, 0, 60], [40, 0, 0, 0]]]),
        together=np.full((2, 4, 4), 5) + 20 * np.eye(4, dtype=int),
        dropped=np.array([[0] * 9 + [10], [0] * 10]),
        choices=np.array([[10] * 10, [10] * 9 + [0]]),
        expert_entropy=np.array([1.3, 0.6]),
        token_entropy=np.array([0.4, 0.1]),
        shuffled_token_entropy=np.array([0.8, 0.5]),
        modality_entropy=np.array([1.2, 0.0]),
        row_tokens=tokens,
        row_modality=np.broadcast_to(np.arange(12) > 6, (2, 12)).astype(np.int32),
        row_valid=np.broadcast_to(np.arange(12) < 11, (2, 12)).copy(),
        row_pieces=pieces,
        row_experts=experts,
        pictures=np.full((1, 8, 8, 3), 200, np.uint8),
        places=np.array([[0, 7]]),
        grid=np.array([2, 2]),
    )
