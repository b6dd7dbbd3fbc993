"""What a report says of the protocol that figures were measured by."""

from typing import Any

import pytest

from drift_jax.tasks.generator.protocols import (
  PROTOCOLS,
  described,
  of_request,
)

OF_BOTH = (
  "imagenet_256_fid_stats.npz, SHA-256 1; single images of "
  "imagenet_val_prc_arr0.npz, SHA-256 2"
)


def differences(name, *, path, source=None, **changes):
  """What differs if all but the changes is as the protocol has it."""
  asked: dict[str, Any] = of_request(name) | {"per_class": 50} | changes
  metrics = asked.pop("metrics")
  for key in ("protocol", "labels"):
    del asked[key]
  reference = {"path": path, "provenance": source and {"source": source}}
  told = described(name, samples=asked, metrics=metrics, reference=reference)
  assert told["name"] == name and told["reference"] == reference
  assert {key: told[key] for key in asked} == asked
  return told["differs"]


@pytest.mark.parametrize(
  ("name", "path", "source"),
  [
    ("wflow", "/data/jit_in256_stats.npz", None),
    ("adm", "adm.npz", "VIRTUAL_imagenet256_labeled.npz, SHA-256 3"),
    ("drifting", "weights/drifting.npz", OF_BOTH),
  ],
)
def test_nothing_differs(name, path, source):
  for changes in ({}, {"metrics": ("inception_score",)}):
    assert differences(name, path=path, source=source, **changes) == []


def test_what_differs_is_named():
  wflow = {"path": "jit_in256_stats.npz"}
  assert differences("wflow", alphas=(1.09,), **wflow) == []
  for key, value in (("alphas", (1.09, 1.3)), ("pixels", "truncate")):
    (text,) = differences("wflow", **{key: value}, **wflow)
    assert text.startswith(f"{key}: {value}")
  (text,) = differences("wflow", path="imagenet256_train.npz")
  assert "jit_in256_stats.npz" in text and "imagenet256_train.npz" in text
  # Its own statistics, but precision and recall by others' images.
  (text,) = differences("drifting", path="imagenet_256_fid_stats.npz")
  assert "imagenet_val_prc_arr0.npz" in text
  # Without those figures nothing is asked of single images.
  ablation = {"alphas": (1.0, 1.5, 2.0, 2.5, 3.0, 3.5), "metrics": ("fid",)}
  given = {"path": "imagenet_256_fid_stats.npz"}
  assert differences("drifting", **given, **ablation) == []
  (text,) = differences("drifting", **given, metrics=("fid", "kid"))
  assert text.startswith("metrics: ('fid', 'kid')")


def test_the_alphas_of_a_sweep_are_distinct():
  for protocol in PROTOCOLS.values():
    alphas = protocol.alphas or (1.0,)
    assert list(alphas) == sorted(set(alphas)) and 1 <= alphas[0]
    assert alphas[-1] <= 4  # configs train no larger ones
