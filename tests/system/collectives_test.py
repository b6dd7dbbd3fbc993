"""Which collectives the compiled programs of a run hold, and how large."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from configs import common, digits
from drift_jax.system import jaxprs, sharding
from drift_jax.tasks import parse, programs
from drift_jax.tools import hlo
from drift_jax.training.programs import Program

SCALARS = 4_096  # bytes: norms, losses and diagnostics


def tiny(variant: str, **mesh: int):
  """The digits' config with a smaller model, encoders described."""
  config = digits.get_config(variant)
  config.mesh.update(mesh)
  if config.task == "mae":
    config.mae.batch_size = 16
    config.eval.batch_size = 16
    return parse(config)
  config.batch.update(labels=8, generated=4, positives=4, unconditional=2)
  config.eval.update(batch_size=16)
  if config.encoders:
    encoder = digits.get_config("encoder").model
    config.encoders.mae.path = "nowhere"
    config.encoders.mae.model = common.frozen_model("mae", encoder)
    config.features.update(
      every_k_block=4, patch_mean_size=(), patch_std_size=(), use_std=False
    )
  return parse(config)


def compiled(config, *names: str) -> dict[str, tuple[Program, hlo.Program]]:
  """The programs of these names, all if there are none."""
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  options = {"xla_backend_optimization_level": 0}
  return {
    program.name: (
      program,
      hlo.analyse(
        program.jitted.lower(*program.arguments.values())
        .compile(options)
        .as_text()
      ),
    )
    for program in programs(config, mesh)
    if not names or program.name in names
  }


def layer_shapes(*trees) -> set[tuple[int, ...]]:
  """Shapes of whole parameters, of stacked ones' layers too, without ones."""
  shapes = set()
  for leaf in jax.tree.leaves(trees):
    for shape in (leaf.shape, leaf.shape[1:]):
      shapes.add(tuple(n for n in shape if n > 1))
  return shapes


def bytes_of(*trees, sharded: bool) -> int:
  """Of the leaves that are sharded over the mesh, or of those that are not."""
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(trees)
    if ("fsdp" in leaf.sharding.spec) == sharded
  )


def gathered_shapes(program: hlo.Program) -> set[tuple[int, ...]]:
  return {
    tuple(n for n in dimensions if n > 1)
    for entry in program.collectives
    if entry.kind == "all-gather"
    for _, dimensions in entry.shapes
  }


@pytest.fixture(scope="module")
def sharded():
  """{program: ...} of a generator in an encoder's features, on 2 x 4."""
  return compiled(tiny("features", data=2, fsdp=4))


@pytest.mark.slow
def test_only_parameters_are_gathered(sharded):
  for name, (program, found) in sharded.items():
    weights = [
      program.arguments[key]
      for key in ("params", "frozen")
      if key in program.arguments
    ]
    if name == "train":
      weights.append(program.arguments["state"].params)
    assert gathered_shapes(found) <= layer_shapes(*weights), name
    # In the backward pass once more, never for each use.
    times = 2 if name == "train" else 1
    gathered = found.by_kind()["all-gather"]["bytes"]
    assert gathered <= times * bytes_of(*weights, sharded=True), name
    assert gathered > 0
    assert found.unknown_trips == 0
  assert set(sharded["sample"][1].by_kind()) == {"all-gather"}  # no sums


@pytest.mark.slow
def test_gradients_are_reduce_scattered(sharded):
  """Each sharded parameter's once, in float32; the rest is summed."""
  program, found = sharded["train"]
  params = program.arguments["state"].params
  kinds = found.by_kind()
  assert set(kinds) == {"all-gather", "all-reduce", "reduce-scatter"}
  whole = bytes_of(params, sharded=True)
  assert kinds["reduce-scatter"]["bytes"] == whole
  # Over 'data' the parts, over both axes what every device has whole.
  expected = whole / 4 + bytes_of(params, sharded=False)
  assert expected <= kinds["all-reduce"]["bytes"] <= expected + SCALARS


@pytest.mark.slow
def test_whole_parameters_are_never_gathered():
  """With fsdp=1 there is one sum of gradients, and nothing else large."""
  program, found = compiled(tiny("", data=8, fsdp=1), "train")["train"]
  kinds = found.by_kind()
  assert set(kinds) == {"all-reduce"}
  expected = bytes_of(program.arguments["state"].params, sharded=False)
  assert expected <= kinds["all-reduce"]["bytes"] <= expected + SCALARS


@pytest.mark.slow
def test_encoders_train_the_same_way():
  found = compiled(tiny("encoder", data=2, fsdp=4))
  program, train = found["train"]
  params = program.arguments["state"].params
  kinds = train.by_kind()
  assert set(kinds) == {"all-gather", "all-reduce", "reduce-scatter"}
  assert gathered_shapes(train) <= layer_shapes(params)
  whole = bytes_of(params, sharded=True)
  assert kinds["reduce-scatter"]["bytes"] == whole
  assert kinds["all-gather"]["bytes"] <= 2 * whole
  _, evaluate = found["evaluate"]
  assert gathered_shapes(evaluate) <= layer_shapes(params)
  assert evaluate.by_kind()["all-reduce"]["bytes"] <= SCALARS


def test_counts_of_a_program_written_by_hand():
  """A loop of 5 trips with a gather in it; an all-reduce behind."""
  mesh = sharding.make_mesh(1, 8)

  def body(x):
    def step(carry, _):
      whole = jax.lax.all_gather(carry, "fsdp", tiled=True)
      return carry + whole.sum(), None

    x, _ = jax.lax.scan(step, x, length=5)
    return jax.lax.psum(x @ x, "fsdp")

  spec = jax.sharding.PartitionSpec("fsdp")
  jitted = jax.jit(
    sharding.over_devices(body, mesh, (spec,), jax.sharding.PartitionSpec())
  )
  traced = jitted.trace(jax.ShapeDtypeStruct((64,), np.float32))
  found = hlo.analyse(traced.lower().compile().as_text())
  assert found.by_kind() == {
    "all-gather": {"count": 5, "bytes": 5 * 64 * 4},
    "all-reduce": {"count": 1, "bytes": 4},
  }
  assert found.bytes > found.bytes_once
  assert jaxprs.matmul_flops(traced.jaxpr, 8) == 2 * 8
  asked = hlo.requested_collectives(traced.jaxpr)
  assert hlo.totals(asked) == found.by_kind()
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.analyse("HloModule empty")


def test_operations_are_those_that_a_result_needs():
  """Two products in each of 5 blocks, and their gradients; of what is
  computed again for them, the second product is not needed."""
  n, depth = 8, 5

  def loss(weights, x):
    block = jax.checkpoint(lambda x, w: (jnp.sin(x @ w) @ w, None))
    return jax.lax.scan(block, x, weights)[0].sum()

  arrays = jnp.ones((depth, n, n)), jnp.ones((n, n))
  product = 2 * n**3
  forward = jax.jit(loss).trace(*arrays)
  assert jaxprs.matmul_flops(forward.jaxpr, 1) == depth * 2 * product
  both = jax.jit(jax.value_and_grad(loss)).trace(*arrays)
  assert jaxprs.matmul_flops(both.jaxpr, 1) == depth * (2 + 1 + 4) * product


def test_a_kernel_whose_result_is_not_needed_counts_nothing():
  def kernel(x_ref, out_ref):
    out_ref[...] = x_ref[...]

  def run(x):
    return pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
      cost_estimate=pl.CostEstimate(3, 0, 0),
      interpret=True,
    )(x)

  def block(x):
    y = jax.jit(run)(x)
    return run(x @ x), y, jnp.sum(run(x))

  for results, needed in ((slice(3), 3 * 3 + 2 * 8**3), (slice(1, 2), 3)):
    traced = jax.jit(lambda x, part=results: block(x)[part]).trace(
      jnp.ones((8, 8))
    )
    assert jaxprs.matmul_flops(traced.jaxpr, 1) == needed


_FUSIONS = """HloModule m

%inner (p0: f32[4,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,8}
}

%outer (q0: f32[4,8], q1: s32[], q2: f32[8]) -> f32[8] {
  %q0 = f32[4,8]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[8]{0} parameter(2)
  %part = f32[1,8]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%inner
  %flat = f32[8]{0} bitcast(%part)
  ROOT %sum = f32[8]{0} add(%flat, %q2)
}

%moving (r0: f32[4,8]) -> f32[2,8] {
  %r0 = f32[4,8]{1,0} parameter(0)
  ROOT %half = f32[2,8]{1,0} slice(%r0), slice={[0:2], [0:8]}
}

ENTRY %main (x: f32[4,8], i: s32[], y: f32[8]) -> f32[8] {
  %x = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[8]{0} parameter(2)
  %room = f32[4,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %near = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%y)
  %nearby = f32[8]{0:S(1)} copy-done(%near)
  %half = ((f32[4,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]) async-start(%x), calls=%moving
  %halved = f32[2,8]{1,0:S(1)} async-done(%half)
  ROOT %out = f32[8]{0} fusion(%x, %i, %nearby), kind=kLoop, calls=%outer, metadata={op_name="jit(f)/transpose(jvp(Net.run))/Inner/add"}, backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_bytes_of_a_program_written_by_hand():
  """Slices count as what is taken, however deep; nothing counts twice."""
  copy = 2 * 8 * 4 + 4  # with its flag
  half = 2 * 16 * 4
  fusion = (8 + 1 + 8) * 4 + 8 * 4
  found = hlo.analyse(_FUSIONS)
  assert found.bytes == copy + half + fusion
  assert found.parts == {"": (0, copy + half), "Net": (7, fusion)}


_CUSTOM = """HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %a = f32[8] copy(%x), backend_config={"window_config":{},"estimated_cycles":"100"}
  ROOT %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz","cost_estimate":{COST}}}
}
"""  # noqa: E501


def test_a_kernel_counts_at_the_roofline_of_its_declared_cost():
  # 1 us of products, 2 us of memory at 1.75 GHz, beside the other's cycles.
  cost = '"bytes_accessed":"3200000","flops":"918000000","transcendentals":"7"'
  text = _CUSTOM.replace("COST", cost)
  assert hlo.analyse(text).cycles == 100 + 3500
  # Inside a fusion too, which has no estimate of its own.
  start, _, main = text.partition("ENTRY %main")
  found = hlo.analyse(
    f"""{start}%fused{main}
ENTRY %main (y: f32[8]) -> f32[8] {{
  %y = f32[8] parameter(0)
  ROOT %out = f32[8] fusion(%y), kind=kCustom, calls=%fused
}}"""
  )
  assert (found.cycles, found.kernels) == (3500, {"tpu_custom_call": 1})
