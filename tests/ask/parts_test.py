"""Parts are cut of documents line by line, and know their lines."""

import pytest

from longjax import types
from longjax.agents import memory
from longjax.ask import files, parts
from longjax.data import tokenizer as tokenizer_lib


def reader(part_len):
  return memory.MemoryAgent(
      tokenizer_lib.load('configs/tiny_base'),
      memory.MemoryConfig(part_len=part_len))


@pytest.mark.parametrize('part_len', [16, 50, 300])
def test_parts_know_the_lines_they_are_of(tmp_path, part_len):
  (tmp_path / 'a.txt').write_text(
      ''.join(f'Line {i} of a.\n' for i in range(40)) + 'é' * 200)
  (tmp_path / 'b.jsonl').write_text(
      '{"text": "One of b."}\n{"text": "Two of b.\\nThree of b."}\n')
  agent = reader(part_len)
  paths = [tmp_path / 'a.txt', tmp_path / 'b.jsonl']
  stream = parts.Parts(agent, paths)
  ids, numbers = [], {}
  for part in stream:
    assert len(part) <= part_len
    ids += part
    text = ''.join(line.text for line in stream.lines)
    assert agent.text(part).strip('\ufffd') in text
    for line in stream.lines:
      numbers.setdefault((line.text, line.number), line.file)
  assert agent.text(ids) == ''.join(x.text for x in files.lines(paths))
  assert numbers['Line 7 of a.\n', 8] == str(paths[0])
  assert numbers['Three of b.', 2] == str(paths[1])
  size = parts.size(agent, paths)
  assert size.num_tokens == len(ids)
  assert size.num_parts == len(list(parts.Parts(agent, paths)))


@pytest.mark.parametrize('num_lines', [3, 40])
def test_a_file_that_is_written_to_meanwhile_is_told(tmp_path, num_lines):
  agent, path = reader(16), tmp_path / 'a.txt'
  path.write_text('A line of a.\n' * 20)
  counted = parts.size(agent, [path]).num_parts
  stream = parts.Parts(agent, [path], num_parts=counted)
  assert len(list(stream)) == counted
  path.write_text('A line of a.\n' * num_lines)
  with pytest.raises(types.UserError, match='a.txt: was written to'):
    list(stream)
