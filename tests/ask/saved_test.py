"""An inquiry is found again, and nothing else is taken for it."""

import pytest

from longjax.agents import memory
from longjax.ask import saved, sources
from longjax.data import tokenizer as tokenizer_lib

ASKED = {'questions': ('Who?',), 'files': [['a.txt', 3, 1]]}


def test_what_is_saved_is_loaded(tmp_path):
  agent = memory.MemoryAgent(
      tokenizer_lib.load('configs/tiny_base'), memory.MemoryConfig())
  place = sources.Source(file='a.txt', line=2, part=1, is_found=True)
  reading = saved.Reading(
      turn=2, notes=memory.Notes(memory=(5, 6), plan=(7,), is_parsed=False),
      sources=sources.Sources({'Ada came.': place}),
      answer=saved.Answer(text='Ada', is_finished=True))
  folder = saved.Folder(tmp_path, ASKED)
  assert folder.load() == {}
  folder.save(agent, [reading], sizes=[1])
  content = saved.Folder(tmp_path, ASKED).load()
  assert content['sizes'] == [1]
  got = saved.Reading.from_json(content['readings'][0])
  assert got.sources.known == reading.sources.known
  assert (got.turn, got.notes, got.answer) == (
      reading.turn, reading.notes, reading.answer)
  assert saved.Folder(tmp_path, ASKED | {'seed': 1}).load() == {}


@pytest.mark.parametrize('content', [
    '', '\0\0', '{"asked"', '[]', 'null', '{}', '{"asked": 1}', '[' * 200_000])
def test_a_damaged_file_is_not_used(tmp_path, content, caplog):
  folder = saved.Folder(tmp_path, ASKED)
  folder.path.mkdir()
  (folder.path / saved.FILE).write_text(content)
  assert folder.load() == {}
  assert 'inquiry.json is damaged' in caplog.text
