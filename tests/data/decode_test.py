"""Decoding: modes to RGB, formats by content, damage."""

import importlib.util
import io

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from drift_jax.data import decode

HAS_SIMPLEJPEG = importlib.util.find_spec("simplejpeg") is not None


def encode(image: Image.Image, kind: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def noise(mode: str = "RGB", size=(23, 17)) -> Image.Image:
  rng = np.random.default_rng(0)
  channels = len(Image.new(mode, (1, 1)).getbands())
  pixels = rng.integers(0, 256, (size[1], size[0], channels), np.uint8)
  return Image.fromarray(pixels.squeeze(), mode=None).convert(mode)


def test_what_is_lossless_comes_back():
  """Of WebP the first frame."""
  image, grey = noise(), noise("L")
  others = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
  animated = {"lossless": True, "save_all": True, "append_images": others}
  for data in (encode(image, "PNG"), encode(image, "WEBP", **animated)):
    pixels = decode.decode(data, "pillow")
    assert pixels.dtype == np.uint8
    assert_array_equal(pixels, np.asarray(image))
    assert_array_equal(decode.decode_image(data, "pillow"), pixels)
  pixels = decode.decode(encode(grey, "PNG"), "pillow")
  assert_array_equal(pixels, np.asarray(grey.convert("RGB")))


def test_exif_orientation_is_not_applied_to_grey():
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  pixels = decode.decode(encode(noise("L"), "JPEG", exif=exif), "pillow")
  assert pixels.shape == (17, 23, 3) and (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(orientation):
  """All eight, in which 0 and 9 mean nothing; by EXIF and by XMP."""
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  xmp = f'<x xmlns:tiff="t" tiff:Orientation="{orientation}"/>'.encode()
  for data in (
    encode(noise(), "JPEG", exif=exif),
    encode(noise("L"), "JPEG", exif=exif),
    encode(noise(), "JPEG", xmp=xmp),
    encode(noise(), "PNG", exif=exif),
    encode(noise(), "WEBP", exif=exif, lossless=True),
  ):
    stored = Image.open(io.BytesIO(data))
    want = ImageOps.exif_transpose(stored).convert("RGB")
    assert want.size == ((17, 23) if orientation in range(5, 9) else (23, 17))
    for decoder in ("pillow", "simplejpeg")[: 1 + HAS_SIMPLEJPEG]:
      image = decode.decode_image(data, decoder, exif=True)
      assert_array_equal(np.asarray(image), np.asarray(want))
      plain = decode.decode_image(data, decoder)
      assert_array_equal(np.asarray(plain), decode.decode(data, decoder))
      assert plain.size == (23, 17)


def test_alpha_is_dropped_not_composited():
  for mode, colour, want in [
    ("RGBA", (200, 100, 50, 0), (200, 100, 50)),
    ("LA", (70, 0), (70, 70, 70)),
  ]:
    data = encode(Image.new(mode, (4, 4), colour), "PNG")
    assert (decode.decode(data, "pillow") == want).all()


def test_palette_with_transparency_gives_its_colours_without_a_warning():
  image = Image.new("P", (6, 2))
  image.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
  image.putdata([0, 1, 2] * 4)
  data = encode(image, "PNG", transparency=bytes([0, 128, 255]))
  want = np.array([[10, 20, 30], [200, 100, 50], [7, 8, 9]] * 2)
  assert (decode.decode(data, "pillow") == want).all()


def test_16_bit_keeps_the_high_byte():
  values = (np.arange(256, dtype=np.uint16) * 256 + 255).reshape(16, 16)
  pixels = decode.decode(encode(Image.fromarray(values), "PNG"), "pillow")
  assert_array_equal(pixels[..., 1], values >> 8)


def test_cmyk_of_adobe_is_inverted():
  """Pillow writes CMYK JPEGs inverted and marked, as Photoshop does."""
  data = encode(Image.new("CMYK", (16, 16), (10, 20, 30, 40)), "JPEG")
  assert b"Adobe" in data
  want = [(255 - c) * (255 - 40) / 255 for c in (10, 20, 30)]
  for decoder in ["pillow", "simplejpeg"][: 1 + HAS_SIMPLEJPEG]:
    assert np.abs(decode.decode(data, decoder) - np.array(want)).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.7])
def test_truncated_files_raise(kind, keep):
  data = encode(noise(size=(64, 64)), kind)
  decode.decode(data, "pillow")
  for decoder in ["pillow", "simplejpeg"][: 1 + HAS_SIMPLEJPEG]:
    with pytest.raises(decode.DecodeError):
      decode.decode(data[: int(keep * len(data))], decoder)
  with pytest.raises(decode.DecodeError, match="not a JPEG, PNG, WEBP image"):
    decode.decode(encode(noise(), "GIF"), "pillow")


def test_damaged_bytes_raise_nothing_else():
  """2000 files with a few wrong bytes: an image or a DecodeError."""
  rng = np.random.default_rng(0)
  files = [
    encode(noise(m), k)
    for m, k in [("RGB", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("RGB", "WEBP")]
  ]
  outcomes = []
  for trial in range(2000):
    data = bytearray(files[trial % len(files)])
    for _ in range(3):
      # Not the size in a header: a huge image is Pillow's own warning.
      data[rng.integers(30, len(data))] = rng.integers(256)
    try:
      decode.decode(bytes(data), "pillow")
      outcomes.append(True)
    except decode.DecodeError:
      outcomes.append(False)
  assert 0.05 < np.mean(outcomes) < 0.95


def big_png(size: int) -> bytes:
  """A PNG with a workflow of so many bytes, as text of each kind, and an ICC
  profile of that size."""
  texts = PngImagePlugin.PngInfo()
  for kind, zipped in (("workflow", False), ("prompt", True)):
    texts.add_text(kind, "x" * size, zip=zipped)
    texts.add_itxt(f"i{kind}", "x" * size, zip=zipped)
  return encode(noise(), "PNG", pnginfo=texts, icc_profile=b"x" * size)


def test_what_else_is_in_a_png_is_no_damage():
  pixels = decode.decode(big_png(2 * 2**20), "pillow")
  assert_array_equal(pixels, np.asarray(noise()))


def test_limits_are_named_as_limits(monkeypatch):
  data = big_png(1000)
  monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 999)
  with pytest.raises(decode.LimitError, match="larger than .*-strip"):
    decode.decode(data, "pillow")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  with pytest.raises(decode.LimitError, match="at most 200 pixels.*-resize"):
    decode.decode(encode(noise(), "JPEG"), "pillow")


@pytest.mark.skipif(not HAS_SIMPLEJPEG, reason="simplejpeg not installed")
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_simplejpeg_gives_the_same_pixels(subsampling):
  for image in (noise(size=(131, 77)), noise("L", (131, 77))):
    options = {} if image.mode == "L" else {"subsampling": subsampling}
    data = encode(image, "JPEG", progressive=subsampling == 1, **options)
    want = decode.decode(data, "pillow")
    assert_array_equal(decode.decode(data, "simplejpeg"), want)
    assert_array_equal(
      np.asarray(decode.decode_image(data, "simplejpeg")), want
    )
  png = encode(noise(), "PNG")
  assert_array_equal(
    decode.decode(png, "simplejpeg"), decode.decode(png, "pillow")
  )
