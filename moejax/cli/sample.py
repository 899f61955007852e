"""``moejax sample``: pictures and captions from a checkpoint of a run."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.cli.common import command_parser, print_json, workdir_config
from moejax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from moejax.generate.samples import Outcome

MODES = (
    "all",
    "text2image",
    "image2text",
    "unconditional",
    "class2image",
    "denoising",
    "guidance",
)
# Those of pictures that are denoised alone, and those that a prompt goes with.
_OF_DENOISING = ("class2image", "denoising", "guidance")
_PROMPTED = ("text2image", "denoising", "guidance")
# Flags that have an effect on some kinds of model alone.
_SEQUENCE_FLAGS = ("temperature", "top_k", "top_p")
_DENOISING_FLAGS = ("denoise_steps", "sampler", "shift", "spacing", "guidance_interval")
# What each data.order trains a model to write.
_TRAINED = {
    "text_first": ("text2image", "unconditional"),
    "image_first": ("image2text", "unconditional"),
    "random": ("text2image", "image2text", "unconditional"),
}


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser(
        "sample",
        "Sample from a checkpoint: pictures of captions, captions of pictures, pictures without a\n"
        "caption; of diffusion models pictures of classes, strips of denoising, a sweep of the\n"
        "guidance. Writes MODE.png, .txt and .json into WORKDIR/samples/step_N, with the nearest\n"
        "training picture and its distance beside each new one.",
        config=False,
    )
    parser.add_argument("--mode", help=f"one of {', '.join(MODES)} (default: all)")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a caption of your own for text2image, denoising or guidance; can be given several "
        "times",
    )
    parser.add_argument(
        "--n",
        type=int,
        default=16,
        help="samples per mode, fewer where rows would not be whole (default: 16)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="keep so many likeliest tokens (default: 0, all)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="keep this much probability (default: 0.95)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=2.0,
        help="weight of the caption or the class; 1 is the model alone (default: 2)",
    )
    parser.add_argument(
        "--denoise-steps",
        type=int,
        default=50,
        help="of diffusion models and of pictures that are latents in a sequence; the temperature "
        "and filters are for text then (default: 50)",
    )
    parser.add_argument(
        "--sampler",
        help="of denoising: ddim, ddpm, euler, heun, dpmpp_2m, sde (default: ddim)",
    )
    parser.add_argument(
        "--shift",
        type=float,
        default=1.0,
        help="of the times of --sampler; above 1 more steps are spent where there is much noise",
    )
    parser.add_argument(
        "--spacing",
        default="",
        help="of the times of --sampler: uniform, of EDM rho or exponential (default: the first)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="times of denoising between which there is guidance; 0 is data (default: all)",
    )
    parser.add_argument(
        "--cache-experts",
        action="store_true",
        help="of a diffusion model whose experts the noise level alone chooses: make them one "
        "dense layer for each step before drawing",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="of captions and pictures to start from (default: eval.split)",
    )
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse(argv)
    modes = _modes(args)
    config = workdir_config(args.workdir)
    _check_flags(args, parser, config)

    from tqdm import tqdm

    from moejax.generate.denoiser_samples import sample_mode
    from moejax.generate.samples import Request, write_outcome
    from moejax.generate.sampling import Sampling, check_sampling
    from moejax.train.load import load

    sampling = check_sampling(Sampling(args.temperature, args.top_k, args.top_p, args.guidance))
    possible = _possible(config)
    modes = modes or possible
    _check_modes(modes, possible, config)
    split = args.split or config.eval.split
    # With --json stdout carries the document alone, whatever a library prints.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside:
        loaded = load(args.workdir, args.step)
        sampler, settings = _sampler(loaded, args)
        pipeline = loaded.train_pipeline()
        folder = Path(args.workdir) / "samples" / f"step_{loaded.step}"
        about = {"run": str(args.workdir), "step": loaded.step, "split": split, **settings}
        written = {}
        # disable=None: no bar where stderr is not a terminal.
        with tqdm(total=len(modes) * args.n, unit="sample", disable=None, leave=False) as bar:
            request = Request(
                sampler=sampler,
                data=config.data,
                split=split,
                prompts=args.prompt,
                count=args.n,
                sampling=sampling,
                seed=args.seed,
                progress=bar.update,
                sources={"train": pipeline.source},
            )
            for mode in modes:
                bar.set_description(mode)
                before = bar.n
                outcome = sample_mode(mode, request)
                # A mode draws fewer where rows would not be whole.
                bar.total += bar.n - before - args.n
                paths = write_outcome(outcome, folder, _about_mode(about, mode))
                written[mode] = outcome, paths
                bar.write("\n".join(_report(outcome, paths)))
    if args.json:
        print_json(
            {
                **about,
                "modes": {
                    mode: {
                        **outcome.summary,
                        "files": {kind: str(path) for kind, path in paths.items()},
                        "rows": outcome.rows,
                    }
                    for mode, (outcome, paths) in written.items()
                },
            }
        )
    return 0


def _modes(args: argparse.Namespace) -> tuple[str, ...]:
    """The modes asked for; empty for all that the run was trained for.

    Raises:
      UserError: for whatever can be seen to be wrong before anything is loaded.
    """
    if not args.workdir:
        raise UserError("--workdir: name the folder of a run, e.g. --workdir runs/quickstart")
    if args.mode is not None and args.mode not in MODES:
        raise UserError(f"--mode: no mode {args.mode!r}{did_you_mean(args.mode, MODES)}")
    if args.prompt and args.mode not in (None, *_PROMPTED):
        raise UserError(
            f"--prompt: goes with --mode {', '.join(_PROMPTED)}, not with --mode {args.mode}"
        )
    if not all(prompt.strip() for prompt in args.prompt):
        raise UserError("--prompt: is empty; --mode unconditional makes pictures without a caption")
    if args.n < 1:
        raise UserError(f"--n: must be positive, got {args.n}")
    if args.seed < 0:
        raise UserError(f"--seed: must not be negative, got {args.seed}")
    if args.prompt and args.mode is None:
        return ("text2image",)
    return () if args.mode in (None, "all") else (args.mode,)


def _check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser, config: Any) -> None:
    """UserError for a flag without an effect on this kind of model."""
    from moejax.generate.cached_experts import check_cacheable
    from moejax.generate.denoiser import draws_pictures

    if draws_pictures(config):
        without = dict.fromkeys(_SEQUENCE_FLAGS, "sequences")
    else:
        without = {"cache_experts": "a diffusion model of pictures"}
        if not _denoises(config):
            without |= dict.fromkeys(_DENOISING_FLAGS, "pictures that are denoised")
    for name, kind in without.items():
        if getattr(args, name) != parser.get_default(name):
            raise UserError(
                f"--{name.replace('_', '-')}: is of {kind}, and has no effect on model.name="
                f"{config.model.name}; leave it out"
            )
    if args.cache_experts:
        check_cacheable(config.model)


def _denoises(config: Any) -> bool:
    """Whether pictures are latents in the sequences of a model."""
    latents = getattr(config.model, "latents", None)
    return latents is not None and latents.channels > 0


def _possible(config: Any) -> tuple[str, ...]:
    """The modes that the model of a run was trained for; UserError if it writes nothing."""
    from moejax.generate.api import check_can_sample
    from moejax.generate.denoiser import draws_pictures
    from moejax.generate.denoiser_samples import modes_of

    if draws_pictures(config):
        return modes_of(config.model)
    check_can_sample(config)
    trained = _TRAINED[config.data.order]
    strips = _denoises(config) and "text2image" in trained
    return (*trained, *(("denoising", "guidance") if strips else ()))


def _check_modes(modes: tuple[str, ...], possible: tuple[str, ...], config: Any) -> None:
    """UserError for a mode that is of another kind of model."""
    from moejax.generate.denoiser import draws_pictures

    denoiser = draws_pictures(config)
    for mode in modes:
        if mode not in possible and (denoiser or mode in _OF_DENOISING):
            raise UserError(
                f"--mode {mode}: not of model.name={config.model.name} as it is trained; use "
                + " or ".join(possible)
            )


def _sampler(loaded: Any, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """What pictures and texts are drawn from, and the settings that have an effect on them."""
    from moejax.generate.api import sampler_of
    from moejax.generate.cached_experts import cached
    from moejax.generate.denoiser import denoiser_of, draws_pictures
    from moejax.generate.drawing import Drawing, check_drawing

    drawing = Drawing(
        sampler=args.sampler or Drawing.sampler,
        steps=args.denoise_steps,
        spacing=args.spacing,
        shift=args.shift,
        guidance=args.guidance,
        interval=tuple(args.guidance_interval) if args.guidance_interval else None,
    )
    settings = {name: getattr(args, name) for name in ("seed", "guidance")}
    if draws_pictures(loaded.config):
        sampler = denoiser_of(loaded)
        sampler = dataclasses.replace(sampler, drawing=check_drawing(drawing, sampler.diffusion))
        sampler = cached(sampler) if args.cache_experts else sampler
        settings["cache_experts"] = args.cache_experts
    else:
        sampler = sampler_of(loaded)
        settings |= {name: getattr(args, name) for name in _SEQUENCE_FLAGS}
        if sampler.diffusion is None:
            return sampler, settings
        sampler = dataclasses.replace(sampler, drawing=check_drawing(drawing, sampler.diffusion))
    settings |= {name: getattr(args, name) for name in _DENOISING_FLAGS}
    settings["sampler"] = drawing.sampler
    return sampler, {name: value for name, value in settings.items() if value not in ("", None)}


def _about_mode(about: dict[str, Any], mode: str) -> dict[str, Any]:
    """``about`` without the settings that have no effect in ``mode``."""
    without = []
    if mode not in ("text2image", "class2image", "denoising"):
        without.append("guidance")
    if mode not in ("text2image", "class2image", "denoising", "guidance"):
        without.append("guidance_interval")
    if "denoise_steps" in about:
        without += _DENOISING_FLAGS if mode == "image2text" else _SEQUENCE_FLAGS
    return {key: value for key, value in about.items() if key not in without}


def _report(outcome: "Outcome", paths: dict[str, Path]) -> list[str]:
    """What is printed of one mode."""
    values = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in outcome.summary.items()
    )
    files = ", ".join(f".{kind}" for kind in paths if kind != "png")
    return [f"{outcome.mode}: {values}", f"  {paths['png']} (and {files})"]
