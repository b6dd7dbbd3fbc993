"""Compares runs of policies: see drift_jax.tools.policy_table."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from drift_jax import config as config_lib
from drift_jax.metrics.files import replacing
from drift_jax.metrics.plots import plot_policies
from drift_jax.metrics.writers import read_jsonl
from drift_jax.tasks import parse
from drift_jax.tasks.policy.config import PolicyConfig
from drift_jax.tasks.policy.evaluation import ONE_STEP, policy_samplers
from drift_jax.training.facts import read_facts

# What may differ between runs of an environment: the seed and how a run is
# computed; and between those of two methods, the methods.
_SEED = ("seed", "mesh.", "processes.", "checkpoint.", "train.log_every")
_SEED += ("data.prefetch", "eval.parallel", "eval.threads", "eval.videos")
_METHOD = ("loss.", "drift.", "batch.generated", "model.time_size")
_METHOD += ("eval.samplers",)


class Row(NamedTuple):
  """Runs of a method, evaluated in one way.

  Attributes:
    environment: of them.
    method: and what is not its default.
    sampler: of figures.json.
    evaluations: of the network, for one chunk.
    figures: {seed: figures.json of the sampler}.
    curves: {seed: records with the sampler's "success_rate"}.
  """

  environment: str
  method: str
  sampler: str
  evaluations: int
  figures: dict[int, dict[str, Any]]
  curves: dict[int, list[dict[str, Any]]]

  @property
  def label(self) -> str:
    """'drifting', or 'diffusion, ddpm:100'."""
    if self.sampler == ONE_STEP:
      return self.method
    return f"{self.method}, {self.sampler}"

  def values(self, figure: str) -> list[float]:
    """Of all seeds, in their order."""
    return [self.figures[seed][figure] for seed in sorted(self.figures)]


def read(workdirs: Sequence[str]) -> list[Row]:
  """The rows of finished runs, in the order of the workdirs.

  Raises:
    ConfigError: a folder without a finished run of a policy, two runs of the
      same method and seed, or runs that differ in more than that.
  """
  rows: dict[tuple[str, str, str], Row] = {}
  first: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {}
  for workdir in workdirs:
    path = pathlib.Path(workdir)
    for name in ("config.json", "figures.json"):
      if not (path / name).exists():
        raise config_lib.ConfigError(
          f"no finished run of a policy in {workdir}: {path / name} is missing"
        )
    values = read_facts(epath.Path(path / "config.json"), dict)
    config = parse(values)
    if not isinstance(config, PolicyConfig):
      raise config_lib.ConfigError(
        f"{workdir} holds a run of task {config.task!r}, want 'policy'"
      )
    method = _method(config)
    flat = config_lib.flatten(values)
    for key, free in (
      ((config.environment,), _SEED + _METHOD),
      ((config.environment, method), _SEED),
    ):
      _check_equal(*first.setdefault(key, (workdir, flat)), workdir, flat, free)
    report = read_facts(epath.Path(path / "figures.json"), dict)
    records = list(read_jsonl(path / "metrics.jsonl"))
    for sampler in policy_samplers(config):
      place = config.environment, method, sampler
      count = 1
      if sampler != ONE_STEP:
        count = int(sampler.partition(":")[2])
      row = rows.setdefault(place, Row(*place, count, {}, {}))
      if config.seed in row.figures:
        raise config_lib.ConfigError(
          f"{workdir}: {config.environment}, {row.label}, seed {config.seed} "
          "is there twice"
        )
      row.figures[config.seed] = report[sampler]
      key = f"eval/{sampler}/success_rate"
      row.curves[config.seed] = [
        {"step": record["step"], "success_rate": record[key]}
        for record in records
        if key in record
      ]
  return list(rows.values())


def _method(config: PolicyConfig) -> str:
  """Its name, and what else of the drifting loss is not the default."""
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


def _check_equal(
  workdir: str,
  wanted: dict[str, Any],
  other: str,
  found: dict[str, Any],
  free: tuple[str, ...],
) -> None:
  """Raises ConfigError where two runs differ in what is not free."""
  for key in sorted({*wanted, *found}):
    if not key.startswith(free) and wanted.get(key) != found.get(key):
      raise config_lib.ConfigError(
        f"{workdir} and {other} can't be compared: {key} is "
        f"{wanted.get(key)!r} and {found.get(key)!r}"
      )


def table(rows: Sequence[Row]) -> str:
  """Markdown: means over seeds, and each seed's."""
  lines = [
    "| | evaluations | success | seeds | ms a chunk |",
    "|---" * 5 + "|",
  ]
  for row in rows:
    rates = row.values("success_rate")
    times = row.values("milliseconds_per_chunk")
    each = ", ".join(f"{rate:.3f}" for rate in rates)
    cells = (
      f"{row.environment}, {row.label}",
      row.evaluations,
      f"{sum(rates) / len(rates):.3f}",
      f"{', '.join(map(str, sorted(row.figures)))}: {each}",
      f"{sum(times) / len(times):.3g}",
    )
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines) + "\n"


def run(workdirs: Sequence[str], out: str) -> str:
  """Writes policies.md and policies.png; returns the former's text.

  Raises:
    ConfigError: see read.
  """
  rows = read(workdirs)
  curves: dict[str, dict[str, Any]] = {}
  for row in rows:
    environment = curves.setdefault(row.environment, {})
    environment[row.label] = list(row.curves.values())
  text = table(rows)
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  with replacing(folder / "policies.md") as file:
    file.write_text(text)
  plot_policies(curves, folder / "policies.png")
  return text
