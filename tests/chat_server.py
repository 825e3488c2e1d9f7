"""A chat-completion server on this machine that misbehaves to order."""

import contextlib
import dataclasses
import http.server
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Request:
  """What came in, and when (seconds, monotonic)."""

  number: int
  seconds: float
  prompt: str
  body: dict[str, Any]
  headers: dict[str, str]


class Connection:
  """Where a behaviour writes its answer."""

  def __init__(self, handler: '_Handler'):
    self._handler = handler

  def say(self, content: Any) -> None:
    """A well-formed completion."""
    self.send(completion(content))

  def send(
      self, body: bytes, *, status: int = 200, claimed: int | None = None,
      headers: dict[str, str] | None = None,
  ) -> None:
    """A whole answer; `claimed` is the length it says it has."""
    self._handler.send_response(status)
    for name, value in (headers or {}).items():
      self._handler.send_header(name, value)
    length = len(body) if claimed is None else claimed
    self._handler.send_header('Content-Length', str(length))
    self._handler.end_headers()
    self._handler.wfile.write(body)
    self._handler.close_connection = claimed is not None

  def hang(self) -> None:
    """Nothing until the server ends."""
    self._handler.server.owner.released.wait(60.0)

  def is_left(self, *, seconds: float) -> bool:
    """Waits; whether the client went away meanwhile, without its answer."""
    connection = self._handler.connection
    if not select.select([connection], [], [], seconds)[0]:
      return False
    try:
      return not connection.recv(1, socket.MSG_PEEK)
    except OSError:
      return True

  def drip(self, body: bytes, *, seconds: float) -> None:
    """An answer that comes byte by byte."""
    self._handler.send_response(200)
    self._handler.send_header('Content-Length', str(len(body)))
    self._handler.end_headers()
    for i in range(len(body)):
      self._handler.wfile.write(body[i:i + 1])
      self._handler.wfile.flush()
      time.sleep(seconds)


def completion(content: Any) -> bytes:
  message = {'role': 'assistant', 'content': content}
  return json.dumps({'choices': [{'message': message}]}).encode()


Behaviour = Callable[[Request, Connection], None]


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def setup(self):
    super().setup()
    self.server.owner.sockets.append(self.connection)

  def do_POST(self):
    owner: Server = self.server.owner
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with owner.lock:
      request = Request(
          len(owner.requests), time.monotonic(),
          body['messages'][0]['content'], body, dict(self.headers))
      owner.requests.append(request)
      owner.num_open += 1
      owner.most_open = max(owner.most_open, owner.num_open)
    try:
      owner.behave(request, Connection(self))
    except OSError:  # The client gave up.
      self.close_connection = True
    finally:
      with owner.lock:
        owner.num_open -= 1

  def log_message(self, *args):
    pass


class Server:
  """Answers each request in a thread as `behave` says.

  Attributes:
    requests: all so far.
    most_open: so many were being answered at a time.
    released: set when the server ends.
  """

  def __init__(self, behave: Behaviour, *, port: int = 0):
    self.behave = behave
    self.requests: list[Request] = []
    self.sockets: list[socket.socket] = []
    self.num_open = self.most_open = 0
    self.lock = threading.Lock()
    self.released = threading.Event()

    class Threads(http.server.ThreadingHTTPServer):
      daemon_threads = True
      request_queue_size = 128
      owner = self

      def handle_error(self, *args):
        pass

    self._server = Threads(('127.0.0.1', port), _Handler)
    self.port = self._server.server_address[1]
    self.url = f'http://127.0.0.1:{self.port}/v1'
    self._thread = threading.Thread(
        target=self._server.serve_forever, kwargs={'poll_interval': 0.01})
    self._thread.start()

  def kill(self) -> None:
    """Ends it at once, cutting what is being answered."""
    self.released.set()
    for connection in self.sockets:
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()

  def __enter__(self) -> 'Server':
    return self

  def __exit__(self, *error) -> None:
    self.kill()


def yes(request, connection):
  connection.say('[[YES]]')


def hang(request, connection):
  connection.hang()


def first(num, bad, then=yes):
  """A server that behaves as `bad` for its first `num` requests."""

  def behave(request, connection):
    (bad if request.number < num else then)(request, connection)

  return behave


def status(code, **headers):
  named = {name.replace('_', '-'): value for name, value in headers.items()}

  def behave(request, connection):
    connection.send(b'{"error": "no"}', status=code, headers=named)

  return behave
