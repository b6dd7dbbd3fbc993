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

# A record, and the scale and lines of each panel.
CASES = [
  (
    plot_drift,
    {
      "drift_rms/0.02": 3,
      "drift_rms/10": 9,
      "drift_rms/2": 1,
      "drift_rms/2/a": 9,
    },
    ["log: temperature 0.02, temperature 2, temperature 10"],
  ),
  (
    plot_frechet,
    {
      "eval/fd_pixel/alpha_1.0": 2.0,
      "eval/fd_pixel/alpha_1.5": 3.0,
      "eval/fd_pixel/baseline": 0.42,
      "eval/fid/alpha_1.0": 9.0,
      "eval/coverage/alpha_1.0": 1e9,
    },
    ["log: α = 1, α = 1.5, real train vs held-out: 0.84", "log: α = 1"],
  ),
  (
    plot_mae,
    {"recon_loss": 2.0, "accuracy": 0.25, "lr": 9.0},
    ["log: recon_loss", "linear: accuracy"],
  ),
  (
    plot_diagnostics,
    {"alignment/0.2": -0.5, "neighbours/0.2": 3.0, "temperature_scale": 0.5},
    ["log: temperature 0.2", "linear: temperature 0.2", "log: temperature all"],
  ),
  (
    plot_toy,
    {
      "loss": 2.0,
      "eval/energy_distance": 0.5,
      "eval/energy_distance/baseline": 0.1,
      "eval/mode_ratio/0": 0.9,
    },
    [
      "log: generated",
      "log: generated, data vs data: 0.2",
      "linear: mode 0, true: 1",
    ],
  ),
  (
    plot_policy,
    {
      "loss": 2.0,
      "drift_rms/0.2": 0.5,
      "drift_rms/0.2/a": 9.0,
      "eval/one_step/success_rate": 0.25,
      "eval/one_step/mode/above": 0.75,
      "eval/one_step/mode/below": 0.0,
    },
    [
      "linear: one_step",
      "linear: one_step/mode/above, one_step/mode/below",
      "log: drift_rms/0.2",
    ],
  ),
  # If nothing drifts, the loss is what falls.
  (plot_policy, {"loss": 2.0}, ["log: loss"]),
]


@pytest.mark.parametrize("plot, record, panels", CASES)
def test_panels(tmp_path, figures, plot, record, panels):
  """Of records that follow each other, in any order."""
  later = {"step": 20, **{key: 2 * value for key, value in record.items()}}
  other = {"step": 30, **dict.fromkeys(record, math.nan)}
  plot([later, other, {"step": 10, **record}], tmp_path / "new" / "plot.png")
  axes = figures[0].axes
  assert [
    f"{axis.get_yscale()}: "
    + ", ".join(line.get_label() for line in axis.get_lines())
    for axis in axes
  ] == panels
  # The record that is not finite is left out.
  line = axes[0].get_lines()[0]
  assert line.get_xdata().tolist() == [10, 20]
  assert line.get_ydata()[1] == 2 * line.get_ydata()[0]
  with Image.open(tmp_path / "new" / "plot.png") as image:
    assert image.format == "PNG"
    assert min(image.size) > 300
    assert np.asarray(image.convert("L")).std() > 5
  assert len(list((tmp_path / "new").iterdir())) == 1


MAE = {"step": 1, "accuracy": 0.5}


def test_suffix_says_the_format(tmp_path):
  plot_mae([MAE], tmp_path / "plot.svg")
  assert "<svg" in (tmp_path / "plot.svg").read_text()
  with pytest.raises(ValueError, match="valid options are .*'.png'"):
    plot_mae([MAE], tmp_path / "plot.txt")


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
