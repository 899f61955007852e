"""``moejax`` with the bigram of the tests of training: the command line, compiled in a second.

The file is both the program and its config.
"""

import sys
from pathlib import Path

from moejax.config import default_config


def get_config(arg=""):
    del arg
    config = default_config("bigram", "next_token")
    config.model.dtype = "float64"
    config.data.update(batch_size=8, sequence_length=16, text_tokenizer="bytes")
    config.optim.update(learning_rate=0.05, warmup_steps=2, accumulation_steps=2)
    config.train.update(steps=12, checkpoint_every=4, checkpoint_keep=9)
    config.eval.update(batches=2, every=6)
    config.log.every = 3
    return config


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
    import conftest

    from moejax.cli.main import main
    from moejax.train import setup

    setup.build_pipeline = lambda config, split, *, codec=None: conftest.FakePipeline(config, split)
    # The codec is of the built-in pictures, which the made-up rows have none of.
    import moejax.models.picture_codec as pictures

    pictures.load_picture_codec = lambda config: None
    sys.exit(main())
