"""Compares released generators: see drift_jax.tools.verify_released."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from drift_jax import sampling
from drift_jax.metrics.files import write_report
from drift_jax.tasks.generator.reports import Request, report_on_weights
from drift_jax.training.released import Released

_IMAGES, _COLUMNS = 10, 5


def run(chosen: Sequence[Released], arguments: argparse.Namespace) -> None:
  """Prints a row for each generator as it is ready.

  Raises:
    ArtifactError: one that can't be had or loaded.
    ConfigError, EvaluationError: figures that can't be computed.
  """
  figure = f"FID of {arguments.num_samples} samples" if arguments.fid else "FID"
  columns = ("artifact", "steps", "alpha", "published FID", figure, "images")
  for row in (columns, ["---"] * len(columns)):
    print(_row(row))
  out = pathlib.Path(arguments.out)
  for entry in chosen:
    alpha = 1.0 if entry.alpha is None else entry.alpha
    steps, picture = _draw(entry, alpha, arguments, out)
    fid = f"{_fid(entry, alpha, arguments, out):.4g}" if arguments.fid else ""
    cells = (entry.name, steps, alpha, entry.fid, fid, picture)
    print(_row(cells), flush=True)


def _row(cells: Sequence[object]) -> str:
  return f"| {' | '.join(map(str, cells))} |"


def _draw(
  entry: Released,
  alpha: float,
  arguments: argparse.Namespace,
  out: pathlib.Path,
) -> tuple[int | None, pathlib.Path]:
  """Draws images of classes far apart; returns the generator's training steps
  and the picture."""
  model = sampling.load(f"hf://{entry.name}")
  labels = np.linspace(0, model.num_classes - 1, _IMAGES).astype(np.int32)
  samples = model.sample(
    labels, alpha=alpha, seed=arguments.seed, batch_size=arguments.batch_size
  )
  picture = out / f"{entry.name}.png"
  dataclasses.replace(samples, columns=_COLUMNS).save(picture)
  return model.generator.step, picture


def _fid(
  entry: Released,
  alpha: float,
  arguments: argparse.Namespace,
  out: pathlib.Path,
) -> float:
  """The FID; writes the whole report."""
  path = out / f"{entry.name}.json"
  request = Request(
    alphas=[alpha],
    metrics=["fid"],
    num_samples=arguments.num_samples,
    batch_size=arguments.batch_size,
    seed=arguments.seed,
    judges={
      ("inception", "path"): arguments.inception,
      ("inception", "reference"): arguments.inception_reference,
    },
    out=str(path),
  )
  report = report_on_weights(f"hf://{entry.name}", request)
  write_report(path, report)
  return report["results"][alpha]["fid"]
