"""Rollouts and answers as text to read, with the evidence highlighted."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from longjax.data import chat
from longjax.evals import curves, page, scores, tables

# Longer texts are cut to what lies around their evidence.
_MAX_DOCUMENT_CHARS = 20_000
_AROUND_EVIDENCE_CHARS = 600
_MAX_PROMPT_CHARS = 12_000

Rollout = Mapping[str, Any]


def highlight(text: str, spans: Sequence[Sequence[int]]) -> str:
  """Text as HTML with `[start, end)` ranges of it in `<mark>`.

  Nested and overlapping ranges become one mark; adjacent ones stay two. What
  lies outside the text is ignored, so the text is always shown whole.
  """
  merged: list[list[int]] = []
  for start, end in sorted((max(0, s), min(e, len(text))) for s, e in spans):
    if start >= end:
      continue
    if merged and start < merged[-1][1]:
      merged[-1][1] = max(merged[-1][1], end)
    else:
      merged.append([start, end])
  parts, done = [], 0
  for start, end in merged:
    parts += [page.text(text[done:start]),
              '<mark>', page.text(text[start:end]), '</mark>']
    done = end
  return ''.join(parts) + page.text(text[done:])


def shorten(
    text: str, spans: Sequence[Sequence[int]], *, max_chars: int
) -> tuple[str, list[list[int]]]:
  """Leaves out what is far from the spans, if a text is too long.

  Returns:
    The text, with a note at each gap, and the spans moved to fit it.
  """
  if len(text) <= max_chars:
    return text, [list(span) for span in spans]
  keep: list[list[int]] = []
  wanted = [(0, 0), (len(text), len(text)), *((s, e) for s, e in spans)]
  for start, end in sorted(wanted):
    left = max(0, start - _AROUND_EVIDENCE_CHARS)
    right = min(len(text), end + _AROUND_EVIDENCE_CHARS)
    if keep and left <= keep[-1][1]:
      keep[-1][1] = max(keep[-1][1], right)
    else:
      keep.append([left, right])
  short, moved, done = '', [], 0
  for left, right in keep:
    if left > done:
      short += f'\n[… {left - done:,} characters left out …]\n'
    shift = len(short) - left
    moved += [
        [s + shift, e + shift] for s, e in spans if left <= s and e <= right]
    short += text[left:right]
    done = right
  return short, moved


def rollouts(groups: Sequence[Rollout], *, max_groups: int) -> str:
  """Filters, and one card for each prompt with its responses."""
  chosen = choose(groups, max_groups=max_groups)
  if not chosen:
    return ''
  tasks = sorted({g['task'] for g in chosen}, key=curves.task_order)
  steps = sorted({g['step'] for g in chosen})
  filters = [
      _select('task', 'all task types', tasks, tasks),
      _select('step', 'all steps', steps, [f'step {s}' for s in steps]),
      _select('outcome', 'all outcomes', ('all', 'mixed', 'none'),
              ('all correct', 'mixed', 'none correct')),
      '<input name="words" type="search" placeholder="contains…" '
      'aria-label="contains">',
      '<span class="shown muted small"></span>']
  latest_first = sorted(
      chosen, key=lambda g: (-g['step'], curves.task_order(g['task'])))
  note = ''
  if len(chosen) < len(groups):
    note = (f'<p class="muted small">{len(chosen)} of the {len(groups):,} '
            'prompts in rollouts.jsonl, spread over the run.</p>')
  return (
      f'{note}<div class="filters">{"".join(filters)}</div>'
      + '\n'.join(map(_group, latest_first)))


def choose(
    groups: Sequence[Rollout], *, max_groups: int
) -> Sequence[Rollout]:
  """At most `max_groups`, of steps spread evenly from first to last.

  All groups of a step are kept as long as there is room for two steps.
  """
  if len(groups) <= max_groups:
    return groups
  by_step: dict[int, list[Rollout]] = {}
  for group in groups:
    by_step.setdefault(group['step'], []).append(group)
  steps = sorted(by_step)
  largest = max(len(g) for g in by_step.values())
  num_steps = min(len(steps), max(2, max_groups // largest))
  places = {
      round(i * (len(steps) - 1) / (num_steps - 1)) for i in range(num_steps)
  } if num_steps > 1 else {0}
  room = max(1, max_groups // len(places))
  return [g for i in sorted(places) for g in by_step[steps[i]][:room]]


def answers(
    evaluations: Sequence[tables.Evaluation], *, per_task: int
) -> str:
  """The same held-out questions, answered in each evaluation.

  Of each task: examples whose last reward is better than the first, and
  examples that stayed wrong, in turn, so that neither is hidden.
  """
  columns = [
      {r.id: r for r in tables.records(e) if r.sample == 0}
      for e in evaluations]
  shared = [r for i, r in columns[0].items() if all(i in c for c in columns)]
  cards = []
  for task in sorted({r.task for r in shared}, key=curves.task_order):
    own = sorted((r for r in shared if r.task == task), key=lambda r: r.id)
    random.Random(0).shuffle(own)
    better = [r for r in own if columns[-1][r.id].reward > r.reward]
    wrong = [r for r in own if columns[-1][r.id].reward < 0.5]
    picked = []
    for pair in zip(better + own, wrong + own):
      picked += [r for r in pair if r not in picked]
    for record in picked[:per_task]:
      cards.append(_answer(
          record, [(tables.label(e['name']), c[record.id])
                   for e, c in zip(evaluations, columns)]))
  if not cards:
    return ''
  note = ('<p class="muted small">Of each task type, examples that got better '
          'and examples still wrong, first sample of each evaluation.</p>')
  return note + '\n'.join(cards)


def _select(key, everything, values, labels) -> str:
  options = [f'<option value="">{page.text(everything)}</option>']
  options += [
      f'<option value="{page.text(value)}">{page.text(name)}</option>'
      for value, name in zip(values, labels)]
  return (f'<select name="{key}" aria-label="{key}">'
          f'{"".join(options)}</select>')


def _group(group: Rollout) -> str:
  rewards = [s['reward'] for s in group['samples']]
  outcome = 'mixed'
  if all(r >= 0.999 for r in rewards):
    outcome = 'all'
  elif all(r <= 0.001 for r in rewards):
    outcome = 'none'
  mean = sum(rewards) / max(len(rewards), 1)
  task = page.text(group['task'])
  return (
      f'<article class="group" data-task="{task}" data-step="{group["step"]}" '
      f'data-outcome="{outcome}"><header><span class="tag">{task}</span>'
      f'<span>{page.text(group["stage"])}, step {group["step"]}</span>'
      f'<span>mean reward {mean:.2f}</span>'
      f'<span>{page.text(group["id"])}</span></header>'
      + _question(group['question'], group.get('instruction', ''))
      + _row('gold', ' | '.join(group['gold']))
      + _documents(group['documents']) + _prompt(group['prompt'])
      + ''.join(_sample(sample) for sample in group['samples'])
      + '</article>')


def _question(question: str, instruction: str) -> str:
  aside = ''
  if instruction:
    aside = f' <span class="muted small">{page.text(instruction)}</span>'
  return f'<p class="question">{page.text(question)}{aside}</p>'


def _row(name: str, value: str) -> str:
  return f'<div class="row"><span>{name}</span><b>{page.text(value)}</b></div>'


def _documents(documents: Sequence[Mapping[str, Any]]) -> str:
  quotes, sections = [], []
  for document in documents:
    spans = document['evidence']
    shown, moved = shorten(
        document['text'], spans, max_chars=_MAX_DOCUMENT_CHARS)
    kind = ' class="source"' if spans else ''
    title = page.text(document['title'])
    sections.append(
        f'<section{kind}><h4>{title}</h4><p>{highlight(shown, moved)}</p>'
        '</section>')
    quotes += [
        f'<div><mark>{page.text(document["text"][s:e])}</mark> '
        f'<span class="muted small">{title}</span></div>' for s, e in spans]
  evidence = ''
  if quotes:
    evidence = ('<div class="row"><span>evidence</span>'
                f'<div>{"".join(quotes)}</div></div>')
  num_chars = sum(len(d['text']) for d in documents)
  num_sources = sum(1 for d in documents if d['evidence'])
  return (
      f'{evidence}<details><summary>{len(documents)} documents, '
      f'{num_chars:,} characters, evidence in {num_sources}</summary>'
      f'<div class="docs">{"".join(sections)}</div></details>')


def _prompt(prompt: str) -> str:
  shown, _ = shorten(prompt, (), max_chars=_MAX_PROMPT_CHARS)
  return ('<details><summary>Prompt as the model reads it</summary>'
          f'<div class="docs"><pre>{page.text(shown)}</pre></div></details>')


def _sample(sample: Mapping[str, Any]) -> str:
  advantage = f'{sample["advantage"]:+.2f}'.replace('-', '−')
  flags = []
  if not sample['is_finished']:
    flags.append('<span class="flag">cut off</span>')
  if not sample['is_kept']:
    flags.append('<span class="note">masked by AEPO</span>')
  return (
      f'<div class="sample"><div class="numbers">{_pill(sample["reward"])}'
      f'<span>advantage {advantage}</span>'
      f'<span>{sample["length"]:,} tokens</span>'
      f'<span>entropy {sample["entropy"]:.2f}</span>{"".join(flags)}'
      '</div><div>' + _turns(sample.get('turns', ()))
      + _written(sample['thinking'], sample['response'])
      + f'<div class="muted small">graded: {_graded(sample["answer"])} '
      f'by rule {page.text(sample["rule"])}</div></div></div>')


def _turns(turns: Sequence[Mapping[str, Any]]) -> str:
  """What the memory agent noted after each part, and the part to unfold."""
  made = []
  for number, turn in enumerate(turns, start=1):
    flag = ''
    if not turn['is_parsed']:
      flag = '<span class="flag">no memory tag</span>'
    plan = turn['plan'].strip()
    made.append(
        f'<details><summary>part {number} of {len(turns)} {flag} → '
        f'{page.text(turn["memory"].strip() or "(empty)")}'
        + (f' <span class="muted">plan: {page.text(plan)}</span>'
           if plan else '')
        + f'</summary><div class="docs"><pre>{page.text(turn["part"])}</pre>'
        '</div></details>')
  return ''.join(made)


def _answer(
    record: scores.Record, columns: Sequence[tuple[str, scores.Record]]
) -> str:
  evidence = ''
  if record.evidence:
    quotes = ''.join(
        f'<div><mark>{page.text(quote)}</mark></div>'
        for quote in record.evidence)
    evidence = ('<div class="row"><span>evidence</span>'
                f'<div>{quotes}</div></div>')
  samples = ''
  for name, answer in columns:
    parts = chat.split_response(answer.response)
    samples += (
        '<div class="sample"><div class="numbers">'
        f'<span>{page.text(name)}</span>{_pill(answer.reward)}</div><div>'
        f'{_written(parts.thinking, parts.answer)}'
        f'<div class="muted small">graded: {_graded(answer.answer)}</div>'
        '</div></div>')
  return (
      '<article class="group"><header>'
      f'<span class="tag">{page.text(record.task)}</span>'
      f'<span>{record.prompt_length:,} tokens</span>'
      f'<span>{page.text(record.id)}</span></header>'
      + _question(record.question, '') + _row('gold', ' | '.join(record.gold))
      + evidence + samples + '</article>')


def _written(thinking: str, response: str) -> str:
  parts = ''
  if thinking.strip():
    parts += f'<p class="written thinking">{page.text(thinking.strip())}</p>'
  if response.strip():
    parts += f'<p class="written">{page.text(response.strip())}</p>'
  return parts or '<p class="written muted">(nothing)</p>'


def _pill(reward: float) -> str:
  share = min(max(reward, 0.0), 1.0)
  return f'<span class="pill" style="--r:{share:.3f}">{reward:.2f}</span>'


def _graded(answer: str) -> str:
  if not answer:
    return '<span class="flag">no answer found</span>'
  return f'<b>{page.text(answer)}</b>'
