"""The manifest of a saved step: tells a whole checkpoint from a damaged one.

It lists the size and CRC of every file, and carries a CRC of its own.
"""

import json
import os
import pathlib
import zlib

NAME = 'MANIFEST.json'

# Orbax writes these when it commits, after the manifest; nothing reads them.
_UNLISTED = ('_CHECKPOINT_METADATA', NAME)


def damage(directory: pathlib.Path) -> str:
  """What is wrong with a saved step, in words; '' if nothing is."""
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
    size = path.stat().st_size
    if size != expected['bytes']:
      return f'{name} has {size} bytes instead of {expected["bytes"]}'
    if _file_crc(path) != expected['crc']:
      return f'{name} is altered'
  return ''


def write(directory: pathlib.Path) -> None:
  """Lists the files of a step that is otherwise complete."""
  files = {
      str(path.relative_to(directory)): {
          'bytes': path.stat().st_size, 'crc': _file_crc(path)}
      for path in sorted(directory.rglob('*'))
      if path.is_file() and path.name not in _UNLISTED
  }
  text = json.dumps(files, sort_keys=True)
  content = {'files': files, 'crc': _crc(text.encode())}
  temporary = directory / f'{NAME}.tmp'
  with open(temporary, 'w', encoding='utf-8') as f:
    json.dump(content, f, sort_keys=True)
    f.flush()
    os.fsync(f.fileno())
  temporary.replace(directory / NAME)


def _crc(data: bytes) -> str:
  return f'{zlib.crc32(data):08x}'


def _file_crc(path: pathlib.Path) -> str:
  crc = 0
  with open(path, 'rb') as f:
    while block := f.read(1 << 22):
      crc = zlib.crc32(block, crc)
  return f'{crc:08x}'
