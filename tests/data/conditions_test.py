"""Reals by condition: which come, in any part and at any time."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from drift_jax.data.conditions import ConditionFeed, ConditionGrouped
from tests.data.fakes import Numbers, values

COUNT, LABELS, POSITIVES, UNCONDITIONAL = 24, 8, 3, 2
SIZES = {
  "num_labels": LABELS,
  "num_positives": POSITIVES,
  "num_unconditional": UNCONDITIONAL,
}


def records(shape=(2,), **changes):
  """Records of three classes with random conditions."""
  reader = Numbers(COUNT, **changes)
  conditions = np.random.default_rng(0).normal(size=(COUNT, *shape))
  reader.conditions = conditions.astype(np.float16)
  return reader


def feed(reader, **changes):
  return ConditionFeed(reader, seed=5, **{**SIZES, **changes})


@pytest.mark.parametrize("shape", [(2,), (4, 3)], ids=["embedding", "tokens"])
def test_a_condition_has_its_image_and_those_of_the_nearest(shape):
  """Of its class; each condition comes once an epoch."""
  reader = records(shape)
  points = np.float64(reader.conditions).reshape(COUNT, -1, shape[-1]).mean(1)
  asked = []
  batches = feed(reader)
  for _ in range(6):
    batch = next(batches)
    assert batch["conditions"].dtype == np.float32
    for label, condition, positives in zip(
      batch["labels"], batch["conditions"], batch["positives"], strict=True
    ):
      own, *others = values(positives).astype(int)
      asked.append(own)
      assert label == reader.labels[own]
      assert_array_equal(condition, np.float32(reader.conditions[own]))
      same = np.flatnonzero(
        (reader.labels == label) & (np.arange(COUNT) != own)
      )
      far = np.linalg.norm(points[same] - points[own], axis=1)
      assert others == same[np.argsort(far)][: POSITIVES - 1].tolist()
    drawn = values(batch["unconditional"]).ravel().tolist()
    assert len(set(drawn)) == LABELS * UNCONDITIONAL
  for epoch in np.reshape(asked, (2, COUNT)):
    assert sorted(epoch) == list(range(COUNT))


@pytest.mark.parametrize("positives", [1, POSITIVES])
def test_parts_and_resumed_batches_are_those_of_one_process(positives):
  reader, changes = records(noise=True), {"num_positives": positives}
  whole = feed(reader, **changes)
  batches = [next(whole) for _ in range(4)]
  parts = [
    feed(reader, **changes, process_index=p, process_count=2) for p in (0, 1)
  ]
  late = feed(reader, **changes, num_workers=0, num_threads=2)
  parts[0].restore({"position": np.asarray(0)})
  late.restore({"position": np.asarray(2)})
  for number, batch in enumerate(batches):
    halves = [next(part) for part in parts]
    for name, array in batch.items():
      joined = np.concatenate([half[name] for half in halves])
      assert_array_equal(joined, array)
    if number >= 2:
      for name, array in next(late).items():
        assert_array_equal(array, batch[name])
  late.close()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_labels": 25}, "draws 25 .batch.labels."),
    ({"num_unconditional": 4}, "draws 32 .batch.unconditional."),
    ({"num_positives": 9}, "class 0 .class0. has 8 images"),
  ],
)
def test_too_few_images_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    ConditionGrouped(records(), 0, *{**SIZES, **changes}.values())
