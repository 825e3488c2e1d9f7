"""Tests for longjax.rows."""

import collections

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from longjax import rows, types

TRIALS = hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck))

ids = st.integers(1, 50)
branches = st.builds(
    rows.Branch,
    response=st.lists(ids, min_size=1, max_size=5),
    trajectory=st.integers(0, 30),
    extra_prompt=st.lists(ids, max_size=3))
groups = st.builds(
    rows.Group,
    prompt=st.lists(ids, min_size=1, max_size=8),
    branches=st.lists(branches, min_size=1, max_size=4))
many_groups = st.lists(groups, min_size=1, max_size=7)


def size(group):
  """Tokens of a group, counted from the docstring's picture."""
  return len(group.prompt[:-1]) + sum(
      len([group.prompt[-1], *b.extra_prompt, *b.response[:-1]])
      for b in group.branches)


def as_tuple(group):
  """What must survive packing."""
  return (tuple(group.prompt), tuple(
      (tuple(b.extra_prompt), tuple(b.response), b.trajectory)
      for b in group.branches))


def read_back(packed):
  """Groups of every row, found from the metadata alone."""
  found = []
  for r in range(packed.tokens.shape[0]):
    in_row = []
    for number in range(packed.meta.group[r].max() + 1):
      in_group = packed.meta.group[r] == number
      prefix = in_group & (packed.meta.branch[r] == 0)
      prompt, read = list(packed.tokens[r, prefix]), []
      assert list(packed.meta.position[r, prefix]) == list(range(len(prompt)))
      assert not packed.loss_mask[r, prefix].any()
      heads = set()
      for b in range(1, packed.meta.branch[r, in_group].max() + 1):
        at = np.flatnonzero(in_group & (packed.meta.branch[r] == b))
        inputs = packed.tokens[r, at]
        assert list(packed.meta.position[r, at]) == list(
            range(len(prompt), len(prompt) + len(at)))
        trained = packed.loss_mask[r, at]
        response = packed.targets[r, at][trained]
        # Inputs and targets are one sequence, shifted by a token.
        extra = inputs[1:len(inputs) - len(response) + 1]
        assert list(inputs[len(extra) + 1:]) == list(response[:-1])
        assert list(trained) == [False] * len(extra) + [True] * len(response)
        assert list(packed.response_index[r, at][trained]) == list(
            range(len(response)))
        trajectories = set(packed.trajectory[r, at][trained])
        assert len(trajectories) == 1
        heads.add(inputs[0])
        read.append((tuple(extra), tuple(response), trajectories.pop()))
      assert len(heads) == 1  # The last prompt token, at each branch's head.
      in_row.append(((*prompt, heads.pop()), tuple(read)))
    found.append(in_row)
  return found


@TRIALS
@hypothesis.given(st.data())
def test_visible_is_the_rule_of_the_docstring(data):
  query, key = (
      np.array(data.draw(st.lists(
          st.tuples(st.integers(-1, 2), st.integers(0, 2), st.integers(0, 4)),
          min_size=1, max_size=12)), np.int32)
      for _ in range(2))
  want = np.zeros((len(query), len(key)), bool)
  for t, (q_group, q_branch, q_position) in enumerate(query):
    for s, (k_group, k_branch, k_position) in enumerate(key):
      want[t, s] = (
          q_group == k_group and k_group != -1
          and (k_branch == 0 or k_branch == q_branch)
          and k_position <= q_position)
  got = rows.visible(rows.TokenMeta(*query.T), rows.TokenMeta(*key.T))
  np.testing.assert_array_equal(got, want)


def test_visible_keeps_rows_apart():
  meta = rows.TokenMeta(*(
      np.random.default_rng(i).integers(-1, 3, (4, 9)) for i in range(3)))
  got = rows.visible(meta, meta)
  assert got.shape == (4, 9, 9)
  for b in range(4):
    one = jax.tree.map(lambda x, b=b: x[b], meta)
    np.testing.assert_array_equal(got[b], rows.visible(one, one))


def test_the_docstrings_example():
  packed = rows.pack([rows.Group(prompt=[10, 11, 12], branches=[
      rows.Branch(response=[20, 21], trajectory=5),
      rows.Branch(response=[22], trajectory=7)])], row_len=7)
  #                                       padding: v
  expected = {
      'tokens': [10, 11, 12, 20, 12, 0, 0],
      'targets': [0, 0, 20, 21, 22, 0, 0],
      'loss_mask': [0, 0, 1, 1, 1, 0, 0],
      'trajectory': [0, 0, 5, 5, 7, 0, 0],
      'response_index': [0, 0, 0, 1, 0, 0, 0],
  }
  for name, want in expected.items():
    np.testing.assert_array_equal(getattr(packed, name), [want], err_msg=name)
  np.testing.assert_array_equal(packed.meta.group, [[0, 0, 0, 0, 0, -1, -1]])
  np.testing.assert_array_equal(packed.meta.branch, [[0, 0, 1, 1, 2, 0, 0]])
  np.testing.assert_array_equal(packed.meta.position, [[0, 1, 2, 3, 2, 0, 0]])


@TRIALS
@hypothesis.given(many_groups, st.integers(0, 20))
def test_every_group_is_packed_once_and_whole(made, room):
  row_len = max(map(size, made)) + room
  packed = rows.pack(made, row_len=row_len)
  found = [group for in_row in read_back(packed) for group in in_row]
  assert collections.Counter(found) == collections.Counter(
      map(as_tuple, made))
  # Nothing lies outside the groups that were read back.
  assert (packed.meta.group >= 0).sum() == sum(map(size, made))
  assert sum(map(size, made)) == sum(g.num_tokens for g in made)
  for name in ('tokens', 'targets', 'trajectory', 'response_index'):
    assert not getattr(packed, name)[packed.meta.group < 0].any()


@TRIALS
@hypothesis.given(many_groups, st.integers(0, 20))
def test_a_trained_token_sees_its_prompt_and_its_response_so_far(made, room):
  packed = rows.pack(made, row_len=max(map(size, made)) + room)
  sees = np.asarray(rows.visible(packed.meta, packed.meta))
  for r, in_row in enumerate(read_back(packed)):
    for number, (prompt, responses) in enumerate(in_row):
      for b, (extra, response, _) in enumerate(responses, start=1):
        trained = np.flatnonzero(
            (packed.meta.group[r] == number) & (packed.meta.branch[r] == b)
            & packed.loss_mask[r])
        for i, t in enumerate(trained):
          seen = np.flatnonzero(sees[r, t])
          in_order = seen[np.argsort(packed.meta.position[r, seen])]
          assert tuple(packed.tokens[r, in_order]) == (
              *prompt, *extra, *response[:i])
          assert packed.targets[r, t] == response[i]


@TRIALS
@hypothesis.given(many_groups, st.integers(0, 20))
def test_no_two_rows_would_fit_into_one(made, room):
  row_len = max(map(size, made)) + room
  packed = rows.pack(made, row_len=row_len)
  used = sorted((packed.meta.group >= 0).sum(axis=1))
  assert used[0] > 0
  if len(used) > 1:
    assert used[0] + used[1] > row_len


@TRIALS
@hypothesis.given(many_groups, st.data())
def test_groups_stand_in_the_rows_they_were_given(made, data):
  row_of = data.draw(st.lists(
      st.integers(0, 3), min_size=len(made), max_size=len(made)))
  placed = [[g for g, r in zip(made, row_of) if r == row] for row in range(4)]
  row_len = max(sum(map(size, groups)) for groups in placed)
  found = read_back(rows.write(placed, row_len=row_len))
  assert found == [list(map(as_tuple, groups)) for groups in placed]


def test_split_gives_the_rows_in_order():
  packed = rows.pack([group_of(n) for n in (1, 2, 3, 4, 5, 6)], row_len=6,
                     num_rows=6)
  parts = rows.split(packed, 2)
  assert [part.tokens.shape for part in parts] == [(2, 6)] * 3
  jax.tree.map(
      lambda whole, *parts: np.testing.assert_array_equal(
          np.concatenate(parts), whole), packed, *parts)


def group_of(num_tokens):
  return rows.Group(prompt=[1], branches=[
      rows.Branch(response=[2] * num_tokens, trajectory=0)])


def test_num_rows_are_returned_even_if_fewer_would_do():
  packed = rows.pack([group_of(3)], row_len=4, num_rows=5)
  assert packed.tokens.shape == (5, 4)
  assert packed.loss_mask.sum() == 3


def test_the_longest_groups_are_placed_first():
  made = [group_of(n) for n in (2, 3, 5, 7, 8, 5)]
  packed = rows.pack(made, row_len=10)
  assert sorted((packed.meta.group >= 0).sum(axis=1)) == [10, 10, 10]


def test_a_group_longer_than_a_row_is_named():
  with pytest.raises(
      types.UserError,
      match=r'group of 9 tokens \(prompt 1, 1 responses\).*row_len=8'):
    rows.pack([group_of(9)], row_len=8)


def test_too_few_rows_are_named():
  with pytest.raises(
      types.UserError, match='3 groups need 3 rows of row_len=4 but num_row'):
    rows.pack([group_of(4)] * 3, row_len=4, num_rows=2)


def test_packing_nothing_gives_rows_of_padding():
  packed = rows.pack([], row_len=4, num_rows=2)
  assert packed.tokens.shape == (2, 4)
  assert (packed.meta.group == -1).all()


def test_rows_pass_through_jit_as_one_tree():
  packed = rows.pack([group_of(3)], row_len=4, num_rows=2)
  total = jax.jit(lambda batch: (batch.targets * batch.loss_mask).sum())(packed)
  assert total == 6


def test_an_empty_response_is_refused():
  with pytest.raises(ValueError, match='response of trajectory 3 is empty'):
    rows.Branch(response=[], trajectory=3)
