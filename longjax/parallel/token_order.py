"""Which device of the mesh axis `seq` holds which tokens of a row.

Late tokens see more keys than early ones, and the tokens of a short packed
sequence fewer than those of a long one, so a row cut into N contiguous parts
leaves most devices waiting for one. Instead a row is cut into many blocks,
which are dealt out by the number of key blocks each will visit: the heaviest N
one to each device, the next N again one to each, the heaviest of them to the
device with the least so far, and so on. On a causal row that is dealing back
and forth:

  N = 4:  block   0 1 2 3 4 5 6 7
          device  0 1 2 3 3 2 1 0

Any order is allowed because every token carries its group, branch and position
(`rows`); every device gets equally many tokens.

B rows, T positions, N devices along `seq`, C tokens a block, X = T / C blocks.
"""

import jax
import jax.numpy as jnp

from longjax import types

_BLOCKS_PER_DEVICE = 8

# A device with this many tokens or more needs them in blocks of this length.
_MANY_TOKENS, _LEAST_BLOCK_LEN = 1024, 128


def block_len(length: int, num_devices: int, *, max_len: int) -> int:
  """C: the largest power of two that gives every device enough blocks.

  Args:
    length: T, a multiple of `num_devices`.
    num_devices: N.
    max_len: of attention's blocks; a longer one would only balance worse.
      Rounded down to a power of two.

  Returns:
    A power of two that divides T / N; a device gets 8 blocks or more if it
    has 8 tokens.
  """
  per_device = length // num_devices
  divides = per_device & -per_device
  return min(divides, _power_of_two(max_len),
             _power_of_two(max(per_device // _BLOCKS_PER_DEVICE, 1)))


def check_len(field: str, length: int, num_devices: int) -> None:
  """Refuses rows whose tokens cannot be dealt out well.

  Args:
    field: of the config, for the message.
    length: T.
    num_devices: N.

  Raises:
    UserError: T is not a multiple of N, or a device's tokens are many and not
      whole blocks.
  """
  multiple = num_devices
  if num_devices > 1 and length >= num_devices * _MANY_TOKENS:
    # Else blocks are so short that there are millions of pairs of them.
    multiple *= _LEAST_BLOCK_LEN
  if length % multiple:
    raise types.UserError(
        f'{field}={length} cannot be split over mesh.seq={num_devices}; use a '
        f'multiple of {multiple}, or a smaller mesh.seq.')


def _power_of_two(number: int) -> int:
  """The largest up to `number`."""
  return 1 << (number.bit_length() - 1)


def deal(
    work: jax.Array,  # i32[B, X]
    num_devices: int,
) -> jax.Array:  # i32[B, X]
  """Order of blocks whose N contiguous parts have equal work.

  Args:
    work: of each block.
    num_devices: N; divides X.

  Returns:
    Block i of the new order is block `order[i]` of the old. A device's blocks
    stand in their old order.
  """

  def one_row(work):  # i32[X]
    rounds = jnp.argsort(-work, stable=True).reshape(-1, num_devices)

    def play(loads, blocks):
      device = jnp.argsort(loads, stable=True)  # Least loaded first.
      place = jnp.argsort(device)
      dealt = blocks[place]
      return loads + work[dealt], dealt

    _, dealt = jax.lax.scan(
        play, jnp.zeros(num_devices, work.dtype), rounds)
    return jnp.sort(dealt, axis=0).T.reshape(-1)

  return jax.vmap(one_row)(work)


@jax.custom_vjp
def reorder(
    x: jax.Array,  # [B, T, ...]
    order: jax.Array,  # i32[B, X]
) -> jax.Array:  # [B, T, ...]
  """Puts blocks of T / X tokens into a new order."""
  blocks = x.reshape(*order.shape, -1, *x.shape[2:])
  index = order.reshape(*order.shape, *(1,) * (blocks.ndim - 2))
  return jnp.take_along_axis(blocks, index, axis=1).reshape(x.shape)


def inverse(order: jax.Array) -> jax.Array:  # i32[B, X] -> i32[B, X]
  """The order that undoes another."""
  return jnp.argsort(order, axis=1)


# A gather's own gradient would be a scatter, which is slow on TPUs.
reorder.defvjp(
    lambda x, order: (reorder(x, order), order),
    lambda order, d_out: (reorder(d_out, inverse(order)), None))
