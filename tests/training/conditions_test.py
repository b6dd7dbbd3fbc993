"""Files of conditions: which row is whose, and what can't be used."""

import dataclasses

import numpy as np
import pytest

from configs import cifar10, digits
from drift_jax.system.errors import ConfigError
from drift_jax.tasks import parse
from drift_jax.tasks.generator.setup import with_classes
from drift_jax.training.conditions import check_values
from drift_jax.training.inputs import image_inputs, open_readers, require
from tests.training.inputs_test import CLASSES, TEST, TRAIN, make, make_split

BY_CONDITION = {"batch.reals": "condition_grouped"}
NAMES = [
  f"{split}/{name}/{index}.png"
  for split, indices in (("train", TRAIN), ("test", TEST))
  for name in CLASSES
  for index in indices
]
VALUES = np.arange(2 * len(NAMES), dtype=np.float32).reshape(-1, 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """both/{train,test}/CLASS/FILE and one/CLASS/FILE."""
  root = tmp_path_factory.mktemp("images")
  make_split(root / "both" / "train", TRAIN)
  make_split(root / "both" / "test", TEST)
  make_split(root / "one", TRAIN)
  return root


def save(path, names=NAMES, values=VALUES, **others):
  np.savez(path, names=np.array(names), conditions=values, **others)
  return str(path)


def open_folder(images, file, source="both", **changes):
  config = make(
    f"folder:{images}/{source}", conditions=file, **BY_CONDITION, **changes
  )
  return config, open_readers(config, None)


def test_rows_find_their_images_by_name(images, tmp_path):
  """In any order, of all splits; facts tell of other numbers."""
  order = np.random.default_rng(0).permutation(len(NAMES))
  names = [NAMES[i] for i in order]
  file = save(tmp_path / "c.npz", names, VALUES[order])
  _, readers = open_folder(images, file)
  count = len(CLASSES) * len(TRAIN)
  np.testing.assert_array_equal(readers.train.conditions, VALUES[:count])
  np.testing.assert_array_equal(readers.test().conditions, VALUES[count:])
  other = save(tmp_path / "d.npz", values=VALUES + 1)
  facts = open_folder(images, other)[1].facts
  differ = {k for k in facts if facts[k] != readers.facts[k]}
  assert differ == {"conditions_sha256"}


def test_images_that_are_held_out_take_their_rows_along(images, tmp_path):
  names = [f"{c}/{i}.png" for c in CLASSES for i in TRAIN]
  values = np.arange(len(names), dtype=np.float16)[:, None, None]
  values = np.tile(values, (1, 3, 4))  # tokens
  file = save(tmp_path / "c.npz", names, values)
  config, readers = open_folder(images, file, "one", held_out=2)
  for reader in (readers.train, readers.test()):
    rows = reader.conditions[:, 0, 0].astype(int)
    assert (rows // len(TRAIN) == reader.labels).all()
  assert len(readers.test().conditions) == 2 * len(CLASSES)
  model = with_classes(config, readers.train, str(tmp_path)).model
  assert (model.condition_size, model.condition_tokens) == (4, 3)


def test_images_without_names_are_numbered(tmp_path):
  names = [f"train/{i}" for i in range(1257)]
  values = np.random.default_rng(0).normal(size=(1257, 2))
  config = digits.get_config("style,smoke")
  config.data.conditions = save(tmp_path / "c.npz", names, values)
  readers = open_readers(parse(config), None)
  np.testing.assert_array_equal(readers.train.conditions, np.float32(values))
  with pytest.raises(ConfigError, match="no condition for image 'test/0'"):
    readers.test()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda n, v: (n[1:], v[1:]), "no condition for image 'train/cat/0.png'"),
    (
      lambda n, v: (["train/cat/9.png", *n], v[[0, *range(len(v))]]),
      "which is no image",
    ),
    (lambda n, v: ([n[1], *n[1:]], v), "names image 'train/cat/1.png' twice"),
    (lambda n, v: (n[1:], v), "a text for each of the 24 rows"),
    (lambda n, v: (n, v[:, 0]), r"float32 \(24,\), want \[n, D\]"),
    (lambda n, v: (n, v.astype(int)), "want .* of float16 or float32"),
    (
      lambda n, v: (n, np.where(v == 5, np.nan, v)),
      "condition 2 is not finite",
    ),
  ],
)
def test_files_that_do_not_fit_the_images(images, tmp_path, change, message):
  file = save(tmp_path / "c.npz", *change(NAMES, VALUES))
  with pytest.raises(ConfigError, match=message) as error:
    open_folder(images, file)
  assert str(error.value).startswith("data.conditions")
  assert "\n" not in str(error.value)


def test_a_file_that_is_none(images, tmp_path):
  (tmp_path / "text.npz").write_text("none")
  np.savez(tmp_path / "other.npz", embeddings=VALUES)
  for name, message in (
    ("text.npz", "no .npz file"),
    ("other.npz", "has no array 'conditions'"),
  ):
    with pytest.raises(ConfigError, match=message):
      open_folder(images, str(tmp_path / name))
  config = make(
    f"folder:{images}/both", conditions=f"{tmp_path}/no.npz", **BY_CONDITION
  )
  wanted = image_inputs(config, is_new=True, tested=False)
  with pytest.raises(ConfigError, match=r"no.npz'?: there is no such file"):
    require(wanted, config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"conditions": "x.npz"}, "batch.reals='queue'"),
    (BY_CONDITION, "give the .npz of conditions"),
    ({"model.condition_size": 2}, "condition_size=2 without data.conditions"),
    (
      {"conditions": "x.npz", **BY_CONDITION, "eval.labels": "x.npy"},
      "eval.labels='x.npy' with data.conditions",
    ),
    (
      {"conditions": "x.npz", **BY_CONDITION, "max_corrupt": 1},
      "max_corrupt=1 with data.conditions",
    ),
  ],
)
def test_keys_that_contradict(changes, message):
  if changes.get("batch.reals") is None:
    changes = {"batch.reals": "queue", **changes}
  with pytest.raises(ConfigError, match=message):
    make("folder:x", cifar10.get_config, **changes)


def test_conditions_of_another_width(images, tmp_path):
  file = save(tmp_path / "c.npz")
  sizes = {"model.condition_size": 3}
  config, readers = open_folder(images, file, **sizes)
  with pytest.raises(
    ConfigError, match=r"shape \(2,\), model.condition_size=3"
  ):
    with_classes(config, readers.train, str(tmp_path))


def test_guidance_of_one_class_stays(images, tmp_path):
  """Reals of other conditions repel."""
  (tmp_path / "train").mkdir()
  names = []
  for index in TRAIN:
    source = images / "one" / "cat" / f"{index}.png"
    (tmp_path / "train" / source.name).write_bytes(source.read_bytes())
    names.append(f"train/{source.name}")
  file = save(tmp_path / "c.npz", names, VALUES[: len(names)])
  changes = {"conditions": file, "held_out": 2, **BY_CONDITION}
  config = make(f"folder:{tmp_path}", **changes)
  config = dataclasses.replace(
    config, eval=dataclasses.replace(config.eval, metrics=("label_accuracy",))
  )
  readers = open_readers(config, None)
  new = with_classes(config, readers.train, str(tmp_path))
  assert new.guidance == config.guidance and new.batch == config.batch
  assert new.eval.metrics == () and new.model.num_classes == 1


def test_numbers_in_double_precision_are_rounded():
  values = check_values("x", np.full((2, 3), 0.1))
  assert values.dtype == np.float32
