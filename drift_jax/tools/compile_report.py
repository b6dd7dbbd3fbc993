"""Reports of compile_check: figures of programs, and advice."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_Totals = dict[str, dict[str, int]]
# The part of a GPU's memory that JAX can take, beside CUDA's own.
_ALMOST_ALL = 0.95
_CUDNN = "__cudnn$fmha"


@dataclasses.dataclass
class Report:
  """Figures of one program for each device, in bytes.

  Attributes:
    program: 'train', 'sample', ...
    fits: whether it compiled within the memory; None if nothing says how much
      there is.
    seconds: to compile.
    arguments: {'params', 'optimizer', 'ema', 'frozen', 'batch', ...: size};
      'rest' of the state, too.
    outputs: all results; those that take the place of an argument, too. None
      if it did not compile.
    activations: everything temporary: activations, gathered parameters and
      gradients; None if it did not compile.
    code: the program itself; None if it did not compile.
    peak: of the memory in use; None if it did not compile, unless the
      compiler says what it would take.
    largest: of the temporary arrays when they take most, on GPUs; see
      gpu_memory.largest.
    available: memory of a device that JAX takes; None if unknown.
    memory: of which it is a part; None if unknown.
    flops: floating point operations of matrix products and convolutions.
    bytes_accessed: of the memory, as XLA counts them, but loops as often as
      they run; for GPUs, of which XLA counts none, by the shapes that
      operations take and give.
    estimated_seconds: the compiler's cycles at 1.75 GHz, without collectives;
      None if it gives none.
    overflown: whether it gives one that is no number of cycles.
    parts: {module: {'seconds', 'bytes'}}: the same two of each Flax module with
      its gradient, 'rest' of all else; bytes by the shapes that operations take
      and give, which is close to XLA's count, not equal; no seconds if the
      compiler gives none.
    kernels: {name: how often it runs} of libraries, Pallas and Triton.
    attention: whose attention runs, and why; '' but for generators on GPUs.
    collectives: {kind: {'count', 'bytes'}} of the compiled program.
    asked: the same of what the program asks for; compilers may choose others.
    advice: what to change, if it does not fit or sums more than it needs to.
    message: the compiler's, if it does not fit or can't be read.
  """

  program: str
  fits: bool | None
  seconds: float
  arguments: dict[str, int]
  outputs: int | None = None
  activations: int | None = None
  code: int | None = None
  peak: int | None = None
  largest: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  available: int | None = None
  memory: int | None = None
  flops: float | None = None
  bytes_accessed: float | None = None
  estimated_seconds: float | None = None
  overflown: bool = False
  parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  attention: str = ""
  collectives: _Totals = dataclasses.field(default_factory=dict)
  asked: _Totals = dataclasses.field(default_factory=dict)
  advice: list[str] = dataclasses.field(default_factory=list)
  message: str = ""


def advice(report: Report, config: Any, mesh: Any) -> list[str]:
  """Changes by which a program takes less memory, the cheapest first."""
  training = report.program == "train"
  encoders = getattr(config, "encoders", {})
  decodes = any(e.decode and e.in_loss for e in encoders.values())
  state = ("params", "optimizer", "ema")
  trained = sum(report.arguments.get(name, 0) for name in state)
  remat = True if config.task == "mae" else "full"
  stored = config.model.remat if training else remat
  if stored == "auto":
    from drift_jax.tasks.generator import setup

    stored = setup.remat_for("auto", mesh)
  recomputed = "in the backward pass instead of storing them"
  almost = _ALMOST_ALL * (report.memory or 0)
  choices = [
    (
      (report.available or 0) < (report.peak or math.inf) <= almost,
      f"XLA_PYTHON_CLIENT_MEM_FRACTION={_ALMOST_ALL} in the environment: JAX "
      f"takes {_gb(report.available or 0)} of the card's "
      f"{_gb(report.memory or 0)} now",
    ),
    (not training, "a smaller eval.batch_size"),
    (
      stored not in (True, "full"),
      f"model.remat={remat}: recomputes blocks {recomputed}",
    ),
    (
      training
      and getattr(config.model, "attention_dtype", "bfloat16") != "bfloat16",
      "model.attention_dtype=bfloat16: halves the stored attention (the "
      "published ablations use float32)",
    ),
    (
      training and decodes and not config.vae.remat,
      f"vae.remat=True: recomputes the decoder's blocks {recomputed}",
    ),
  ]
  for name, encoder in encoders.items():
    trains = training and encoder.in_loss and not encoder.remat
    whole = encoder.sharding == "replicated"
    choices += [
      (
        encoder.dtype == "float32",
        f"encoders.{name}.dtype=bfloat16: half of it",
      ),
      (trains, f"encoders.{name}.remat=True: recomputes it {recomputed}"),
      (whole, f"encoders.{name}.sharding=fsdp: keeps parts, gathers each step"),
    ]
  large = trained > 0.2 * (report.available or math.inf)
  choices.append(
    (large, f"a larger mesh.fsdp: the state takes {trained / 1e9:.1f} GB")
  )
  if training and config.task == "generator":
    labels = config.batch.labels
    from drift_jax.tasks.generator import setup

    at_once = setup.labels_at_once(config, mesh)
    text = (
      f"train.accum_labels={mesh.size}: so many of the {labels} labels at once"
    )
    choices.append((at_once > mesh.size, text))
    most = config.train.detached_at_once or config.batch.generated
    text = (
      f"train.detached_at_once={max(1, most // 4)}: so many reals and extra "
      "negatives of a label at once"
    )
    choices.append((config.batch.negatives > 0 and most > 1, text))
  batch = "batch.labels, batch.generated"
  batch = "mae.batch_size" if config.task == "mae" else batch
  choices.append((training, f"more devices, or a smaller batch ({batch})"))
  return [text for applies, text in choices if applies]


def attention(report: Report, config: Any) -> str:
  """Whose attention a generator's program runs on GPUs, and why."""
  if config.task != "generator" or report.program not in ("train", "sample"):
    return ""
  if any(name.startswith(_CUDNN) for name in report.kernels):
    return "cuDNN's"
  if config.train.kernels != "auto":
    return f"XLA's, as train.kernels={config.train.kernels}: 'auto' is cuDNN's"
  dtype = config.model.attention_dtype
  if dtype != "bfloat16":
    return f"XLA's, as model.attention_dtype={dtype}: cuDNN's takes bfloat16"
  return (
    "XLA's: cuDNN's takes an even number of tokens, and heads of 8, 16, ... "
    "128 channels"
  )


def whole_sums(report: Report) -> list[str]:
  """Gradients that the compiler sums whole though parts were asked for."""
  kind = "reduce-scatter"
  asked, given = (
    counts.get(kind, {"bytes": 0})["bytes"]
    for counts in (report.asked, report.collectives)
  )
  if asked - given <= 0.1 * asked:
    return []
  return [
    f"mesh.data=2: {_gb(asked - given)} of gradients are all-reduced, as libtpu"
    " does if fsdp is all of a square slice"
  ]


def describe(result: Mapping[str, Any], reports: Sequence[Report]) -> str:
  """The reports as text."""
  mesh = ", ".join(f"{name}={size}" for name, size in result["mesh"].items())
  lines = [
    f"{result['config']} on {result['topology']}: {result['devices']} x "
    f"{result['device_kind']}, mesh {mesh}. For each device:"
  ]
  for report in reports:
    verdict = {True: "fits", False: "DOES NOT FIT", None: "compiled"}
    of = "" if report.available is None else f" of {_gb(report.available)}"
    peak = "?" if report.peak is None else _gb(report.peak)
    lines += [
      "",
      f"{report.program}: {verdict[report.fits]}, {peak}{of} at the peak "
      f"(compiled in {report.seconds:.0f} s)",
    ]
    lines += [f"  {name:<12} {text}" for name, text in _rows(report)]
  return "\n".join(lines)


def _rows(report: Report) -> Iterator[tuple[str, str]]:
  """(what, figures) of a report's lines."""
  sizes = dict(report.arguments)
  if report.activations is not None:
    sizes["activations"] = report.activations
  yield "memory", ", ".join(f"{name} {_gb(n)}" for name, n in sizes.items())
  for row in report.largest:
    what = f"{row['count']} x {row['type']}, {_gb(row['bytes'])}"
    yield "largest", f"{what}: {row['where'].partition('/')[2] or 'no name'}"
  seconds = report.estimated_seconds
  if report.flops is not None and report.bytes_accessed is not None:
    accessed = _gb(report.bytes_accessed)
    work = f"{report.flops / 1e12:.4g} TFLOP, {accessed} accessed"
    if seconds is not None:
      work += f", about {seconds * 1e3:.3g} ms at 1.75 GHz"
    elif report.overflown:
      work += ", no time: the compiler's estimate has overflowed"
    yield "work", work
  shown = [
    f"{name} {part['seconds'] * 1e3:.3g} ms"
    for name, part in report.parts.items()
    if seconds and part["seconds"] > 0.01 * seconds
  ]
  if shown:
    yield "parts", ", ".join(shown)
  if report.attention:
    yield "attention", report.attention
  if report.kernels:
    counts = sorted(report.kernels.items())
    yield "kernels", ", ".join(f"{name} {count} x" for name, count in counts)
  for kind in sorted(report.collectives | report.asked):
    total = report.collectives.get(kind, {"count": 0, "bytes": 0})
    asked = report.asked.get(kind, {"bytes": 0})["bytes"]
    line = f"{total['count']} x, {_gb(total['bytes'])}"
    if abs(total["bytes"] - asked) > 0.1 * max(total["bytes"], asked):
      line += f" (the program asks for {_gb(asked)})"
    yield kind, line
  if report.message:
    yield "compiler", report.message
  for text in report.advice:
    yield "change", text


def _gb(size: float) -> str:
  for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
    if size >= 0.1 * unit:
      return f"{size / unit:.3g} {name}"
  return f"{size:.0f} B"
