"""An object store in memory: gs:// for epath, and HTTP for TensorStore.

Objects appear whole when they are closed; nothing can be appended to, renamed
or locked. Both doors lead to the same objects, so that what Orbax writes
through TensorStore (arrays) and through epath (all else) lies together.
"""

import contextlib
import http.server
import json
import threading
import urllib.parse

import fsspec
from etils.epath import backend
from fsspec.implementations import memory
from orbax.checkpoint._src.path import gcs_utils


class ObjectStore(memory.MemoryFileSystem):
  """What `fsspec.filesystem('gcs')` returns here."""

  protocol = ('gs', 'gcs')
  store: dict = {}
  pseudo_dirs = ['']
  cachable = False

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path).removeprefix('gs://').removeprefix('gcs://').strip('/')
    return f'/{path}' if path else ''

  def _open(self, path, mode='rb', **kwargs):
    if mode not in ('rb', 'wb'):
      raise NotImplementedError(f'objects cannot be opened with {mode!r}')
    return super()._open(path, mode, **kwargs)

  def mv(self, *args, **kwargs):
    raise NotImplementedError('objects cannot be renamed')

  rename = mv


class _Handler(http.server.BaseHTTPRequestHandler):
  """The few calls of the JSON API that TensorStore makes."""

  protocol_version = 'HTTP/1.1'

  def _answer(self, code, body=b'', kind='application/json', **headers):
    self.send_response(code)
    self.send_header('Content-Type', kind)
    self.send_header('Content-Length', str(len(body)))
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    self.wfile.write(body)

  def _parse(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    parts = [urllib.parse.unquote(p) for p in url.path.split('/')]
    bucket = parts[parts.index('b') + 1]
    name = parts[parts.index('o') + 1] if parts[-1] != 'o' else query.get(
        'name', '')
    return bucket, name, query

  def _facts(self, path):
    content = ObjectStore.store[path].getvalue()
    _, bucket, name = path.split('/', 2)
    return {'kind': 'storage#object', 'bucket': bucket, 'name': name,
            'size': str(len(content)), 'generation': '1'}

  def do_GET(self):
    bucket, name, query = self._parse()
    if not name:
      prefix = f'/{bucket}/' + query.get('prefix', '')
      items = [self._facts(p) for p in sorted(ObjectStore.store)
               if p.startswith(prefix)]
      self._answer(200, json.dumps({'items': items}).encode())
      return
    path = f'/{bucket}/{name}'
    if path not in ObjectStore.store:
      self._answer(404)
      return
    content = ObjectStore.store[path].getvalue()
    wanted = self.headers.get('Range', '')
    if wanted.startswith('bytes='):
      first, _, last = wanted.removeprefix('bytes=').partition('-')
      size = len(content)
      start = int(first) if first else max(size - int(last), 0)
      end = min(int(last) + 1 if first and last else size, size)
      self._answer(
          206, content[start:end], 'application/octet-stream',
          Content_Range=f'bytes {start}-{end - 1}/{size}',
          x_goog_generation='1')
      return
    self._answer(200, content, 'application/octet-stream',
                 x_goog_generation='1')

  def do_POST(self):
    bucket, name, query = self._parse()
    content = self.rfile.read(int(self.headers['Content-Length']))
    path = f'/{bucket}/{name}'
    if query.get('ifGenerationMatch') == '0' and path in ObjectStore.store:
      self._answer(412)
      return
    ObjectStore().pipe_file(path, content)
    self._answer(200, json.dumps(self._facts(path)).encode())

  def do_DELETE(self):
    bucket, name, _ = self._parse()
    known = ObjectStore.store.pop(f'/{bucket}/{name}', None)
    self._answer(404 if known is None else 204)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def running(monkeypatch):
  """gs:// leads into memory."""
  ObjectStore.store.clear()
  ObjectStore.pseudo_dirs[:] = ['']
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  before = fsspec.registry.get('gcs')
  fsspec.register_implementation('gcs', ObjectStore, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  monkeypatch.setenv(
      'TENSORSTORE_GCS_HTTP_URL', f'http://127.0.0.1:{server.server_port}')
  monkeypatch.setenv('TENSORSTORE_GCS_HTTP_VERSION', '1.1')
  monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'nobody')
  monkeypatch.setattr(
      gcs_utils, 'is_hierarchical_namespace_enabled', lambda path: False)
  try:
    yield ObjectStore
  finally:
    server.shutdown()
    server.server_close()
    backend.fsspec_backend._get_filesystem.cache_clear()
    if before is not None:
      fsspec.register_implementation('gcs', before, clobber=True)
