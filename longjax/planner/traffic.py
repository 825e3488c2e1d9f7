"""Bytes that a program sends over the chips' network, by an analytic model.

Follows the model code collective by collective (`model.projection`,
`model.moe`, `model.context_parallel`, `model.head`); what the compiler adds or
saves is not seen. All figures are for one device.

Notation: n devices along the mesh axes of a collective. Gathering an array of
b bytes brings each device (n - 1) / n of it, and so does reducing and
scattering it; a sum over devices costs both; a step of a ring costs what is
passed on.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from longjax.model import architecture
from longjax.model import compute as compute_lib
from longjax.parallel import rules as rules_lib
from longjax.planner import flops, transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
  """How often parts of a program run.

  Attributes:
    forward: passes through the layers, those computed again included.
    attention: forward passes of attention, likewise.
    backward: 1 if there is a backward pass, else 0.
  """

  forward: int = 1
  attention: int = 1
  backward: int = 0


def passes(remat: compute_lib.Remat) -> Passes:
  """Of a forward and a backward pass."""
  again = 0 if remat is compute_lib.Remat.NONE else 1
  return Passes(
      forward=1 + again,
      attention=1 + (remat not in (
          compute_lib.Remat.NONE, compute_lib.Remat.ATTENTION)),
      backward=1)


def of_rows(
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    *,
    num_rows: int,
    row_len: int,
    ring: bool,
    dtype: str,
    passes: Passes,
    with_head: bool,
) -> list[transfer.Transfer]:
  """Of layers, embedding and head over rows that are computed at once.

  Args:
    model: sizes.
    rules: mesh and table.
    num_rows: B, at once.
    row_len: T.
    ring: whether keys travel around `seq` or are gathered.
    dtype: of activations.
    passes: how often.
    with_head: whether logits are computed.
  """
  width = jnp.dtype(dtype).itemsize
  tokens = num_rows * row_len / rules.size('batch') / rules.size('seq')
  out = [
      *_weights(model, rules, width, passes),
      *_keys(model, rules, tokens, ring, width, passes),
      *_sums(model, rules, tokens, width, passes),
      *_embedding(model, rules, tokens, width, passes),
  ]
  if model.moe:
    out += _experts(model, rules, tokens, width, passes)
  if with_head:
    out += _head(model, rules, width, passes)
  return [t for t in out if t.num_bytes]


def repeated(
    transfers: Sequence[transfer.Transfer], times: float
) -> list[transfer.Transfer]:
  """The same, so many times."""
  return [
      dataclasses.replace(t, num_bytes=t.num_bytes * times) for t in transfers]


def _share(num_devices: int) -> float:
  """(n - 1) / n."""
  return (num_devices - 1) / num_devices


def _gathered(purpose, num_devices, num_bytes):
  return transfer.Transfer(
      purpose=purpose, kind=transfer.Kind.BOTH_WAYS, num_devices=num_devices,
      num_bytes=num_bytes * _share(num_devices))


def _summed(purpose, num_devices, num_bytes):
  """A sum that every device gets: scattered and gathered."""
  return _gathered(purpose, num_devices, 2 * num_bytes)


def _reduced(purpose, rules, pieces, num_bytes):
  """Gradients of weights in pieces: scattered, summed over what is left."""
  in_pieces = rules.size(pieces)
  left = math.prod(
      rules.mesh.shape[axis] for axis in rules.axes('batch')
      if axis not in rules.axes(pieces)
      and not (pieces == 'expert_embed' and axis in rules.axes('experts')))
  return [
      _gathered(purpose, in_pieces, num_bytes),
      _summed(f'{purpose}, over replicas', left, num_bytes / in_pieces),
  ]


def _weights(model, rules, width, passes):
  """Matrices of the layers, gathered for each pass, and their gradients.

  What the backward pass computes again and its gradients share one gather, as
  compiled programs show.
  """
  count = flops.attention_weights(model)
  if model.moe is None:
    count += 3 * model.embed_dim * model.ffn_dim
  count *= model.num_layers / rules.size('heads')
  times = 1 + passes.backward
  return [
      _gathered('weights', rules.size('embed'), times * count * width),
      *_reduced('gradients', rules, 'embed', passes.backward * count * 4),
  ]


def _experts(model, rules, tokens, width, passes):
  """Experts' matrices, their gradients, and the tokens' way to them."""
  # Each device meets the experts of its own place on the ring only, but once
  # for each stop of the ring.
  stops = rules.size('experts')
  count = 3 * model.embed_dim * model.ffn_dim * model.moe.num_experts
  count *= model.num_layers / rules.size('ffn')
  is_ring = stops > 1
  # On a ring they are computed once more for the backward pass, whether the
  # block is or not.
  times = 1 + 2 * passes.backward if is_ring else (
      passes.forward + passes.backward)
  pieces = rules.size('expert_embed')
  out = [
      _gathered('experts', pieces, times * count * width),
      *_reduced(
          'gradients of experts', rules, 'expert_embed',
          passes.backward * count * 4),
  ]
  if is_ring:
    # With a token travel its experts and their weights, and the sum, which is
    # passed on once more at the end.
    token = model.embed_dim * width + 4 * model.moe.num_active
    choice = 4 * model.moe.num_active
    total = 4 * model.embed_dim
    per_token = (
        passes.forward * stops * (token + choice)
        + passes.backward * stops * token
        + (1 + passes.backward) * (stops + 1) * total)
    out.append(transfer.Transfer(
        purpose='tokens to experts', kind=transfer.Kind.ONE_WAY,
        num_devices=stops,
        num_bytes=tokens * per_token * model.num_layers))
  if rules.size('ffn') > 1:
    out.append(_summed(
        'sums over tensor', rules.size('ffn'),
        (1 + passes.backward) * tokens * model.embed_dim * 4
        * model.num_layers))
  return out


def _keys(model, rules, tokens, ring, width, passes):
  """Keys and values around `seq`, and their gradients."""
  num_devices = rules.size('seq')
  if num_devices == 1:
    return []
  heads = max(1, model.num_kv_heads / rules.size('kv_heads'))
  values = 2 * tokens * heads * model.head_dim * model.num_layers  # One's own.
  forward = (passes.attention + passes.backward) * values * width
  backward = passes.backward * values * 4
  if ring:
    # Gradients are passed on once more, home.
    return [transfer.Transfer(
        purpose='keys and values', kind=transfer.Kind.ONE_WAY,
        num_devices=num_devices,
        num_bytes=num_devices * forward + (num_devices + 1) * backward)]
  return [
      _gathered('keys and values', num_devices, num_devices * forward),
      _gathered('gradients of keys', num_devices, num_devices * backward)]


def _sums(model, rules, tokens, width, passes):
  """Outputs of attention and MLP, partial on each device along `tensor`."""
  times = passes.forward + passes.backward
  if not model.moe:  # Else that is `_experts`' business.
    times += 1 + passes.backward  # An MLP's result need not be known again.
  return [_summed(
      'sums over tensor', rules.size('heads'),
      times * tokens * model.embed_dim * width * model.num_layers)]


def _embedding(model, rules, tokens, width, passes):
  """Rows of the table from where they lie, and back their gradients."""
  pieces = rules.size('embed')
  times = 1 + passes.backward
  values = times * tokens * model.embed_dim * width
  return [
      transfer.Transfer(
          purpose='embeddings', kind=transfer.Kind.SCATTERED,
          num_devices=pieces, num_bytes=values * _share(pieces)),
      _summed('embeddings over tensor', rules.size('vocab'), values),
  ]


def _head(model, rules, width, passes):
  """The output matrix, and its gradient."""
  count = model.embed_dim * model.vocab_size / rules.size('vocab')
  return [
      _gathered(
          'head', rules.size('embed'), (1 + passes.backward) * count * width),
      *_reduced('gradient of head', rules, 'embed',
                passes.backward * count * 4),
  ]


def sampler_weights(
    model: architecture.ModelConfig, rules: rules_lib.Rules, *, dtype: str
) -> list[transfer.Transfer]:
  """Parameters gathered once for all tokens that are sampled."""
  width = jnp.dtype(dtype).itemsize
  experts = 0
  if model.moe:
    experts = (3 * model.num_layers * model.moe.num_experts * model.embed_dim
               * model.ffn_dim)
  others = flops.num_parameters(model) - experts
  return [
      _gathered('weights', rules.size('embed'),
                others * width / rules.size('heads')),
      _gathered('experts', rules.size('expert_embed'),
                experts * width / rules.size('experts') / rules.size('ffn')),
  ]


def of_queries(
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    *,
    num_tokens: int,
    dtype: str,
) -> list[transfer.Transfer]:
  """Of chunks that attend to lanes split over `seq`: queries go, sums return.

  Args:
    model: sizes.
    rules: with the sampler's table.
    num_tokens: of all chunks.
    dtype: of activations.
  """
  num_devices = rules.size('seq')
  numbers = (num_tokens / rules.size('batch') * model.num_layers
             * model.num_heads / rules.size('heads') * model.head_dim)
  width = jnp.dtype(dtype).itemsize
  made = [_gathered('queries', num_devices, numbers * width),
          _gathered('attention over the prompt', num_devices, numbers * 4)]
  return [t for t in made if t.num_bytes]


def of_token(
    model: architecture.ModelConfig,
    rules: rules_lib.Rules,
    *,
    num_samples: int,
    dtype: str,
) -> list[transfer.Transfer]:
  """Of one decoding step of so many samples in all.

  Args:
    model: sizes.
    rules: with the sampler's table, by which weights are not in pieces.
    num_samples: P * G.
    dtype: of activations.
  """
  width = jnp.dtype(dtype).itemsize
  tokens = num_samples / rules.size('batch')
  once = Passes()
  out = _sums(model, rules, tokens, width, once)
  if model.moe:
    out += _experts(model, rules, tokens, width, once)
  shards = rules.mesh.shape['seq']
  if rules.size('seq') == 1 and shards > 1:
    # Each device attends to its part of the prompt.
    out.append(_summed(
        'attention over the prompt', shards,
        tokens * model.num_heads / rules.size('heads')
        * (model.head_dim + 2) * 4 * model.num_layers))
  return [t for t in out if t.num_bytes]
