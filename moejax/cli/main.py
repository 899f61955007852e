"""``moejax COMMAND``: finds the command, runs it, and turns mistakes into one line and exit 2."""

import importlib
import sys
from collections.abc import Sequence

from moejax import __version__
from moejax.errors import UserError, did_you_mean
from moejax.host_memory import keep_freed_memory

# name -> one line for --help. Each is the module moejax.cli.<name> with run(argv) -> exit code.
COMMANDS = {
    "train": "train a config, or resume the run in its workdir",
    "eval": "evaluate the checkpoint of a run",
    "sample": "generate text and pictures from the checkpoint of a run",
    "report": "one HTML file that shows a run: losses, samples, speed, config, environment",
    "inspect": "parameters (total, active), FLOPs per token, bytes and sharding per device",
    "compile": "a training step for TPUs or GPUs that are not here: does it fit, what it exchanges",
    "bench": "how long a layer takes beside the dense one of equal FLOPs",
    "compare": "several configs at equal training FLOPs, with intervals over seeds",
    "fidelity": "how far pictures are from real ones, and whether that measure sees known faults",
    "isoflop": "one config at several widths and equal FLOPs: best sizes and a scaling law",
    "prepare": "make a data set from public packages or a folder of pictures",
    "convert": "make a run of others: a dense model of experts, experts of dense models",
    "launch": "the file that starts a run on a cluster or in a cloud",
    "list": "the configs, sources, blocks, objectives, ... that a config can name",
}


def help_text() -> str:
    """What ``moejax --help`` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    return (
        "moejax: multimodal mixture-of-experts research in JAX\n\n"
        "usage: moejax COMMAND [--config SPEC] [--config.a.b=v ...] [--workdir DIR]\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  --help, --version\n\n"
        "start with: moejax train --config quickstart\n"
        "flags of a command: moejax COMMAND --help\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``moejax`` with ``argv`` (default: the process's) and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text(), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    try:
        name = argv[0]
        if name not in COMMANDS:
            raise UserError(f"no command {name!r}{did_you_mean(name, COMMANDS)}")
        keep_freed_memory()
        return importlib.import_module(f"moejax.cli.{name}").run(argv[1:])
    except UserError as error:
        print(f"moejax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moejax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
