"""compile_check: real TPUs and GPUs, compiled for without one."""

import dataclasses
import json
import re

import jax
import pytest

from configs import cifar10, digits, imagenet_latent, mae_latent
from drift_jax import config as config_lib
from drift_jax import tasks as tasks_lib
from drift_jax.system import devices, sharding
from drift_jax.tasks import parse
from drift_jax.tools import compile_check, gpu_memory, hlo
from drift_jax.training import artifacts
from drift_jax.training import run as run_lib
from tests import process
from tests.programs import call_each
from tests.published_configs_test import get

# Widths that TPUs tile evenly, one label a chip.
SMALL = (
  "--config=configs/digits.py",
  "--config.model.hidden_size=128",
  "--config.model.cond_dim=128",
  "--config.model.num_heads=2",
  "--config.model.depth=3",
  "--config.model.remat=attention",
  "--config.batch.positives=8",
  "--config.eval.batch_size=16",
)
# Without the tests' XLA_FLAGS: libtpu refuses flags that it doesn't have.
ALONE = {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}


def run(*arguments):
  """What a process that compiles for other devices has said."""
  done = process.call(*arguments, **ALONE)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  return done.stdout


@pytest.fixture(scope="module")
def v6e(tmp_path_factory):
  """(report, text, programs) of a small generator on 16 chips of v6e."""
  folder = tmp_path_factory.mktemp("check")
  file = folder / "report.json"
  text = run(
    *("-m", "drift_jax.tools.compile_check", *SMALL),
    "--topology=v6e:4x4",
    "--mesh=data=2,fsdp=8",
    f"--json={file}",
    f"--hlo={folder}",
  )
  programs = {path.stem: path.read_text() for path in folder.glob("*.txt")}
  return json.loads(file.read_text()), text, programs


@pytest.mark.system
def test_a_small_model_on_a_real_topology(v6e):
  report, text, programs = v6e
  assert (report["devices"], report["device_kind"]) == (16, "TPU v6 lite")
  assert report["mesh"] == {"data": 2, "fsdp": 8}
  train, sample = report["programs"]
  assert (train["program"], sample["program"]) == ("train", "sample")
  assert train["fits"] and sample["fits"] and train["advice"] == []
  sizes = train["arguments"]
  # AdamW's two moments and two averages beside the parameters, in eighths.
  config = parse(digits.get_config())
  assert sizes["optimizer"] == 2 * sizes["params"] + 8  # two counters
  assert sizes["ema"] == len(config.ema.decays) * sizes["params"]
  assert sum(sizes.values()) < train["peak"] < train["available"]
  assert train["activations"] > 0
  assert train["flops"] > 3 * sample["flops"]
  assert train["bytes_accessed"] > sample["bytes_accessed"] > 0
  assert {"Generator", "rest"} <= set(train["parts"])
  assert sum(part["seconds"] for part in train["parts"].values()) == (
    pytest.approx(train["estimated_seconds"])
  )
  for word in ("train: fits", "params", "optimizer", "TFLOP", "all-gather"):
    assert word in text, text
  # One attention kernel forward, one backward; remat keeps the former's result.
  for name, count in {"train": 2, "sample": 1}.items():
    kernels = programs[name].count('custom_call_target="tpu_custom_call"')
    assert kernels == count, name
  assert programs.keys() == {"train", "sample", "train_memory", "sample_memory"}
  assert "cumulative_size" in programs["train_memory"]


_KERNELS = """
import jax, jax.numpy as jnp
from drift_jax import drift
from drift_jax.system import sharding
from drift_jax.models import layers
from drift_jax.tasks.generator.setup import memory_on_chip_for
from drift_jax.tools import compile_check

compile_check.prepare_compilers()
for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
  mesh = sharding.make_mesh(devices=compile_check.find_devices(topology)[:1])
  place = sharding.replicated(mesh)
  shape = lambda *x, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    x, dtype, sharding=place
  )
  loss = lambda x, y, w: drift.drift_losses(
    {"wide": x}, {"wide": y}, w, num_positives=8, temperatures=(0.05, 0.2),
    kernel="pallas",
  )[0].sum()
  features = (shape(1, 8, 3, 1024), shape(1, 12, 3, 1024))
  weight = shape(1, dtype=jnp.float32)
  jax.jit(jax.value_and_grad(loss)).lower(*features, weight).compile()
  # Heads of 64, two at a time, and of 72: where there is least memory on chip
  # with as many tokens as W-Flow's largest generator has.
  tokens = 272 if topology.startswith("v4") else 20
  for heads, x in ((4, shape(2, 20, 256)), (16, shape(2, tokens, 1152))):
    attention = layers.Attention(
      heads, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"), "pallas"
    )
    params = jax.tree.map(
      lambda p: shape(*p.shape, dtype=p.dtype),
      jax.eval_shape(attention.init, jax.random.key(0), x),
    )
    total = lambda p, x: attention.apply(p, x).astype(jnp.float32).sum()
    jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, x).compile()
  # Both branches of a block, where there is memory for them.
  memory = memory_on_chip_for("auto", mesh)
  assert bool(memory) == (not topology.startswith("v4"))
  if memory:
    block = layers.Block(
      2, 544, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"), "pallas", memory
    )
    x, condition = shape(4, 16, 128), shape(4, 8, dtype=jnp.float32)
    params = jax.tree.map(
      lambda p: shape(*p.shape, dtype=p.dtype),
      jax.eval_shape(block.init, jax.random.key(0), x, condition),
    )
    total = lambda p, *of: block.apply(p, *of)[0].astype(jnp.float32).sum()
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    compiled = gradient.lower(params, x, condition).compile().as_text()
    assert compiled.count('custom_call_target="tpu_custom_call"') == 3
  print(topology)
"""


@pytest.mark.system
def test_kernels_compile_for_every_generation():
  assert run("-c", _KERNELS).split()[-1] == "v6e:2x2"


_MISTAKES = {
  "--topology=v6e": "--topology='v6e': want GENERATION:AxB",
  "--topology=v6e-64": "v6e-64 is v6e:8x8;",
  "--topology=v5litepod-128": "v5litepod-128 is v5e:8x16;",
  "--topology=h300:2x8": "'h300:2x8': want .*h100, h200, b200.*rtx4090",
  "--topology=h100:0": "'h100:0': want .*CARD:GPUS",
  "--topology=v9z:4x4": "v9z:4x4.*valid ones",
  "--mesh=rows=2": r"'rows=2' is not AXIS=SIZE.*'data', 'fsdp'",
  "--mesh=data=3": "mesh data=3, fsdp=1 does not fit 1 devices",
  "--programs=trian": r"no 'trian'.*'train', 'sample'",
  "--config.model.num_classes=0": "model.num_classes=0.*set it",
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
  """(reports of a square mesh and a large batch, what the tool ended with)."""
  folder = tmp_path_factory.mktemp("others")
  files = [folder / f"{number}.json" for number in range(2)]
  cases = [
    [*SMALL, *case.split(), "--programs=train", f"--json={file}"]
    for file, case in zip(
      files,
      (
        "--config.model.depth=1 --topology=v6e:4x4 --mesh=data=1,fsdp=16",
        "--topology=v5e:2x2 --config.batch.generated=65536",
      ),
      strict=True,
    )
  ]
  cases += [["--config=configs/digits.py", mistake] for mistake in _MISTAKES]
  told = call_each("drift_jax.tools.compile_check", cases, **ALONE)
  reports = [json.loads(file.read_text()) for file in files]
  return reports, [end for _, end in told]


@pytest.mark.system
def test_collectives_of_a_tpu(v6e):
  """No activation is moved, and gradients are reduce-scattered."""
  train, sample = v6e[0]["programs"]
  assert set(sample["collectives"]) == {"all-gather"}
  kinds = train["collectives"]
  # TPUs shift the odd rows of reduce-scatters that they have put together.
  shifted = kinds.pop("collective-permute", {"bytes": 0})["bytes"]
  assert shifted < 0.05 * kinds["reduce-scatter"]["bytes"]
  assert set(kinds) == {"all-gather", "all-reduce", "reduce-scatter"}
  sharded = 8 * train["arguments"]["params"]
  assert 0 < kinds["reduce-scatter"]["bytes"] <= sharded
  assert kinds["reduce-scatter"]["bytes"] > 0.8 * sharded
  assert kinds["all-gather"]["bytes"] <= 2 * sharded
  assert kinds["all-reduce"]["bytes"] < 0.5 * sharded


@pytest.mark.system
def test_sums_of_square_slices_are_told(others):
  """Where libtpu takes reduce-scatters apart, and a mesh where it doesn't."""
  (result, _), ends = others
  assert ends[0] == ""
  (report,) = result["programs"]
  assert report["fits"] and "reduce-scatter" not in report["collectives"]
  (line,) = report["advice"]
  assert line.startswith("mesh.data=2: ") and "all-reduced" in line
  whole = report["asked"]["reduce-scatter"]["bytes"]
  assert report["collectives"]["all-reduce"]["bytes"] > whole
  text = compile_check.describe(result, [compile_check.Report(**report)])
  assert re.search(
    r"reduce-scatter 0 x, 0 B \(the program asks for [\d.]+ [kM]B\)", text
  ), text


@pytest.mark.parametrize(
  ("cycles", "seconds"), [(1750, 1e-6), (2**63 - 1, None)]
)
def test_a_time_that_has_overflowed_is_none(cycles, seconds):
  report = compile_check.Report("train", True, 1.0, {}, flops=1e12)
  text = f"""HloModule m, is_scheduled=true

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  ROOT %y = f32[8] copy(%x), backend_config={{"estimated_cycles":"{cycles}"}}
}}
"""
  compile_check._read_program(report, text)
  assert report.estimated_seconds == seconds
  assert report.overflown == (seconds is None)
  has_time = any("seconds" in part for part in report.parts.values())
  assert has_time == (seconds is not None)


@pytest.mark.system
def test_what_does_not_fit_is_told(others):
  (_, report), ends = others
  assert ends[1] == "1"
  (train,) = report["programs"]
  assert train["fits"] is False
  assert train["peak"] > train["available"] == int(15.75 * 2**30)
  assert "emory" in train["message"]
  assert any("model.remat" in line for line in train["advice"])
  assert any("batch.generated" in line for line in train["advice"])


# The same generator with cuDNN's attention, on two hosts of four GPUs.
GPU = (
  *SMALL,
  "--config.model.dtype=bfloat16",
  "--config.model.attention_dtype=bfloat16",
)
GPU_MESH = "data=2,fsdp=4"
with_cuda = pytest.mark.skipif(
  not devices.installed("jax-cuda13-plugin", "jax-cuda12-plugin"),
  reason=f"no compiler for GPUs: {compile_check.install_line('cuda13')}",
)


def config_of(arguments):
  """The typed config of a command line of digits."""
  config = digits.get_config()
  for argument in arguments[1:]:
    key, _, text = argument.removeprefix("--config.").partition("=")
    value = int(text) if text.isdigit() else text
    config.update_from_flattened_dict({key: value})
  return compile_check.with_mesh(parse(config), GPU_MESH)


@pytest.mark.system
@with_cuda
def test_a_small_model_on_gpus(tmp_path):
  file = tmp_path / "report.json"
  text = run(
    *("-m", "drift_jax.tools.compile_check", *GPU, "--topology=h100:2x4"),
    *(f"--mesh={GPU_MESH}", "--programs=train", f"--json={file}"),
    f"--hlo={tmp_path}",
  )
  report = json.loads(file.read_text())
  assert report["device_kind"] == devices.CARDS["h100"].kind
  assert (report["devices"], report["mesh"]) == (8, {"data": 2, "fsdp": 4})
  (train,) = report["programs"]
  assert train["fits"] and train["available"] == int(0.75 * train["memory"])
  assert sum(train["arguments"].values()) < train["peak"]
  assert train["estimated_seconds"] is None  # No GPU was there to be timed.
  # What the same program takes and gives on CPU devices, which there are.
  (known,) = compile_check.check(config_of(GPU), jax.devices(), ["train"])
  assert train["arguments"] == known.arguments
  assert train["outputs"] == known.outputs
  assert train["flops"] == pytest.approx(known.flops, rel=0.01)
  assert 0.1 * known.bytes_accessed < train["bytes_accessed"]
  assert train["bytes_accessed"] < known.bytes_accessed
  # One attention forward in each block, one backward, none recomputed.
  depth = 3
  assert train["kernels"]["__cudnn$fmhaSoftmax"] == depth
  assert train["kernels"]["__cudnn$fmhaSoftmaxBackward"] == depth
  assert train["attention"] == "cuDNN's"
  assert {"all-gather", "reduce-scatter"} <= set(train["collectives"])
  sizes = [row["bytes"] for row in train["largest"]]
  assert sizes == sorted(sizes, reverse=True)
  assert 0 < sum(sizes) <= train["activations"]
  assert "train: fits" in text and "cuDNN" in text
  assert (tmp_path / "train_memory.txt").exists()


_EVERY_CARD = """
from drift_jax.system import devices
from drift_jax.tools import compile_check

compile_check.prepare_compilers()
for name, card in devices.CARDS.items():
  one, *others = compile_check.find_devices(f"{name}:2x4")
  assert len(others) == 7 and others[-1].process_index == 1
  assert one.device_kind == card.kind
  assert one.compute_capability == card.capability
  assert one.core_count == card.cores
print("all")
"""


@pytest.mark.system
@with_cuda
def test_the_compiler_knows_every_card():
  assert run("-c", _EVERY_CARD).split() == ["all"]


class _Measured(Exception):
  """Ends a run after its first step."""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "encoder"])
def test_a_run_holds_what_is_predicted(variant, tmp_path, monkeypatch):
  """Arguments and results of its step, to the byte, on one of 8 devices."""
  config = compile_check.with_mesh(
    parse(digits.get_config(variant)), "data=2,fsdp=4"
  )
  (report,) = compile_check.check(config, jax.devices(), ["train"])
  make, held = run_lib.make_training, []

  def size(tree):
    return sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
      if shard.device == jax.devices()[0]
    )

  def measured(*args):
    training = make(*args)

    def step(*arguments):
      held.append(size(arguments))  # before they are donated
      held.append(size(training.step(*arguments)))
      raise _Measured

    return dataclasses.replace(training, step=step)

  monkeypatch.setattr(run_lib, "make_training", measured)
  with pytest.raises(_Measured):
    tasks_lib.trainer(config.task).train_and_evaluate(config, str(tmp_path))
  assert held == [sum(report.arguments.values()), report.outputs]


@pytest.mark.parametrize(
  ("topology", "extra"), [("rtx4090", "cuda13"), ("v6e:4x4", "tpu")]
)
def test_a_missing_compiler_is_named(topology, extra, monkeypatch):
  version = devices.installed("jax")
  monkeypatch.setattr(
    *(devices, "installed"),
    lambda *packages: version if packages == ("jax",) else None,
  )
  with pytest.raises(config_lib.ConfigError) as error:
    compile_check.check_topology(topology)
  assert f"pip install 'jax[{extra}]=={version}'" in str(error.value)


def test_memory_that_jax_takes_of_a_gpu(monkeypatch):
  name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  monkeypatch.setenv(name, ".9")
  assert devices.memory_fraction() == 0.9
  for value in ("2", "0", "most", "nan"):
    monkeypatch.setenv(name, value)
    with pytest.raises(devices.DeviceError, match=f"{name}='{value}'"):
      devices.memory_fraction()


def test_the_largest_arrays_at_the_peak():
  """`early` is gone then; `copy` lies where `kept` does."""
  program = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %early = f32[64]{0} add(%p, %p), metadata={op_name="jit(f)/early"}
  %kept = f32[32]{0} add(%p, %p), metadata={op_name="jit(f)/block/kept"}
  %copy = f32[32]{0} bitcast(%kept), metadata={op_name="jit(f)/copy"}
  %pair = (f32[32]{0}, f32[40]{0}) fusion(%p), metadata={op_name="jit(f)/pair"}
  ROOT %out = f32[8]{0} add(%p, %p)
}
"""
  assignment = """BufferAssignment:
allocation 0: size 32, page 0, parameter 0, shape |f32[8]| at ShapeIndex {}:
 value: <1 p @0> (size=32,offset=0): f32[8]{0}
allocation 1: size 416, page 0, preallocated-temp:
 value: <2 early @0> (size=256,offset=128): f32[64]{0}
 value: <3 kept @0> (size=128,offset=0): f32[32]{0}
 value: <4 copy @0> (size=128,offset=0): f32[32]{0}
 value: <5 pair{0} @0> (size=128,offset=128): f32[32]{0}
 value: <6 pair{1} @0> (size=160,offset=256): f32[40]{0}
"""
  ranges = """HloLiveRange (max 6):
  BufferLiveRange:
    p{}:0-6
    early{}:1-2
    kept{}:2-5
    copy{}:3-5
    pair{0}:4-5
    pair{1}:4-5
"""
  rows = gpu_memory.largest(program, assignment, ranges)
  assert [(row["type"], row["bytes"], row["where"]) for row in rows] == [
    ("f32[40]", 160, "jit(f)/pair"),
    ("f32[32]", 128, "jit(f)/block/kept"),
    ("f32[32]", 128, "jit(f)/pair"),
  ]
  assert gpu_memory.largest(program, "", "") == []


def test_operations_that_gpus_start_early_are_fusions():
  program = """
%fused (q.0: f32[8,4], i.0: s32[]) -> f32[1,4] {{
  %q.0 = f32[8,4]{{1,0}} parameter(0)
  %i.0 = s32[] parameter(1)
  ROOT %part = f32[1,4]{{1,0}} dynamic-slice(%q.0, %i.0, %i.0)
}}

ENTRY %main (q: f32[8,4], i: s32[]) -> f32[1,4] {{
  %q = f32[8,4]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
{}
}}
"""
  early = (
    "  %s = ((f32[8,4]{1,0}, s32[]), f32[1,4]{1,0}, u32[]) "
    "fusion-start(%q, %i), kind=kLoop, calls=%fused\n"
    "  ROOT %d = f32[1,4]{1,0} fusion-done(%s)"
  )
  plain = "  ROOT %d = f32[1,4]{1,0} fusion(%q, %i), kind=kLoop, calls=%fused"
  moved = [hlo.analyse(program.format(x)).bytes for x in (early, plain)]
  assert moved[0] == moved[1] > 0


def test_elements_of_tuples_are_counted():
  """However they are written: JAX 0.12 does without get-tuple-element."""
  program = """
ENTRY %main (p.1: (f32[4], (f32[9], f32[8,2]))) -> f32[4] {{
  %p.1 = (f32[4]{{0}}, /*index=1*/(f32[9]{{0}}, f32[8,2]{{1,0}})) parameter(0)
{}
  ROOT %sum = (f32[4]{{0}}, f32[8,2]{{1,0}}) all-reduce({})
}}
"""
  elements = """  %a = f32[4]{0} get-tuple-element(%p.1), index=0
  %b = (f32[9]{0}, f32[8,2]{1,0}) get-tuple-element(%p.1), index=1
  %c = f32[8,2]{1,0} get-tuple-element(%b), index=1"""
  for parts in ((elements, "%a, %c"), ("", "%p.1#0, %p.1#1#1")):
    found = hlo.analyse(program.format(*parts))
    assert found.by_kind() == {"all-reduce": {"count": 1, "bytes": 80}}
    assert found.bytes == 160


def test_memory_falls_as_fsdp_grows():
  """State in parts; what every device has whole, and the batch, stay."""
  config = parse(digits.get_config())
  sizes = []
  for fsdp in (1, 2, 4, 8):
    config = compile_check.with_mesh(config, f"data=-1,fsdp={fsdp}")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    train, *_ = tasks_lib.programs(config, mesh)
    sizes.append(compile_check.argument_bytes(train.arguments))
  for key in ("params", "optimizer", "ema"):
    whole, *parts = (size[key] for size in sizes)
    for fsdp, part in zip((2, 4, 8), parts, strict=True):
      assert whole / fsdp <= part < 1.15 * whole / fsdp, (key, fsdp)
  assert len({size["batch"] for size in sizes}) == 1


@pytest.mark.slow
def test_the_devices_that_are_there(monkeypatch):
  """Nobody says how much memory a CPU has; libtpu can't write some programs,
  of which is told what is known without the text."""
  config = parse(digits.get_config())
  (report,) = compile_check.check(config, jax.devices(), ["sample"])
  assert report.fits is None and report.available is None
  assert report.peak >= sum(report.arguments.values())
  result = {"config": "c", "topology": "local", "devices": 8, "mesh": {}}
  result["device_kind"] = "cpu"
  assert "sample: compiled, " in compile_check.describe(result, [report])

  def fail(self):
    raise jax.errors.JaxRuntimeError("INTERNAL: no such operand")

  monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
  (report,) = compile_check.check(config, jax.devices(), ["sample"])
  assert "each loop once" in report.message
  assert report.flops > 0 and report.bytes_accessed > 0
  assert report.collectives == {}  # fsdp=1


@pytest.mark.system
def test_mistakes(others):
  _, ends = others
  for line, message in zip(ends[2:], _MISTAKES.values(), strict=True):
    assert line.startswith("Error: ") and re.search(message, line), line


def test_configs_that_can_not_be_compiled():
  config = cifar10.get_config()
  config.update_from_flattened_dict(
    {"model.num_classes": 10, "encoders.mae.path": "nowhere"}
  )
  message = r"encoders\.mae\.path='nowhere'.*model is"
  with pytest.raises(artifacts.ArtifactError, match=message):
    compile_check.check(parse(config), jax.devices())
  config = digits.get_config()
  config.batch.labels = 12
  with pytest.raises(config_lib.ConfigError, match=r"batch\.labels=12.*8"):
    compile_check.check(parse(config), jax.devices())


@pytest.mark.parametrize(
  ("config", "batch"),
  [
    (imagenet_latent.get_config("l2,smoke"), "batch.labels"),
    (mae_latent.get_config("256,smoke"), "mae.batch_size"),
  ],
)
def test_all_that_stands_in_the_way_is_told_at_once(config, batch):
  config.update_from_flattened_dict({batch: 12})
  with pytest.raises(config_lib.ConfigError) as error:
    compile_check.check(parse(config), jax.devices())
  for part in ("model.num_classes=0", f"{batch}=12", "vae.path="):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ("message", "size"),
  [
    ("the total memory required (32.93G) exceeds 31.24G.", 32.93 * 2**30),
    ("Ran out of memory. Used 512.00M of 16G hbm.", 512 * 2**20),
    ("something else", None),
  ],
)
def test_sizes_in_compilers_messages(message, size):
  assert compile_check.needed_bytes(message) == (size and int(size))


@pytest.mark.slow
def test_published_configs_are_described():
  """Their networks need not be there: all programs can be made.

  The largest of each kind; the others differ in sizes.
  """
  mesh = sharding.make_mesh(1, 8)
  decoded = ("imagenet_latent", "convnext")
  largest = ("imagenet_latent", "wflow_xl2")
  generators = (largest, ("imagenet_pixel", "l16"), decoded)
  for name, variant in generators:
    programs = tasks_lib.programs(get(name, variant), mesh)
    decode = ["decode"] if name == "imagenet_latent" else []
    assert [program.name for program in programs] == [
      *("train", "sample", *decode, "judge inception")
    ]
  # Those of the last one.
  assert programs[0].arguments["frozen"].keys() == {"convnext", "vae"}
  for name in ("mae_latent", "mae_pixel"):
    names = [p.name for p in tasks_lib.programs(get(name, "640"), mesh)]
    assert names == ["train", "evaluate"]
