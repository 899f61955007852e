"""``moejax launch``: fills in the file that starts a run on a cluster or in a cloud."""

import argparse
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.cli.common import command_parser, print_json
from moejax.config.load import config_folder, load_config, resolve
from moejax.errors import UserError, did_you_mean
from moejax.parallel.machines import GPUS, TPUS, Machines, parse_machines

_DESCRIPTION = """Write the file that trains a config on a cluster or in a cloud. Nothing is
started: what is printed says the command that does (docs/cloud.md).

    moejax launch --target gke_tpu --topology v5p:4x4x8 --image IMAGE --config mot:7b \\
        --workdir gs://BUCKET/mot_7b --dry-run
    moejax launch --target slurm --topology h100:16 --config mot:1.5b --workdir /shared/mot"""

# Where a bucket is mounted on every host, and the port of process 0.
MOUNT = "/bucket"
PORT = 55527
# Of a JobSet's name its pods' names are made, which may have 63 characters.
_LONGEST_NAME = 40


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of cluster or cloud.

    Attributes:
      template: file in experiments/launch.
      accelerators: the kinds that it can have.
      start: the command that starts what the file says; ``{file}``.
      quote: (words of a command) -> how they are written in the file.
      spot: what stands for @{spot} in the file, without and with ``--spot``; None if it has none.
      bucket: the run lies in a bucket that is mounted, not in a shared folder.
      needs, takes: flags of this target, those that must be given and the others.
    """

    template: str
    accelerators: Mapping[str, Any]
    start: str
    quote: Callable[[Sequence[str]], str]
    spot: tuple[str, str] | None = None
    bucket: bool = True
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def shell_words(words: Sequence[str]) -> str:
    """A command for a shell, a flag on each line."""
    command, flags = words[:2], words[2:]
    return " \\\n  ".join([shlex.join(command), *map(shlex.quote, flags)])


def kubernetes_words(words: Sequence[str]) -> str:
    """A command as a YAML list; Kubernetes itself replaces $(NAME) in it, and $$ stands for $."""
    quoted = (json.dumps(word.replace("$", "$$"), ensure_ascii=False) for word in words)
    return "\n".join(f"- {word}" for word in quoted)


_GKE: dict[str, Any] = {
    "start": "kubectl apply -f {file}",
    "quote": kubernetes_words,
    "spot": ("", 'cloud.google.com/gke-spot: "true"'),
    "needs": ("image",),
    "takes": ("service_account",),
}
TARGETS = {
    "gke_tpu": Target("gke_tpu.yaml", TPUS, **_GKE),
    "gke_gpu": Target("gke_gpu.yaml", GPUS, **_GKE),
    "tpu_vm": Target(
        *("tpu_vm.sh", TPUS, "bash {file}", shell_words),
        spot=("", "--spot"),
        needs=("zone",),
        takes=("package",),
    ),
    "slurm": Target("slurm.sh", GPUS, "sbatch {file}", shell_words, bucket=False),
    "skypilot": Target(
        *("skypilot.yaml", GPUS, "sky jobs launch {file}", shell_words),
        spot=("false", "true"),
        takes=("package",),
    ),
}
# Flags that only some targets have -> what they hold, and what it must look like.
_OWN = {
    "image": ("a container image, one that has moejax", r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*"),
    "service_account": (
        "a service account of Kubernetes that may write to the bucket",
        r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?",
    ),
    "zone": ("a zone of Google Cloud, such as us-east5-a", r"[a-z]+-[a-z]+\d+-[a-z]"),
    "package": ("what pip is to install on the hosts, in the copied folder", r".+"),
}


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args = _parser().parse(argv)
    target = _target(args)
    words = train_words(args, workdir_there(args.workdir, target))
    machines = parse_machines(args.topology, args.nodes)
    if machines.kind not in target.accelerators:
        raise UserError(
            f"--topology {args.topology}: --target {args.target} has no {machines.kind}; choose "
            f"from: {', '.join(target.accelerators)}"
        )
    config = load_config(args.config, args.overrides)

    from moejax.parallel.mesh import check_mesh

    check_mesh(config, machines.chips)
    name = args.name or re.sub(r"[^a-z0-9]+", "-", config.about.name.lower()).strip("-")
    _check(
        "--name", name, r"[a-z]([-a-z0-9]*[a-z0-9])?", "a DNS label: small letters, digits and -"
    )
    if len(name) > _LONGEST_NAME:
        raise UserError(f"--name {name}: has more than {_LONGEST_NAME} characters")
    template = Path(args.template) if args.template else template_folder() / target.template
    text = fill(
        template, {**values(args, target, machines), "name": name, "command": target.quote(words)}
    )
    output = Path(args.output or f"{name}_{target.template}")
    start = target.start.format(file=shlex.quote(str(output)))
    if not args.dry_run:
        write_new(output, text, force=args.force)
    if args.json:
        print_json(
            {
                "target": args.target,
                "name": name,
                "hosts": machines.hosts,
                "chips": machines.chips,
                "output": None if args.dry_run else str(output),
                "start": start,
                "text": text,
            }
        )
    elif args.dry_run:
        print(text, end="")
    else:
        size = f"{machines.chips} chips on {machines.hosts} host{'s'[: machines.hosts > 1]}"
        print(f"{output}: {size}; start it with: {start}")
    return 0


def _parser():
    parser = command_parser("launch", _DESCRIPTION, workdir=False)
    parser.add_argument("--target", default="", metavar="TARGET", help=f"{', '.join(TARGETS)}")
    parser.add_argument(
        "--workdir",
        metavar="URL",
        help="folder of the run: gs://BUCKET/FOLDER, with slurm a path that all nodes share",
    )
    parser.add_argument(
        "--topology",
        metavar="KIND:SIZE",
        help=f"the chips: {', '.join(TPUS)} and a shape (v5p:4x4x8), or "
        f"{', '.join(GPUS)} and a number (h100:16)",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="hosts of GPUs (default: 8 on each)")
    parser.add_argument("--name", default="", help="of the job (default: that of the config)")
    for flag, (what, _) in _OWN.items():
        parser.add_argument(_flag(flag), help=f"{what} ({_targets_with(flag)})")
    parser.add_argument(
        "--spot",
        action="store_true",
        help=f"machines that may be preempted ({_targets_with('spot')})",
    )
    parser.add_argument(
        "--max-restarts", type=int, default=50, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--template", metavar="FILE", help="a template of your own")
    parser.add_argument(
        "--output", metavar="FILE", help="what to write (default: NAME_TEMPLATE here)"
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the file on stdout, write nothing"
    )
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _targets_with(flag: str) -> str:
    return ", ".join(name for name, target in TARGETS.items() if flag in _flags_of(target))


def _flags_of(target: Target) -> tuple[str, ...]:
    return (*target.needs, *target.takes, *(("spot",) if target.spot else ()))


def _target(args: argparse.Namespace) -> Target:
    """The target of ``args``, whose flags are checked."""
    if args.target not in TARGETS:
        said = f"no target {args.target!r}" if args.target else "name one"
        raise UserError(f"--target: {said}{did_you_mean(args.target, TARGETS)}")
    target = TARGETS[args.target]
    for flag, what in (
        ("config", "a config, e.g. mot:7b"),
        ("workdir", "the folder of the run, e.g. gs://BUCKET/FOLDER"),
        ("topology", "the chips, e.g. v5p:4x4x8 or h100:16"),
        *((flag, _OWN[flag][0]) for flag in target.needs),
    ):
        if not getattr(args, flag):
            raise UserError(f"{_flag(flag)}: give {what}")
    for flag in (*_OWN, "spot"):
        if getattr(args, flag) and flag not in _flags_of(target):
            others = _targets_with(flag)
            raise UserError(f"{_flag(flag)}: goes with --target {others}, not {args.target}")
    for flag, (what, pattern) in _OWN.items():
        if getattr(args, flag):
            _check(_flag(flag), getattr(args, flag), pattern, what)
    for flag, low in (("nodes", 1), ("max_restarts", 0)):
        number = getattr(args, flag)
        if number is not None and number < low:
            raise UserError(f"{_flag(flag)} {number}: must be at least {low}")
    if target.bucket:
        _check_config_there(args)
    return target


def _check(flag: str, value: str, pattern: str, what: str) -> None:
    if not re.fullmatch(pattern, value) or not value.isprintable():
        raise UserError(f"{flag} {value!r}: is not {what}")


def _check_config_there(args: argparse.Namespace) -> None:
    """Refuses a config that the hosts cannot find: they have moejax and the copied folder."""
    path, _ = resolve(args.config)
    name = args.config.partition(":")[0]
    shipped = config_folder().resolve() in path.resolve().parents
    if name.endswith(".py"):
        if Path(name).is_absolute() or not path.resolve().is_relative_to(Path.cwd()):
            raise UserError(
                f"--config {args.config}: the hosts have the current folder; name a file in it, "
                "by a relative path"
            )
    elif not shipped:
        raise UserError(
            f"--config {args.config}: is found by MOEJAX_CONFIG_PATH, which the hosts do not have; "
            "name its file"
        )


def workdir_there(workdir: str, target: Target) -> str:
    """The folder of the run as a host sees it. UserError if the target cannot have it."""
    if not workdir.isprintable():
        raise UserError(f"--workdir {workdir!r}: has a character that is not printable")
    if not target.bucket:
        if not workdir.startswith("/"):
            raise UserError(
                f"--workdir {workdir}: name a path that all nodes share, such as /shared/run"
            )
        return workdir
    match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])/+([^/].*)", workdir)
    if not match or ".." in match[2].split("/"):
        raise UserError(f"--workdir {workdir}: name a folder of a bucket, gs://BUCKET/FOLDER")
    return f"{MOUNT}/{match[2].rstrip('/')}"


def train_words(args: argparse.Namespace, workdir: str) -> list[str]:
    """The words of the command that every host runs."""
    words = [
        *("moejax", "train", f"--config={args.config}"),
        *(f"--import={name}" for name in args.imports),
        *(f"--config.{override}" for override in args.overrides),
        f"--workdir={workdir}",
    ]
    for word in words:
        if not word.isprintable():
            raise UserError(f"{word.partition('=')[0]}: has a character that is not printable")
    return words


def values(args: argparse.Namespace, target: Target, machines: Machines) -> dict[str, str]:
    """What stands in the templates beside the name and the command."""
    tpu, shape = TPUS.get(machines.kind), "x".join(map(str, machines.shape))
    accelerator = target.accelerators[machines.kind]
    bucket = args.workdir.removeprefix("gs://").partition("/")[0]
    given = {
        "hosts": machines.hosts,
        "chips_per_host": machines.chips_per_host,
        "max_restarts": args.max_restarts,
        "port": PORT,
        "topology": shape,
        "bucket": bucket,
        "bucket_url": f"gs://{bucket}",
        "accelerator": accelerator.sky if args.target == "skypilot" else accelerator.gke,
        "image": args.image,
        "service_account": args.service_account or "default",
        "zone": args.zone,
        "package": shlex.quote(args.package or (".[tpu]" if tpu else ".[gpu]")),
        "spot": (target.spot or ("", ""))[args.spot],
    }
    if tpu:
        given["version"] = tpu.version
        # In three dimensions one number of chips has several shapes.
        given["accelerator_flags"] = (
            f"--type={tpu.vm} --topology={shape}"
            if len(machines.shape) == 3
            else f"--accelerator-type={tpu.vm}-{machines.chips}"
        )
    return {name: str(value) for name, value in given.items()}


def template_folder() -> Path:
    """The folder of the templates: inside the wheel, or in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_launch"
    return installed if installed.is_dir() else package.parent / "experiments" / "launch"


def fill(template: Path, given: dict[str, str]) -> str:
    """The text of ``template`` with each ``@{name}`` replaced by ``given[name]``.

    A value of several lines is indented like the line that it begins on; a line that held nothing
    but an empty value is left out.

    Raises:
      UserError: no such file, or a name that is not in ``given``.
    """
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--template {template}: cannot be read: {error}") from error
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]

        def value(match: re.Match, indent: str = indent) -> str:
            if match[1] not in given:
                raise UserError(
                    f"{template}: no value @{{{match[1]}}}{did_you_mean(match[1], given)}"
                )
            return given[match[1]].replace("\n", f"\n{indent}")

        filled = re.sub(r"@\{([^{}]*)\}", value, line)
        if filled.strip() or not line.strip():
            lines.append(filled.rstrip())
    return "\n".join(lines) + "\n"


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Writes ``path`` in one piece. UserError if it is there, unless ``force``."""
    if path.exists() and not force:
        raise UserError(f"--output {path}: is there already; --force writes over it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
