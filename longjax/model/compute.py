"""How the network is computed: what changes speed and memory, not the maths."""

import contextlib
import dataclasses
import enum
from typing import Any, Literal

import jax
import jax.numpy as jnp

from longjax import types

# Names that `checkpoint_name` gives and remat policies refer to.
RESIDUAL = 'residual'
ATTENTION = 'attention'


class Remat(enum.StrEnum):
  """What the backward pass recomputes."""

  NONE = 'none'  # Nothing: every intermediate is kept.
  BLOCK = 'block'  # All but the residual stream between blocks.
  ATTENTION = 'attention'  # All but that and what attention returned.
  OFFLOAD = 'offload'  # As BLOCK, the residual stream waiting in host memory.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """How forward and backward passes are carried out.

  Attributes:
    attention: backend, see `attention.attention`; 'auto' takes the platform's.
    block_len: tokens of an attention block; 0 takes the platform's.
    context_parallel: how keys travel over the mesh axis `seq`: 'ring' passes
      them on, 'all_gather' collects them; 'auto' chooses by their size.
    dtype: of activations and of the weights they meet. Parameters, norms,
      softmax, router, and gradients of weights with their sums over tokens and
      devices are float32 whatever it is.
    remat: see `Remat`.
  """

  attention: Literal[
      'auto', 'reference', 'blockwise', 'tpu', 'gpu'] = 'auto'
  block_len: int = 0
  context_parallel: Literal['auto', 'ring', 'all_gather'] = 'auto'
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Remat = Remat.NONE

  def __post_init__(self):
    if self.block_len < 0:
      raise types.UserError(
          f'compute.block_len={self.block_len} must be >= 0.')

  @property
  def activation_dtype(self) -> Any:
    """The dtype as jax knows it."""
    return jnp.dtype(self.dtype)

  def matmul_precision(self) -> contextlib.AbstractContextManager[None]:
    """Inside, matrix products are as exact as `dtype` says.

    Accelerators multiply float32 in fewer bits unless told otherwise.
    """
    is_exact = self.dtype == 'float32'
    return jax.default_matmul_precision('highest' if is_exact else None)


def checkpointed(step: Any, remat: Remat) -> Any:
  """Wraps the function of one block, a scan's body, for the backward pass."""
  policies = jax.checkpoint_policies
  match remat:
    case Remat.NONE:
      return step
    case Remat.BLOCK:
      return jax.checkpoint(step)
    case Remat.ATTENTION:
      return jax.checkpoint(
          step, policy=policies.save_only_these_names(ATTENTION))
    case Remat.OFFLOAD:
      return jax.checkpoint(
          step,
          policy=policies.save_and_offload_only_these_names(
              names_which_can_be_saved=[],
              names_which_can_be_offloaded=[RESIDUAL],
              offload_src='device', offload_dst='pinned_host'))
