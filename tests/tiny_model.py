"""A model that compiles in seconds, and prompts and responses for it."""

import types as python_types

import jax
import numpy as np

from longjax import rows, types
from longjax.model import architecture, parameters
from longjax.model import compute as compute_lib
from longjax.parallel import mesh
from longjax.parallel import rules as rules_lib
from longjax.rl import batch, clipping, entropy_control
from longjax.rl import loss as loss_lib
from longjax.rollout import decode
from longjax.train import optimizer as optimizer_lib
from longjax.train import rl_stage as rl_stage_lib

MODEL = architecture.ModelConfig(
    vocab_size=96, embed_dim=32, ffn_dim=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8)


def rules(**sizes: int) -> rules_lib.Rules:
  """Rules of a mesh; without sizes, of one device."""
  if not sizes:
    return rules_lib.Rules(
        mesh.make(mesh.MeshConfig(data=1), jax.devices()[:1]))
  return rules_lib.Rules(mesh.make(mesh.MeshConfig(**{'data': 1} | sizes)))


def params(
    seed: int = 0, model: architecture.ModelConfig = MODEL
) -> types.Params:
  """Parameters whose norms are not 1 and whose logits spread by about 2."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    values = rng.normal(size=leaf.shape)
    if path[-1].key.endswith('norm'):
      return np.float32(1.0 + 0.3 * values)
    scale = 2.0 if path[-1].key == 'head' else 1.0
    return np.float32(scale * model.embed_dim**-0.5 * values)

  return jax.tree_util.tree_map_with_path(fill, parameters.abstract(model))


def prompts(lengths, seed: int = 0) -> list[types.Prompt]:
  """Random prompts of given lengths, with distinct tasks in turn."""
  rng = np.random.default_rng(seed)
  made = []
  for i, length in enumerate(lengths):
    example = types.TaskExample(
        id=f'prompt {i}', task=('mc', 'multihop')[i % 2], kind='qa',
        documents=(), question='?', answers=('yes',))
    made.append(types.Prompt(
        example=example, number=1000 + i,
        tokens=tuple(rng.integers(1, MODEL.vocab_size, length).tolist())))
  return made


def rollouts(
    num_prompts: int, num_samples: int, max_len: int, seed: int = 0
) -> types.Rollouts:
  """Random responses of random lengths, as the sampler would return them."""
  rng = np.random.default_rng(seed)
  shape = (num_prompts, num_samples, max_len)
  lengths = rng.integers(1, max_len + 1, shape[:2])
  lengths.flat[:2] = 1, max_len
  mask = np.arange(max_len) < lengths[..., None]
  return types.Rollouts(
      tokens=np.int32(rng.integers(1, MODEL.vocab_size, shape) * mask),
      lengths=np.int32(lengths),
      logprobs=np.float32(rng.normal(-4.5, 0.3, shape) * mask),
      entropy=np.float32(rng.uniform(1.0, 4.0, shape) * mask),
      entropy_t1=np.float32(rng.uniform(1.0, 4.0, shape) * mask),
      is_finished=lengths < max_len)


def packed(
    prompts: list[types.Prompt], rollouts: types.Rollouts, *, row_len: int,
    num_rows: int,
) -> rows.Rows:
  """The one micro-batch they fit into."""
  made = batch.pack(
      prompts, rollouts, row_lens=(row_len,), num_rows=num_rows)
  [part] = made.micro_batches
  return part


def repeated(
    prompts: list[types.Prompt], rollouts: types.Rollouts, *, row_len: int
) -> rows.Rows:
  """Every response in a row of its own, behind its own copy of the prompt."""
  num_samples = rollouts.lengths.shape[1]
  flat = rows.empty(rollouts.lengths.size, row_len)
  for n in range(rollouts.lengths.size):
    p, g = divmod(n, num_samples)
    length = rollouts.lengths[p, g]
    prompt = prompts[p].tokens
    sequence = [*prompt, *rollouts.tokens[p, g, :length]]
    num_read = len(sequence) - 1
    flat.tokens[n, :num_read] = sequence[:-1]
    flat.meta.group[n, :num_read] = 0
    flat.meta.position[n, :num_read] = np.arange(num_read)
    trained = slice(len(prompt) - 1, num_read)
    flat.targets[n, trained] = sequence[len(prompt):]
    flat.loss_mask[n, trained] = True
    flat.trajectory[n, trained] = n
    flat.response_index[n, trained] = np.arange(length)
  return flat


def extras(made: types.Rollouts, seed: int = 0) -> dict[str, np.ndarray]:
  """Arrays by response that `rl_job.loss` takes; one response is removed."""
  rng = np.random.default_rng(seed)
  num_responses, max_len = made.lengths.size, made.tokens.shape[2]
  lengths = made.lengths.reshape(-1)
  weights = np.full((num_responses, max_len), 1.0 / lengths.sum())
  weights[3] = 0.0
  weights *= np.arange(max_len) < lengths[:, None]
  sampler = made.logprobs.reshape(num_responses, max_len)
  return {
      'advantages': np.float32(rng.normal(size=num_responses)),
      'token_weights': np.float32(weights),
      'sampler_logprobs': sampler,
      'old_logprobs': np.float32(
          sampler + 0.5 * rng.normal(size=sampler.shape)),
  }


def rl_stage(**overrides) -> rl_stage_lib.RlStage:
  """A stage whose loss has every term: ratio clips, importance weights."""
  return rl_stage_lib.RlStage(**dict(
      steps=4, num_prompts=8, num_samples=3, max_prompt_len=16, row_lens=(48,),
      sampler=decode.SamplerConfig(temperature=0.7, max_response_len=8),
      optimizer=optimizer_lib.OptimizerConfig(learning_rate=1e-2),
      aepo=entropy_control.AepoConfig(),
      clip=clipping.NegativeClipConfig(),
      loss=loss_lib.LossConfig(objective='off_policy', tis_cap=2.0),
  ) | overrides)


def context(
    made: rules_lib.Rules, model: architecture.ModelConfig = MODEL,
    **compute: str,
) -> python_types.SimpleNamespace:
  """The fields of `run_state.Context` that losses read."""
  return python_types.SimpleNamespace(
      model=model, rules=made,
      compute=compute_lib.Compute(**{'attention': 'reference'} | compute))


def assert_trees_close(got, want, *, tolerance: float = 1e-5) -> None:
  """Leaves differ by at most `tolerance` times the largest value in them."""

  def one(path, got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(
        got, want, rtol=0.0, atol=tolerance * np.abs(want).max(),
        err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(one, got, want)
