"""A table of ablations: figures over seeds, beside the paper's values.

Nothing here trains or reads a config: `ablate` fills in rows, these functions
aggregate them, say whether the paper's order holds, and write the files.
"""

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from drift_jax.metrics.files import PathLike, replacing
from drift_jax.metrics.plots import plot_alphas
from drift_jax.metrics.row_plots import PlottedRow, plot_rows

# {figure: {alpha: value}} of one run.
Figures = Mapping[str, Mapping[float, float]]
# FID, the range of several rows' FID, or nothing known.
Paper = float | tuple[float, float] | None

# Figures of which more is better; of all others less is.
_HIGHER = (
  "inception_score",
  "precision",
  "recall",
  "density",
  "coverage",
  "label_accuracy",
)
# What eval.metrics computes under other names than its own.
_FIGURES = {
  "precision_recall": ("precision", "recall"),
  "coverage": ("coverage", "density"),
  "coverage_inception": ("coverage_inception", "density_inception"),
  "duplicates": ("near_duplicates", "exact_duplicates"),
}


@dataclasses.dataclass
class Row:
  """A row and the runs that it has so far.

  Attributes:
    name, label: of the row.
    overrides: what it changes, as a reader sees it.
    paper: FID in the paper.
    runs: {seed: figures}.
    baseline: {figure: of real images}.
    workdirs: {seed: of the run}.
    failed: {seed: why}.
  """

  name: str
  label: str
  overrides: str
  paper: Paper
  runs: dict[int, Figures] = dataclasses.field(default_factory=dict)
  baseline: dict[str, float] = dataclasses.field(default_factory=dict)
  workdirs: dict[int, str] = dataclasses.field(default_factory=dict)
  failed: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Heading:
  """What is said of a table as a whole.

  Attributes:
    title, varies, source: of the table, see configs/ablations.py.
    base: e.g. 'digits'.
    steps: of each run.
    seeds: asked for.
    figure: that rows are compared by.
    alpha: at which; None: at each row's best.
    command: that wrote the table.
    curve: whether rows are alphas of the same runs, and drawn as curves.
  """

  title: str
  varies: str
  source: str
  base: str
  steps: int
  seeds: Sequence[int]
  figure: str
  alpha: float | None
  command: str
  curve: bool = False


@dataclasses.dataclass(frozen=True)
class Value:
  """A figure over seeds; spread is None for a single one."""

  mean: float
  spread: float | None
  count: int

  def __str__(self) -> str:
    if self.spread is None:
      return f"{self.mean:.4g}"
    return f"{self.mean:.4g} ± {self.spread:.2g}"


def figures_of(names: Sequence[str]) -> list[str]:
  """The figures that eval.metrics' names stand for."""
  return [figure for name in names for figure in _FIGURES.get(name, (name,))]


def higher_is_better(figure: str) -> bool:
  """Whether more of it is better."""
  return figure.removesuffix("_inception") in _HIGHER


def summarise(values: Sequence[float]) -> Value:
  """Mean and sample standard deviation (n - 1)."""
  spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return Value(float(np.mean(values)), spread, len(values))


def last_figures(
  records: Sequence[Mapping[str, float]], step: int
) -> tuple[dict[str, dict[float, float]], dict[str, float]]:
  """({figure: {alpha: value}}, {figure: of real images}) at a step.

  Args:
    records: of metrics.jsonl.
    step: whose evaluation is meant; both are empty where there was none.
  """
  figures: dict[str, dict[float, float]] = {}
  baseline: dict[str, float] = {}
  for record in records:
    if record["step"] != step:
      continue
    for key, value in record.items():
      section, _, rest = key.partition("/")
      figure, _, what = rest.partition("/")
      if section != "eval":
        continue
      if what == "baseline":
        baseline[figure] = value
      elif what.startswith("alpha_"):
        alpha = float(what.removeprefix("alpha_"))
        figures.setdefault(figure, {})[alpha] = value
  return figures, baseline


def over_seeds(row: Row, figure: str, alpha: float) -> Value | None:
  """Of the row's runs that have it."""
  values = [
    run[figure][alpha]
    for run in row.runs.values()
    if alpha in run.get(figure, ())
  ]
  return summarise(values) if values else None


def chosen_alpha(row: Row, figure: str, alpha: float | None) -> float | None:
  """The given alpha, or else that of the row's best mean; None without runs.

  The same for all seeds: a best one of each would reward those that scatter.
  """
  if alpha is not None or not row.runs:
    return alpha
  means: dict[float, float] = {}
  for a in sorted({a for run in row.runs.values() for a in run[figure]}):
    value = over_seeds(row, figure, a)
    assert value is not None
    means[a] = _badness(value, figure)
  return min(means, key=lambda a: means[a])


def headline(row: Row, heading: Heading) -> Value | None:
  """The row's value of the figure that rows are compared by."""
  alpha = chosen_alpha(row, heading.figure, heading.alpha)
  return None if alpha is None else over_seeds(row, heading.figure, alpha)


def paper_text(paper: Paper) -> str:
  """As a table says it."""
  if paper is None:
    return "not given here"
  if isinstance(paper, tuple):
    return f"{paper[0]:g} to {paper[1]:g}"
  return f"{paper:.2f}"


def _bounds(paper: Paper) -> tuple[float, float]:
  assert paper is not None
  return paper if isinstance(paper, tuple) else (paper, paper)


def ordering(rows: Sequence[Row], heading: Heading) -> str:
  """Whether the paper's order of the rows holds, and where not, in words.

  A pair is compared where the paper's values say which is better. Kendall's
  tau is (pairs in the paper's order - swapped pairs) / pairs.
  """
  known: list[tuple[Row, Value]] = []
  for row in rows:
    value = headline(row, heading)
    if value is not None and row.paper is not None:
      known.append((row, value))
  pairs = tied = 0
  swapped = []
  for one, other in itertools.combinations(known, 2):
    better, worse = sorted((one, other), key=lambda x: _bounds(x[0].paper)[0])
    if _bounds(better[0].paper)[1] >= _bounds(worse[0].paper)[0]:
      continue
    pairs += 1
    here, there = (_badness(x[1], heading.figure) for x in (better, worse))
    if here == there:
      tied += 1
    elif here > there:
      swapped.append(_describe(better, worse, here - there))
  if not pairs:
    return (
      "The paper's order can't be compared: it orders no two rows that have "
      "runs here."
    )
  if pairs == 1:
    held = "is tied in" if tied else "is swapped in" if swapped else "holds in"
    text = f"The paper's order {held} the one pair that it orders."
    return text + "".join(f"\n- Swapped: {line}" for line in swapped)
  tau = (pairs - tied - 2 * len(swapped)) / pairs
  held = pairs - tied - len(swapped)
  text = (
    f"The paper's order holds in {held} of {pairs} pairs that it orders "
    f"(Kendall's tau {tau:.2f})."
  )
  if tied:
    text += f" {tied} tied."
  return text + "".join(f"\n- Swapped: {line}" for line in swapped)


def _describe(
  better: tuple[Row, Value], worse: tuple[Row, Value], apart: float
) -> str:
  """A pair that is the other way round here than in the paper."""
  spreads = [value.spread for _, value in (better, worse)]
  if None in spreads or math.isinf(apart):
    note = ""
  elif apart <= math.hypot(*(s or 0.0 for s in spreads)):
    note = ", closer than the seeds scatter"
  else:
    note = ", farther apart than the seeds scatter"
  return (
    f"{worse[0].label} ({worse[1]}) is better here than {better[0].label} "
    f"({better[1]}){note}; in the paper {paper_text(worse[0].paper)} against "
    f"{paper_text(better[0].paper)}."
  )


def _badness(value: Value, figure: str) -> float:
  """Less is better, whatever the figure; what diverged is the worst."""
  if math.isnan(value.mean):
    return math.inf
  return -value.mean if higher_is_better(figure) else value.mean


def _figure_names(rows: Sequence[Row], first: str) -> list[str]:
  found = {f: None for row in rows for run in row.runs.values() for f in run}
  return [first, *(name for name in found if name != first)]


def markdown(rows: Sequence[Row], heading: Heading) -> str:
  """The table, what it is of, and whether the paper's order holds."""
  figure = heading.figure
  others = [
    name
    for name in _figure_names(rows, figure)[1:]
    if not name.endswith(("_std", "_threshold", "_rate"))
  ]
  values = [headline(row, heading) for row in rows]
  best = min((_badness(v, figure) for v in values if v), default=None)
  lines = [
    ["row", "overrides", "runs", figure, "alpha", *others, "FID, paper"],
  ]
  lines.append(["---"] * len(lines[0]))
  for row, value in zip(rows, values, strict=True):
    alpha = chosen_alpha(row, figure, heading.alpha)
    text = "" if value is None else str(value)
    if value is not None and _badness(value, figure) == best:
      text = f"**{text}**"
    cells = [row.label, row.overrides, str(len(row.runs)), text]
    cells.append("" if alpha is None else f"{alpha:g}")
    for name in others:
      other = None if alpha is None else over_seeds(row, name, alpha)
      cells.append("" if other is None else str(other))
    lines.append([*cells, paper_text(row.paper)])
  table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  where = (
    f"alpha {heading.alpha:g}"
    if heading.alpha is not None
    else "the alpha whose mean is best"
  )
  seeds = ", ".join(map(str, heading.seeds))
  parts = [
    f"# {heading.title}",
    heading.varies,
    f"`{heading.base}`, {heading.steps} steps, seeds {seeds}. Rows are "
    f"compared by `{figure}` "
    f"({'higher' if higher_is_better(figure) else 'lower'} is better) at "
    f"{where}: mean ± "
    "sample standard deviation over the seeds, a single value for one seed. "
    f"{_real(rows, figure)}FID of {heading.source} is of ImageNet at 256 px, "
    "another data set and scale: the order of rows can be compared, not the "
    "values.",
    table,
    ordering(rows, heading),
  ]
  missing = [
    f"- {row.name}, seed {seed}: {why}"
    for row in rows
    for seed, why in row.failed.items()
  ]
  if missing:
    parts.append("\n".join(["Failed:", *missing]))
  parts.append(f"```bash\n{heading.command}\n```")
  return "\n\n".join(parts) + "\n"


def _real(rows: Sequence[Row], figure: str) -> str:
  value = _baseline(rows, figure)
  return "" if value is None else f"Of as many real images: {value:.4g}. "


def _baseline(rows: Sequence[Row], figure: str) -> float | None:
  found = (row.baseline.get(figure) for row in rows)
  return next((value for value in found if value is not None), None)


def as_csv(rows: Sequence[Row]) -> str:
  """One line for each run, with all figures at all alphas."""
  columns = {
    f"{figure}/alpha_{alpha:g}": (figure, alpha)
    for row in rows
    for run in row.runs.values()
    for figure, values in run.items()
    for alpha in values
  }
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(
    ["row", "overrides", "seed", "workdir", "paper_fid", *columns]
  )
  for row in rows:
    for seed, run in sorted(row.runs.items()):
      values = [run.get(f, {}).get(alpha, "") for f, alpha in columns.values()]
      paper = "" if row.paper is None else paper_text(row.paper)
      writer.writerow(
        [row.name, row.overrides, seed, row.workdirs[seed], paper, *values]
      )
  return text.getvalue()


def write(
  rows: Sequence[Row], heading: Heading, path: PathLike, name: str
) -> list[str]:
  """Writes NAME.md, NAME.csv and NAME.png into a folder; gives their paths."""
  texts = {"md": markdown(rows, heading), "csv": as_csv(rows)}
  for suffix, text in texts.items():
    with replacing(f"{path}/{name}.{suffix}") as temporary:
      temporary.write_text(text, encoding="utf-8")
  picture = f"{path}/{name}.png"
  drawn = [row for row in rows if row.runs]
  if heading.curve and len(drawn) > 1:
    plot_alphas(_curves(drawn, heading.figure), picture)
  else:
    plot_rows(
      [_points(row, heading) for row in rows],
      picture,
      figure=heading.figure,
      title=f"{heading.base}, {heading.steps} steps",
      source=heading.source,
      real=_baseline(rows, heading.figure),
    )
  return [f"{path}/{name}.{suffix}" for suffix in (*texts, "png")]


def _points(row: Row, heading: Heading) -> PlottedRow:
  alpha = chosen_alpha(row, heading.figure, heading.alpha)
  values = tuple(
    run[heading.figure][alpha]
    for run in row.runs.values()
    if alpha is not None and alpha in run.get(heading.figure, ())
  )
  return PlottedRow(row.label, values, row.paper)


def _curves(rows: Sequence[Row], figure: str) -> dict[float, dict[str, float]]:
  """{alpha: {figure: mean over seeds}}, of what all rows have."""
  found: dict[float, dict[str, float]] = {}
  for row in rows:
    alpha = chosen_alpha(row, figure, None)
    assert alpha is not None
    found[alpha] = {}
    for name in _figure_names(rows, figure):
      value = over_seeds(row, name, alpha)
      if value is not None:
        found[alpha][name] = value.mean
  return found
