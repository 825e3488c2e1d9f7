"""The manifest of a saved step: tells a whole checkpoint from a damaged one.

It lists the size and CRC of every file, and carries a CRC of its own. Object
stores keep checksums themselves: there it lists sizes.
"""

import json
import os
import zlib
from collections.abc import Iterator

from etils import epath

from longjax.train import mirror

NAME = 'MANIFEST.json'

# Orbax writes these when it commits, after the manifest; nothing reads them.
_UNLISTED = ('_CHECKPOINT_METADATA', NAME)


def damage(directory: epath.PathLike) -> str:
  """What is wrong with a saved step, in words; '' if nothing is."""
  directory = epath.Path(directory)
  manifest = directory / NAME
  if not manifest.is_file():
    return f'{NAME} is missing'
  try:
    listed = json.loads(manifest.read_text())
    files, crc = listed['files'], listed['crc']
  except (ValueError, KeyError, TypeError):
    return f'{NAME} is unreadable'
  if _crc(json.dumps(files, sort_keys=True).encode()) != crc:
    return f'{NAME} is altered'
  for name, expected in files.items():
    path = directory / name
    if not path.is_file():
      return f'{name} is missing'
    size = path.stat().length
    if size != expected['bytes']:
      return f'{name} has {size} bytes instead of {expected["bytes"]}'
    if 'crc' in expected and _file_crc(path) != expected['crc']:
      return f'{name} is altered'
  return ''


def write(directory: epath.PathLike) -> None:
  """Lists the files of a step that is otherwise complete."""
  directory = epath.Path(directory)
  is_remote = mirror.is_remote(directory)
  files: dict[str, dict[str, int | str]] = {}
  for path in _files(directory):
    if path.name not in _UNLISTED:
      entry = files[str(path.relative_to(directory))] = {
          'bytes': path.stat().length}
      if not is_remote:
        entry['crc'] = _file_crc(path)
  text = json.dumps(files, sort_keys=True)
  content = {'files': files, 'crc': _crc(text.encode())}
  if is_remote:  # Objects appear whole.
    (directory / NAME).write_text(json.dumps(content, sort_keys=True))
    return
  temporary = directory / f'{NAME}.tmp'
  with open(temporary, 'w', encoding='utf-8') as f:
    json.dump(content, f, sort_keys=True)
    f.flush()
    os.fsync(f.fileno())
  temporary.replace(directory / NAME)


def _crc(data: bytes) -> str:
  return f'{zlib.crc32(data):08x}'


def _files(directory: epath.Path) -> Iterator[epath.Path]:
  """Those of a whole tree, in order."""
  for path in sorted(directory.iterdir()):
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _file_crc(path: epath.Path) -> str:
  crc = 0
  with path.open('rb') as f:
    while block := f.read(1 << 22):
      crc = zlib.crc32(block, crc)
  return f'{crc:08x}'
