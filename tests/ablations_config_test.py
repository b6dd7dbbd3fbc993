"""Every row of every table on every base is a config that parses."""

import pytest

from configs import ablations, imagenet_latent
from drift_jax import config as config_lib
from drift_jax import tasks as tasks_lib
from drift_jax.training.drifting import drift_arguments

BASES = (
  "imagenet_latent",
  "digits",
  "digits:judge",
  "digits:features",
  "mnist",
  "mnist:cpu",
  "cifar10",
)
# What a base can't do: it has no encoder, or none that it drifts in.
IMPOSSIBLE = {
  ("digits", "table3"): "which has no encoder: take a base that has one",
  ("digits", "features"): "which has no encoder: take a base that has one",
  ("digits:judge", "features"): "whose encoders only judge",
}
CASES = [(base, table) for base in BASES for table in ablations.TABLES]


# Tables whose rows all differ from the base: each has weights of its own, or
# its evaluation alone.
WITHOUT_BASE = ("table3", "fig5")


def parse(name):
  config = ablations.get_config(name)
  for encoder in config.encoders.values():
    encoder.path = encoder.path or "given by the user"
  return tasks_lib.parse(config)


@pytest.mark.parametrize(("base", "table"), CASES)
def test_rows_parse_and_differ(base, table):
  """One row is the base, else what tables share would be trained twice."""
  if (base, table) in IMPOSSIBLE:
    with pytest.raises(ValueError, match=IMPOSSIBLE[base, table]):
      ablations.rows(table, base)
    return
  rows = ablations.rows(table, base)
  configs = [parse(f"{base}/{table}/{name}") for name in rows]
  for config in configs:
    drift_arguments(config.drift)  # where fields are checked
  texts = {config_lib.to_json(config) for config in configs}
  labels = {row.label for row in rows.values()}
  assert len(texts) == len(labels) == len(rows) >= 2
  if table not in WITHOUT_BASE:
    assert configs.count(parse(base)) == 1


@pytest.mark.parametrize("base", ["imagenet_latent", "digits"])
def test_wflows_rows_run_what_they_quote(base):
  """Its ablation, but for the alphas of the evaluation; its field anywhere."""
  row = ablations.get_config(f"{base}/fields/sinkhorn_velocity")
  wflow = imagenet_latent.get_config("wflow_ablation")
  assert row.drift.field == "sinkhorn"
  if base == "imagenet_latent":
    wflow.eval.alphas = row.eval.alphas
    assert row.to_dict() == wflow.to_dict()
  wflow.drift.affinity_floor = row.drift.affinity_floor
  assert row.drift.to_dict() == wflow.drift.to_dict()


@pytest.mark.parametrize("base", BASES)
def test_the_allocation_keeps_the_number_of_generated_samples(base):
  wanted = parse(base).batch
  for name in ablations.rows("table2", base):
    config = parse(f"{base}/table2/{name}")
    batch = config.batch
    assert batch.labels * batch.generated == wanted.labels * wanted.generated
    if batch.reals == "queue":
      assert batch.labels <= config.queue.push_per_step
    if name.startswith("positives"):
      assert batch.generated == wanted.generated
    else:
      assert batch.positives == wanted.positives


def test_small_encoders_are_judged_in_pixels():
  """Each row has features of its own, in which others can't be judged."""
  raw, *widths = (
    parse(f"digits:features/table3/{row}")
    for row in ("raw", "mae_8", "mae_16", "mae_32")
  )
  assert not raw.encoders
  paths = [config.encoders["mae"].path for config in widths]
  assert paths == [
    f"runs/digits_encoder_{width}/encoder" for width in (8, 16, 32)
  ]
  assert all(config.encoders["mae"].in_loss for config in widths)
  for config in (raw, *widths):
    assert "fd_pixel" in config.eval.metrics
    assert "fd_encoder" not in config.eval.metrics


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("digit/table1/y", "base 'digit': valid options are .*'digits'"),
    ("digits/table4/y", "table 'table4': valid options are .*'table1'"),
    ("digits/table11/z", "row 'z': valid options of digits/table11 are .*'xy'"),
    ("imagenet_latent:l2/table3/moco", "compared on the ablation"),
    ("imagenet_latent:smoke/table2/base", "an eighth of batch.generated=4"),
  ],
)
def test_mistakes(name, message):
  with pytest.raises(ValueError, match=message):
    ablations.get_config(name)
