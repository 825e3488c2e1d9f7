"""Which responses of a step are kept to read, and what is kept of them."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from longjax.rl import batch
from longjax.train import graded as graded_lib
from longjax.train import metrics, run_state, sampling


def write(
    context: run_state.Context,
    graded: graded_lib.Graded,
    plan: batch.Plan,
    *,
    asked: graded_lib.Graded,
    name: str,
    tasks: Sequence[str],
    turn: int,
    global_step: int,
) -> None:
  """Keeps all responses to one prompt, tasks taking turns.

  Args:
    context: of the run; its writer takes them.
    graded: what is trained on.
    plan: what the update did with it.
    asked: all that was sampled; shown if nothing is trained on.
    name: of the stage.
    tasks: of its examples.
    turn: how often something was kept before.
    global_step: of the run.
  """
  advantages, keep = jax.device_get((plan.advantages, plan.keep))
  if not graded.lengths.any():
    graded = asked
    advantages, keep = np.zeros((2, graded.lengths.size))
  sampled = graded.sampled
  rollouts = sampled.rollouts

  def places_off(p: int) -> int:
    task = tasks.index(sampled.prompts[p].example.task)
    return (task - turn) % len(tasks)

  # A batch of fewer prompts than tasks may lack the one whose turn it is.
  written = np.flatnonzero(rollouts.lengths.any(axis=1)).tolist()
  p = min(written, key=places_off)
  num_samples = rollouts.lengths.shape[1]
  samples = []
  for g in range(num_samples):
    i, length = p * num_samples + g, rollouts.lengths[p, g]
    score = graded.scores[i]
    assert score is not None
    samples.append(metrics.Sample(
        text=sampled.texts[i], score=score, advantage=float(advantages[i]),
        length=int(length),
        entropy=float(rollouts.entropy[p, g].sum() / length),
        is_finished=bool(rollouts.is_finished[p, g]), is_kept=bool(keep[i]),
        turns=_turns(sampled, (p, g), context.tokenizer.decode)))
  prompt = sampled.prompts[p]
  context.rollouts.write(
      global_step, name, prompt.example, samples,
      prompt_text=context.tokenizer.decode(prompt.tokens))


def _turns(
    sampled: sampling.Sampled,
    reader: tuple[int, int],
    decode: Callable[[Iterable[int]], str],
) -> list[metrics.Turn]:
  """What the memory agent noted, part by part."""
  return [
      metrics.Turn(
          part=decode(turn.part), memory=decode(turn.notes.memory),
          plan=decode(turn.notes.plan), is_parsed=turn.notes.is_parsed)
      for turn in sampled.turns if turn.part is not None
      and (turn.prompt.query, turn.prompt.sample) == reader]
