import math

import numpy as np
import pytest
from PIL import Image

from drift_jax.metrics.plots import (
  plot_alphas,
  plot_diagnostics,
  plot_drift,
  plot_frechet,
  plot_mae,
  plot_policies,
  plot_policy,
  plot_toy,
)
from tests import process

DRIFT = [
  {
    "step": step,
    "drift_rms/0.02": 3.0 / (step + 10),
    "drift_rms/0.2": math.nan if step == 50 else 6.0 / (step + 10),
    "drift_rms/10": 9.0,
    "drift_rms/0.2/layer1": 1e9,
  }
  for step in range(0, 1000, 10)
]
FRECHET = [
  {
    "step": step,
    "eval/fd_pixel/alpha_1.0": 0.42 + 900.0 / step,
    "eval/fd_pixel/alpha_1.5": 0.42 + 999.0 / step,
    "eval/fd_pixel/baseline": 0.42,
    "eval/fid/alpha_1.0": 9.0,
    "eval/coverage/alpha_1.0": 1e9,
  }
  for step in range(100, 1001, 100)
]
MAE = [{"step": 1, "recon_loss": 2.0, "accuracy": 0.25, "lr": 9.0}]
DIAGNOSTICS = [
  {"step": 1, "alignment/0.2": -0.5, "neighbours/0.2": 3.0, "self_mass/0.2": 1}
]
TOY = [
  {"step": 1, "loss": 2.0, "eval/energy_distance": 0.5},
  {"step": 2, "eval/energy_distance/baseline": 0.1, "eval/mode_ratio/0": 0.9},
]
POLICY = [
  {"step": 1, "loss": 2.0, "drift_rms/0.2": 0.5, "drift_rms/0.2/a": 9.0},
  {
    "step": 2,
    "eval/one_step/success_rate": 0.25,
    "eval/one_step/mode/above": 0.75,
    "eval/one_step/mode/below": 0.0,
  },
]
# Of each panel: the beginning of its title, its scale, and its lines.
CASES = [
  (
    plot_drift,
    DRIFT,
    {"raw drift": ("log", [f"temperature {t}" for t in ("0.02", "0.2", "10")])},
  ),
  (
    plot_frechet,
    FRECHET,
    {
      "fd_pixel": ("log", ["α = 1", "α = 1.5", "real train vs held-out: 0.42"]),
      "fid": ("log", ["α = 1"]),
    },
  ),
  (
    plot_mae,
    MAE,
    {
      "reconstruction loss": ("log", ["recon_loss"]),
      "classification accuracy": ("linear", ["accuracy"]),
    },
  ),
  (
    plot_diagnostics,
    DIAGNOSTICS,
    {
      "effective positives": ("log", ["temperature 0.2"]),
      "cosine": ("linear", ["temperature 0.2"]),
      "own share": ("linear", ["temperature 0.2"]),
    },
  ),
  (
    plot_diagnostics,
    [{"step": 1, "temperature_scale": 0.5}],
    {"scale of the": ("log", ["temperature all"])},
  ),
  (
    plot_toy,
    TOY,
    {
      "loss": ("log", ["generated"]),
      "energy": ("log", ["generated", "data vs data: 0.1"]),
      "mass of each": ("linear", ["mode 0", "true: 1"]),
    },
  ),
  (
    plot_policy,
    POLICY,
    {
      "success rate": ("linear", ["one_step"]),
      "share of": ("linear", ["one_step/mode/above", "one_step/mode/below"]),
      "RMS of": ("log", ["drift_rms/0.2"]),
    },
  ),
  # If nothing drifts, the loss is what falls.
  (plot_policy, [{"step": 1, "loss": 2.0}], {"loss": ("log", ["loss"])}),
]


@pytest.mark.parametrize("plot, records, panels", CASES)
def test_panels(tmp_path, figures, plot, records, panels):
  plot(records[::-1], tmp_path / "new" / "plot.png")
  (figure,) = figures
  assert len(figure.axes) == len(panels)
  for axis, (title, (scale, lines)) in zip(
    figure.axes, panels.items(), strict=True
  ):
    assert axis.get_ylabel().startswith(title)
    assert axis.get_yscale() == scale
    assert [line.get_label() for line in axis.get_lines()] == lines
  with Image.open(tmp_path / "new" / "plot.png") as image:
    assert image.format == "PNG"
    assert min(image.size) > 300
    assert np.asarray(image.convert("L")).std() > 5
  assert len(list((tmp_path / "new").iterdir())) == 1


def test_lines_are_the_records(tmp_path, figures):
  plot_drift(DRIFT[::-1], tmp_path / "plot.png")
  first, second, _ = figures[0].axes[0].get_lines()
  expected = [(r["step"], r["drift_rms/0.02"]) for r in DRIFT]
  assert np.array_equal(first.get_xydata(), expected)
  # The record that is not finite is left out.
  assert len(second.get_xydata()) == len(DRIFT) - 1
  plot_frechet(FRECHET, tmp_path / "plot.png")
  *_, baseline = figures[1].axes[0].get_lines()
  assert baseline.get_linestyle() == "--"
  assert set(baseline.get_ydata()) == {0.42}


def test_suffix_says_the_format(tmp_path):
  plot_mae(MAE, tmp_path / "plot.svg")
  assert "<svg" in (tmp_path / "plot.svg").read_text()
  with pytest.raises(ValueError, match="valid options are .*'.png'"):
    plot_mae(MAE, tmp_path / "plot.txt")


@pytest.mark.parametrize("plot", [plot_drift, plot_frechet, plot_mae])
@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": 2.0}]])
def test_nothing_to_plot(tmp_path, plot, records):
  expected = "loss, step" if records else "none"
  with pytest.raises(ValueError, match=f"plot.png.* their keys are {expected}"):
    plot(records, tmp_path / "plot.png")
  assert not (tmp_path / "plot.png").exists()


def test_figures_over_alpha(tmp_path, figures):
  fids = {1.0: 5.0, 1.5: 3.0, 2.0: 4.0}
  results = {
    alpha: {"fid": fid, "inception_score": 100 * alpha, "coverage": 0.5}
    for alpha, fid in reversed(fids.items())
  }
  plot_alphas(results, tmp_path / "plot.png")
  fid, score = figures[0].axes
  assert (fid.get_ylabel(), score.get_ylabel()) == ("FID", "Inception score")
  assert fid.get_lines()[0].get_xydata().tolist() == [
    [alpha, value] for alpha, value in fids.items()
  ]
  # The best: the lowest distance, the highest score.
  assert fid.texts[0].get_text() == "3 at α = 1.5"
  assert score.texts[0].get_text() == "200 at α = 2"
  for bad in (
    {1.0: {"fid": 5.0}},
    dict.fromkeys((1.0, 2.0), {"coverage": 1.0}),
  ):
    with pytest.raises(ValueError, match="at least two alphas"):
      plot_alphas(bad, tmp_path / "plot.png")


def test_policies_have_a_line_for_each_seed_and_one_of_their_mean(
  tmp_path, figures
):
  def seed(*rates):
    return [{"step": i, "success_rate": rate} for i, rate in enumerate(rates)]

  # The second seed is at its second evaluation still.
  curves = {
    "push": {"drifting": [seed(0.2, 0.6, 0.8), seed(0.4, 0.8)]},
    "reach": {"drifting": [seed(1.0)], "diffusion": [seed(0.5)]},
  }
  plot_policies(curves, tmp_path / "plot.png")
  push, reach = figures[0].axes
  lines = [line.get_ydata().tolist() for line in push.get_lines()]
  assert lines[:2] == [[0.2, 0.6, 0.8], [0.4, 0.8]]
  np.testing.assert_allclose(lines[2], [0.3, 0.7])
  assert [text.get_text() for text in reach.get_legend().get_texts()] == [
    "drifting",
    "diffusion",
  ]


@pytest.mark.system
def test_no_pyplot(tmp_path):
  code = """
import sys
from drift_jax.metrics.plots import plot_mae
plot_mae([{"step": 1, "accuracy": 0.5}], sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
  done = process.call("-c", code, tmp_path / "plot.png")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "plot.png").exists()
