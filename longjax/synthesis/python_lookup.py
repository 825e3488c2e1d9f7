"""Lookup questions about the installed Python standard library.

  python -m longjax.synthesis.python_lookup --output=runs/python_lookup.jsonl

An example of bringing your own documents: real modules are read (parsed with
`ast`, never imported), cut into excerpts of signatures and docstring lines,
and asked about:

  Which module defines the function `dedent`?
  What is the default of the argument `width` of `shorten`?

Each line of the file is one example in the format `data.documents` reads.
Output depends on the Python version, the seed and the flags only.
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from longjax import types

_MAX_LINE_CHARS = 76
_MIN_FUNCTIONS = 2
_MIN_DOCUMENTS = 3
# Most questions with one answer: half of all defaults are None.
_MAX_SAME_ANSWER = 40
# A default that still says something without its punctuation: 3, 1.5, None,
# 'utf-8'. Answers are compared word by word.
_PLAIN_DEFAULT = re.compile(r"\d+(\.\d+)?|None|True|False|'\w[\w .-]*'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
  """A public top-level function.

  Attributes:
    module: where it is defined.
    name: without the module.
    signature: its `def` line without annotations and colon.
    summary: first line of its docstring; may be empty.
    defaults: argument to the source text of its default.
  """

  module: str
  name: str
  signature: str
  summary: str
  defaults: tuple[tuple[str, str], ...]

  def lines(self) -> str:
    """What an excerpt shows of it."""
    return '\n'.join(filter(None, (self.signature, self.summary)))


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
  every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
  every += filter(None, (arguments.vararg, arguments.kwarg))
  for argument in every:
    argument.annotation = None
  return arguments


def _defaults(arguments: ast.arguments) -> tuple[tuple[str, str], ...]:
  positional = [*arguments.posonlyargs, *arguments.args]
  # Defaults belong to the last positional arguments.
  pairs = [*zip(positional[::-1], arguments.defaults[::-1]),
           *zip(arguments.kwonlyargs, arguments.kw_defaults)]
  return tuple(sorted(
      (argument.arg, ast.unparse(default))
      for argument, default in pairs if default is not None))


def functions_of(module: str, source: str) -> list[Function]:
  """Public top-level functions whose excerpt fits on short lines.

  In order of definition; a name defined twice is left out.
  """
  nodes = [node for node in ast.parse(source).body
           if isinstance(node, ast.FunctionDef)
           and not node.name.startswith('_')]
  counts = Counter(node.name for node in nodes)
  functions = []
  for node in nodes:
    arguments = _without_annotations(node.args)
    signature = f'def {node.name}({ast.unparse(arguments)})'
    if counts[node.name] > 1 or len(signature) > _MAX_LINE_CHARS:
      continue
    docstring = (ast.get_docstring(node) or '').split('\n')[0].strip()
    if docstring.startswith('>>>') or len(docstring) > _MAX_LINE_CHARS:
      docstring = ''
    functions.append(Function(
        module=module, name=node.name, signature=signature,
        summary=docstring, defaults=_defaults(arguments)))
  return functions


@functools.cache
def read_library() -> dict[str, list[Function]]:
  """Functions of every standard module that is written in Python.

  Left out are submodules, modules with fewer than two usable functions, and
  functions whose name several modules use.
  """
  modules = {}
  for name in sorted(sys.stdlib_module_names):
    spec = None if name.startswith('_') else importlib.util.find_spec(name)
    origin = (spec and spec.origin) or ''
    if origin.endswith('.py'):
      source = pathlib.Path(origin).read_text(encoding='utf-8')
      modules[name] = functions_of(name, source)
  counts = Counter(f.name for found in modules.values() for f in found)
  unique = {
      name: [f for f in found if counts[f.name] == 1 and f.name not in modules]
      for name, found in modules.items()}
  return {name: found for name, found in unique.items()
          if len(found) >= _MIN_FUNCTIONS}


def _excerpt(
    rng: random.Random, functions: Sequence[Function],
    included: Function | None = None,
) -> dict[str, str]:
  """A document of two or three of a module's functions, in their order."""
  num_functions = min(len(functions), rng.randint(2, 3))
  others = [f for f in functions if f is not included]
  rng.shuffle(others)
  chosen = ([included] if included else []) + others
  chosen = sorted(chosen[:num_functions], key=functions.index)
  return {'title': functions[0].module,
          'text': '\n'.join(function.lines() for function in chosen)}


def _module_question(function: Function) -> dict[str, Any]:
  return {
      'question': f'Which module defines the function `{function.name}`?',
      'answers': [function.module],
      'evidence': [function.signature],
      'reasoning': f'{function.signature} is in {function.module}.',
  }


def _default_question(
    function: Function, argument: str, default: str
) -> dict[str, Any]:
  plain = default.strip("'")
  return {
      'question': f'What is the default of the argument `{argument}` of '
                  f'`{function.name}`?',
      'answers': [default] if plain == default else [plain, default],
      'evidence': [function.signature],
      'reasoning': f'{function.signature} has {argument}={default}.',
  }


_Question = tuple[Function, dict[str, Any]]


def _spread(questions: list[_Question], rng: random.Random) -> list[_Question]:
  """Random order, but answers take turns: guessing "None" stays unpaid."""
  rng.shuffle(questions)
  turns: Counter[str] = Counter()
  turn_of = []
  for _, fields in questions:
    turn_of.append(turns[fields['answers'][0]])
    turns[fields['answers'][0]] += 1
  order = sorted(range(len(questions)), key=turn_of.__getitem__)
  return [questions[i] for i in order if turn_of[i] < _MAX_SAME_ANSWER]


def _questions(
    library: dict[str, list[Function]], rng: random.Random
) -> list[_Question]:
  """Every question there is, the two forms taking turns."""
  about_modules: list[_Question] = []
  about_defaults: list[_Question] = []
  for functions in library.values():
    for function in functions:
      about_modules.append((function, _module_question(function)))
      for argument, default in function.defaults:
        if _PLAIN_DEFAULT.fullmatch(default):
          about_defaults.append(
              (function, _default_question(function, argument, default)))
  about_modules = _spread(about_modules, rng)
  about_defaults = _spread(about_defaults, rng)
  num_both = min(len(about_modules), len(about_defaults))
  pairs = zip(about_modules, about_defaults, strict=False)
  mixed = [question for pair in pairs for question in pair]
  return mixed + about_modules[num_both:] + about_defaults[num_both:]


def solve(documents: Sequence[dict[str, str]], question: str) -> set[str]:
  """Answers from the documents' text: finds the `def` line, parses it."""
  asked = re.findall(r'`(\w+)`', question)
  answers = set()
  for document in documents:
    for line in document['text'].splitlines():
      if not re.match(rf'def {asked[-1]}\(', line):
        continue
      if question.startswith('Which module'):
        answers.add(document['title'])
      else:
        node = ast.parse(f'{line}: pass').body[0]
        assert isinstance(node, ast.FunctionDef)
        answers |= {default.strip("'")
                    for name, default in _defaults(node.args)
                    if name == asked[0]}
  return answers


def generate(
    *, num: int, seed: int = 0, context_chars: int = 700
) -> Iterator[dict[str, Any]]:
  """Yields examples as the JSON objects of a data file.

  Args:
    num: how many.
    seed: of choice and order.
    context_chars: of documents, aimed at; 700 make about 600 tokens.

  Raises:
    UserError: the library does not give that many questions.
  """
  rng = random.Random(f'python_lookup/{seed}')
  library = read_library()
  written = 0
  for function, fields in _questions(library, rng):
    if written == num:
      return
    documents = [_excerpt(rng, library[function.module], function)]
    others = [name for name in library if name != function.module]
    rng.shuffle(others)
    num_chars = len(documents[0]['text'])
    for name in others:
      if num_chars >= context_chars and len(documents) >= _MIN_DOCUMENTS:
        break
      documents.append(_excerpt(rng, library[name]))
      num_chars += len(name) + len(documents[-1]['text'])
    rng.shuffle(documents)
    if solve(documents, fields['question']) != {fields['answers'][0]}:
      continue
    written += 1
    yield {
        'id': f'python-{seed}-{written:06d}', 'task': 'reading', 'kind': 'qa',
        'documents': documents, **fields,
        'instruction': 'Answer with the name or value only.'}
  if written < num:
    raise types.UserError(
        f'num={num} is more than the {written} questions that the standard '
        f'library gives; use at most {written}.')


def write(path: str, *, num: int, seed: int, context_chars: int) -> None:
  """Writes a JSONL file, under a temporary name until it is complete."""
  examples = generate(num=num, seed=seed, context_chars=context_chars)
  text = ''.join(json.dumps(e, ensure_ascii=False) + '\n' for e in examples)
  temporary = f'{path}.tmp'
  try:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(temporary).write_text(text, encoding='utf-8')
    os.replace(temporary, path)
  except OSError as error:
    raise types.UserError(
        f'output={path} cannot be written ({error.strerror}); choose another '
        'file.') from error


def main(argv: Sequence[str]) -> int:
  """Writes the file; exit code 2 on a user's mistake."""
  del argv
  values = flags.FLAGS
  try:
    write(values.output, num=values.num, seed=values.seed,
          context_chars=values.context_chars)
  except types.UserError as error:
    sys.stderr.write(f'longjax: error: {error}\n')
    return 2
  sys.stderr.write(f'{values.output}: {values.num} examples.\n')
  return 0


if __name__ == '__main__':
  flags.DEFINE_string('output', None, 'JSONL file to write.', required=True)
  flags.DEFINE_integer('num', 400, 'Number of questions.', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Seed of choice and order.')
  flags.DEFINE_integer(
      'context_chars', 700, 'Characters of documents per question.')
  app.run(main)
