"""Mixture-of-Transformers on 1,528 emoji and their English names: the first thing to run.

Each modality has its own QKV, output, feed-forward and norm weights (arXiv 2411.04996); one
self-attention sees names and pictures in one sequence. ``:dense`` shares all weights: the same
FLOPs a token, and the baseline to compare with.

    moejax train --config quickstart
    moejax train --config quickstart:dense
"""

from moejax.config import default_config

ARGS = ("", "dense")


def get_config(arg=""):
    config = default_config()
    untied = arg != "dense"
    config.about.update(
        paper="arXiv 2411.04996" if untied else "arXiv 2405.09818",
        family="mixture-of-transformers" if untied else "dense",
        total_params=3_015_424 if untied else 2_162_048,
        active_params=2_162_048,
        mechanism_test="tests/papers/test_mot.py::test_modalities_have_own_weights",
    )
    config.model.untie.update(qkv=untied, out=untied, ffn=untied, norms=untied, final_norm=untied)
    # Two records of about 73 tokens fill a row to 91%; longer rows spend more on attention.
    config.data.update(batch_size=16, sequence_length=160)
    config.optim.update(learning_rate=3e-3, warmup_steps=20)
    config.train.update(steps=160, checkpoint_every=80)
    return config
