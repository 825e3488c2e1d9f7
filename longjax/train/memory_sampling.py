"""Trajectories of the memory agent, to train on.

G readers read each of P documents (`agents.rounds`); a trajectory is all that
one of them wrote, turn after turn. It is graded once, by its answer, and has
one advantage for all of its tokens. In rows a turn of the G readers is a group:
what their prompts begin with, the part of the document, stands there once.

P prompts, G trajectories per prompt, N = P * G, K parts of a document at most,
R tokens of a turn at most.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from longjax import rows, types
from longjax.agents import memory, rounds, sampled
from longjax.data import chat, prompts, task_balance
from longjax.train import partial, rl_stage, run_state, sampling


class MemoryTurns:
  """A `sampling.Sampler` whose responses are trajectories of many turns."""

  def __init__(
      self,
      context: run_state.Context,
      stage: rl_stage.RlStage,
      *,
      examples: Sequence[types.TaskExample],
      balance: task_balance.TaskBalancedSampler,
      name: str,
  ):
    """Prepares a stage; see `sampling.OneTurn`."""
    assert stage.memory is not None
    self._context = context
    self._stage = stage
    self._examples = examples
    self._balance = balance
    self._name = name
    self._agent = memory.MemoryAgent(context.tokenizer, stage.memory)
    self.engine = sampling.engine(stage, context)

  def __call__(
      self, params: types.Params, stage_step: int,
      carried: partial.Carried | None = None,
      *, submit: sampling.Submit,
  ) -> sampling.Sampled:
    """See `sampling.Sampler`."""
    assert carried is None
    stage = self._stage
    drawn = self._balance.batch(stage_step)
    chosen = [self._examples[int(i)] for i in drawn]
    queries = [self._query(example) for example in chosen]
    session = self.engine.session(params)
    of_step = jax.random.fold_in(self._context.key(self._name), stage_step)
    by_trajectory: list[list[rounds.Turn]] = [
        [] for _ in range(len(chosen) * stage.num_samples)]
    texts = [''] * len(by_trajectory)
    for taken in rounds.read(
        self._agent, queries, sampled.generate(
            session, of_step, examples=chosen,
            numbers=[prompts.number(example.id) for example in chosen]),
        [rounds.Reader(query=p, sample=g)
         for p in range(len(chosen)) for g in range(stage.num_samples)]):
      for turn in taken:
        p, g = turn.prompt.query, turn.prompt.sample
        i = p * stage.num_samples + g
        by_trajectory[i].append(turn)
        # Short documents are graded while long ones are still read.
        if turn.is_last:
          is_finished = turn.response.is_finished
          texts[i] = chat.response_text(
              turn.response.tokens, self._context.tokenizer,
              is_finished=is_finished)
          submit((p, g), chosen[p], texts[i], is_finished=is_finished)
    turns = list(itertools.chain(*by_trajectory))
    return sampling.Sampled(
        prompts=[
            types.Prompt(
                example=example, number=prompts.number(example.id),
                tokens=by_trajectory[p * stage.num_samples][0].prompt.tokens)
            for p, example in enumerate(chosen)],
        example=drawn, rollouts=self._rollouts(by_trajectory),
        texts=texts,
        groups=groups(by_trajectory, num_samples=stage.num_samples),
        metrics=session.stats.metrics() | metrics(turns), turns=turns)

  def _query(self, example: types.TaskExample) -> rounds.Query:
    made = rounds.query(self._agent, example)
    if made.num_parts > self._stage.max_parts:
      raise types.UserError(
          f'example {example.id!r} has {made.num_parts} parts of '
          f'memory.part_len={self._agent.config.part_len} tokens, '
          f'rl.max_parts={self._stage.max_parts}; raise one of them or use '
          'shorter documents.')
    # Or a run would end where a memory first takes all of its room.
    longest = max(
        self._agent.longest_prompts(made.question, made.instruction))
    if longest > self._stage.max_prompt_len:
      raise types.UserError(
          f'example {example.id!r}: the prompt of a turn takes up to {longest} '
          f'tokens, rl.max_prompt_len={self._stage.max_prompt_len}; raise it, '
          'or lower rl.memory.part_len or rl.memory.memory_len.')
    return made

  def _rollouts(
      self, by_trajectory: Sequence[Sequence[rounds.Turn]]
  ) -> types.Rollouts:
    """All that was written, [P, G, (K + 1) * R], turns one after the other."""
    stage = self._stage
    shape = len(by_trajectory), stage.trajectory_len
    tokens = np.zeros(shape, np.int32)
    logprobs, entropy, entropy_t1 = np.zeros((3, *shape), np.float32)
    lengths = np.zeros(len(by_trajectory), np.int32)
    for i, turns in enumerate(by_trajectory):
      for turn in turns:
        made = turn.response
        new = slice(lengths[i], lengths[i] + len(made.tokens))
        tokens[i, new] = made.tokens
        logprobs[i, new] = made.logprobs
        entropy[i, new] = made.entropy
        entropy_t1[i, new] = made.entropy_t1
        lengths[i] = new.stop

    def by_sample(x: Any) -> Any:
      return x.reshape(-1, stage.num_samples, *x.shape[1:])

    return types.Rollouts(
        tokens=by_sample(tokens), lengths=by_sample(lengths),
        logprobs=by_sample(logprobs), entropy=by_sample(entropy),
        entropy_t1=by_sample(entropy_t1), is_finished=by_sample(np.asarray(
            [turns[-1].response.is_finished for turns in by_trajectory])))


def groups(
    by_trajectory: Sequence[Sequence[rounds.Turn]], *, num_samples: int
) -> list[list[rows.Group]]:
  """Turns as groups of rows, prompt by prompt.

  The readers of a document take a turn together. What their prompts begin with
  is the prefix of a group, the rest of a prompt stands with its response. Token
  j of a trajectory's turn has the index that it has in the whole trajectory.

  Args:
    by_trajectory: N lists of turns.
    num_samples: G.
  """
  found: list[list[rows.Group]] = []
  for start in range(0, len(by_trajectory), num_samples):
    by_turn: dict[int, list[tuple[int, int, rounds.Turn]]] = (
        collections.defaultdict(list))
    for trajectory in range(start, start + num_samples):
      first = 0
      for turn in by_trajectory[trajectory]:
        by_turn[turn.prompt.turn].append((trajectory, first, turn))
        first += len(turn.response.tokens)
    found.append([_group(by_turn[turn]) for turn in sorted(by_turn)])
  return found


def _group(members: Sequence[tuple[int, int, rounds.Turn]]) -> rows.Group:
  given = [turn.prompt.tokens for _, _, turn in members]
  # Of sequences in order, what the first and the last begin with all do.
  least, most = min(given), max(given)
  shared = next(
      (i for i, (a, b) in enumerate(zip(least, most)) if a != b), len(least))
  return rows.Group(
      prompt=least[:shared], branches=[
          rows.Branch(
              extra_prompt=turn.prompt.tokens[shared:],
              response=turn.response.tokens, trajectory=trajectory,
              first_index=first)
          for trajectory, first, turn in members])


def metrics(turns: Sequence[rounds.Turn]) -> dict[str, float]:
  """How readers did: turns, memory carried, responses without a memory."""
  updates = [turn for turn in turns if not turn.is_last]
  if not updates:
    return {}
  num_trajectories = len(turns) - len(updates)
  return {
      'memory/turns': len(turns) / num_trajectories,
      'memory/tokens': float(np.mean([len(t.notes.memory) for t in updates])),
      'memory/parse_failures': float(
          np.mean([not t.notes.is_parsed for t in updates])),
      'memory/truncated': float(
          np.mean([not t.response.is_finished for t in updates]))}
