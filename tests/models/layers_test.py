import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models import layers
from tests.conftest import assert_close


def _normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


@pytest.mark.parametrize(
  ("attention", "tokens"),
  [
    (layers.attention, 5),
    (layers.attention_by_head, 5),
    (layers.attention_by_head, 40),
  ],
)
def test_attention_equals_a_float64_oracle(attention, tokens):
  query, key, value = (_normal(i, 2, tokens, 3, 4) for i in range(3))
  q, k, v = (x.astype(np.float64) for x in (query, key, value))
  expected = np.zeros(q.shape)
  for b, h in np.ndindex(2, 3):
    logits = q[b, :, h] @ k[b, :, h].T / 2
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    expected[b, :, h] = weights @ v[b, :, h]
  arrays = [jnp.asarray(x) for x in (query, key, value)]
  out = attention(*arrays, dtype=jnp.dtype("float32"))
  assert_close(out, expected, 1e-6)
  out = attention(*arrays, dtype=jnp.dtype("bfloat16"))
  assert out.dtype == jnp.bfloat16
  assert_close(out, expected, 1e-2)


@pytest.mark.parametrize(
  ("tokens", "dtype", "by_head"),
  [(5, "float32", False), (40, "float32", True), (40, "bfloat16", False)],
)
def test_one_head_after_the_other_where_it_is_faster(tokens, dtype, by_head):
  """As many products as heads, and the gradients of all at once."""
  arrays = [jnp.asarray(_normal(i, 2, tokens, 3, 4)) for i in range(4)]

  def gradients(attend):
    def loss(*arrays):
      out = attend(*arrays[:3], dtype=jnp.dtype(dtype))
      return jnp.sum(out.astype(jnp.float32) * arrays[3])

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

  both = [gradients(layers.attention), gradients(layers.attention_by_head)]
  for expected, actual in zip(*(f(*arrays) for f in both), strict=True):
    assert_close(actual, expected, 1e-6)
  one, each = (str(jax.make_jaxpr(f)(*arrays)).count("dot_gen") for f in both)
  assert each == one * (3 if by_head else 1)


def test_bfloat16_attention_keeps_logits_and_softmax_in_float32():
  # The products are 257 and 256, of which bfloat16 can hold only the second.
  query = jnp.array([[16.0, 1.0, 0.0, 0.0], [16.0, 1.0, 0.0, 0.0]])
  key = jnp.array([[16.0, 1.0, 0.0, 0.0], [16.0, 0.0, 0.0, 0.0]])
  value = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
  out = layers.attention(
    *(x[None, :, None] for x in (query, key, value)),
    dtype=jnp.dtype("bfloat16"),
  )
  expected = 1 / (1 + np.exp(-0.5))
  assert float(out[0, 0, 0, 0]) == pytest.approx(expected, rel=2**-8)


def test_rotary_turns_half_split_pairs_by_position():
  x = _normal(0, 1, 7, 2, 6)
  out = layers.apply_rotary(jnp.asarray(x))
  expected = np.zeros(x.shape)
  for t, h, i in np.ndindex(7, 2, 3):
    angle = t * 10_000.0 ** (-2 * i / 6)
    turn = np.exp(1j * angle) * (x[0, t, h, i] + 1j * x[0, t, h, i + 3])
    expected[0, t, h, i], expected[0, t, h, i + 3] = turn.real, turn.imag
  assert_close(out, expected, 1e-6)


@pytest.mark.parametrize(
  ("hidden_size", "width"), [(64, 192), (768, 2048), (1024, 2752), (48, 128)]
)
def test_swiglu_width_is_two_thirds_rounded_up_to_32(hidden_size, width):
  assert layers.swiglu_width(hidden_size, 4.0) == width


def test_position_table_is_sin_cos_of_column_and_row():
  side, channels = 3, 8
  init = layers.sincos_position_init(side)
  table = init(jax.random.key(0), (1, side * side, channels))
  for row, column in np.ndindex(side, side):
    expected = []
    for position in (column, row):
      angles = [position * 10_000.0 ** (-i / 2) for i in range(2)]
      expected += [np.sin(angles), np.cos(angles)]
    token = table[0, row * side + column]
    np.testing.assert_allclose(token, np.concatenate(expected), atol=1e-6)


def test_unpatchify_inverts_patchify_and_the_order_is_row_column_channel():
  x = jnp.asarray(_normal(0, 2, 4, 6, 3))
  folded = layers.patchify(x, 2)
  np.testing.assert_array_equal(
    folded[1, 1, 2], np.asarray(x)[1, 2:4, 4:6].reshape(-1)
  )
  np.testing.assert_array_equal(layers.unpatchify(folded, 2), x)
