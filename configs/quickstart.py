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
    config.about.update(paper="2411.04996", family="mot", total_params=0, active_params=0)
    untied = arg != "dense"
    config.model.untie.update(
        qkv=untied, out=untied, ffn=untied, norms=untied, final_norm=untied
    )
    # Four records of about 73 tokens fill a row to 95%.
    config.data.update(batch_size=16, sequence_length=304)
    config.optim.update(learning_rate=3e-3, warmup_steps=20)
    config.train.update(steps=160, checkpoint_every=80)
    return config
