"""``moejax list``: what a config can name."""

import importlib
import sys
import textwrap
from pathlib import Path
from typing import Any

from moejax.cli.common import command_parser, print_json
from moejax.config.load import config_module, load_config, own_folders, resolve, short_names
from moejax.config.registry import Registry
from moejax.errors import UserError, did_you_mean

# kind -> (field that names one, module that has registered them all once imported, registry)
REGISTRIES = {
    "models": ("model.name", "moejax.models", "MODELS"),
    "blocks": ("model.block_pattern", "moejax.nn.block", "BLOCKS"),
    "objectives": ("objective.name", "moejax.objectives", "OBJECTIVES"),
    "sources": ("data.source", "moejax.data.sources", "SOURCES"),
    "optimizers": ("optim.name", "moejax.train.optim", "OPTIMIZERS"),
    "evaluators": ("eval.metrics", "moejax.train.evaluate", "EVALUATORS"),
    "samplers": ("moejax sample --sampler", "moejax.ops.samplers", "SAMPLERS"),
    "routers": ("model.moe.router.name", "moejax.routing", "ROUTERS"),
    "scores": ("model.moe.score.name", "moejax.routing", "SCORES"),
    "losses": ("model.moe.losses", "moejax.routing", "ROUTER_LOSSES"),
}
KINDS = ("configs", *REGISTRIES)


def run(argv: list[str]) -> int:
    """Runs ``moejax list`` and returns the exit code."""
    parser = command_parser("list", "What a config can name.", config=False, workdir=False)
    parser.add_argument(
        "kind", nargs="?", default="", metavar="KIND", help=f"one of {', '.join(KINDS)}"
    )
    args = parser.parse(argv)
    if args.kind and args.kind not in KINDS:
        raise UserError(f"list: no kind {args.kind!r}{did_you_mean(args.kind, KINDS)}")
    kinds = (args.kind,) if args.kind else KINDS
    found = {kind: rows(kind) for kind in kinds}
    if args.json:
        print_json(found[args.kind] if args.kind else found)
        return 0
    for kind in kinds:
        print(f"{kind}{_field(kind)}:")
        names = [_name(row) for row in found[kind]]
        width = max(map(len, names), default=0)
        for row, name in zip(found[kind], names, strict=True):
            print(f"  {name:<{width}}  {_line(row)}".rstrip())
            if row.get("options"):
                print("\n".join(_option_lines(row["options"], width + 4)))
    return 0


def rows(kind: str) -> list[dict[str, Any]]:
    """The rows of ``moejax list KIND --json``."""
    if kind == "configs":
        return [row for name, path in short_names().items() for row in _config_rows(name, path)]
    _, module, attribute = REGISTRIES[kind]
    registry: Registry = getattr(importlib.import_module(module), attribute)
    return [_entry_row(name, registry.get(name)) for name in registry]


def _entry_row(name: str, entry: Any) -> dict[str, Any]:
    """The row of a registered entry; those that a config gives options have them, with defaults."""
    function = getattr(entry, "function", getattr(entry, "step", entry))
    row: dict[str, Any] = {"name": name, "summary": _summary(function)}
    if hasattr(entry, "defaults"):
        row["options"] = dict(entry.defaults())
    return row


def config_args(name: str) -> tuple[str, ...]:
    """The arguments that the config of this short name takes; ``""`` is none."""
    return tuple(getattr(config_module(resolve(name)[0]), "ARGS", ("",)))


def _config_rows(name: str, path: Path) -> list[dict[str, Any]]:
    try:
        return [_config_row(name, arg) for arg in config_args(name)]
    except Exception as error:
        if path.parent not in own_folders():
            raise
        # One of the user's own may need --import, or be half written.
        print(f"moejax: warning: config {name!r} does not load: {error}", file=sys.stderr)
        return []


def _config_row(name: str, arg: str) -> dict[str, Any]:
    about = load_config(f"{name}:{arg}" if arg else name).about
    return {
        "name": name,
        "arg": arg,
        "paper": about.paper,
        "family": about.family,
        "total_params": about.total_params,
        "active_params": about.active_params,
        "approximate": list(about.approximate),
    }


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']}:{row['arg']}" if row.get("arg") else row["name"]


def _line(row: dict[str, Any]) -> str:
    if "summary" in row:
        return row["summary"]
    total, active = row["total_params"], row["active_params"]
    size = f"{total:,} parameters" + (f", {active:,} active" if active != total else "")
    return ", ".join(part for part in (row["family"], size, row["paper"]) if part)


def _option_lines(options: dict[str, Any], indent: int) -> list[str]:
    """``name=default, ...`` in lines."""
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    margin = " " * indent
    return textwrap.wrap(text, 100, initial_indent=margin, subsequent_indent=margin)


def _field(kind: str) -> str:
    return f" ({REGISTRIES[kind][0]})" if kind in REGISTRIES else " (--config)"


def _summary(entry: Any) -> str:
    """The first line of the docstring."""
    return next(iter((entry.__doc__ or "").strip().splitlines()), "")
