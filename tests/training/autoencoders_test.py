"""Which autoencoder belongs to a generator; released_test.py downloads it."""

import pytest

from drift_jax.system import sharding
from drift_jax.tasks.generator.restore import open_artifact
from drift_jax.training import artifacts, autoencoders, released
from drift_jax.training.artifacts import ArtifactError, Described
from tests.autoencoders import save_vae
from tests.released_hub import GENERATOR, PIXELS
from tests.small_generator import save_generator


@pytest.mark.parametrize(
  ("metadata", "expected"),
  [
    ({"artifact_type": "ema_model"}, released.AUTOENCODER),
    ({"artifact_type": "ema_model", "vae": "hf://a/b"}, "hf://a/b"),
    (
      {"artifact_type": "ema_model", "model_config": GENERATOR | PIXELS},
      "",
    ),
    ({"format": "flax.msgpack"}, ""),
    ({"format": "safetensors", "vae": "hf://a/b"}, "hf://a/b"),
  ],
)
def test_it_is_the_named_one_or_the_release_s(metadata, expected):
  described = Described("gen", {"model_config": GENERATOR} | metadata)
  assert autoencoders.belonging_to("here", described) == expected


def test_a_name_that_is_none():
  described = Described("gen", {"model_config": GENERATOR, "vae": 3})
  with pytest.raises(ArtifactError, match="here: .*vae=3, want hf://OWNER"):
    autoencoders.belonging_to("here", described)


@pytest.mark.slow
def test_metadata_name_it(tmp_path):
  vae = str(save_vae(tmp_path / "vae"))
  for channels, message in ((2, None), (4, "of 2 channels, but .* have 4")):
    source = save_generator(
      tmp_path / str(channels),
      in_channels=channels,
      out_channels=channels,
      facts={"vae": vae},
    )
    mesh = sharding.make_mesh()
    if message:
      with pytest.raises(ArtifactError, match=message):
        open_artifact(source, "", mesh, decoded=True)
      continue
    opened = open_artifact(source, "", mesh, decoded=True)
    assert opened.vae is not None and opened.provenance["vae"] == vae
    assert opened.vae.sha256 == artifacts.load(vae).sha256
