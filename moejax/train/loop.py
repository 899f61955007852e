"""The training loop: resume, step, log, evaluate, save, stop."""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from moejax.analysis.flops import BACKWARD_AND_FORWARD, flops_per_token
from moejax.analysis.params import param_table
from moejax.analysis.trace import PROGRAM
from moejax.config.schema import Config
from moejax.errors import UserError
from moejax.parallel import distributed
from moejax.parallel.batches import host_rows, put_batch
from moejax.parallel.mesh import replicated
from moejax.train import workdir as workdirs
from moejax.train.checkpoint import Checkpoints, saved_steps
from moejax.train.evaluate import (
    EvalContext,
    EvalPlan,
    Patience,
    eval_plans,
    format_table,
    run_evaluators,
)
from moejax.train.progress import Progress, format_count
from moejax.train.routing_log import RoutingLog
from moejax.train.setup import Setup, prepare, surroundings
from moejax.train.start import Start, plan_start
from moejax.train.state import TrainState
from moejax.train.step import StepMetrics
from moejax.train.stop import StopSignals
from moejax.train.throughput import Clock, peak_flops
from moejax.train.writers import MetricWriter, open_sinks, read_rows, save_arrays

# How a run that was stopped early can be gone on with.
GO_ON = "with a larger eval.patience (0: none) the same command goes on"


# How long a host looks for what another one wrote to the workdir.
SEEN_SECONDS = 60


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains ``config`` in ``workdir``, or goes on with the run that is there.

    The run is exact: stopped at any moment, also by ``kill -9``, and started again with the same
    arguments, it ends with the same parameters and metric rows as one that was never stopped. On
    SIGTERM or Ctrl-C it saves and returns.

    Where jax.distributed was started (moejax.parallel.distributed.start), every process calls this
    with the same arguments and a workdir that all see; the first one prints and writes. A mistake
    or a signal in one of them ends all; an unexpected exception ends its process at once.

    Args:
      config: the experiment.
      workdir: folder of the run; made once everything has been checked.

    Returns:
      The values of the last rows of metrics.jsonl, and ``"step"``.

    Raises:
      UserError: a mistake in the config, the data or the workdir; nothing was written.
      NonFiniteLoss: after ``train.max_skipped`` skipped steps in a row.
    """
    with _all_or_none():
        return _train(config, Path(workdir))


def _all_or_none() -> contextlib.AbstractContextManager:
    # These two are raised in every process of a run or in none.
    return distributed.ends_at_once(UserError, NonFiniteLoss)


def _train(config: Config, workdir: Path) -> dict[str, float]:
    with distributed.together():
        record = workdirs.check_workdir(workdir, config)
        steps = saved_steps(workdir / "checkpoints")
    distributed.check_same({"--config": repr(config), "--workdir": f"{record} {steps}"})
    if steps and (finished := _finished(config, workdir, steps[-1])):
        if distributed.primary():
            print(f"{workdir}: {finished}")
        return last_values(workdir)
    with distributed.together():
        setup = prepare(config)
        workdirs.check_data_version(workdir, record, setup.pipeline.version)
        made_with = surroundings(setup)
        start = None if steps else plan_start(setup, workdir)
    distributed.check_same({"data.source": setup.pipeline.version})
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(setup.mesh))
        run = _Run(setup, workdir, stop, start)
        for change in workdirs.changed_surroundings(record, made_with):
            run.progress.say(f"warning: not bit for bit as before: {change}")
        with _all_or_none():
            # A new folder is never without its config.json; an old one keeps it until the restored
            # state has been found to fit.
            if record is None:
                with distributed.together():
                    if run.primary:
                        workdirs.write_record(workdir, config, made_with)
                with distributed.together():
                    workdirs.await_record(workdir, SEEN_SECONDS)
            run.open(stack)
            if record is not None and run.primary:
                workdirs.write_record(workdir, config, made_with)
            run.go()
    # Only now has the first process closed its files.
    with distributed.together():
        return last_values(workdir)


def _finished(config: Config, workdir: Path, step: int) -> str:
    """Why a run whose newest checkpoint is of ``step`` is at its end; "" if it is not."""
    if step >= config.train.steps:
        return f"already trained to step {step} of {config.train.steps}"
    patience = recorded_patience(config, workdir, step)
    return f"stopped early, finished: {patience.describe()}; {GO_ON}" if patience.exhausted else ""


def last_values(workdir: Path) -> dict[str, float]:
    """The values of the last train and the last eval row of a run, with the last step."""
    values: dict[str, float] = {}
    for row in read_rows(workdir / "metrics.jsonl"):
        values.update(row)
    return values


def recorded_patience(config: Config, workdir: Path, step: int) -> Patience:
    """The early stop as the rows up to ``step`` have it."""
    rows = read_rows(workdir / "metrics.jsonl")
    return Patience(config.eval, [row for row in rows if row["step"] <= step])


class _Run:
    """The parts of a run that is under way. ``open`` makes or restores them, ``go`` trains."""

    def __init__(self, setup: Setup, workdir: Path, stop: StopSignals, start: Start | None):
        config = setup.config
        self.start = start
        self.setup, self.config, self.workdir, self.stop = setup, config, workdir, stop
        self.sources = [spec for spec, _ in config.data.sources]
        folder = workdir / "checkpoints"
        latest = max(saved_steps(folder), default=0)
        self.primary = distributed.primary()
        self.progress = Progress(
            config.train.steps,
            latest,
            losses=getattr(config.model, "modalities", ()),
            quiet=not self.primary,
        )
        self.plans = eval_plans(config.eval)
        self.context: EvalContext | None = None
        # The last step: its number and metrics, not looked at before the next one is under way.
        self.unchecked: tuple[int, StepMetrics] | None = None
        # Sums up to a log point, not written before the next step is under way.
        self.unwritten: tuple[int, StepMetrics] | None = None

    def open(self, stack: contextlib.ExitStack) -> None:
        """Makes or restores the state, compiles the step."""
        setup, config = self.setup, self.config
        step = setup.train_step()
        traced = step.trace(setup.recipe.abstract, setup.batch)
        _, shapes = traced.out_info
        whole = replicated(setup.mesh)
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self.zeros = jax.jit(zeros, out_shardings=whole)()
        self.add = jax.jit(lambda sums, metrics: sums + metrics, out_shardings=whole)
        best = config.eval.best_metric
        self.checkpoints = Checkpoints(
            self.workdir / "checkpoints", keep=config.train.checkpoint_keep, best_metric=best
        )
        stack.callback(self.checkpoints.close)
        latest = self.checkpoints.latest()
        self.state: TrainState
        self.sums: StepMetrics
        if latest is None:
            self.state, self.sums = self.initial_state(), self.zeros
        else:
            self.state, self.sums = self.checkpoints.restore(
                latest, setup.recipe.abstract, self.zeros
            )
        self.first = latest or 0
        self.best = self.checkpoints.best()
        self.patience = recorded_patience(config, self.workdir, self.first)
        notes: list[str] = []
        if self.primary:
            sinks = open_sinks(config, self.workdir, self.first)
            notes = [sink.note for sink in sinks if sink.note]
            self.writer = MetricWriter(self.workdir, self.first, sinks)
            stack.callback(self.writer.close)
            self.routing = RoutingLog(self.workdir, self.first, config.model)
            stack.callback(self.routing.close)
        stack.callback(self.progress.close)
        self.progress.say("\n".join([header(setup), *notes]))
        if latest is not None:
            self.progress.say(f"resumed from step {latest}")
        elif self.start is not None:
            self.progress.say(self.start.describe())
        # All wait for the slowest compiler here: on CPUs a group of devices whose first collective
        # is not begun by all of its processes within 30 seconds is an error.
        with distributed.together():
            self.train_step = traced.lower().compile()
        flops = BACKWARD_AND_FORWARD * flops_per_token(config)
        self.rows = host_rows(setup.mesh, config.data.batch_size)
        share = len(self.rows.held) / config.data.batch_size
        self.clock = Clock(flops, peak_flops(jax.devices()) if flops else 1.0, share)

    def initial_state(self) -> TrainState:
        """Drawn, or with the parameters of another run; init_report.json then says which."""
        if self.start is None:
            return self.setup.recipe.create()
        if self.primary:
            self.start.write(self.workdir)
        return self.start.create(self.setup.recipe)

    def go(self) -> None:
        """Steps from the restored step to the last one, or until a stop is asked for."""
        config, total = self.config, self.config.train.steps
        mesh, rows = self.setup.mesh, self.rows
        batches = iter(self.setup.pipeline.batches(self.first, rows.held))
        profiler = _Profiler(self)
        for step in range(self.first, total):
            profiler.before(step)
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            self.state, metrics = self.train_step(self.state, put_batch(batch, mesh, rows))
            self.sums = self.add(self.sums, metrics)
            done = step + 1
            # Only now look at the step before: the device is never left without work.
            self.settle()
            self.unchecked = step, metrics
            if done % config.log.every == 0 or done == total:
                self.unwritten, self.sums = (done, self.sums), self.zeros
            if step == self.first:
                # The first step warms up; speed and ETA are measured from here on.
                jax.block_until_ready(metrics)
                self.clock.restart()
                self.progress.begin()
            else:
                self.clock.step(batch, waited)
            profiler.after(step, metrics)
            self.progress.step(done)
            # Read once: a signal that comes after this line waits for the next step.
            stop = self.stop.agreed()
            self.look_back(done, stop)
            if self.patience.exhausted and done < total:
                self.end(f"stopped early at step {done}: {self.patience.describe()}; {GO_ON}")
                return
            if stop and done < total:
                self.progress.say(f"stopped at step {done}; run the same command to go on")
                return
        self.end(f"trained to step {total}: {self.workdir}")

    def end(self, line: str) -> None:
        """The last words of a run that is finished."""
        self.progress.close()
        if self.clock.total_seconds:
            share = self.clock.total_waited / self.clock.total_seconds
            self.progress.say(f"input wait: {share:.2%} of the time of the steps")
        self.progress.say(line)

    def look_back(self, done: int, stop: bool) -> None:
        """Evaluates and saves after ``done`` steps, where it is time to (saves if ``stop``)."""
        config, last = self.config, done == self.config.train.steps
        due = [plan for plan in self.plans if last or plan.due(done)]
        save = last or done % config.train.checkpoint_every == 0 or stop
        if not (due or save):
            return
        # A checkpoint at this step promises that the rows up to it are written.
        self.settle()
        with self.clock.paused():
            values = self.evaluate(done, due) if due else None
            score = self.checkpoints.score(values)
            ended = last or self.patience.exhausted
            if save or ended or score < self.best:
                self.best = min(self.best, score)
                if self.primary:
                    self.writer.sync()
                    self.routing.sync()
                self.checkpoints.save(done, self.state, self.sums, self.setup.mesh, values)
            if ended:
                self.checkpoints.wait()

    def settle(self) -> None:
        """Checks the last step and writes the row that is due; waits for that step to end."""
        if self.unchecked is not None:
            (step, metrics), self.unchecked = self.unchecked, None
            if int(metrics.skipped_in_row) >= self.config.train.max_skipped:
                raise NonFiniteLoss(self.non_finite(step, int(metrics.skipped_in_row)))
        if self.unwritten is not None:
            (step, sums), self.unwritten = self.unwritten, None
            values = {**row_values(sums, self.sources), **self.clock.read()}
            if self.primary:
                self.writer.write(step, values)
                self.routing.write(step, sums)
            self.progress.row(step, values)

    def evaluate(self, done: int, due: list[EvalPlan]) -> dict[str, float]:
        """Evaluates the state by ``due``, writes the row and the pictures, prints a table.

        When that ends the run, the evaluators whose time it was not have their turn as well.
        """
        params = self.state.eval_params()
        setup = self.setup
        context = self.context or setup.eval_context(
            params, setup.eval_pipeline, setup.pipeline, setup.eval_others
        )
        self.context = context.with_params(params)
        result = run_evaluators(self.context, due)
        self.patience.note(done, result.values)
        if self.patience.exhausted:
            rest = [plan for plan in self.plans if plan not in due]
            result = result.joined(run_evaluators(self.context, rest))
        # Parameters are donated to the next step: the context must not keep them.
        self.context = context.with_params(None)
        values = result.values
        if self.primary and values:
            self.writer.write(done, {f"eval/{name}": value for name, value in values.items()})
        paths = []
        if self.primary:
            paths = self.writer.images(done, result.images)
            save_arrays(self.workdir, done, result.arrays)
        if values:
            split = self.config.eval.split
            self.progress.say(f"evaluation on {split} at step {done}\n{format_table(values)}")
        for note in result.notes:
            self.progress.say(note)
        for path in paths:
            self.progress.say(f"samples at step {done}: {path}")
        if self.patience.limit and self.patience.since:
            self.progress.say(self.patience.describe())
        return values

    def non_finite(self, step: int, in_row: int) -> str:
        ids = self.setup.pipeline.record_ids(step)
        shown = ", ".join(map(str, ids[:32])) + (f", ... ({len(ids)} in all)" if ids[32:] else "")
        return (
            f"loss or gradient not finite in {in_row} steps in a row, up to step {step + 1}, whose "
            f"batch holds the records {shown}; lower optim.learning_rate, or look at these records"
        )


class _Profiler:
    """A jax.profiler trace of ``train.profile_steps`` steps from ``train.profile_start`` on.

    Beside it lies the program of the step, which has the named scopes (moejax.analysis.trace).
    """

    def __init__(self, run: _Run):
        config = run.config.train
        self.start = max(config.profile_start, run.first)
        self.stop = min(self.start + config.profile_steps, config.steps) - 1
        self.run, self.folder = run, run.workdir / "profile"

    def before(self, step: int) -> None:
        if self.start == step <= self.stop and self.run.primary:
            jax.profiler.start_trace(str(self.folder))

    def after(self, step: int, metrics: StepMetrics) -> None:
        if self.start <= step == self.stop and self.run.primary:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            program = self.run.train_step.as_text()
            (self.folder / PROGRAM).write_text(program, encoding="utf-8")
            steps = f"steps {self.start + 1} to {self.stop + 1}"
            self.run.progress.say(f"profile of {steps}: {self.folder}")


def row_values(sums: StepMetrics, sources: Sequence[str] = ()) -> dict[str, float]:
    """The training fields of a metrics row: exact means over the steps that ``sums`` adds up.

    Values that are no means (``router/...``, and their part in ``train/loss``) are of the sums over
    all these steps: a load that is even over them counts as even. A loss without a target in these
    steps is left out, as are all when every step was skipped. ``sources`` names the sources of a
    mixture, whose losses are counted by number.
    """
    names = {f"source_{index}": f"source/{name}" for index, name in enumerate(sources)}
    values: dict[str, float] = {}
    sums = jax.device_get(sums)
    if sums.steps > 0:
        values["train/loss"] = float(sums.losses.total())
        values["train/grad_norm"] = float(sums.grad_norm / sums.steps)
    for name, weight in sums.losses.weights.items():
        if weight > 0:
            # "text_correct" counts right predictions: its mean is an accuracy.
            modality = name.removesuffix("_correct")
            shown = names.get(name, name)
            key = f"train/loss/{shown}" if modality == name else f"train/accuracy/{modality}"
            values[key] = float(sums.losses.sums[name] / weight)
    if sums.steps > 0:
        derived = sums.losses.derived_values()
        values.update({f"train/{name}": float(value) for name, value in derived.items()})
    values["train/learning_rate"] = float(sums.learning_rate)
    values["train/skipped"] = int(sums.skipped)
    return values


def header(setup: Setup) -> str:
    """What is about to be trained, in a few lines."""
    config, pipeline, mesh = setup.config, setup.pipeline, setup.mesh
    params = sum(leaf.size for leaf in jax.tree.leaves(setup.recipe.abstract.params))
    table = param_table(setup.model, config)
    shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    steps, epoch = config.train.steps, max(1, pipeline.steps_per_epoch)
    tokens = config.data.batch_size * config.data.sequence_length
    size = f"{config.data.batch_size} x {config.data.sequence_length} tokens"
    if config.data.format != "tokens":
        size = f"{config.data.batch_size} pictures"
    if config.data.image_sizes:
        size = f"{config.data.batch_size} rows of {config.data.max_patches} patches"
    cut = getattr(pipeline, "truncated", 0)
    lines = (
        f"{config.about.name or config.model.name}: {format_count(params)} parameters, "
        f"{format_count(table.active)} active for a token, "
        + (f"{format_count(table.frozen)} frozen, " if table.frozen else "")
        + f"in {config.model.dtype}",
        f"devices: {mesh.size} x {jax.devices()[0].device_kind}"
        + (f" ({shape})" if shape else "")
        + (f", in {jax.process_count()} processes" if distributed.several() else ""),
        f"data: {pipeline.source.name}, {len(pipeline.source)} records; {size} a step, "
        f"{epoch} steps an epoch" + (f"; {cut} texts cut to fit" if cut else ""),
        f"training: {steps} steps, {steps / epoch:.3g} epochs"
        + (f", {format_count(steps * tokens)} tokens" if config.data.format == "tokens" else ""),
    )
    return "\n".join(lines)
