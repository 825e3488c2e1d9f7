"""An example as a record of TensorFlow Datasets, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from longjax import types


def features() -> tfds.features.FeaturesDict:
  """Names and types of an example's fields."""
  text = tfds.features.Text()
  integer = tfds.features.Scalar(np.int64)
  return tfds.features.FeaturesDict({
      'id': text,
      'task': text,
      'kind': text,
      'documents': tfds.features.Sequence({'title': text, 'text': text}),
      'question': text,
      'instruction': text,
      'answers': tfds.features.Sequence(text),
      'evidence': tfds.features.Sequence(
          {'document': integer, 'start': integer, 'end': integer}),
      'reasoning': text,
      'hops': integer,
      'meta': tfds.features.Sequence({'key': text, 'value': text}),
  })


def to_record(example: types.TaskExample) -> dict[str, Any]:
  """What TFDS writes."""
  return {
      'id': example.id,
      'task': example.task,
      'kind': example.kind,
      'documents': [
          {'title': d.title, 'text': d.text} for d in example.documents],
      'question': example.question,
      'instruction': example.instruction,
      'answers': list(example.answers),
      'evidence': [
          {'document': s.document, 'start': s.start, 'end': s.end}
          for s in example.evidence],
      'reasoning': example.reasoning,
      'hops': example.hops,
      'meta': [{'key': k, 'value': v} for k, v in example.meta.items()],
  }


def from_record(record: Mapping[str, Any]) -> types.TaskExample:
  """The example of what TFDS reads."""
  def strings(values) -> list[str]:
    return [bytes(v).decode() for v in values]

  documents, evidence, meta = (
      record[k] for k in ('documents', 'evidence', 'meta'))
  return types.TaskExample(
      **{k: bytes(record[k]).decode() for k in (
          'id', 'task', 'kind', 'question', 'instruction', 'reasoning')},
      documents=tuple(
          types.Document(title=title, text=text) for title, text in zip(
              strings(documents['title']), strings(documents['text']),
              strict=True)),
      answers=tuple(strings(record['answers'])),
      evidence=tuple(
          types.Span(document=int(d), start=int(s), end=int(e))
          for d, s, e in zip(
              evidence['document'], evidence['start'], evidence['end'],
              strict=True)),
      hops=int(record['hops']),
      meta=dict(zip(
          strings(meta['key']), strings(meta['value']), strict=True)),
  )
