"""Which images train and which judge; data that do not fit the config."""

import dataclasses
import re
import shutil
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import cifar10, imagenet_latent
from drift_jax import config as config_lib
from drift_jax.config import sections
from drift_jax.system.errors import ERRORS
from drift_jax.tasks import parse
from drift_jax.tasks.generator.setup import generator_feed, with_classes
from drift_jax.training.inputs import (
  check_reals,
  check_shape,
  open_readers,
  with_num_classes,
)
from tests.data import latents_test
from tests.data.pictures import picture, write

CLASSES = ("cat", "dog", "owl")
# Which pictures each split has of each class.
TRAIN = range(6)
TEST = range(6, 8)


def number(label, index):
  """The picture's seed: every image of the data is another."""
  return 10 * label + index


def make_split(folder, indices):
  for label, name in enumerate(CLASSES):
    for index in indices:
      write(folder / name / f"{index}.png", number(label, index), (8, 8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """both/{train,test}/CLASS/FILE and one/CLASS/FILE."""
  root = tmp_path_factory.mktemp("images")
  make_split(root / "both" / "train", TRAIN)
  make_split(root / "both" / "test", TEST)
  make_split(root / "one", TRAIN)
  return root


def make(source, get_config=cifar10.get_config, **changes):
  """A parsed config of some data; changes are of data unless dotted."""
  config = get_config("smoke")
  keys = {"source": source} | changes
  if get_config is cifar10.get_config:
    keys = {"image_size": 8, "crop": "none", "model.input_size": 8} | keys
    config.encoders = ConfigDict()
    config.eval.metrics = ("fd_pixel",)
    config.checkpoint.best_metric = ""
  config.update_from_flattened_dict(
    {k if "." in k else f"data.{k}": value for k, value in keys.items()}
  )
  return parse(config)


def shown(reader):
  """{picture's number: label} of everything that a reader has."""
  known = {
    np.asarray(picture(number(label, index), (8, 8))).tobytes(): (label, index)
    for label in range(len(CLASSES))
    for index in (*TRAIN, *TEST)
  }
  pixels = np.rint((reader.fixed(np.arange(len(reader))) + 1) * 127.5)
  found = [known[image.tobytes()] for image in pixels.astype(np.uint8)]
  assert [label for label, _ in found] == reader.labels.tolist()
  assert len(set(found)) == len(found)
  return set(found)


EVERY_TRAIN = {(label, i) for label in range(3) for i in TRAIN}
EVERY_TEST = {(label, i) for label in range(3) for i in TEST}


def test_data_with_a_test_split_are_judged_by_it(images):
  config = make(f"folder:{images}/both", held_out=2)
  readers = open_readers(config, None)
  assert shown(readers.train) == EVERY_TRAIN
  assert shown(readers.test()) == EVERY_TEST
  assert readers.train.class_names == CLASSES


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
  ("folder", "test_split"), [("one", "test"), ("one", ""), ("both/train", "")]
)
def test_data_without_hold_images_out(images, folder, test_split, in_memory):
  """Two of each class, whatever the seed of the run: none is trained on."""
  seen = []
  for seed in (0, 1):
    config = make(
      f"folder:{images}/{folder}",
      held_out=2,
      test_split=test_split,
      in_memory=in_memory,
    )
    readers = open_readers(dataclasses.replace(config, seed=seed), None)
    test = shown(readers.test())
    assert sorted(label for label, _ in test) == [0, 0, 1, 1, 2, 2]
    assert shown(readers.train) == EVERY_TRAIN - test
    seen.append(test)
  assert seen[0] == seen[1]


@pytest.mark.parametrize(
  ("folder", "test_split", "message"),
  [
    ("one", "test", "data: .*one has no split 'test'.*set data.held_out"),
    ("one", "", "needs held-out images.*data.test_split and data.held_out"),
    ("both", "val", r"data: .*no split 'val': its splits are \['test', 'tra"),
  ],
)
def test_nothing_held_out_trains_but_can_not_judge(
  images, folder, test_split, message
):
  config = make(f"folder:{images}/{folder}", held_out=0, test_split=test_split)
  readers = open_readers(config, None)
  assert shown(readers.train) == EVERY_TRAIN
  with pytest.raises(config_lib.ConfigError, match=message):
    readers.test()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"source": "folder:nowhere"}, "^data.source='folder:.* not a folder"),
    (
      {"held_out": 6, "test_split": ""},
      "^data.held_out=6: .*class 0 .'cat'.*6",
    ),
    ({"train_split": "trian"}, "no split 'trian': its splits are"),
    ({"class_order": "imagenet"}, "^data.class_order.*'cat'.* WordNet ids"),
    ({"wire": "bfloat16"}, "data.wire='bfloat16'.*'uint8', 'float32'"),
    ({"source": "digits", "wire": "uint8"}, "'uint8' can't hold .* 17 values"),
  ],
)
def test_mistakes_are_named_before_anything_is_read(images, changes, message):
  config = make(**{"source": f"folder:{images}/both"} | changes)
  with pytest.raises(config_lib.ConfigError, match=message):
    open_readers(config, None)


def test_an_image_of_another_size(images):
  """Found by path, when it is read: at once if all are held in memory."""
  sizes = {"image_size": 16, "model.input_size": 16}
  message = "train/cat/0.png is 8 x 8 .*data.crop='none'"
  config = make(f"folder:{images}/both", **sizes, in_memory=False)
  readers = open_readers(config, None)
  with pytest.raises(ERRORS, match=message):
    readers.train.fixed(np.arange(1))
  config = make(f"folder:{images}/both", **sizes, in_memory=True)
  with pytest.raises(ERRORS, match=message):
    open_readers(config, None)


def test_classes_are_counted_or_compared(images):
  config = make(f"folder:{images}/both", **{"model.num_classes": 0})
  reader = open_readers(config, None).train
  counted = with_num_classes(config, reader)
  assert counted.model.num_classes == 3
  assert with_num_classes(counted, reader) == counted
  wrong = dataclasses.replace(
    config, model=dataclasses.replace(config.model, num_classes=4)
  )
  with pytest.raises(
    config_lib.ConfigError, match="have 3 classes, model.num_classes=4: .* 0 "
  ):
    with_num_classes(wrong, reader)
  # What could not be checked before the classes were known.
  odd = dataclasses.replace(
    config, eval=dataclasses.replace(config.eval, num_samples=10)
  )
  with pytest.raises(
    config_lib.ConfigError, match="num_samples=10 .*classes=3"
  ):
    with_num_classes(odd, reader)


def test_a_model_of_another_size(images):
  reader = open_readers(make(f"folder:{images}/both"), None).train
  check_shape(reader, (8, 8, 3), "the model makes")
  with pytest.raises(
    config_lib.ConfigError, match=r"\(8, 8, 3\), the model makes \(8, 8, 1\)"
  ):
    check_shape(reader, (8, 8, 1), "the model makes")


QUEUE = {"batch.reals": "queue"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch.positives": 7}, r"\(cat\) has 6 images.*positives=7 can draw"),
    (
      QUEUE | {"batch.labels": 3, "queue.push_per_step": 2},
      "batch.labels=3 .*queue.push_per_step=2 samples: raise queue.push",
    ),
    (QUEUE | {"batch.positives": 7}, r"cat\) has 6 .*=7.*replacement=True"),
    (QUEUE | {"batch.unconditional": 19}, "18 images.*unconditional=19"),
  ],
)
def test_reals_that_the_data_can_not_give(images, changes, message):
  sizes = {"batch.labels": 2, "batch.positives": 2, "batch.unconditional": 1}
  config = make(f"folder:{images}/both", **sizes | changes)
  reader = open_readers(config, None).train
  with pytest.raises(config_lib.ConfigError, match=message):
    generator_feed(config, reader)


@pytest.mark.parametrize(
  ("drawn", "held_out", "message"),
  [
    (
      ("queue", 8, 7, 0, 0),
      2,
      r"cat\) has 4 images, .*generator.positives to 4, ",
    ),
    (
      ("class_grouped", 8, 2, 0, 0),
      2,
      "4 images.* draw 8.*positives to 1.*labels to 6",
    ),
    (("queue", 8, 2, 0, 0), 4, "class 0 has 2 training .*4 gen.*data.held_out"),
    (("queue", 8, 2, 0, 0), 2, ""),
    (("queue", 0, 99, 99, 99), 5, ""),
    # More samples than are held out.
    (
      ("queue", 8, 2, 0, 15),
      2,
      "class 0 has 4 .* 5 gen.*generator.num_samples=12",
    ),
    (("queue", 8, 2, 0, 12), 2, ""),
    (("queue", 8, 2, 0, 6), 4, ""),
    (("queue", 8, 2, 0, 7), 2, "num_samples=7 cannot be balanced"),
  ],
)
def test_an_encoder_is_told_what_its_generator_would_lack(
  images, drawn, held_out, message
):
  config = make(f"folder:{images}/one", held_out=held_out)
  names = ("reals", "labels", "positives", "unconditional", "num_samples")
  reals = sections.GeneratorReals(**dict(zip(names, drawn, strict=True)))
  readers = open_readers(config, None)
  if not message:
    return check_reals(reals, readers, judged=True)
  with pytest.raises(config_lib.ConfigError, match=message) as caught:
    check_reals(reals, readers, judged=True)
  # Any one of the changes is enough.
  remedies = str(caught.value).rpartition(": ")[2]
  for key, value in re.findall(r"r\.(\w+)(?: to |=)(\d+)[, ]", remedies):
    changed = dataclasses.replace(reals, **{key: int(value)})
    check_reals(changed, readers, judged=True)


def test_one_class_is_not_guided(images, tmp_path):
  """Unless the config says model.num_classes=1, as runs of before may."""
  config = make(f"folder:{images}/one/cat", held_out=1)
  metrics = ("fd_pixel", "label_accuracy")
  config = dataclasses.replace(
    config, eval=dataclasses.replace(config.eval, metrics=metrics)
  )
  reader = open_readers(config, None).train
  workdir = str(tmp_path)
  alone = with_classes(config, reader, workdir)
  assert alone.guidance.minimum == alone.guidance.maximum == 1
  assert alone.batch.unconditional == 0 and alone.model.num_classes == 1
  assert alone.eval.alphas == (1.0,) and alone.eval.metrics == ("fd_pixel",)
  assert with_classes(alone, reader, workdir) == alone
  given = dataclasses.replace(
    config, model=dataclasses.replace(config.model, num_classes=1)
  )
  assert with_classes(given, reader, workdir) == given
  several = open_readers(make(f"folder:{images}/one", held_out=1), None).train
  assert with_classes(config, several, workdir).guidance == config.guidance


def test_a_class_that_has_not_come_up_in_the_queue_repeats(images):
  sizes = {"batch.labels": 2, "batch.positives": 6, "queue.class_size": 8}
  sizes |= {"queue.push_per_step": 9, "queue.prefill": 0}
  config = make(f"folder:{images}/both", **QUEUE, **sizes)
  reader = open_readers(config, None).train
  feed = generator_feed(config, reader)
  feed.start()
  positives = next(feed)["positives"]
  assert any(len({image.tobytes() for image in row}) < 6 for row in positives)
  feed.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """A latent cache of 11 images, as latents_test makes it."""
  path = tmp_path_factory.mktemp("latents")
  settings = latents_test.SETTINGS
  latents_test.make(path / "cache", settings, latents_test.random_moments(11))
  return path


def autoencoder(sha256="a" * 64, scaling_factor=0.18215):
  """What is asked of the artifact that decodes."""
  return types.SimpleNamespace(
    sha256=sha256, metadata={"model_config": {"scaling_factor": scaling_factor}}
  )


def latents(source, **changes):
  options = {"vae.path": "weights/sd_vae", "test_split": "validation"}
  return make(source, imagenet_latent.get_config, **options | changes)


def test_latents(cache):
  """A relative DIR starts in data.data_dir, as it does for folders."""
  config = latents("latents:cache", data_dir=str(cache))
  readers = open_readers(config, autoencoder())
  assert readers.train.sample_shape == (4, 4, 3) and len(readers.train) == 11
  assert readers.train.dtype.name == "bfloat16" and readers.train.grid is None
  with pytest.raises(
    config_lib.ConfigError, match=r"data: no latent .*'validation'.*\['train'\]"
  ):
    readers.test()


@pytest.mark.parametrize(
  ("other", "message"),
  [
    ({"sha256": "b" * 64}, "data: .* SHA-256 a{64}, but the one given has b"),
    ({"scaling_factor": 1.0}, "data: .*scaled by 0.18215, .*factor of 1.0: gi"),
    (None, r"data: .*needs vae\.path.*convert_weights vae"),
  ],
)
def test_latents_of_another_autoencoder(cache, other, message):
  vae = None if other is None else autoencoder(**other)
  with pytest.raises(config_lib.ConfigError, match=message):
    open_readers(latents(f"latents:{cache}/cache"), vae)


@pytest.mark.parametrize("crop", ["none", "random"])
def test_images_in_memory_need_no_files(tmp_path, images, crop):
  """And are those that the files would have given, crops and flips too."""
  shutil.copytree(images / "one", tmp_path / "one")
  source = f"folder:{tmp_path}/one"
  indices = np.array([4, 14, 0, 4])

  def read(reader):
    rngs = [np.random.default_rng(i) for i in range(len(indices))]
    return reader.read(indices, rngs)

  config = make(source, crop=crop, held_out=1, in_memory=False)
  expected = read(open_readers(config, None).train)
  config = make(source, crop=crop, held_out=1, in_memory=True)
  reader = open_readers(config, None).train
  shutil.rmtree(tmp_path / "one")
  np.testing.assert_array_equal(read(reader), expected)
