"""Every row of every table on every base is a config that parses."""

import pytest

from configs import ablations, imagenet_latent
from drift_jax import config as config_lib
from drift_jax import tasks as tasks_lib
from drift_jax.training.drifting import drift_arguments

BASES = (
  "imagenet_latent",
  "digits",
  "digits:features",
  "mnist",
  "mnist:cpu",
  "cifar10",
)
# What a base can't do: it has no encoder, or none that it drifts in.
IMPOSSIBLE = {
  ("digits", "table3"): "which has no encoder: take a base that has one",
  ("digits", "features"): "which has no encoder: take a base that has one",
  ("mnist:cpu", "features"): "whose encoders only judge",
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


WORST = (41.0, 177.0)


@pytest.mark.parametrize(
  ("table", "names", "values"),
  [
    ("table1", "antisymmetric attraction_1.5 repulsion_1.5 attraction_2 "
     "repulsion_2 attraction_only", (8.46, *[WORST] * 5)),
    ("table2", "positives_1 positives_16 positives_32 generated_8 generated_16 "
     "generated_32 base", (20.4, 10.4, 9.0, 11.8, 10.2, 9.3, 8.46)),
    ("table3", "simclr moco convnext mae_256 mae_384 mae_512 mae_640 "
     "mae_640_long mae_640_cls", (*[None] * 3, 8.46, *[None] * 5)),
    ("table11", "xy y none", (8.46, 8.92, 10.54)),
    ("style", "without base", (8.86, 8.46)),
    ("features", "a_b a_c a_d", (9.58, 9.10, 8.46)),
    ("temperature", "tau_0.02 tau_0.05 tau_0.2 all", (10.62, 8.67, 8.96, 8.46)),
    ("fig5", "alpha_1 alpha_1.25 alpha_1.5 alpha_1.75 alpha_2 alpha_2.5 "
     "alpha_3", (*[None] * 4, 8.46, *[None] * 2)),
    ("fields", "softmax mmd kl gaussian sharp sinkhorn_0 sinkhorn_half "
     "sinkhorn sinkhorn_velocity sinkhorn_own",
     (8.46, *[None] * 4, 10.40, 10.17, 7.29, 7.08, 17.57)),
  ],
)  # fmt: skip
def test_the_papers_values(table, names, values):
  """The papers' FID; unknown ones are None, never guessed."""
  rows = ablations.rows(table, "imagenet_latent")
  papers = {name: row.paper for name, row in rows.items()}
  assert papers == dict(zip(names.split(), values, strict=True))
  if table == "temperature":  # other bases' are others, in the same order
    others = ablations.rows(table, "cifar10").values()
    assert tuple(row.paper for row in others) == values


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


def test_imagenet_encoders():
  for width in (256, 384, 512, 640):
    encoder = parse(f"imagenet_latent/table3/mae_{width}").encoders["mae"]
    assert encoder.model["base_channels"] == width
  assert parse("imagenet_latent/table3/simclr").encoders["simclr"].decode


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("digit/table1/y", "base 'digit': valid options are .*'digits'"),
    ("digits/table4/y", "table 'table4': valid options are .*'table1'"),
    ("digits/table11/z", "row 'z': valid options of digits/table11 are .*'xy'"),
    ("digits/table11", "'digits/table11': want BASE/TABLE/ROW"),
    ("digits:encoder/table1/x", "base 'digits:encoder' has task='mae'"),
    ("digits:smok/table1/x", "variant 'smok': valid options"),
    ("imagenet_latent:l2/table3/moco", "compared on the ablation"),
    ("imagenet_latent:smoke/table2/base", "an eighth of batch.generated=4"),
  ],
)
def test_mistakes(name, message):
  with pytest.raises(ValueError, match=message):
    ablations.get_config(name)
