"""Puts finished runs side by side: see drift_jax.tools.table."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from drift_jax import config as config_lib
from drift_jax.metrics.plots import plot_policies
from drift_jax.tasks.policy.config import PolicyConfig
from drift_jax.tasks.policy.evaluation import ONE_STEP, policy_samplers
from drift_jax.tools.work import rows
from drift_jax.training.facts import check_same_data

# Keys that may differ between runs of a row: the seed, how a run is computed.
SEED = (
  *("seed", "train.log_every", "eval.parallel", "eval.threads", "eval.videos"),
  *rows.MACHINE,
)
# Further keys that may differ between two methods of an environment.
METHOD = (
  *("loss.", "drift.", "batch.generated", "model.time_size", "eval.samplers"),
)


def run(workdirs: Sequence[str], out: str, task: str | None = None) -> str:
  """Writes the table of finished runs; returns its Markdown.

  Args:
    workdirs: workdirs of the runs.
    out: folder of the table.
    task: the only task that is allowed; None for any.

  Raises:
    ConfigError: a folder without a finished run, runs of several tasks or of
      other data, two runs of a row with one seed, or policies of an environment
      that differ in more than method and seed.
  """
  runs = [rows.read(workdir) for workdir in workdirs]
  for run in runs:
    if task not in (None, run.config.task):
      raise config_lib.ConfigError(
        f"{run.path} holds a run of task {run.config.task!r}, want {task!r}"
      )
  tasks = sorted({run.config.task for run in runs})
  if len(tasks) > 1:
    raise config_lib.ConfigError(f"runs of {tasks} can't stand in one table")
  if tasks == ["policy"]:
    return _write_policies(runs, out)
  check_same_data([epath.Path(run.path) for run in runs])
  found = runs_by_config(runs)
  names = dict.fromkeys(itertools.chain(*(run.figures for run in runs)))
  text = rows.markdown(
    ("", "runs", *names),
    (
      (label, len(row.figures), *(rows.spread(row.values(n)) for n in names))
      for label, row in found.items()
    ),
  )
  return _write(found, out, "table", text)


def runs_by_config(
  runs: Sequence[rows.FinishedRun],
) -> dict[str, rows.Runs]:
  """{label: runs that differ in their seeds alone}.

  A label lists the values that differ between runs.
  """
  configs = [
    {key: v for key, v in run.values.items() if not key.startswith(SEED)}
    for run in runs
  ]
  varied = sorted(
    key
    for key in set(itertools.chain(*configs))
    if any(c.get(key) != configs[0].get(key) for c in configs)
  )
  found: dict[str, rows.Runs] = {}
  for run, config in zip(runs, configs, strict=True):
    label = "; ".join(f"{key}={config.get(key)}" for key in varied)
    row = found.setdefault(label or run.config.task, rows.Runs())
    row.add(run, label or run.config.task)
  return found


@dataclasses.dataclass
class _PolicyRow(rows.Runs):
  """Runs of a method, evaluated in one way.

  Attributes:
    environment: environment of the runs.
    label: 'drifting', or 'diffusion, ddpm:100'.
    evaluations: evaluations of the network for one chunk.
    curves: for each seed, records with the sampler's "success_rate".
  """

  environment: str
  label: str
  evaluations: int
  curves: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)


def policy_rows(runs: Sequence[rows.FinishedRun]) -> dict[str, _PolicyRow]:
  """{'ENVIRONMENT, METHOD, SAMPLER': row}, in the order of the runs.

  Raises:
    ConfigError: see run.
  """
  found: dict[str, _PolicyRow] = {}
  first: dict[tuple[str, ...], rows.FinishedRun] = {}
  for run in runs:
    config = run.config
    assert isinstance(config, PolicyConfig)
    method = _method(config)
    for key, free in (
      ((config.environment,), SEED + METHOD),
      ((config.environment, method), SEED),
    ):
      other = first.setdefault(key, run)
      for name, (one, two) in rows.changes(
        other.values, run.values, free
      ).items():
        raise config_lib.ConfigError(
          f"{other.path} and {run.path} can't be compared: {name} is {one!r} "
          f"and {two!r}"
        )
    for sampler in policy_samplers(config):
      label, count = method, 1
      if sampler != ONE_STEP:
        label, count = f"{method}, {sampler}", int(sampler.partition(":")[2])
      name = f"{config.environment}, {label}"
      row = found.setdefault(name, _PolicyRow(config.environment, label, count))
      row.add(run, name, prefix=f"{sampler}.")
      key = f"eval/{sampler}/success_rate"
      row.curves.append(
        [
          {"step": record["step"], "success_rate": record[key]}
          for record in run.records()
          if key in record
        ]
      )
  return found


def _method(config: PolicyConfig) -> str:
  """The method's name and its options that are not the default."""
  parts = [config.loss.method]
  if config.loss.method == "drifting":
    kind = config.drift.temperature_scale.kind
    for value, default, text in (
      (config.drift.field, "softmax", config.drift.field),
      (config.loss.problem, "step", f"problem {config.loss.problem}"),
      (kind, "fixed", f"{kind} temperature"),
    ):
      parts += [text] * (value != default)
  return ", ".join(parts)


def _write_policies(runs: Sequence[rows.FinishedRun], out: str) -> str:
  """Writes policies.md, .csv and .png; returns the first one's text."""
  found = policy_rows(runs)
  lines = []
  curves: dict[str, dict[str, Any]] = {}
  for name, row in found.items():
    rates = row.values("success_rate")
    seeds = ", ".join(map(str, sorted(row.figures)))
    each = ", ".join(f"{rate:.3f}" for rate in rates)
    time = row.values("milliseconds_per_chunk").mean()
    cells = (f"{rates.mean():.3f}", f"{seeds}: {each}", f"{time:.3g}")
    lines.append((name, row.evaluations, *cells))
    curves.setdefault(row.environment, {})[row.label] = row.curves
  header = ("", "evaluations", "success", "seeds", "ms a chunk")
  text = _write(found, out, "policies", rows.markdown(header, lines))
  plot_policies(curves, f"{out}/policies.png")
  return text


def _write(
  found: Mapping[str, rows.Runs], out: str, name: str, table: str
) -> str:
  """Writes NAME.md and NAME.csv; returns the first one's text."""
  lines = [
    line for label, row in found.items() for line in row.lines(row=label)
  ]
  rows.write(out, name, md=table + "\n", csv=rows.csv_text(lines))
  return table + "\n"
