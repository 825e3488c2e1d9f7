import pytest

from longjax import types
from longjax.model import architecture

SIZES = dict(
    vocab_size=96, embed_dim=32, ffn_dim=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize('change, message', [
    (dict(num_layers=0), r'model\.num_layers=0 must be >= 1'),
    (dict(vocab_size=-1), r'model\.vocab_size=-1 must be >= 1'),
    (dict(num_kv_heads=3), r'model\.num_heads=4 .* model\.num_kv_heads=3'),
    (dict(head_dim=7), r'model\.head_dim=7 must be even'),
    (dict(rope_theta=0.0), r'model\.rope_theta=0\.0 must be positive'),
    (dict(norm_epsilon=-1e-6), r'model\.norm_epsilon=-1e-06 must be positive'),
])
def test_impossible_sizes_are_refused(change, message):
  architecture.ModelConfig(**SIZES)
  with pytest.raises(types.UserError, match=message) as error:
    architecture.ModelConfig(**SIZES | change)
  assert '\n' not in str(error.value)
