"""The shape of a Qwen3-style decoder."""

import dataclasses

from longjax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and constants of the network.

  Attributes:
    vocab_size: V, rows of the embedding table.
    embed_dim: D, width of the residual stream.
    ffn_dim: F, hidden width of the gated MLP.
    num_layers: L.
    num_heads: N, query heads.
    num_kv_heads: K, key/value heads; divides N.
    head_dim: H; N * H need not equal D.
    rope_theta: base of the rotary frequencies.
    norm_epsilon: added to mean squares before the root.
    tied_embeddings: the output head is the transposed embedding table.
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
