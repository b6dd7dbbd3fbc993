"""A table of ablations: figures over seeds, beside the paper's values."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_jax.metrics.files import PathLike
from drift_jax.metrics.plots import plot_alphas
from drift_jax.metrics.row_plots import PlottedRow, plot_rows
from drift_jax.tools.work import rows
from drift_jax.tools.work.rows import at_alpha, spread

# FID, the range of several rows' FID, or nothing known.
Paper = float | tuple[float, float] | None

# Figures that are better if higher; all others are better if lower.
_HIGHER = ("inception_score", "precision", "recall", "density", "coverage")
_HIGHER += ("label_accuracy", "classifier_accuracy")
# Entries of eval.metrics whose figures have other names.
_FIGURES = {
  "precision_recall": ("precision", "recall"),
  "coverage": ("coverage", "density"),
  "coverage_inception": ("coverage_inception", "density_inception"),
  "coverage_classifier": ("coverage_classifier", "density_classifier"),
  "duplicates": ("near_duplicates", "exact_duplicates"),
}


@dataclasses.dataclass
class Row(rows.Runs):
  """A row and the runs that it has so far.

  Attributes:
    name, label: name in commands, label for readers.
    overrides: changes to the base, in words.
    paper: FID in the paper.
    real: {figure: value of real images}.
  """

  name: str
  label: str
  overrides: str
  paper: Paper
  real: dict[str, float] = dataclasses.field(default_factory=dict)

  def names(self) -> list[str]:
    """Figures without their guidance scales."""
    keys = itertools.chain(*self.figures.values())
    return list(dict.fromkeys(key.partition("/alpha_")[0] for key in keys))

  def bounds(self) -> tuple[float, float]:
    """The lowest and the highest FID in the paper."""
    assert self.paper is not None
    if isinstance(self.paper, tuple):
      return self.paper
    return self.paper, self.paper

  def paper_text(self) -> str:
    """The paper's FID as a table says it."""
    if self.paper is None:
      return "not given here"
    low, high = self.bounds()
    return f"{low:.2f}" if low == high else f"{low:g} to {high:g}"


@dataclasses.dataclass(frozen=True)
class Table:
  """A table: its rows, and the facts that all of them share.

  Attributes:
    rows: filled in as runs end.
    about: title, varies and source, see Table of configs/ablations.py.
    base: e.g. 'digits'.
    steps: training steps of each run.
    seeds: seeds of each row.
    figure: figure that rows are compared by.
    alpha: guidance scale of the comparison; None for each row's best.
    command: command that wrote the table.
    curve: whether rows are alphas of the same runs, drawn as curves.
  """

  rows: Sequence[Row]
  about: Any
  base: str
  steps: int
  seeds: Sequence[int]
  figure: str
  alpha: float | None
  command: str
  curve: bool = False

  def alpha_of(self, row: Row) -> float | None:
    """The given alpha, or else that of the row's best mean; None without runs.

    All seeds share it: each seed's own best would reward rows that scatter.
    """
    if self.alpha is not None or not row.figures:
      return self.alpha
    prefix = f"{self.figure}/alpha_"
    keys = {key for run in row.figures.values() for key in run}
    found = {key for key in keys if key.startswith(prefix)}
    alphas = sorted(float(key.removeprefix(prefix)) for key in found)
    return min(
      alphas,
      key=lambda a: self.badness(row.values(at_alpha(self.figure, a))),
    )

  def values(self, row: Row, figure: str = "") -> np.ndarray:
    """A figure of all seeds at the row's alpha; the compared one by default."""
    alpha = self.alpha_of(row)
    if alpha is None:
      return np.zeros(0)
    return row.values(at_alpha(figure or self.figure, alpha))

  def badness(self, values: np.ndarray) -> float:
    """A number that is lower for better values, and infinite for NaN."""
    mean = float(values.mean()) if len(values) else math.nan
    if math.isnan(mean):
      return math.inf
    return -mean if higher_is_better(self.figure) else mean

  def real(self) -> float | None:
    """The compared figure of real images, if it is known."""
    known = [r.real[self.figure] for r in self.rows if self.figure in r.real]
    return known[0] if known else None


def figures_of(names: Sequence[str]) -> list[str]:
  """The figures that eval.metrics' names stand for."""
  return [figure for name in names for figure in _FIGURES.get(name, (name,))]


def higher_is_better(figure: str) -> bool:
  """Whether a higher value is better."""
  space = "_inception" if figure.endswith("_inception") else "_classifier"
  return figure.removesuffix(space) in _HIGHER


def ordering(table: Table) -> str:
  """Says whether the paper's order of the rows holds, and which pairs differ.

  A pair is compared if the paper's values say which is better. Kendall's tau
  is (pairs in the paper's order - swapped pairs) / pairs.
  """
  known = [row for row in table.rows if row.paper is not None and row.figures]
  held = tied = 0
  swapped = []
  for pair in itertools.combinations(known, 2):
    better, worse = sorted(pair, key=lambda row: row.bounds()[0])
    if better.bounds()[1] >= worse.bounds()[0]:
      continue
    here, there = (table.badness(table.values(r)) for r in (better, worse))
    held += here < there
    tied += here == there
    if here > there:
      swapped.append(_describe(table, better, worse, here - there))
  pairs = held + tied + len(swapped)
  if not pairs:
    return (
      "The paper's order can't be compared: it orders no two rows that have "
      "runs here."
    )
  if pairs == 1:
    how = "holds in" if held else "is tied in" if tied else "is swapped in"
    text = f"The paper's order {how} the one pair that it orders."
    return "\n- Swapped: ".join([text, *swapped])
  text = (
    f"The paper's order holds in {held} of {pairs} pairs that it orders "
    f"(Kendall's tau {(held - len(swapped)) / pairs:.2f})."
  )
  return "\n- Swapped: ".join([text + f" {tied} tied." * (tied > 0), *swapped])


def _describe(table: Table, better: Row, worse: Row, apart: float) -> str:
  """Describes a pair that is swapped here."""
  ours = [table.values(row) for row in (better, worse)]
  note = ""
  if all(len(values) > 1 for values in ours) and math.isfinite(apart):
    scatter = math.hypot(*(values.std(ddof=1) for values in ours))
    which = "closer" if apart <= scatter else "farther apart"
    note = f", {which} than the seeds scatter"
  return (
    f"{worse.label} ({spread(ours[1])}) is better here than {better.label} "
    f"({spread(ours[0])}){note}; in the paper {worse.paper_text()} against "
    f"{better.paper_text()}."
  )


def markdown(table: Table) -> str:
  """The table in Markdown, with its conditions and the paper's order."""
  # 1. A line for each row, the best in bold
  others = [
    name
    for name in dict.fromkeys(itertools.chain(*(r.names() for r in table.rows)))
    if name != table.figure
    and not name.endswith(("_std", "_threshold", "_rate"))
  ]
  best = min(table.badness(table.values(row)) for row in table.rows)
  lines = []
  for row in table.rows:
    values, alpha = table.values(row), table.alpha_of(row)
    text = spread(values)
    if text and table.badness(values) == best:
      text = f"**{text}**"
    cells = [row.label, row.overrides, len(row.figures), text]
    cells += ["" if alpha is None else f"{alpha:g}"]
    cells += [spread(table.values(row, name)) for name in others]
    lines.append([*cells, row.paper_text()])
  header = ["row", "overrides", "runs", table.figure, "alpha", *others]
  # 2. How it was made
  where = "the alpha whose mean is best"
  if table.alpha is not None:
    where = f"alpha {table.alpha:g}"
  direction = "higher" if higher_is_better(table.figure) else "lower"
  real = table.real()
  images = "" if real is None else f"Of as many real images: {real:.4g}. "
  about = (
    f"`{table.base}`, {table.steps} steps, seeds "
    f"{', '.join(map(str, table.seeds))}. Rows are compared by "
    f"`{table.figure}` ({direction} is better) at {where}: mean ± sample "
    "standard deviation over the seeds, a single value for one seed. "
    f"{images}FID of {table.about.source} is of ImageNet at 256 px, another "
    "data set and scale: the order of rows can be compared, not the values."
  )
  parts = [f"# {table.about.title}", table.about.varies, about]
  parts += [rows.markdown([*header, "FID, paper"], lines), ordering(table)]
  # 3. What failed
  missing = [
    f"- {row.name}, seed {seed}: {why}"
    for row in table.rows
    for seed, why in row.failed.items()
  ]
  if missing:
    parts.append("\n".join(["Failed:", *missing]))
  return "\n\n".join([*parts, f"```bash\n{table.command}\n```"]) + "\n"


def write(table: Table, folder: PathLike, name: str) -> list[str]:
  """Writes NAME.md, NAME.csv (all figures of each run) and NAME.png.

  Returns:
    Their paths.
  """
  lines = [
    line
    for row in table.rows
    for line in row.lines(
      row=row.name,
      overrides=row.overrides,
      paper_fid="" if row.paper is None else row.paper_text(),
    )
  ]
  first = ("row", "overrides", "seed", "workdir", "paper_fid")
  texts = {"md": markdown(table), "csv": rows.csv_text(lines, first)}
  written = rows.write(folder, name, **texts)
  picture = f"{folder}/{name}.png"
  drawn = [row for row in table.rows if row.figures]
  if table.curve and len(drawn) > 1:
    plot_alphas(
      {
        alpha: {n: float(table.values(r, n).mean()) for n in r.names()}
        for r in drawn
        if (alpha := table.alpha_of(r)) is not None
      },
      picture,
    )
  else:
    plot_rows(
      [
        PlottedRow(r.label, tuple(table.values(r)), r.paper) for r in table.rows
      ],
      picture,
      figure=table.figure,
      title=f"{table.base}, {table.steps} steps",
      source=table.about.source,
      real=table.real(),
    )
  return [*written, picture]
