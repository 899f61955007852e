"""Layers timed side by side with what else could compute them; see ``moejax bench``."""

from moejax.analysis.bench.cases import BENCHES, DIRECTIONS, SKEWS, Case
from moejax.analysis.bench.run import DECODE, KERNELS, bench
