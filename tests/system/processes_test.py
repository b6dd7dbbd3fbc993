"""Sums over hosts, in two real processes."""

import jax
import numpy as np
import pytest

from drift_jax.metrics.frechet import FeatureStats
from drift_jax.metrics.inception import InceptionScore, inception_score
from drift_jax.system import processes, sharding
from tests import shared_figures
from tests.conftest import assert_close
from tests.process import call_together, free_port

PROGRAM = """if True:
  import sys
  import numpy as np
  from drift_jax.system import processes

  processes.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
  from drift_jax.metrics.batches import local_batches
  from drift_jax.metrics.frechet import FeatureStream
  from drift_jax.metrics.inception import InceptionScore
  from drift_jax.system import sharding
  from tests import shared_figures

  own = int(sys.argv[2])
  data = dict(np.load(sys.argv[3]))
  out = {"first": processes.is_first()}
  # Of different lengths, one of them nothing.
  rows = data["values"][:3] if own else data["values"][:0]
  out["gathered"] = np.concatenate(processes.gather(rows))
  processes._CHUNK_BYTES = 64
  out["total"] = processes.total(data["values"] * (1 + own))
  stream = FeatureStream()
  # The second process has the far smaller part.
  stream.update(data["features"][90:] if own else data["features"][:90])
  stats = stream.result()
  out |= {"count": stats.count, "mean": stats.mean, "scatter": stats.scatter}
  alone = FeatureStream()
  if own:
    alone.update(data["features"])
  out["alone"] = alone.result().scatter
  score = InceptionScore(50, 6, 5)
  part = np.arange(50)[own::2]
  score.update(data["logits"][part], part)
  out["score"] = score.result()
  # Fewer than the first one's part of a batch.
  few = shared_figures.figures_of_few(
    data["pictures"], data["real"], sharding.make_mesh(2, 2)
  )
  out["few"] = np.asarray(list(few.values()))
  numbers = [(n.tolist(), v) for n, v in local_batches(7, 4)]
  out["numbers"] = np.asarray([n for n, _ in numbers])
  out["valid"] = np.asarray([v for _, v in numbers])
  out["from_first"] = processes.from_first(lambda: [own, "told"])[0]

  def refuse():
    raise OSError(f"process {own} refuses")

  mesh = sharding.make_mesh(2, 2)
  rows = sharding.put_batch(np.arange(8.0).reshape(4, 2)[2 * own :][:2], mesh)
  tree = {"rows": rows, "own": np.full(2, own)}
  out |= processes.fetch(tree)
  messages = []
  for bad in (
    lambda: processes.from_first(refuse),
    lambda: list(local_batches(7, 3)),
    lambda: twice.result(),
    lambda: FeatureStream().result(),
  ):
    twice = InceptionScore(50, 6, 5)
    twice.update(data["logits"], np.arange(50))
    try:
      bad()
    except (ValueError, OSError, processes.PeerError) as error:
      messages.append(str(error))
  out["messages"] = np.asarray(messages)
  np.savez(sys.argv[4], **out)
"""


@pytest.fixture(scope="module")
def data():
  random = np.random.default_rng(0)
  return {
    # Sums that float32 would round.
    "values": random.normal(size=(5, 3)) + 1e6,
    "features": random.normal(size=(100, 4)) + 1e4,
    "logits": random.normal(size=(50, 6)),
    "pictures": random.uniform(-1, 1, (20, 2, 2, 3)).astype(np.float32),
    "real": random.uniform(-1, 1, (40, 2, 2, 3)).astype(np.float32),
  }


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("processes")
  np.savez(folder / "data.npz", **data)
  port, data_file = free_port(), folder / "data.npz"
  call_together(
    *(["-c", PROGRAM, port, i, data_file, folder / f"{i}.npz"] for i in (0, 1)),
    devices=2,
  )
  return [dict(np.load(folder / f"{i}.npz")) for i in range(2)]


@pytest.mark.system
def test_every_host_has_the_same_sums_to_the_last_bit(results, data):
  first, second = results
  assert first["first"] and not second["first"]
  for key in "gathered total count mean scatter alone score".split():
    np.testing.assert_array_equal(first[key], second[key])
  np.testing.assert_array_equal(first["gathered"], data["values"][:3])
  np.testing.assert_array_equal(
    first["total"], data["values"] + 2 * data["values"]
  )


@pytest.mark.system
def test_statistics_of_both_are_those_of_all(results, data):
  whole = FeatureStats.from_features(data["features"])
  for result in results:
    assert result["count"] == 100
    assert_close(result["mean"], whole.mean, 1e-15)
    # One rounding of an offset of 1e4 is 1e-12 of these features.
    assert_close(result["scatter"], whole.scatter, 1e-11)
    assert_close(result["alone"], whole.scatter, 1e-11)
    assert result["score"] == pytest.approx(
      inception_score(data["logits"], 5), rel=1e-13
    )


@pytest.mark.system
def test_a_process_without_a_sample_joins_in_every_figure(results, data):
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  alone = shared_figures.figures_of_few(data["pictures"], data["real"], mesh)
  assert len(alone) == 16
  for result in results:
    assert_close(result["few"], np.asarray(list(alone.values())), 1e-9)


@pytest.mark.system
def test_what_one_knows_and_what_all_hold(results):
  first, second = results
  assert first["numbers"].tolist() == [[0, 1], [4, 5]]
  # The last batch is filled up with the last sample.
  assert second["numbers"].tolist() == [[2, 3], [6, 6]]
  assert first["valid"].tolist() == [2, 2]
  assert second["valid"].tolist() == [2, 1]
  for own, result in enumerate(results):
    assert result["from_first"] == 0
    np.testing.assert_array_equal(result["rows"], np.arange(8.0).reshape(4, 2))
    assert result["own"].tolist() == [own, own]


@pytest.mark.system
def test_mistakes_are_told_in_all_processes(results):
  refused = [result["messages"][0] for result in results]
  assert refused == ["process 0 refuses", "process 0 failed: process 0 refuses"]
  for result in results:
    _, shares, twice, nothing = result["messages"].tolist()
    assert "a multiple of the 2 processes, got 3" in shares
    assert "sample number 0 came twice" in twice
    assert "no features" in nothing


def test_one_process_needs_no_collectives():
  values = np.arange(6.0).reshape(3, 2)
  (gathered,) = processes.gather(values)
  assert gathered is values and processes.total(values) is values
  assert processes.is_first()
  processes.initialize("", None, None)
  score = InceptionScore(4, 2, 1)
  with pytest.raises(ValueError, match="4 samples got only 0"):
    score.result()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("", 2, None), "give all three"),
    (("host", 2, 0), "coordinator='host' must be HOST:PORT of process 0"),
    (("host:1", 2, -1), r"process_id=-1 must lie in \[0, num_processes=2\)"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    processes.initialize(*arguments)


@pytest.mark.parametrize(
  ("text", "lost"),
  [
    # As measured on CPU, of the coordination service, of NCCL.
    ("UNKNOWN: Gloo AllReduce failed: Connection closed by peer [::1]:1", True),
    ("UNAVAILABLE: tasks are unhealthy (stopped sending heartbeats)", True),
    ("INTERNAL: NCCL operation failed: remote process exited or", True),
    ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
    ("INTERNAL: CUDA error: an illegal memory access", False),
  ],
)
def test_which_errors_follow_from_a_lost_process(monkeypatch, text, lost):
  error = jax.errors.JaxRuntimeError(text)
  assert not processes.is_lost_peer(error)  # there is no other
  monkeypatch.setattr(processes, "several", lambda: True)
  assert processes.is_lost_peer(error) == lost
  try:
    raise ValueError("a save failed") from error
  except ValueError as outer:
    assert processes.is_lost_peer(outer) == lost
  # JAX's dispatch knows no class of its own; a disk's text is not meant.
  assert processes.is_lost_peer(ValueError(text)) == lost
  assert not processes.is_lost_peer(ValueError(f"a file: {text}"))
  assert not processes.is_lost_peer(OSError(text))
