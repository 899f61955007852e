#!/bin/bash
# From nothing to moejax/data/builtin/kl.npz, its figures and its picture; resumes where it stopped.
set -euo pipefail
moejax train --config tokenizer_kl --workdir runs/tokenizer_kl
moejax eval --workdir runs/tokenizer_kl --split val
moejax eval --workdir runs/tokenizer_kl --split test
python tools/export_image_tokenizer.py --workdir runs/tokenizer_kl
python experiments/tokenizer_kl/latents.py
python experiments/tokenizer_fsq/grid.py --kind kl
