"""The shape of a decoder of the Qwen family."""

import dataclasses
import math

import numpy as np

from longjax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """A mixture of experts in place of the MLP of every layer.

  Attributes:
    num_experts: E.
    num_active: A, experts each token is sent to.
    normalize_weights: the A chosen router probabilities are divided by their
      sum.
  """

  num_experts: int
  num_active: int
  normalize_weights: bool = True

  def __post_init__(self):
    if not 1 <= self.num_active <= self.num_experts:
      raise types.UserError(
          f'model.moe.num_active={self.num_active} must lie between 1 and '
          f'num_experts={self.num_experts}.')

  @property
  def id_dtype(self) -> np.dtype:
    """The smallest integers that hold an expert's number."""
    return np.min_scalar_type(self.num_experts - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
  """Rotary frequencies stretched beyond the trained length.

  YaRN (arXiv:2309.00071), Secs. 3.2 to 3.4.

  Attributes:
    factor: s, target length over trained length.
    original_len: positions the model was trained on.
    beta_fast: pairs that turn more often than this over `original_len` keep
      their frequency.
    beta_slow: pairs that turn less often are divided by `factor`.
    attention_factor: multiplies queries and keys; None means 0.1 ln(s) + 1.
    truncate: the borders between the pairs are rounded outward to whole ones.
  """

  factor: float
  original_len: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    if not self.factor >= 1.0:
      raise types.UserError(
          f'model.yarn.factor={self.factor} must be >= 1.')
    if self.original_len < 1:
      raise types.UserError(
          f'model.yarn.original_len={self.original_len} must be >= 1.')
    if not self.beta_fast > self.beta_slow > 0.0:
      raise types.UserError(
          f'model.yarn.beta_fast={self.beta_fast} must be greater than '
          f'beta_slow={self.beta_slow}, and both positive.')

  @property
  def scale(self) -> float:
    """What queries and keys are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and constants of the network.

  Attributes:
    vocab_size: V, rows of the embedding table.
    embed_dim: D, width of the residual stream.
    ffn_dim: F, hidden width of the gated MLP, or of each expert.
    num_layers: L.
    num_heads: N, query heads.
    num_kv_heads: K, key/value heads; divides N.
    head_dim: H; N * H need not equal D.
    rope_theta: base of the rotary frequencies.
    norm_epsilon: added to mean squares before the root.
    tied_embeddings: the output head is the transposed embedding table.
    qk_norm: queries and keys are RMS-normalised (Qwen3).
    qkv_bias: queries, keys and values have biases (Qwen2).
    moe: None means one dense MLP a layer.
    yarn: None means unscaled rotary frequencies.
  """

  vocab_size: int
  embed_dim: int
  ffn_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 1e6
  norm_epsilon: float = 1e-6
  tied_embeddings: bool = False
  qk_norm: bool = True
  qkv_bias: bool = False
  moe: MoeConfig | None = None
  yarn: YarnConfig | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.type is int and getattr(self, field.name) < 1:
        raise types.UserError(
            f'model.{field.name}={getattr(self, field.name)} must be >= 1.')
    for name in ('rope_theta', 'norm_epsilon'):
      if not getattr(self, name) > 0.0:
        raise types.UserError(
            f'model.{name}={getattr(self, name)} must be positive.')
    if self.num_heads % self.num_kv_heads:
      raise types.UserError(
          f'model.num_heads={self.num_heads} is not a multiple of '
          f'model.num_kv_heads={self.num_kv_heads}.')
    if self.head_dim % 2:
      raise types.UserError(
          f'model.head_dim={self.head_dim} must be even: rotary embeddings '
          'turn pairs of channels.')
