"""Mixture-of-Transformers on 1,528 emoji and their English names: the first thing to run.

Each modality has its own QKV, output, feed-forward and norm weights (arXiv 2411.04996); one
self-attention sees names and pictures in one sequence. ``:dense`` shares all weights: the same
FLOPs a token, and the baseline to compare with. ``:long`` is wider, has names with keywords and
eight variants of each picture. ``:transfusion`` denoises latents of pictures instead of predicting
their codes (arXiv 2408.11039). ``:speech`` has a third tower, for spoken names in units; it needs
``moejax prepare emoji3m``.

    moejax train --config quickstart
    moejax train --config quickstart:dense
    moejax train --config quickstart:long            # 51 minutes on one core of a busy machine
    moejax train --config quickstart:transfusion
    moejax train --config quickstart:speech
"""

from moejax.config import default_config

ARGS = ("", "dense", "long", "transfusion", "speech")


def get_config(arg=""):
    continuous = arg == "transfusion"
    config = default_config("decoder", "transfusion" if continuous else "next_token")
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
    if arg in ("long", "transfusion"):
        config.data.update(caption="keywords", variants=8, sequence_length=176)
        config.optim.update(learning_rate=2e-3, warmup_steps=100)
        config.train.update(steps=2000, checkpoint_every=250)
        config.eval.update(every=250, best_metric="image/loss")
    if arg == "long":
        config.about.update(total_params=5_505_920, active_params=3_734_464)
        config.model.update(d_model=192, num_heads=6, ffn_hidden=(512,))
    if arg == "speech":
        config.about.update(total_params=3_934_336, active_params=2_227_584)
        config.model.update(modalities=("text", "image", "speech"), vocab_size=5368)
        # A record is 64 codes, up to 96 units at 50 a second, and its text.
        config.data.update(source="local:emoji3m", batch_size=8, sequence_length=352, variants=4)
        config.train.update(steps=400, checkpoint_every=100)
    if continuous:
        config.about.update(total_params=3_897_480, active_params=2_617_480)
        config.model.update(vocab_size=4112, num_layers=6, norm_placement="pre")
        config.model.latents.update(channels=8, patch=2, adapter="unet")
        config.data.update(image_tokenizer="builtin:kl", caption="name", text_first_share=0.8)
        config.objective.update(process="flow")
        config.optim.update(ema_decay=0.999)
        config.train.steps = 1500
        config.eval.update(metrics=("likelihood", "denoising"))
    return config
