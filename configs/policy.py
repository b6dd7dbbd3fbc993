"""Drifting Policy: robot control in one evaluation (5.3, Table 7).

  python -m drift_jax.main --config=configs/policy.py:obstacle \\
    --workdir=runs/obstacle

Without more than this package, on two CPU cores: `obstacle`, a point with two
ways round a disc. With the simulators (pip install -r requirements-robots.txt),
demonstrations by a scripted expert: `reach`, `push`, `pick_and_place`
(gymnasium-robotics' Fetch arm). The workdir then holds figures.json, the mean
of the last ten evaluations, and videos/*.gif. Diffusion Policy's data sets, see
docs/policies.md for how to get them: `pusht`, `pusht_image` (rolled out in
gym-pusht), `lift`, `can`, `tool_hang` (robomimic; trained, not rolled out).

Variants, joined by commas, e.g. `configs/policy.py:push,diffusion`; one of the
tasks above, at most one method,
  drifting    one evaluation (the default)
  diffusion   the same network by DDPM: 100 evaluations, and DDIM: 10
  regression  the same network by the mean squared error
and any of
  chunk           the drifting loss of a whole chunk as one vector
  batch_marginal  of all observations pooled: a negative result
  learned         with a learned temperature
  smoke           the same code path in seconds
"""

from ml_collections import ConfigDict

from configs import common

# The environment, and steps that learn it.
SMALL = {
  "obstacle": ("obstacle", 2_000),
  "reach": ("fetch_reach", 2_000),
  "push": ("fetch_push", 4_000),
  "pick_and_place": ("fetch_pick_and_place", 4_000),
}
PUSHT = {"pusht": ("state",), "pusht_image": ("img", "state[:2]")}
# Steps are what the published epochs come to.
ROBOMIMIC = ("lift", "can", "tool_hang")
TASKS = (*SMALL, *PUSHT, *ROBOMIMIC)
METHODS = ("drifting", "diffusion", "regression")
OPTIONS = ("chunk", "batch_marginal", "learned", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  names = [name for name in variant.split(",") if name]
  valid = (*TASKS, *METHODS, *OPTIONS)
  for name in names:
    if name not in valid:
      raise ValueError(f"variant {name!r}: valid options are {valid}")

  def chosen(options: tuple[str, ...]) -> str:
    found = [name for name in names if name in options]
    if len(found) > 1:
      raise ValueError(f"variants {found} exclude each other")
    return found[0] if found else options[0]

  config = common.policy()
  task, method = chosen(TASKS), chosen(METHODS)
  if task in SMALL:
    _small(config, *SMALL[task])
  elif task in PUSHT:
    _pusht(config, PUSHT[task])
  else:
    _robomimic(config, task)
  _method(config, method, small=task in SMALL)
  chosen(("step", "chunk", "batch_marginal"))  # exclude each other
  drifts = [n for n in names if n in ("chunk", "batch_marginal", "learned")]
  if drifts and method != "drifting":
    raise ValueError(f"variants {drifts} are of 'drifting', not of {method!r}")
  if "chunk" in names:
    config.loss.problem = "chunk"
  if "batch_marginal" in names:
    config.loss.problem = "batch"
  if "learned" in names:
    config.drift.temperatures = (0.2,)
    config.drift.temperature_scale.update(kind="learned", rate=1e-3)
  if "smoke" in names:
    _smoke(config)
  return config


def _small(config: ConfigDict, environment: str, num_steps: int) -> None:
  """A task that two CPU cores learn in minutes, of the expert's episodes."""
  config.environment = environment
  config.data.update(source="expert", episodes=200)
  config.model.widths = (32, 64)
  config.batch.size = 32
  config.optim.update(learning_rate=1e-3, warmup_steps=100)
  config.ema.decays = (0.99,)
  config.train.num_steps = num_steps
  every = num_steps // 20
  config.eval.update(every=every, episodes=100, parallel=100, ema_decay=0.99)
  config.checkpoint.every = every


def _pusht(config: ConfigDict, observations: tuple[str, ...]) -> None:
  config.environment = "pusht"
  config.data.source = "zarr:data/pusht/pusht_cchi_v7_replay.zarr"
  config.data.episodes = 90  # of 206
  config.data.observations = observations
  config.optim.grad_clip = 1e9  # none, as published
  config.train.num_steps = 220_000  # 5000 epochs
  if "img" in observations:
    config.model.update(widths=(512, 1024, 2048), crop=84)
    config.batch.size = 64
    config.train.num_steps = 540_000  # 3050 epochs
  config.train.log_every = 500


def _robomimic(config: ConfigDict, task: str) -> None:
  config.data.source = f"hdf5:data/robomimic/datasets/{task}/ph/low_dim.hdf5"
  config.data.observations = (
    "object",
    "robot0_eef_pos",
    "robot0_eef_quat",
    "robot0_gripper_qpos",
  )
  config.optim.grad_clip = 1e9  # none, as published
  config.train.update(num_steps=500_000, log_every=500)
  config.eval.update(every=0, videos=0)


def _method(config: ConfigDict, method: str, *, small: bool) -> None:
  """Drifting, or a baseline."""
  config.loss.method = method
  if method == "regression":
    config.batch.generated = 1
  if method == "diffusion":
    config.loss.diffusion_steps = 100
    config.model.time_size = 64 if small else 256
    config.eval.samplers = ("ddpm:100", "ddim:10")
    if not small:  # small: as many chunks a step as drifting has
      config.batch.generated = 1


def _smoke(config: ConfigDict) -> None:
  config.model.update(widths=(8,), groups=4, keypoints=4, image_features=8)
  if config.data.source == "expert":
    config.data.episodes = 3
  if config.loss.method == "diffusion":
    config.loss.diffusion_steps = 10
    config.model.time_size = 8
    config.eval.samplers = ("ddpm:10", "ddim:5")
  config.batch.size = 8
  config.optim.warmup_steps = 1
  config.train.update(num_steps=4, log_every=1)
  if config.eval.every:
    config.eval.update(every=2, episodes=3, parallel=2, videos=2)
  config.checkpoint.every = 2
