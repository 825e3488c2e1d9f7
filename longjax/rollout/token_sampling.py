"""One token from logits: temperature, nucleus, log-probability, entropy.

Shapes: V vocabulary; leading dimensions are free.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sampled:
  """A chosen token.

  Attributes:
    token: i32[...].
    logprob: f32[...] nats, under the tempered distribution before nucleus
      truncation. The trainer does not renormalise over the nucleus, so
      anything else would bias the importance ratio by the nucleus mass.
    entropy: f32[...] nats, of the same distribution over all of V.
    entropy_t1: f32[...] nats, at temperature 1.
  """

  token: jax.Array
  logprob: jax.Array
  entropy: jax.Array
  entropy_t1: jax.Array


def sample(
    logits: jax.Array,  # f[..., V]
    keys: jax.Array,  # key[...]
    *,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    banned: jax.Array | None = None,  # bool[..., V]
) -> Sampled:
  """Draws one token for each leading index by the Gumbel-max rule.

  Each index has a key of its own, so what it draws depends on nothing else in
  the batch.

  Args:
    logits: unnormalised, any dtype; computed in float32.
    keys: typed PRNG keys.
    temperature: divides the logits; 0 picks the likeliest token, with
      log-probability and entropy reported at temperature 1.
    top_p: the smallest set of tokens holding at least this mass is eligible,
      and tokens exactly as likely as its last; 1 makes every token eligible.
    top_k: only the so many likeliest tokens are eligible, and those exactly as
      likely as the last of them; `top_p` is then of their mass. 0 means all.
    banned: tokens that are not eligible; None means there are none.

  Log-probability and entropy are those before anything was made ineligible.

  Returns:
    The tokens drawn.
  """
  vocab_size = logits.shape[-1]
  scaled = logits.astype(jnp.float32) / (temperature or 1.0)
  logprobs = jax.nn.log_softmax(scaled)
  entropy = _entropy(logprobs)
  entropy_t1 = entropy
  if temperature not in (0.0, 1.0):
    entropy_t1 = _entropy(jax.nn.log_softmax(logits.astype(jnp.float32)))
  eligible = logprobs
  if banned is not None:
    eligible = jax.nn.log_softmax(jnp.where(banned, -jnp.inf, eligible))
  if top_k:
    eligible = _likeliest(eligible, top_k)
  if top_p < 1.0:
    eligible = _nucleus(eligible, top_p)
  if temperature:
    draw = jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,)))
    noise = draw(keys.reshape(-1)).reshape(logits.shape)
    eligible = eligible + noise
  token = _argmax(eligible)
  logprob = jnp.take_along_axis(logprobs, token[..., None], axis=-1)[..., 0]
  return Sampled(
      token=token, logprob=logprob, entropy=entropy, entropy_t1=entropy_t1)


def _argmax(
    x: jax.Array,  # f32[..., V]
) -> jax.Array:  # i32[...]
  """`jnp.argmax`, which CPUs compute one number at a time, in two sweeps."""
  top = jnp.max(x, axis=-1, keepdims=True)
  ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
  return jnp.min(
      jnp.where(x == top, ids, x.shape[-1] - 1), axis=-1).astype(jnp.int32)


def _entropy(
    logprobs: jax.Array,  # f32[..., V]
) -> jax.Array:  # f32[...]
  return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _likeliest(
    logprobs: jax.Array,  # f32[..., V]
    top_k: int,
) -> jax.Array:  # f32[..., V]
  """Sets all but the `top_k` likeliest tokens to -inf; the others sum to 1."""
  lowest = jax.lax.top_k(logprobs, min(top_k, logprobs.shape[-1]))[0][..., -1:]
  return jax.nn.log_softmax(
      jnp.where(logprobs >= lowest, logprobs, -jnp.inf))


def _nucleus(
    logprobs: jax.Array,  # f32[..., V]
    top_p: float,
) -> jax.Array:  # f32[..., V]
  """Sets tokens outside the nucleus to -inf."""
  descending = -jnp.sort(-logprobs, axis=-1)
  mass_before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
  # The last token whose predecessors hold less than top_p closes the set.
  size = jnp.sum(mass_before < top_p, axis=-1, keepdims=True)
  threshold = jnp.take_along_axis(descending, size - 1, axis=-1)
  return jnp.where(logprobs >= threshold, logprobs, -jnp.inf)
