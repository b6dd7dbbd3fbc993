"""Every published queue runs on data with ImageNet's class sizes."""

import dataclasses
import functools

import numpy as np
import pytest

from configs import ablations, imagenet_latent, imagenet_pixel
from drift_jax.data.feed import QueueFeed
from drift_jax.data.loader import Loader
from drift_jax.tasks import parse
from drift_jax.tasks.generator.config import GeneratorConfig
from tests.data.fakes import Numbers, values

pytestmark = pytest.mark.slow

# Of ImageNet's classes 895 have 1300 images, the others down to 732.
SIZES = np.full(1000, 1300)
SIZES[np.arange(105) * 9] = np.linspace(732, 1299, 105)


def published():
  """{name: config} of all that is on ImageNet; of equal queues, the first."""
  configs = {
    f"{module.__name__}:{variant}": module.get_config(variant)
    for module, variants in (
      (imagenet_pixel, imagenet_pixel.SIZES),
      (imagenet_latent, imagenet_latent.VARIANTS),
    )
    for variant in variants
  }
  for table in ablations.TABLES:
    for row in ablations.rows(table, "imagenet_latent"):
      name = f"imagenet_latent/{table}/{row}"
      configs[name] = ablations.get_config(name)
  first = {}
  for name, config in configs.items():
    if config.fd_loss.population:  # draws labels alone
      continue
    assert config.batch.reals == "queue"
    sections = config.batch.to_json() + config.queue.to_json()
    first.setdefault(sections, (name, config))
  return dict(first.values())


PUBLISHED = published()


@functools.cache
def images():
  labels = np.repeat(np.arange(1000), SIZES)
  return Numbers(labels=labels, classes=1000, shape=(1, 1, 1), chunk=1024)


def make(queue, process_index, process_count, **batch):
  """Seed 1: with it all are short of a class within 25 steps."""
  loader = Loader(
    images(),
    batch_size=queue.push_per_step * process_count,
    seed=1,
    num_threads=0,
    process_index=process_index,
    process_count=process_count,
  )
  return QueueFeed(loader, seed=1, **batch, **dataclasses.asdict(queue))


@functools.cache
def filled(queue):
  """One process' queue before the first step: the same for any push."""
  feed = make(queue, 0, 1, num_labels=1, num_positives=1, num_unconditional=1)
  feed.start()
  return feed.state()


def short_draws(name, process_index, process_count):
  """Runs a published feed; how many labels it has had too few samples of."""
  config = parse(PUBLISHED[name])
  assert isinstance(config, GeneratorConfig)
  batch = config.batch
  feed = make(
    config.queue,
    process_index,
    process_count,
    num_labels=batch.labels,
    num_positives=batch.positives,
    num_unconditional=batch.unconditional,
  )
  if process_count == 1:
    feed.restore(filled(dataclasses.replace(config.queue, push_per_step=64)))
  else:
    feed.start()
  short = 0
  # Of the ablations' rows some draw eight times as many labels.
  for _ in range(100 if ":" in name else 40):
    drawn = next(feed)
    labels, positives = drawn["labels"], values(drawn["positives"])
    assert positives.shape == (batch.labels // process_count, batch.positives)
    np.testing.assert_array_equal(
      images().labels[positives.astype(int)],
      np.repeat(labels[:, None], batch.positives, 1),
    )
    few = feed._bank.count[labels] < batch.positives
    short += int(few.sum())
  return short


@pytest.mark.parametrize("name", PUBLISHED)
def test_runs_in_one_process(name):
  # L/2 draws more labels a step than a host pushes: it wants two.
  batch, queue = PUBLISHED[name].batch, PUBLISHED[name].queue
  hosts = 2 if batch.labels > queue.push_per_step else 1
  short = short_draws(name, hosts - 1, hosts)
  assert (short == 0) == (batch.positives < 64)


@pytest.mark.parametrize("size", ["latent:b2", "pixel:b16"])
def test_runs_in_many_processes(size):
  """Process 1 of 32: the first that B/2 stops in, where it may not repeat."""
  assert short_draws(f"configs.imagenet_{size}", 1, 32) > 0
