"""Trains the built-in byte-level BPE of 4,096 entries, moejax/data/builtin/bpe4096.json.

    python tools/train_text_tokenizer.py

On the train split of the built-in data only: every name, and every name with its keywords as a
caption shows them, in all 12 languages. The vocabulary holds the 256 bytes, so every text can be
encoded, and no special tokens. The same data and ``tokenizers`` version give the same file. It
prints the bytes per token of the train and the held-out texts; 10 seconds.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BUILTIN = Path(__file__).parents[1] / "moejax" / "data" / "builtin"
SIZE = 4096


def read_texts(data: Path) -> tuple[list[str], list[str]]:
    """The texts of the train split, and those of val and test."""
    table = json.loads(data.read_text(encoding="utf-8"))
    train, held_out = [], []
    for row in table["rows"]:
        texts = train if row["split"] == "train" else held_out
        for language in table["languages"]:
            name, keywords = row["names"][language], row["keywords"][language]
            texts += [name, f"{name}: {', '.join(keywords)}"]
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE without special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bytes per token over ``texts``; stops if one of them does not come back as it was."""
    encodings = tokenizer.encode_batch(texts)
    for text, decoded in zip(
        texts, tokenizer.decode_batch([e.ids for e in encodings]), strict=True
    ):
        if decoded != text:
            raise SystemExit(f"{text!r} came back as {decoded!r}")
    return sum(len(text.encode()) for text in texts) / sum(len(e.ids) for e in encodings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=BUILTIN / "emoji32.json")
    parser.add_argument("--output", type=Path, default=BUILTIN / f"bpe{SIZE}.json")
    arguments = parser.parse_args()
    train, held_out = read_texts(arguments.data)
    tokenizer = train_tokenizer(train)
    if tokenizer.get_vocab_size() != SIZE:
        raise SystemExit(f"the vocabulary has {tokenizer.get_vocab_size()} entries, not {SIZE}")
    tokenizer.save(str(arguments.output), pretty=False)
    print(f"{arguments.output.name}: {arguments.output.stat().st_size:,} bytes")
    print(f"{SIZE:,} entries from {len(train):,} train texts")
    print(f"train: {bytes_per_token(tokenizer, train):.3f} bytes per token")
    print(f"held out: {bytes_per_token(tokenizer, held_out):.3f} bytes per token")
    print(f"{len(train) + len(held_out):,} texts came back exactly")


if __name__ == "__main__":
    main()
