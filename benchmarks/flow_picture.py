"""A table and a picture of drifting beside flow matching, over evaluations.

  python benchmarks/flow_picture.py OUT.png WORKDIR ... [--figures=fd_pixel]

with the workdirs of benchmarks/flow_matching.py and of drifting runs, as many
of each as there are seeds: points are means, bars sample standard deviations.
Of drifting it takes the last evaluation, each alpha by itself.
"""

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import numpy as np

# {(figure, method): {evaluations: values of the seeds}}
Points = dict[tuple[str, str], dict[int, list[float]]]


def main(argv: Sequence[str]) -> None:
  """Prints and draws."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
  parser.add_argument("--figures", help="some, by commas; default: all")
  args = parser.parse_args(argv)
  from benchmarks.flow_rows import FILE, train_seconds

  points: Points = collections.defaultdict(
    lambda: collections.defaultdict(list)
  )
  real: dict[str, float] = {}
  for folder in args.workdirs:
    if not (folder / "metrics.jsonl").exists():
      raise SystemExit(f"Error: {folder} holds no run: it has no metrics.jsonl")
    add = flow_matching if (folder / FILE).exists() else drifting
    add(folder, points, real)
    seconds = train_seconds(folder)
    print(f"{folder}: {add.__name__}, {seconds:.0f} s of training")
  if not real:
    folders = ", ".join(map(str, args.workdirs))
    raise SystemExit(f"Error: none of {folders} has been evaluated yet")
  figures = shown(points)
  if args.figures:
    figures = args.figures.split(",")
    for name in figures:
      if name not in real:
        raise SystemExit(
          f"Error: --figures: {name!r}: the runs have {', '.join(real)}"
        )
  print(table(points, real, figures))
  draw(args.out, points, real, figures)


def flow_matching(
  folder: pathlib.Path, points: Points, real: dict[str, float]
) -> None:
  """Adds a run of benchmarks/flow_matching.py."""
  from benchmarks.flow_rows import FILE

  for row in map(json.loads, (folder / FILE).read_text().splitlines()):
    real |= row["real"]
    guided = f", guidance {row['guidance']:g}" * (row["guidance"] != 1)
    for figure, value in row["figures"].items():
      method = f"flow matching, {row['solver']}{guided}"
      points[figure, method][row["evaluations"]].append(value)


def drifting(
  folder: pathlib.Path, points: Points, real: dict[str, float]
) -> None:
  """Adds the last evaluation of a drifting run."""
  from drift_jax.metrics.writers import read_jsonl

  records = read_jsonl(folder / "metrics.jsonl")
  last: dict[str, Any] = next(
    (r for r in reversed(records) if any(k.startswith("eval/") for k in r)), {}
  )
  for key, value in last.items():
    _, figure, name = key.split("/") if key.startswith("eval/") else [""] * 3
    if name == "baseline":
      real[figure] = value
    elif figure:
      method = f"drifting, α = {float(name.removeprefix('alpha_')):g}"
      points[figure, method][1].append(value)


def shown(points: Points) -> list[str]:
  """The figures, without those that count copies of training images."""
  names = dict.fromkeys(figure for figure, _ in points)
  return [
    name for name in names if "duplicate" not in name and "near" not in name
  ]


def table(
  points: Points, real: dict[str, float], figures: Sequence[str]
) -> str:
  """Markdown: a row for each method and number of evaluations."""
  ways = {(m, n) for (_, m), of in points.items() for n in of}
  lines = [
    f"| method | evaluations | {' | '.join(figures)} |",
    "|---" * (2 + len(figures)) + "|",
  ]
  for method, count in sorted(ways):
    cells = [spread(points[f, method].get(count, [])) for f in figures]
    lines.append(f"| {method} | {count} | {' | '.join(cells)} |")
  cells = [spread([real[f]] if f in real else []) for f in figures]
  return "\n".join([*lines, f"| real images | | {' | '.join(cells)} |"])


def spread(values: Sequence[float]) -> str:
  """Mean, and standard deviation of several."""
  if not values:
    return ""
  text = f"{np.mean(values):.3g}"
  return text + (f" ± {np.std(values, ddof=1):.2g}" if values[1:] else "")


def draw(
  path: pathlib.Path,
  points: Points,
  real: dict[str, float],
  figures: Sequence[str],
) -> None:
  """A panel for each figure that real images have too."""
  from drift_jax.metrics import plots

  figures = [figure for figure in figures if figure in real]
  methods = sorted({method for _, method in points})
  size = 7.5, 2.8 * len(figures)
  figure, axes = plots.new_figure(size, len(figures), 1, sharex=True)
  for axis, name in zip(axes[:, 0], figures, strict=True):
    for number, method in enumerate(methods):
      of = dict(sorted(points[name, method].items()))
      if not of:
        continue
      axis.errorbar(
        list(of),
        [np.mean(values) for values in of.values()],
        yerr=[np.std(x, ddof=1) if x[1:] else 0.0 for x in of.values()],
        color=plots.COLOURS[number % len(plots.COLOURS)],
        fmt="D" if method.startswith("drifting") else "o-",
        label=method,
        capsize=3,
      )
    plots.dashed_line(axis, real[name], f"real images: {real[name]:.3g}")
    axis.set_ylabel(name)
    if name.startswith("fd_"):
      plots.log_scale(axis)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
  counts = sorted({count for of in points.values() for count in of})
  axes[-1, 0].set(
    xscale="log", xlabel="evaluations of the network for a sample"
  )
  axes[-1, 0].set_xticks(counts, [str(count) for count in counts])
  axes[-1, 0].minorticks_off()
  plots.save_figure(figure, path)


if __name__ == "__main__":
  main(sys.argv[1:])
