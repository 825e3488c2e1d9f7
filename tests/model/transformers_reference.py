"""What transformers computes on a CPU; needs it and torch installed."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np


def load(directory: pathlib.Path, dtype: str = 'float32') -> Any:
  """The model in a directory, which must fill the class it asks for."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation='eager',
        output_loading_info=True, local_files_only=True)
  assert not info['missing_keys'], info
  assert not info['unexpected_keys'], info
  assert not info['mismatched_keys'], info
  return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
  """f32[B, T, V] of tokens i32[B, T]."""
  import torch

  with torch.no_grad():
    out = model(torch.from_numpy(np.int64(tokens)), use_cache=False).logits
  return out.float().numpy()


def cached_logits(
    model: Any, tokens: np.ndarray, prompt_len: int
) -> np.ndarray:
  """f32[B, T - prompt_len + 1, V]: a prompt at once, then token by token.

  The first is of the prompt's last token.
  """
  import torch

  ids = torch.from_numpy(np.int64(tokens))
  found = []
  with torch.no_grad():
    out = model(ids[:, :prompt_len], use_cache=True)
    found.append(out.logits[:, -1])
    for t in range(prompt_len, tokens.shape[1]):
      out = model(
          ids[:, t:t + 1], past_key_values=out.past_key_values, use_cache=True)
      found.append(out.logits[:, -1])
  return torch.stack(found, 1).float().numpy()


def logprobs_and_entropy(
    logits: np.ndarray, targets: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
  """f32[B, T] each, by torch.distributions."""
  import torch

  made = torch.distributions.Categorical(
      logits=torch.from_numpy(logits) / temperature)
  return (made.log_prob(torch.from_numpy(np.int64(targets))).numpy(),
          made.entropy().numpy())


@contextlib.contextmanager
def recorded_experts(model: Any, experts: list[Any]) -> Iterator[None]:
  """Appends to `experts` which ones every layer's router chooses."""
  hooks = [
      layer.mlp.gate.register_forward_hook(
          lambda module, inputs, out: experts.append(out[2]))
      for layer in model.model.layers if hasattr(layer.mlp, 'gate')]
  yield
  for hook in hooks:
    hook.remove()


@contextlib.contextmanager
def given_experts(model: Any, experts: list[Any]) -> Iterator[None]:
  """Routers send tokens to these experts, weighted as they would."""
  import torch

  left = list(experts)

  def route(module, inputs, out):
    chosen = left.pop(0)
    probabilities = torch.softmax(out[0], dim=-1, dtype=torch.float)
    weights = probabilities.gather(1, chosen)
    if module.norm_topk_prob:
      weights = weights / weights.sum(dim=-1, keepdim=True)
    return out[0], weights.to(out[1].dtype), chosen

  hooks = [
      layer.mlp.gate.register_forward_hook(route)
      for layer in model.model.layers if hasattr(layer.mlp, 'gate')]
  yield
  assert not left
  for hook in hooks:
    hook.remove()
