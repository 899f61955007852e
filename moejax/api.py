"""What notebooks use: ``moejax.load_config``, ``build``, ``train``, ``load`` and ``compare``.

For example::

    config = moejax.load_config("quickstart", {"train.steps": 50})
    moejax.train(config, "runs/mine")
    run = moejax.load("runs/mine")
    run.evaluate("test")

``moejax.generate.api`` samples, ``moejax.data.sources.open_source`` opens records.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.analysis.compare.output import write_comparison
from moejax.analysis.compare.plan import ArmSpec, Plan, make_plan, parse_budget
from moejax.analysis.compare.results import ArmResult, Row
from moejax.analysis.compare.tables import comparison_markdown
from moejax.config.load import flag_text
from moejax.config.schema import Config
from moejax.models import build_model
from moejax.objectives import build_objective
from moejax.train.compare import run_comparison
from moejax.train.load import Loaded, load

__all__ = ["Comparison", "Loaded", "build", "compare", "load"]


def build(config: Config):
    """(model, objective) of a config: a Linen module, and a function to LossSums.

    For example::

        model, objective = moejax.build(moejax.load_config("quickstart"))
        params = flax.core.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])
        outputs = jax.jit(model.apply)({"params": params}, batch)
        losses = objective(outputs, batch, jax.random.key(1))
        losses.total(), losses.means()

    ``batch`` is a dict of arrays as pipelines make them (moejax.data.pipeline). A fresh model's
    parameters come boxed with the logical names of their axes, hence the ``unbox``.

    Raises:
      UserError: a model, block or objective that is not registered.
    """
    return build_model(config), build_objective(config)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
      plan: the arms with their steps and FLOPs.
      results: of each arm its learning rate, and the evaluations of each seed.
      rows: each arm against the first one, on each modality.
      workdir: where the runs, tables and pictures lie.
    """

    plan: Plan
    results: list[ArmResult]
    rows: list[Row]
    workdir: Path

    def table(self) -> str:
        """The tables in Markdown."""
        return comparison_markdown(self.plan, self.results, self.rows)


def compare(
    arms: Mapping[str, str | tuple[str, Mapping[str, Any]]],
    budget: str,
    workdir: str | os.PathLike,
    **options: Any,
) -> Comparison:
    """Several configs at equal training FLOPs, as ``moejax compare``; the first is the baseline.

    For example::

        arms = {"dense": "quickstart:dense", "half": ("quickstart", {"model.num_layers": 2})}
        found = moejax.compare(arms, "flops=3e12", "runs/mine", seeds=3)
        print(found.table())

    Args:
      arms: a name for each arm -> its config, or (config, overrides).
      budget: of each run: ``"flops=3e12"``, ``"tokens=1e6"`` or ``"steps=100"``.
      workdir: folder of the comparison; what is finished in it is not run again.
      **options: of :func:`moejax.analysis.compare.plan.make_plan`: seeds, match, rates,
        evaluations, schedule, checkpoint_every, overrides.

    Raises:
      UserError: an arm or the budget is refused; nothing was trained.
      Stopped: a signal asked to stop; the same call goes on.
    """
    specs = []
    for name, arm in arms.items():
        spec, overrides = (arm, {}) if isinstance(arm, str) else arm
        changed = tuple(f"{field}={flag_text(value)}" for field, value in overrides.items())
        specs.append(ArmSpec(name, spec, changed))
    plan, workdir = make_plan(specs, parse_budget(budget), **options), Path(workdir)
    results = run_comparison(plan, workdir, lambda done: write_comparison(plan, done, workdir))
    return Comparison(plan, results, write_comparison(plan, results, workdir), workdir)
