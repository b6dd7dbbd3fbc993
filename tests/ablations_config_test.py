"""Every row of every table on every base is a config that parses."""

import pytest

from configs import ablations
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


def parse(name):
  config = ablations.get_config(name)
  for encoder in config.encoders.values():
    encoder.path = encoder.path or "given by the user"
  return tasks_lib.parse(config)


@pytest.mark.parametrize(
  ("base", "table"), [case for case in CASES if case not in IMPOSSIBLE]
)
def test_rows_parse_and_differ(base, table):
  found = {
    name: parse(f"{base}/{table}/{name}")
    for name in ablations.rows(table, base)
  }
  assert len(found) >= 2
  for config in found.values():
    drift_arguments(config.drift)  # where fields are checked
  texts = [config_lib.to_json(config) for config in found.values()]
  assert len(set(texts)) == len(texts)
  labels = [row.label for row in ablations.rows(table, base).values()]
  assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(("base", "table"), IMPOSSIBLE)
def test_what_a_base_can_not_do(base, table):
  with pytest.raises(ValueError, match=IMPOSSIBLE[base, table]):
    ablations.rows(table, base)


@pytest.mark.parametrize(
  ("base", "table"),
  [
    case
    for case in CASES
    if case not in IMPOSSIBLE and case[1] not in ("table3", "fig5")
  ],
)
def test_one_row_is_the_base(base, table):
  """Else the rows that tables share would be trained more than once."""
  wanted = parse(base)
  rows = [parse(f"{base}/{table}/{row}") for row in ablations.rows(table, base)]
  assert rows.count(wanted) == 1


def papers(table, base="imagenet_latent"):
  return {name: row.paper for name, row in ablations.rows(table, base).items()}


def test_the_papers_values():
  """FID of method.md's section 9; unknown ones are None, never guessed."""
  assert papers("table1") == {"antisymmetric": 8.46} | dict.fromkeys(
    (
      *("attraction_1.5", "repulsion_1.5", "attraction_2", "repulsion_2"),
      "attraction_only",
    ),
    (41.0, 177.0),
  )
  assert papers("table2") == {
    "positives_1": 20.4,
    "positives_16": 10.4,
    "positives_32": 9.0,
    "generated_8": 11.8,
    "generated_16": 10.2,
    "generated_32": 9.3,
    "base": 8.46,
  }
  assert papers("table11") == {"xy": 8.46, "y": 8.92, "none": 10.54}
  assert papers("style") == {"without": 8.86, "base": 8.46}
  assert papers("features") == {"a_b": 9.58, "a_c": 9.10, "a_d": 8.46}
  assert papers("temperature") == {
    "tau_0.02": 10.62,
    "tau_0.05": 8.67,
    "tau_0.2": 8.96,
    "all": 8.46,
  }
  # Other bases have other temperatures, in the same order.
  assert papers("temperature", "cifar10") == {
    "tau_0.1": 10.62,
    "tau_0.2": 8.67,
    "tau_0.4": 8.96,
    "all": 8.46,
  }
  assert papers("fields") == {
    "softmax": 8.46,
    "mmd": 10.40,
    "kl": 10.17,
    "gaussian": None,
    "sharp": None,
    "sinkhorn": 7.29,
    "sinkhorn_velocity": 7.08,
    "sinkhorn_own": 17.57,
  }
  known = {name for name, paper in papers("table3").items() if paper}
  assert known == {"mae_256"}
  assert {n for n, paper in papers("fig5").items() if paper} == {"alpha_2"}


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
  assert list(ablations.rows("table3", "imagenet_latent"))[:3] == [
    "simclr",
    "moco",
    "convnext",
  ]
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
