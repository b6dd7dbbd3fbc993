import math

import numpy as np
import pytest
from PIL import Image

from drift_jax.metrics import plots
from drift_jax.metrics.plots import (
  plot_alphas,
  plot_drift,
  plot_frechet,
  plot_mae,
  plot_policies,
  plot_policy,
)
from tests import process


def drift_records():
  return [
    {
      "step": step,
      "loss": 9.0,
      "drift_rms/0.02": 3.0 / (step + 10),
      "drift_rms/0.05": 4.0 / (step + 10),
      "drift_rms/0.2": math.nan if step == 50 else 6.0 / (step + 10),
      "drift_rms/0.2/layer1": 1e9,
    }
    for step in range(0, 1000, 10)
  ]


def frechet_records():
  records = [{"step": 10, "loss": 1.0}]
  for step in range(100, 1001, 100):
    record = {"step": step}
    for space, floor in (("fd_pixel", 0.42), ("fd_encoder", 0.02)):
      for alpha in (1.0, 1.5, 2.0):
        value = floor * (1.5 + 900.0 * alpha / step)
        record[f"eval/{space}/alpha_{alpha}"] = value
      record[f"eval/{space}/baseline"] = floor
    record["eval/coverage/alpha_1.0"] = 1e9
    records.append(record)
  return records


def mae_records():
  return [
    {"step": step, "recon_loss": 50.0 / (step + 5), "accuracy": step / 1000}
    for step in range(0, 1000, 10)
  ]


CASES = [
  (plot_drift, drift_records),
  (plot_frechet, frechet_records),
  (plot_mae, mae_records),
]


@pytest.fixture
def figures(monkeypatch):
  """Figures that were saved, in order."""
  saved = []
  save = plots.save_figure

  def keep(figure, path):
    saved.append(figure)
    save(figure, path)

  monkeypatch.setattr(plots, "save_figure", keep)
  return saved


def test_suffix_says_the_format(tmp_path):
  plot_mae(mae_records(), tmp_path / "plot.svg")
  assert "<svg" in (tmp_path / "plot.svg").read_text()
  with pytest.raises(ValueError, match="valid options are .*'.png'"):
    plot_mae(mae_records(), tmp_path / "plot.txt")


@pytest.mark.parametrize("plot, make", CASES)
def test_writes_a_picture(tmp_path, plot, make):
  plot(make(), tmp_path / "new" / "plot.png")
  with Image.open(tmp_path / "new" / "plot.png") as image:
    assert image.format == "PNG"
    assert min(image.size) > 400
    assert np.asarray(image.convert("L")).std() > 5
  assert len(list((tmp_path / "new").iterdir())) == 1


def test_drift_lines_are_the_records(tmp_path, figures):
  records = drift_records()
  plot_drift(records[::-1], tmp_path / "plot.png")
  (axis,) = figures[0].axes
  assert axis.get_yscale() == "log"
  lines = {line.get_label(): line.get_xydata() for line in axis.get_lines()}
  assert list(lines) == [f"temperature {t}" for t in ("0.02", "0.05", "0.2")]
  expected = [(r["step"], r["drift_rms/0.05"]) for r in records]
  assert np.array_equal(lines["temperature 0.05"], expected)
  # The record that is not finite is left out.
  assert len(lines["temperature 0.2"]) == len(records) - 1


def test_frechet_panels_lines_and_baselines(tmp_path, figures):
  plot_frechet(frechet_records(), tmp_path / "plot.png")
  panels = {axis.get_ylabel().split()[0]: axis for axis in figures[0].axes}
  assert sorted(panels) == ["fd_encoder", "fd_pixel"]
  for space, floor in (("fd_pixel", 0.42), ("fd_encoder", 0.02)):
    *curves, baseline = panels[space].get_lines()
    labels = [line.get_label() for line in curves]
    assert labels == ["α = 1", "α = 1.5", "α = 2"]
    assert curves[2].get_ydata()[0] == floor * (1.5 + 18.0)
    assert baseline.get_linestyle() == "--"
    assert set(baseline.get_ydata()) == {floor}


def test_fid_has_a_panel(tmp_path, figures):
  records = [{"step": 10, "eval/fid/alpha_1.0": 9.0}]
  plot_frechet(records, tmp_path / "plot.png")
  (axis,) = figures[0].axes
  assert axis.get_ylabel().startswith("fid")


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
  assert score.get_xlabel() == "guidance scale α"
  with Image.open(tmp_path / "plot.png") as image:
    assert min(image.size) > 400
  for bad in (
    {1.0: {"fid": 5.0}},
    dict.fromkeys((1.0, 2.0), {"coverage": 1.0}),
  ):
    with pytest.raises(ValueError, match="at least two alphas"):
      plot_alphas(bad, tmp_path / "plot.png")


def test_mae_panels(tmp_path, figures):
  plot_mae(mae_records(), tmp_path / "plot.png")
  assert len(figures[0].axes) == 2
  without = [{"step": 1, "recon_loss": 2.0}]
  plot_mae(without, tmp_path / "plot.png")
  (axis,) = figures[1].axes
  assert axis.get_lines()[0].get_xydata().tolist() == [[1.0, 2.0]]


def test_policy_panels(tmp_path, figures):
  records = [
    {"step": 1, "loss": 2.0, "drift_rms/0.2": 0.5, "drift_rms/0.2/a": 9.0},
    {
      "step": 2,
      "eval/one_step/success_rate": 0.25,
      "eval/one_step/mode/above": 0.75,
      "eval/one_step/mode/below": 0.0,
    },
  ]
  plot_policy(records, tmp_path / "plot.png")
  rates, modes, drifts = figures[0].axes
  assert rates.get_lines()[0].get_xydata().tolist() == [[2, 0.25]]
  assert [line.get_ydata()[0] for line in modes.get_lines()] == [0.75, 0]
  assert [line.get_ydata()[0] for line in drifts.get_lines()] == [0.5]
  assert drifts.get_yscale() == "log"
  # Where nothing drifts, the loss is what falls.
  plot_policy([{"step": 1, "loss": 2.0}], tmp_path / "plot.png")
  (axis,) = figures[1].axes
  assert axis.get_ylabel() == "loss"
  with pytest.raises(ValueError, match="their keys are"):
    plot_policy([{"step": 1, "grad_norm": 1.0}], tmp_path / "plot.png")


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


@pytest.mark.parametrize("plot, make", CASES)
def test_single_record(tmp_path, plot, make):
  plot(make()[-1:], tmp_path / "plot.png")
  assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("plot", [plot_drift, plot_frechet, plot_mae])
@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": 2.0}]])
def test_nothing_to_plot(tmp_path, plot, records):
  expected = "loss, step" if records else "none"
  with pytest.raises(ValueError, match=f"their keys are {expected}"):
    plot(records, tmp_path / "plot.png")
  assert not (tmp_path / "plot.png").exists()


@pytest.mark.system
def test_no_pyplot(tmp_path):
  code = """
import sys
from drift_jax.metrics.plots import plot_mae
plot_mae([{"step": 1, "accuracy": 0.5}], sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
  path = tmp_path / "plot.png"
  done = process.call("-c", code, path)
  assert done.returncode == 0, done.stderr
  assert path.exists()
