"""Kept facts are traced to the file and the line that says them."""

from longjax.ask import files, sources


def lines(*texts, file='a.txt', first=1):
  return [files.Line(text=f'{text}\n', file=file, number=first + i)
          for i, text in enumerate(texts)]


PART_1 = lines(
    'The town lies by the sea.', 'The mayor of the town is Ada Holm.',
    'The people of the town like the sea.', 'The vault of the bank opens',
    'with the code 4711.', 'Nothing else happened in the town.')
PART_2 = lines(
    'The sea is cold.', 'Ada Holm was seen in Rome.', 'The code is old.',
    first=7)


def places(found):
  return {s: (p.line, p.part, p.is_found) for s, p in found.known.items()}


def test_a_sentence_is_found_in_its_own_words_or_others():
  found = sources.Sources()
  found.update(
      'The mayor of the town is Ada Holm. \n- Mayor: Ada Holm\n'
      '2) code of the vault: 4711\n---\nThe king is dead.', 1, PART_1)
  assert places(found) == {
      'The mayor of the town is Ada Holm.': (2, 1, True),
      'Mayor: Ada Holm': (2, 1, True),
      'code of the vault: 4711': (4, 1, True),
      'The king is dead.': (1, 1, False)}
  assert 'in no line' in str(found.known['The king is dead.'])
  assert str(found.known['Mayor: Ada Holm']) == 'a.txt:2 (part 1)'


def test_what_is_kept_keeps_its_place_and_what_is_dropped_is_forgotten():
  found = sources.Sources()
  found.update('Mayor: Ada Holm. Code of the vault: 4711.', 1, PART_1)
  found.update(
      'The mayor is Ada Holm. Code of the vault: 4711. '
      'She was seen in Rome.', 2, PART_2)
  assert places(found) == {
      'The mayor is Ada Holm.': (2, 1, True),
      'Code of the vault: 4711.': (4, 1, True),
      'She was seen in Rome.': (8, 2, True)}
  again = sources.Sources.from_json(found.to_json())
  assert again.known == found.known


def test_scripts_without_spaces_are_compared_sign_by_sign():
  found = sources.Sources()
  found.update('町長は田中。金庫は四番。', 1, lines(
      '海は青い。', '町長は田中さん。', '金庫の番号は四番です。'))
  assert [p.line for p in found.known.values()] == [2, 3]
