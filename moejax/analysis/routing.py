"""What the routing of a model did, counted from the choices of tokens; numpy alone.

Choices are ``ids`` [..., k] of experts with ``NONE`` where there is none. Entropies are in nats and
about choices: a token with two experts counts twice.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

NONE = -1
DECILES = 10


def by_weight(
    ids: Int[np.ndarray, "*rows k"], weights: Float[np.ndarray, "*rows k"], experts: int
) -> Int[np.ndarray, "*rows k"]:
    """The choices in the order of their weights, the largest first; ids >= ``experts`` are NONE."""
    chosen = ids < experts
    order = np.argsort(np.where(chosen, -weights, np.inf), axis=-1, kind="stable")
    return np.take_along_axis(np.where(chosen, ids, NONE), order, axis=-1).astype(np.int32)


def one_hot(ids: Int[np.ndarray, "*rows k"], experts: int) -> Bool[np.ndarray, "*rows e"]:
    """Which experts each token has."""
    return (ids[..., None] == np.arange(experts)).any(axis=-2)


class PairCounts:
    """How often each expert was chosen beside each value of a key, such as the token's id."""

    def __init__(self, experts: int):
        self.keys = np.zeros(0, np.int64)
        self.counts = np.zeros((0, experts))

    def add(self, keys: Int[np.ndarray, " n"], chosen: Bool[np.ndarray, "n e"]) -> None:
        """Counts n tokens."""
        known = np.union1d(self.keys, keys)
        counts = np.zeros((len(known), self.counts.shape[1]))
        counts[np.searchsorted(known, self.keys)] = self.counts
        np.add.at(counts, np.searchsorted(known, keys), chosen)
        self.keys, self.counts = known, counts

    def table(self, keys: int) -> np.ndarray:
        """[keys, e]: the counts of the keys 0, 1, ...; those past the last one are left out."""
        table = np.zeros((keys, self.counts.shape[1]))
        here = (self.keys >= 0) & (self.keys < keys)
        table[self.keys[here]] = self.counts[here]
        return table

    def entropies(self) -> tuple[float, float]:
        """(H(expert), H(expert | key)); NaN where nothing was counted."""
        total = self.counts.sum()
        if not total:
            return np.nan, np.nan
        of_key = self.counts.sum(axis=1)
        return (
            float(entropy(self.counts.sum(axis=0))),
            float((entropy(self.counts) * of_key).sum() / total),
        )


def entropy(counts: np.ndarray) -> np.ndarray:
    """Of the distributions that counts [..., e] have, in nats; 0 for counts of nothing."""
    total = counts.sum(axis=-1, keepdims=True)
    share = counts / np.where(total > 0, total, 1)
    return -(share * np.log(np.where(share > 0, share, 1))).sum(axis=-1)


def shuffled_within(
    values: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """``values`` dealt anew within each group: what is left of H(expert | value) is chance.

    An id that is seen once has no entropy, whatever the router does; so a conditional entropy
    means something only beside that of shuffled ids.
    """
    dealt = values.copy()
    for group in np.unique(groups):
        here = np.flatnonzero(groups == group)
        dealt[here] = values[rng.permutation(here)]
    return dealt


def together(chosen: Bool[np.ndarray, "n e"]) -> Int[np.ndarray, "e e"]:
    """Tokens that have both experts; on the diagonal those that have the one."""
    counts = chosen.astype(np.int64)
    return counts.T @ counts


def co_activation(counts: np.ndarray) -> np.ndarray:
    """From :func:`together`: the share of the row's tokens that have the column's expert too.

    NaN on the diagonal, and in the rows of experts that no token has.
    """
    own = np.diagonal(counts, axis1=-2, axis2=-1)[..., None]
    share = np.divide(counts, own, out=np.full(counts.shape, np.nan), where=own > 0)
    return np.where(np.eye(counts.shape[-1], dtype=bool), np.nan, share)


def drops_by_position(
    chosen: Int[np.ndarray, "b t k"],
    kept: Int[np.ndarray, "b t k"],
    valid: Bool[np.ndarray, "b t"],
) -> tuple[np.ndarray, np.ndarray]:
    """(choices dropped, choices) in each tenth of the rows, by the place in the row."""
    count = lambda ids: ((ids != NONE).sum(axis=-1) * valid).sum(axis=0)
    made, left = count(chosen), count(kept)
    tenth = np.arange(valid.shape[1]) * DECILES // valid.shape[1]
    add = lambda values: np.bincount(tenth, weights=values, minlength=DECILES)
    return add(made - left), add(made)


def agreement(first: Int[np.ndarray, "*rows k"], second: Int[np.ndarray, "*rows k"]) -> float:
    """The share of tokens whose first choice is the same, of those that have one in both.

    The choices of each token stand in the order of their weights (:func:`by_weight`).
    """
    a, b = first[..., 0], second[..., 0]
    both = (a != NONE) & (b != NONE)
    return float((a == b)[both].mean()) if both.any() else np.nan


def overlap(first: Int[np.ndarray, "*rows k"], second: Int[np.ndarray, "*rows k"]) -> float:
    """The share of a token's experts that it has in both, of the larger number; over tokens."""
    have_a, have_b = first != NONE, second != NONE
    shared = ((first[..., :, None] == second[..., None, :]) & have_a[..., None]).sum(axis=(-2, -1))
    most = np.maximum(have_a.sum(axis=-1), have_b.sum(axis=-1))
    return float((shared / np.maximum(most, 1))[most > 0].mean()) if (most > 0).any() else np.nan


class LayerCounts:
    """One layer's choices, added up over batches."""

    def __init__(self, experts: int, modalities: int):
        self.experts = experts
        self.by_token, self.by_shuffled, self.by_modality, self.by_label, self.by_time = (
            PairCounts(experts) for _ in range(5)
        )
        self.chosen, self.kept = np.zeros((2, modalities, experts))
        self.together = np.zeros((experts, experts), np.int64)
        self.dropped, self.choices = np.zeros((2, DECILES))

    def add(
        self,
        chosen: Int[np.ndarray, "b t k"],
        kept: Int[np.ndarray, "b t k"],
        valid: Bool[np.ndarray, "b t"],
        tokens: Int[np.ndarray, "b t"],
        shuffled: Int[np.ndarray, " n"],
        modality: Int[np.ndarray, "b t"],
        labels: Int[np.ndarray, "b t"] | None = None,
        times: Int[np.ndarray, "b t"] | None = None,
    ) -> None:
        """Counts a batch.

        Args:
          chosen: [b, t, k] before any capacity.
          kept: [b, t, k] after it.
          valid: which tokens are no padding.
          tokens: ids of the vocabulary.
          shuffled: the ids of the valid tokens, dealt anew.
          modality: of the tokens.
          labels: the class of the picture that each token is of, -1 without one; None where
            pictures have none.
          times: the number of the noise level of that picture; None where pictures have no noise.
        """
        chosen_ne, kept_ne = (
            one_hot(chosen[valid], self.experts),
            one_hot(kept[valid], self.experts),
        )
        self.by_token.add(tokens[valid], chosen_ne)
        self.by_shuffled.add(shuffled, chosen_ne)
        self.by_modality.add(modality[valid], chosen_ne)
        if labels is not None:
            known = labels[valid] >= 0
            self.by_label.add(labels[valid][known], chosen_ne[known])
        if times is not None:
            self.by_time.add(times[valid], chosen_ne)
        np.add.at(self.chosen, modality[valid], chosen_ne)
        np.add.at(self.kept, modality[valid], kept_ne)
        self.together += together(chosen_ne)
        dropped, choices = drops_by_position(chosen, kept, valid)
        self.dropped, self.choices = self.dropped + dropped, self.choices + choices
