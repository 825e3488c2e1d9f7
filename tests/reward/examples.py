"""One example of each kind that has a rule, for tests of grades."""

from longjax import types

GOLDS = {
    'mc': ('C', 'The red house'),
    'qa': ('Paris', 'City of Light'),
    'numeric': ('42.5',),
    'count': ('7',),
    'list': ('red', 'blue'),
    'mrcr': ('k3Jd9The river keeps the names of stones.',),
}


def example(kind, /, **fields):
  """The example of a kind, some of its fields replaced."""
  return types.TaskExample(**{
      'id': 'test-1', 'task': kind, 'kind': kind, 'documents': (),
      'question': 'Which one?', 'answers': GOLDS[kind]} | fields)
