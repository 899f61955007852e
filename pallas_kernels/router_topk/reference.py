"""The plain definition, by ``lax.top_k``; its gradients are what autodiff makes of it."""

import jax
import jax.numpy as jnp
from jax import lax


def score(logits_te, scores: str):
    """Scores in float32: "softmax" over the experts, "sigmoid" of each, or the logits."""
    run = {"softmax": lambda x: jax.nn.softmax(x, axis=-1), "sigmoid": jax.nn.sigmoid}
    return run.get(scores, lambda x: x)(logits_te.astype(jnp.float32))


def gates_of(chosen_tk, renormalise: bool, epsilon: float):
    """The gates of the chosen scores."""
    if not renormalise:
        return chosen_tk
    return chosen_tk / (chosen_tk.sum(axis=-1, keepdims=True) + epsilon)


def router_topk(logits_te, bias_e, valid_t, *, k, scores, renormalise, epsilon):
    """(gates, ids, lse, score_sum, load)."""
    s_te = score(logits_te, scores)
    _, ids_tk = lax.top_k(s_te if bias_e is None else s_te + bias_e[None], k)
    gates_tk = gates_of(jnp.take_along_axis(s_te, ids_tk, axis=-1), renormalise, epsilon)
    lse_t = jax.nn.logsumexp(logits_te.astype(jnp.float32), axis=-1)
    score_sum_e = (s_te * valid_t[:, None]).sum(axis=0)
    experts = jnp.arange(logits_te.shape[1], dtype=ids_tk.dtype)
    chosen_tke = (ids_tk[:, :, None] == experts[None, None]) & valid_t[:, None, None]
    return gates_tk, ids_tk, lse_t, score_sum_e, chosen_tke.sum(axis=(0, 1), dtype=jnp.int32)
