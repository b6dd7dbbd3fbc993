"""The training step as a TPU v6e's compiler sees it, beside the release's.

  python benchmarks/step_tpu.py [--settings=ablation,wflow,l2,l16] [--parts=...]
      [--json=FILE]

needs the package libtpu, but no TPU: run from the repository's root on Linux.
Prints a Markdown table; "ratio" is ours / the authors' release, below 1 where
ours is the better one. 1 label a chip, as in the published runs.

'whole' is compiled for the slice of the published setting, 'step' and its parts
for one chip, without collectives. Times are the compiler's cycles at an assumed
1.75 GHz, Pallas kernels at the roofline of their declared cost, collectives at
nothing: ratios mean something, seconds do not. A program that the compiler does
not write down has neither times nor bytes.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import configs, timing
from drift_jax.system import paths
from drift_jax.tools import compile_check

PARTS = ("whole", "step", "generator", "reals", "generated", "loss")


@dataclasses.dataclass(frozen=True)
class Setting:
  """A published run.

  Attributes:
    config: file and variant.
    topology: of the slice.
    labels: of its batch, one for each chip.
    release: {part: {figure: what was recorded of the authors' release}}.
  """

  config: str
  topology: str
  labels: int
  release: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


# Of the authors' release, by jax 0.10.2 and libtpu 0.0.52 on the same settings.
SETTINGS = {
  "ablation": Setting(
    "configs/imagenet_latent.py:ablation",
    "v6e:4x4",
    16,
    {
      "whole": {"peak GB": 19.0, "collective GB": 2.0, "compile s": 24 * 60},
      "step": {"TFLOP": 16.5, "accessed GB": 247, "ms": 149},
      "generator": {"accessed GB": 147, "peak GB": 15.6, "ms": 92},
      "reals": {"accessed GB": 10.9, "ms": 10.5},
      "generated": {"accessed GB": 30.6, "ms": 26},
      "loss": {"accessed GB": 52, "ms": 27, "code MB": 514, "compile s": 244},
    },
  ),
  "wflow": Setting("configs/imagenet_latent.py:wflow_ablation", "v6e:4x4", 16),
  "l2": Setting(
    "configs/imagenet_latent.py:l2",
    "v6e:8x16",
    128,
    {
      "whole": {"peak GB": 30.1, "collective GB": 14.4, "compile s": 24 * 60},
      "step": {"TFLOP": 79.2, "accessed GB": 477, "ms": 442},
    },
  ),
  "l16": Setting(
    "configs/imagenet_pixel.py:l16",
    "v6e:8x16",
    128,
    {
      "whole": {"peak GB": 26.0, "compile s": 18 * 60},
      "step": {"TFLOP": 112.6, "accessed GB": 782},
    },
  ),
}


def main(argv: Sequence[str] | None = None) -> None:
  """Compiles and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument(
    "--settings", type=_names(SETTINGS), default=list(SETTINGS)
  )
  parser.add_argument("--parts", type=_names(PARTS), default=list(PARTS))
  parser.add_argument(
    "--hlo", type=paths.argument, default="", help="folder for the programs"
  )
  parser.add_argument(
    "--set", nargs="*", default=[], help="KEY=VALUE of the config"
  )
  flags = parser.parse_args(argv)
  compile_check.prepare_compilers()
  facts = timing.machine()
  rows = []
  for name in flags.settings:
    for part in flags.parts:
      folder = f"{flags.hlo}/{name}_{part}" if flags.hlo else ""
      figures = measure(SETTINGS[name], part, flags.set, folder)
      recorded = SETTINGS[name].release.get(part, {})
      rows += [
        {"setting": name, "part": part, "figure": figure, "ours": value}
        | ({"release": recorded[figure]} if figure in recorded else {})
        for figure, value in figures.items()
      ]
      print(table(rows[-len(figures) :]), file=sys.stderr, flush=True)
  print(table(rows))
  print(f"\n{timing.in_words(facts)}")
  if flags.json:
    flags.json.write_text(
      json.dumps({"machine": facts, "rows": rows}, indent=1)
    )


def _names(valid: Any) -> Callable[[str], list[str]]:
  def parse(text: str) -> list[str]:
    for name in text.split(","):
      if name not in valid:
        raise argparse.ArgumentTypeError(
          f"{name!r}: valid options are {list(valid)}"
        )
    return text.split(",")

  return parse


def measure(
  setting: Setting,
  part: str,
  overrides: Sequence[str] = (),
  hlo_folder: str = "",
) -> dict[str, float]:
  """{figure: value} of a part, for each chip.

  Args:
    setting: to compile.
    part: one of PARTS.
    overrides: of the config, KEY=VALUE.
    hlo_folder: gets the program's text, if there is any; '' for none.
  """
  from drift_jax import tasks as tasks_lib
  from drift_jax.system import sharding
  from drift_jax.tasks import programs

  labels = setting.labels if part == "whole" else 1
  config = tasks_lib.parse(
    configs.load(setting.config, (f"batch.labels={labels}", *overrides))
  )
  devices = compile_check.find_devices(setting.topology)
  if part != "whole":
    devices = devices[:1]
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  if part in ("whole", "step"):
    program = programs(config, mesh)[0]
  else:
    program = _PROGRAMS[part](config, mesh)
  report = compile_check.compile_program(program, mesh, config, hlo_folder)
  figures = {
    "TFLOP": (report.flops or 0.0) / 1e12,
    # Of a program that can't be read, loops count once: no figure.
    "accessed GB": 0.0
    if report.message
    else (report.bytes_accessed or 0.0) / 1e9,
    "ms": (report.estimated_seconds or 0.0) * 1e3,
    "peak GB": (report.peak or 0.0) / 1e9,
    "code MB": (report.code or 0.0) / 1e6,
    "compile s": report.seconds,
  }
  if part == "whole":
    figures["collective GB"] = (
      sum(kind["bytes"] for kind in report.collectives.values()) / 1e9
    )
  return {name: value for name, value in figures.items() if value}


def _generator(config: Any, mesh: Any) -> Any:
  """Forward and backward pass of the generator."""
  import jax

  from drift_jax.training.programs import Program
  from drift_jax.training.step import apply

  task, params, batch, draws, _ = _inputs(config, mesh)

  def run(params: Any, labels: Any, draws: Any, cotangent: Any) -> Any:
    n = task.num_generated
    samples, vjp = jax.vjp(
      lambda params: apply(
        task.generator,
        params,
        jax.numpy.repeat(labels, n),
        jax.numpy.repeat(draws.alpha, n),
        noise=draws.noise,
        style=draws.style,
      ),
      params,
    )
    return samples, vjp(cotangent)

  return Program(
    "generator",
    jax.jit(run),
    {
      "params": params,
      "labels": batch.labels,
      "draws": draws,
      "cotangent": draws.noise,
    },
  )


def _reals(config: Any, mesh: Any) -> Any:
  """Features of the reals."""
  import jax

  from drift_jax.training.programs import Program
  from drift_jax.training.step import from_wire

  task, _, batch, _, frozen = _inputs(config, mesh)

  def run(frozen: Any, *reals: Any) -> Any:
    joined = jax.numpy.concatenate(reals, axis=1)
    joined = from_wire(joined.reshape(-1, *joined.shape[2:]))
    return task.features(frozen, joined)

  return Program(
    "reals",
    jax.jit(run),
    {
      "frozen": frozen,
      "positives": batch.positives,
      "unconditional": batch.unconditional,
    },
  )


def _generated(config: Any, mesh: Any) -> Any:
  """Features of generated samples, and the gradient through them."""
  import jax

  from drift_jax.training.programs import Program

  task, _, _, draws, frozen = _inputs(config, mesh)
  features = jax.eval_shape(task.features, frozen, draws.noise)

  def run(frozen: Any, samples: Any, cotangents: Any) -> Any:
    found, vjp = jax.vjp(lambda x: task.features(frozen, x), samples)
    return found, vjp(cotangents)

  return Program(
    "generated",
    jax.jit(run),
    {
      "frozen": frozen,
      "samples": draws.noise,
      "cotangents": _on(mesh, features),
    },
  )


def _loss(config: Any, mesh: Any) -> Any:
  """The drifting losses and their gradient, given all features."""
  import jax

  from drift_jax import drift
  from drift_jax.tasks.generator.step import by_label
  from drift_jax.training.programs import Program

  task, _, batch, draws, frozen = _inputs(config, mesh)
  labels, positives = batch.positives.shape[:2]
  unconditional = batch.unconditional.shape[1]
  count = positives + unconditional
  if task.variant.negatives == "independent":
    count += task.num_generated
  reals = jax.ShapeDtypeStruct((count, *task.sample_shape), jax.numpy.float32)
  generated = jax.eval_shape(task.features, frozen, draws.noise)
  real = jax.eval_shape(task.features, frozen, reals)

  def run(generated: Any, real: Any, weight: Any) -> Any:
    def loss(generated: Any) -> Any:
      losses, report = drift.drift_losses(
        by_label(generated, labels),
        by_label(real, labels),
        weight,
        num_positives=positives,
        **task.drift,
        kernel=task.kernel,
        variant=task.variant,
        num_unconditional=unconditional,
      )
      return losses.sum(), report

    return jax.value_and_grad(loss, has_aux=True)(generated)

  return Program(
    "loss",
    jax.jit(run),
    {
      "generated": _on(mesh, generated),
      "real": _on(mesh, real),
      "weight": draws.alpha,
    },
  )


_PROGRAMS = {
  "generator": _generator,
  "reals": _reals,
  "generated": _generated,
  "loss": _loss,
}


def _inputs(config: Any, mesh: Any) -> tuple[Any, Any, Any, Any, Any]:
  """(task, parameters, batch, draws, frozen parameters) of one chip."""
  import jax

  from drift_jax.tasks import programs
  from drift_jax.tasks.generator import setup as networks
  from drift_jax.tasks.generator.step import draw
  from drift_jax.training.frozen import load_encoders, load_vae

  program = programs(config, mesh)[0]
  state, batch, frozen = program.arguments.values()
  encoders = load_encoders(config.encoders, mesh, weights=False)
  vae = load_vae(config.vae, mesh, weights=False)
  task = networks.generator_task(config, encoders, mesh, vae)
  draws = jax.eval_shape(
    lambda key: draw(key, task, config.batch.labels), jax.random.key(0)
  )
  return task, state.params, batch, _on(mesh, draws), frozen


def _on(mesh: Any, tree: Any) -> Any:
  """The shapes, on the mesh's only chip."""
  import jax

  from drift_jax.system import sharding

  place = sharding.replicated(mesh)
  return sharding.abstract(tree, jax.tree.map(lambda _: place, tree))


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Markdown."""
  lines = [
    "| setting | part | figure | ours | release | ratio |",
    "|---" * 6 + "|",
  ]
  for row in rows:
    release = row.get("release")
    ratio = "" if release is None else f"{row['ours'] / release:.2f}"
    shown = "" if release is None else f"{release:g}"
    lines.append(
      f"| {row['setting']} | {row['part']} | {row['figure']} | "
      f"{row['ours']:.3g} | {shown} | {ratio} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
