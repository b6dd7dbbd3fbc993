"""What every config shares: `generator()` and `mae()` give full trees.

Each value here is a default of the project; configs override what differs.
Keys, types and valid ranges: drift_jax/config/.
"""

from ml_collections import ConfigDict


def _shared(task: str) -> ConfigDict:
  config = ConfigDict()
  config.task = task
  config.seed = 0
  # Exported weights that a new run begins with: a folder, or hf://NAME of the
  # authors' release. '': random ones.
  config.init_from = ""

  config.data = ConfigDict()
  # 'digits', 'tfds:NAME', 'folder:DIR', 'tar:FILE', 'hf://datasets/OWNER/NAME'
  # or 'latents:DIR'
  config.data.source = ""
  # Where relative DIR and FILE start, and where TFDS keeps its data sets; '':
  # the working directory, and TFDS_DATA_DIR or ~/tensorflow_datasets.
  config.data.data_dir = ""
  config.data.train_split = "train"
  config.data.test_split = "test"  # held-out images, for evaluation
  # Images of each class that are held out where there is no such split; below
  # 1 the share of each class.
  config.data.held_out = 0.0
  config.data.class_order = ""  # '': sorted names; 'imagenet': the standard one
  config.data.image_size = 256  # pixels
  config.data.channels = 3  # 1: grey
  config.data.crop = "center"  # ADM's; or 'random', 'pad', 'none'
  config.data.crop_scale = (0.2, 1.0)  # share of the area, for 'random'
  config.data.flip = True  # mirror half of the images
  # How images travel to the device: 'uint8' for pixels, 'bfloat16' or
  # 'float16' for latents; or 'float32'.
  config.data.wire = "uint8"
  config.data.in_memory = False  # decode once: for small sets
  config.data.decoder = "pillow"  # or 'simplejpeg', if it is installed
  config.data.exif = False  # turn images upright, as their cameras noted
  config.data.max_corrupt = 0  # unreadable images that are tolerated
  config.data.num_threads = 16  # reader threads
  config.data.num_workers = 0  # reader processes; 0: threads of this one
  config.data.prefetch = 2  # batches on the device ahead of the step

  config.vae = ConfigDict()  # the autoencoder behind latents
  # What tools.convert_weights wrote, or hf://OWNER/NAME of diffusers'. '': no
  # latents.
  config.vae.path = ""
  config.vae.dtype = "bfloat16"
  config.vae.sharding = "replicated"  # or "fsdp": see add_encoder
  # Recompute its blocks in the backward pass through it, where an encoder reads
  # decoded samples.
  config.vae.remat = True
  config.vae.model = ConfigDict()

  config.optim = ConfigDict()  # AdamW (Table 8)
  config.optim.schedule = "constant"  # after the warm-up; or 'cosine'
  config.optim.learning_rate = 2e-4
  config.optim.warmup_steps = 5_000
  config.optim.b1 = 0.9
  config.optim.b2 = 0.95
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.01
  config.optim.grad_clip = 2.0  # global norm
  # Peak for the kernels that Muon moves, of blocks or of all layers; 0: AdamW
  # moves all.
  config.optim.muon_learning_rate = 0.0
  config.optim.muon_kernels = "blocks"  # or 'all'

  config.ema = ConfigDict()
  config.ema.decays = (0.999,)  # one average for each

  config.train = ConfigDict()
  config.train.num_steps = 30_000
  config.train.log_every = 100  # steps
  # STEP:COUNT traces that many steps from that one on, for TensorBoard.
  config.train.profile = ""
  # Compiled programs stay on the disk for the next start: docs/one_gpu.md.
  config.train.keep_compiled = True

  # Where numbers and pictures go: also 'wandb', 'trackio' (docs/sharing.md).
  config.writers = ("jsonl", "tensorboard")

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 1_000  # steps
  config.checkpoint.keep_latest = 2
  config.checkpoint.keep_every = 0  # also keep multiples of this; 0: none
  config.checkpoint.best_metric = ""  # also keep the smallest, e.g. 'fd_pixel'
  config.checkpoint.on_corrupt = "error"  # or 'previous'

  config.mesh = ConfigDict()  # sizes of the device mesh; -1: all that are left
  config.mesh.data = -1
  config.mesh.fsdp = 1

  config.processes = ConfigDict()
  # Seconds after which a silent process counts as lost.
  config.processes.heartbeat_timeout = 100
  # Seconds to wait at the start until all are there: hosts restart in minutes.
  config.processes.join_timeout = 600
  return config


def drift() -> ConfigDict:
  """The paper's drifting field (A.6); the family: docs/fields.md."""
  config = ConfigDict()
  config.field = "softmax"  # 'mmd', 'kl', 'gaussian', 'sharp', 'sinkhorn'
  config.options = ConfigDict(
    {
      "mmd": {"kernel": "laplace"},  # or 'gaussian'
      "kl": {"kernel": "laplace"},
      "sharp": {"kernel": "laplace"},
      "sinkhorn": {"cost": "l2", "iterations": 20.0},  # or 'quadratic'
    }
  )
  config.temperatures = (0.02, 0.05, 0.2)  # of normalised distances
  config.temperature_scale = ConfigDict()
  config.temperature_scale.kind = "fixed"  # 'annealed', 'learned', 'adaptive'
  config.temperature_scale.rate = 0.0  # per step, of annealing or learning
  config.temperature_scale.neighbours = 0.0  # of 'adaptive': positives
  config.affinity_floor = 1e-6  # of 'softmax'
  config.normalization = "xy"  # of 'softmax', Table 11: 'xy', 'y', 'none'
  config.attraction = 1.0  # Table 1: a V+ - b V-
  config.repulsion = 1.0
  # What repels beside unconditional reals: the samples themselves ('own'),
  # even from themselves ('own_with_self'), or a second batch ('independent').
  config.negatives = "own"
  # Unconditional reals are more 'negatives' (A.7), or a 'velocity' (W-Flow).
  config.guidance = "negatives"
  # Whether the scale S counts the own batch beside an independent one (W-Flow).
  config.own_in_scale = False
  config.reduction = "sum"  # over features; or 'mean'
  config.normalize_features = True  # distances in units of their mean
  config.normalize_drift = True  # each temperature's drift by its RMS
  # Alignment of attraction and repulsion, mass on self, marginal errors.
  config.diagnostics = False
  return config


def generator() -> ConfigDict:
  """Defaults of task 'generator'; the model's sizes are left to the config."""
  config = _shared("generator")
  config.data.conditions = ""  # .npz of a condition of each image, if any

  # Of attention and drifting losses: 'pallas' on TPUs, 'xla' anywhere; 'auto'
  # takes the first that runs, and from NVIDIA's Ampere on cuDNN's attention.
  config.train.kernels = "auto"
  # Labels that are computed at once, over all devices; 0: all of batch.labels;
  # -1: all, or of large models on GPUs as many as fit (docs/scaling.md). Fewer
  # need less memory: their gradients are added up.
  config.train.accum_labels = -1
  # The field's scalars (A.6) of such a group: its own ('group'), or those of
  # the whole batch ('exact'), from two more passes without gradients.
  config.train.accum_scalars = "exact"
  # Of what has no gradient, reals and batch.negatives, so many samples of a
  # label at once; 0: all reals, and as many negatives as batch.generated.
  config.train.detached_at_once = 0

  config.model = ConfigDict()
  config.model.mlp_ratio = 4.0
  config.model.context_tokens = 16  # prepended in-context tokens
  config.model.style_vocab = 64  # entries of each style table
  config.model.style_tokens = 32  # random style indices per sample
  # Numbers of a condition other than the class, and of tokens how many; 0: as
  # data.conditions has them, or none without it.
  config.model.condition_size = 0
  config.model.condition_tokens = 0
  config.model.clip = False  # samples end at black and white: docs/recipes.md
  config.model.dtype = "float32"  # activations; parameters are float32
  config.model.attention_dtype = "float32"
  # What is recomputed in the backward pass: 'none', the inside of 'attention',
  # that of both 'branches' of a block, or blocks in 'full'. 'auto': 'full' on
  # GPUs, else 'attention'.
  config.model.remat = "none"

  # Frozen encoders, see add_encoder; those with in_loss=False only judge
  # (eval.metrics "fd_encoder").
  config.encoders = ConfigDict()

  config.features = ConfigDict()  # A.5
  config.features.sample = True  # the flattened sample itself
  config.features.tokens = False  # its grid, each place a problem of its own
  # Pixels by which each step at most moves what encoders see: docs/encoders.md.
  config.features.shift = 0
  config.features.every_k_block = 2  # output of every second block
  config.features.patch_mean_size = (2, 4)  # side of the pooled patches
  config.features.patch_std_size = (2, 4)
  config.features.use_mean = True  # global mean
  config.features.use_std = True  # global standard deviation

  config.drift = drift()

  # Tuning by Frechet distances in place of drifting: docs/fd_tune.md.
  config.fd_loss = ConfigDict()
  # Samples that the moments of what is generated stand for; 0: no tuning.
  config.fd_loss.population = 0
  config.fd_loss.reals = 0  # training images of the real moments; 0: all
  config.fd_loss.trust = 0.0  # weight of the distance from init_from's samples
  # Networks in the loss beside the encoders, exported by tools.convert_weights,
  # and statistics of real images in them; '': of the data's.
  config.fd_loss.inception = ConfigDict({"path": "", "reference": ""})
  config.fd_loss.dinov2 = ConfigDict({"path": "", "reference": ""})

  config.guidance = ConfigDict()  # p(alpha) ~ alpha^-exponent (A.7)
  config.guidance.minimum = 1.0
  config.guidance.maximum = 4.0
  config.guidance.exponent = 3.0
  config.guidance.no_cfg_frac = 0.0  # probability of alpha = 1

  config.batch = ConfigDict()
  # How positives are found: 'queue' (A.8), or 'class_grouped': by index; or
  # 'condition_grouped': those of data.conditions.
  config.batch.reals = "queue"
  config.batch.labels = 64  # N_c, over all devices
  config.batch.generated = 64  # N, for each label
  # More generated samples of each label that repel, without gradient.
  config.batch.negatives = 0
  config.batch.positives = 64  # N_pos, for each label
  config.batch.unconditional = 16  # N_unc, for each label

  config.queue = ConfigDict()  # A.8
  config.queue.class_size = 128  # samples
  config.queue.unconditional_size = 1_000
  config.queue.push_per_step = 64  # of each process
  # Samples pushed before the first step: about num_classes * class_size. A
  # class that has fewer than its positives by then repeats them at first.
  config.queue.prefill = 128_000
  # Whether the data (or class_size) may hold fewer of a class than
  # batch.positives, which then repeat for ever; False: that is an error.
  config.queue.with_replacement = False

  config.eval = ConfigDict()
  config.eval.every = 1_000  # steps; 0: never
  # Of each evaluation, as many of each class; 0: as many as are held out, or
  # as eval.labels lists.
  config.eval.num_samples = 50_000
  config.eval.labels = ""  # a file of class indices, .txt or .npy
  config.eval.label_order = "given"  # or 'class': class by class
  config.eval.pixels = "truncate"  # to 8 bits, for figures; or 'round'
  config.eval.batch_size = 256
  config.eval.alphas = (1.0,)
  config.eval.ema_decay = 0.999  # which average is evaluated
  config.eval.metrics = ("fd_pixel",)
  # Networks that judge, exported by tools.convert_weights, and statistics of
  # real images in their features, made by tools.reference_stats.
  config.eval.inception = ConfigDict()  # of 'fid', 'inception_score', ...
  config.eval.inception.path = ""
  config.eval.inception.reference = ""
  config.eval.dinov2 = ConfigDict()  # of 'fd_dinov2'
  config.eval.dinov2.path = ""
  config.eval.dinov2.reference = ""
  # An encoder's export whose features and head judge samples as they are: one
  # that no generator drifts in (configs/digits.py:classifier).
  config.eval.classifier = ConfigDict({"path": ""})
  config.eval.coverage_k = 5  # neighbours of density and coverage
  config.eval.grid_classes = 10  # rows of the sample grid
  config.eval.grid_per_class = 10  # its columns
  return config


def mae() -> ConfigDict:
  """Defaults of task 'mae'; the model's sizes are left to the config."""
  config = _shared("mae")

  config.model = ConfigDict()
  config.model.layers = (3, 4, 6, 3)  # blocks of each stage
  config.model.mask_patch_size = 2  # on the grid after input patching
  config.model.norm_groups = 32  # fewer where they do not divide the channels
  config.model.dtype = "float32"
  config.model.remat = False

  config.mae = ConfigDict()  # A.3
  config.mae.batch_size = 8_192
  config.mae.mask_ratio = 0.5  # 0: a classifier alone
  config.mae.classification_steps = 3_000  # last steps; 0: no fine-tune
  config.mae.classification_ramp = 1_000  # steps to the full weight
  config.mae.classification_weight = 0.1

  # What the generator that will drift in its features takes of the same data
  # (its config.batch, and eval.num_samples), checked when the encoder starts;
  # labels=0: not checked.
  config.generator = ConfigDict()
  config.generator.reals = "queue"
  config.generator.labels = 0
  config.generator.positives = 1
  config.generator.unconditional = 0
  config.generator.num_samples = 0

  config.optim.learning_rate = 4e-3
  config.optim.warmup_steps = 4_000
  config.ema.decays = (0.9995,)

  config.eval = ConfigDict()
  config.eval.every = 1_000  # steps; 0: never
  config.eval.batch_size = 256
  config.eval.ema_decay = 0.9995
  return config


def toy() -> ConfigDict:
  """Defaults of task 'toy' (5.1): the settings of Fig. 3 and 4."""
  config = _shared("toy")
  del config["init_from"], config["vae"]

  config.data = ConfigDict()
  config.data.distribution = "bimodal"  # see tasks.toy.data.draw_points
  config.data.noise = 0.1  # standard deviation of what is added
  config.data.prefetch = 2  # batches ahead of the step

  config.model = ConfigDict()
  # 'mlp', or 'particles': no network, x <- x + optim.learning_rate V.
  config.model.kind = "mlp"
  config.model.noise_size = 32
  config.model.width = 256  # of each hidden layer
  config.model.depth = 3  # hidden layers
  config.model.location = (0.0, 0.0)  # mean of the samples at first
  config.model.spread = 0.1  # their standard deviation then

  config.drift = drift()
  config.drift.update(
    normalize_features=False, normalize_drift=False, diagnostics=True
  )
  config.drift.temperatures = (0.05,)  # of raw distances
  config.drift.affinity_floor = 0.0

  config.batch = ConfigDict()
  # Independent problems of one step, each with what follows: a multiple of the
  # devices.
  config.batch.labels = 1
  config.batch.generated = 2_048
  config.batch.positives = 2_048

  config.optim.update(
    learning_rate=1e-3, warmup_steps=0, b2=0.999, weight_decay=0.0
  )
  config.ema.decays = (0.0,)  # 0: the parameters themselves

  config.train.update(num_steps=2_000, log_every=10)

  config.eval = ConfigDict()
  config.eval.every = 25  # steps; a frame of the animation each
  config.eval.num_samples = 4_096  # and as many points of data
  config.eval.ema_decay = 0.0  # which average is evaluated

  config.checkpoint.every = 500  # steps
  return config


def policy() -> ConfigDict:
  """Defaults of task 'policy' (5.3): Diffusion Policy's, of vectors."""
  config = _shared("policy")
  del config["init_from"], config["vae"]
  # Where it is rolled out: 'obstacle', 'fetch_reach', 'fetch_push',
  # 'fetch_pick_and_place', 'pusht'; '': nowhere.
  config.environment = ""

  config.data = ConfigDict()
  # 'expert': the environment's scripted one; or 'zarr:DIR', 'hdf5:FILE'
  config.data.source = ""
  config.data.episodes = 0  # the first ones; 0: all that there are
  config.data.seed = 0  # of the expert's
  config.data.observations = ("state",)  # 'state[:2]': its first two columns
  config.data.observation_horizon = 2  # steps
  config.data.prediction_horizon = 16  # steps, from the first observed one on
  config.data.executed = 8  # steps, from the last observed one on
  config.data.prefetch = 2  # batches ahead of the step

  config.model = ConfigDict()
  config.model.widths = (256, 512, 1024)  # of the U-Net's levels
  config.model.kernel_size = 5
  config.model.groups = 8  # of its normalisation
  config.model.time_size = 0  # of a diffusion time's embedding
  config.model.crop = 0  # side of the images' random crops; 0: none
  config.model.keypoints = 32  # of an image
  config.model.image_features = 64
  config.model.dtype = "float32"

  config.loss = ConfigDict()
  # 'drifting'; 'diffusion' and 'regression' are baselines.
  config.loss.method = "drifting"
  # What drifts: an observation's actions of each time 'step', the 'chunk' as
  # one vector; 'batch' pools all observations, and fails: docs/policies.md.
  config.loss.problem = "step"
  config.loss.diffusion_steps = 0  # of 'diffusion'

  config.drift = drift()

  config.batch = ConfigDict()
  config.batch.size = 256  # observations
  config.batch.generated = 8  # chunks of each

  config.optim.update(
    schedule="cosine",
    learning_rate=1e-4,
    warmup_steps=500,
    b2=0.999,
    weight_decay=1e-6,
  )
  config.optim.b1 = 0.95
  config.ema.decays = (0.9999,)

  config.eval = ConfigDict()
  config.eval.every = 5_000  # steps; 0: never
  config.eval.episodes = 50
  config.eval.seed = 100_000  # of the first episode
  config.eval.parallel = 50  # episodes at once
  config.eval.threads = 2  # that step them
  config.eval.samplers = ()  # of 'diffusion': 'ddpm:100', 'ddim:10'
  config.eval.ema_decay = 0.9999  # which average is evaluated
  config.eval.checkpoints = 10  # the last ones, that figures.json averages
  config.eval.videos = 4  # episodes in the GIF
  config.checkpoint.every = 5_000  # steps
  return config


def choose(
  variant: str, options: tuple[str, ...], switches: tuple[str, ...] = ("smoke",)
) -> tuple[str, *tuple[bool, ...]]:
  """'b2,smoke' -> ('b2', True); the first option where none is named.

  One truth value for each of the switches, which go with any option.
  """
  names = [name for name in variant.split(",") if name]
  for name in names:
    if name not in (*options, *switches):
      raise ValueError(
        f"variant {name!r}: valid options are {(*options, *switches)}"
      )
  chosen = [name for name in names if name not in switches] or [options[0]]
  if len(chosen) > 1:
    raise ValueError(f"variants {chosen} exclude each other")
  return chosen[0], *(name in names for name in switches)


# Of configs that read ImageNet: 'folder' is its layout as a folder.
SWITCHES = ("smoke", "folder")


def imagenet(config: ConfigDict, folder: bool) -> None:
  """Names ImageNet's images: those of TFDS, or train/ and val/ of WordNet ids.

  Both have the labels of the standard order.
  """
  config.data.update(source="tfds:imagenet2012", test_split="validation")
  if folder:
    config.data.update(
      source="folder:data/imagenet", test_split="val", class_order="imagenet"
    )


def add_encoder(
  config: ConfigDict,
  name: str,
  path: str,
  kind: str = "",
  model: ConfigDict | None = None,
) -> None:
  """Adds a frozen encoder to the loss, stored in bfloat16."""
  encoder = ConfigDict({"path": path, "dtype": "bfloat16", "in_loss": True})
  # Whether it reads what config.vae makes of latents, not the latents.
  encoder.decode = False
  # On every device, or in parts over the mesh's axis 'fsdp'.
  encoder.sharding = "replicated"
  encoder.remat = False  # recompute its blocks in the backward pass
  # Which model it is; empty: whatever is there.
  encoder.model = frozen_model(kind, model) if model else ConfigDict()
  config.encoders[name] = encoder


def frozen_model(kind: str, model: ConfigDict) -> ConfigDict:
  """What encoders.NAME.model and vae.model hold."""
  return ConfigDict({"kind": kind, **model})


def cpu_generator(config: ConfigDict) -> None:
  """A small generator of 32 x 32 pixels for two CPU cores.

  Muon learns in half the steps of AdamW alone (docs/recipes.md).
  """
  config.data.num_threads = 2
  config.model.update(
    patch_size=8,
    hidden_size=128,
    depth=4,
    num_heads=4,
    cond_dim=128,
    context_tokens=2,
    style_vocab=16,
    style_tokens=4,
    dtype="float32",
    attention_dtype="float32",
    remat="none",
  )
  config.encoders.mae.dtype = "float32"
  config.drift.temperatures = (0.05, 0.1, 0.2)
  config.batch.unconditional = 8
  config.optim.update(
    schedule="cosine",
    learning_rate=2e-3,
    warmup_steps=50,
    weight_decay=0.0,
    muon_learning_rate=0.02,
  )
  config.eval.alphas = (1.0,)


def cpu_encoder(config: ConfigDict) -> None:
  """A small ResNet-MAE of 32 x 32 pixels for two CPU cores.

  Patches of 4 x 4 pixels are folded into channels: wide convolutions of few
  places are what a CPU is good at.
  """
  config.data.num_threads = 2
  config.model.update(
    base_channels=64,
    layers=(1, 1, 1, 1),
    input_patch_size=4,
    norm_groups=8,
    dtype="float32",
  )
  config.optim.update(learning_rate=2e-3, warmup_steps=50)
  config.ema.decays = (0.99,)
  config.eval.ema_decay = 0.99


def by_style(config: ConfigDict, conditions: str) -> None:
  """Makes it of two numbers beside the class, as benchmarks/style.py writes."""
  config.data.conditions = conditions
  config.batch.update(
    reals="condition_grouped",
    labels=32,  # conditions
    generated=16,
    positives=16,  # the image itself and 15 of the nearest conditions
    unconditional=4,
  )


def fd_tune(config: ConfigDict, population: int, start: str) -> None:
  """Makes a generator's config one that tunes it: docs/fd_tune.md.

  By the encoders in the loss and, if features.sample, the samples themselves;
  the judge in the loop is another network, eval.classifier. Set fd_loss.trust.
  """
  config.init_from = start
  config.fd_loss.population = population
  config.features.shift = 0
  config.guidance.update(minimum=1.0, maximum=1.0, no_cfg_frac=0.0)
  config.batch.generated = 1  # each sample has a label of its own
  config.optim.update(
    schedule="cosine",
    warmup_steps=0,
    weight_decay=0.0,
    muon_learning_rate=0.0,
  )
  config.eval.alphas = (1.0,)
  config.eval.metrics = (
    *("fd_classifier", "coverage_classifier", "classifier_accuracy"),
    *(x for x in config.eval.metrics if x not in ("label_accuracy", "fid")),
  )
  config.checkpoint.best_metric = "fd_classifier"


def judge_by_fid(config: ConfigDict) -> None:
  """Evaluates a long run on ImageNet at 256 px as papers do.

  docs/imagenet.md says how the two files are made.
  """
  config.eval.update(every=5_000, metrics=("fid", "inception_score"))
  config.eval.inception.path = "weights/inception"
  config.eval.inception.reference = "weights/imagenet256_train.npz"
  config.checkpoint.update(every=5_000, best_metric="fid")


def for_generator(config: ConfigDict, generator: ConfigDict) -> None:
  """Tells an encoder's config which generator will read the same data."""
  needs = config.generator
  for key in needs:
    section = generator.eval if key == "num_samples" else generator.batch
    needs[key] = section[key]


def classifier(config: ConfigDict, steps: int) -> None:
  """Makes an encoder's config one of a classifier for two CPU cores.

  It sees whole images, and their labels from the first step on: a network that
  judges a generator (eval.classifier) and that no generator drifts in.
  """
  config.seed = 1  # another one than the encoder's
  config.model.update(
    base_channels=24, layers=(1, 2, 2, 1), norm_groups=4, dtype="float32"
  )
  config.mae.update(
    batch_size=128,
    mask_ratio=0.0,
    classification_steps=steps,
    classification_ramp=1,
    classification_weight=1.0,
  )
  config.optim.update(
    schedule="cosine", learning_rate=3e-3, warmup_steps=50, weight_decay=0.05
  )
  config.ema.decays = (0.99,)
  config.train.update(num_steps=steps, log_every=50)
  config.eval.update(every=steps // 4, batch_size=500, ema_decay=0.99)
  config.checkpoint.every = steps // 4


def smoke_generator(config: ConfigDict) -> None:
  """The same code path with a tiny network, in a minute, on a few images."""
  config.data.num_threads = 2
  config.model.update(
    hidden_size=32,
    cond_dim=32,
    depth=2,
    num_heads=2,
    num_classes=0,  # of whatever images there are
    dtype="float32",
  )
  config.batch.update(labels=4, generated=4, positives=4, unconditional=2)
  config.queue.update(
    class_size=8,
    unconditional_size=16,
    push_per_step=4,
    prefill=16,
    with_replacement=True,  # a class may have one image only
  )
  config.features.update(patch_mean_size=(2,), patch_std_size=(2,))
  for frozen in (config.vae, *config.encoders.values()):
    frozen.model = ConfigDict()
  config.optim.warmup_steps = 1
  config.train.update(num_steps=2, log_every=1)
  # No figures: they want more images. The sample grid is drawn.
  config.eval.update(
    every=1,
    num_samples=0,
    batch_size=4,
    metrics=(),
    grid_classes=2,
    grid_per_class=2,
  )
  config.checkpoint.update(every=1, best_metric="")
  config.mesh.update(data=-1, fsdp=1)


def smoke_mae(config: ConfigDict) -> None:
  """The same code path with a tiny network, in a minute, on a few images."""
  config.data.num_threads = 2
  config.model.update(
    base_channels=4,
    layers=(1, 1, 1, 1),
    norm_groups=4,
    num_classes=0,
    dtype="float32",
  )
  config.vae.model = ConfigDict()
  config.mae.update(batch_size=8, classification_ramp=1)
  if config.mae.classification_steps:
    config.mae.classification_steps = 1
  config.optim.warmup_steps = 1
  config.train.update(num_steps=2, log_every=1)
  config.eval.update(every=2, batch_size=8)
  config.checkpoint.every = 1
  config.mesh.update(data=-1, fsdp=1)
