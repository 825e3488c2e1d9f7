"""Requests to a server that misbehaves."""

import contextlib
import datetime
import email.utils
import itertools
import logging
import time

import pytest

from longjax import config as config_lib
from longjax import types
from longjax.reward import completions, endpoint, judge
from tests import asking, chat_server

YES, FAILED = judge.Verdict.YES, judge.Verdict.FAILED


def test_open_requests_are_bounded():
  def behave(request, connection):
    time.sleep(0.03)
    chat_server.yes(request, connection)

  with chat_server.Server(behave) as server:
    verdicts, _ = asking.ask(
        server, *(asking.case(i) for i in range(12)), max_concurrent=3)
  assert verdicts == [YES] * 12
  assert server.most_open == 3


def test_waiting_for_others_does_not_count_as_time_out():
  def behave(request, connection):
    time.sleep(0.1)
    chat_server.yes(request, connection)

  with chat_server.Server(behave) as server:
    verdicts, _ = asking.ask(
        server, *(asking.case(i) for i in range(8)), max_concurrent=1,
        timeout_seconds=0.5)
    assert verdicts == [YES] * 8
    assert len(server.requests) == 8


def test_requests_keep_to_their_rate():
  with chat_server.Server(chat_server.yes) as server:
    verdicts, _ = asking.ask(
        server, *(asking.case(i) for i in range(9)), requests_per_second=20.0)
  assert verdicts == [YES] * 9
  begun = [r.seconds for r in server.requests]
  assert begun[-1] - begun[0] >= 8 / 20.0 - 0.05


@pytest.mark.parametrize('num, verdict', [(1, YES), (2, YES), (9, FAILED)])
def test_a_server_that_says_nothing_is_asked_again(num, verdict):
  with chat_server.Server(chat_server.first(num, chat_server.hang)) as server:
    verdicts, seconds = asking.ask(
        server, asking.case('x'), timeout_seconds=0.2)
    assert verdicts == [verdict]
    assert len(server.requests) == min(num, 2) + 1
    assert seconds < 5.0


def test_the_time_out_is_of_the_whole_request_not_of_a_byte():
  def drip(request, connection):
    connection.drip(chat_server.completion('[[YES]]' + ' ' * 200), seconds=0.02)

  with chat_server.Server(drip) as server:
    verdicts, seconds = asking.ask(
        server, asking.case('x'), timeout_seconds=0.2, max_retries=1)
    assert verdicts == [FAILED]
    assert seconds < 2.0
    assert len(server.requests) == 2


def test_a_slow_stream_that_ends_in_time_is_read():
  def drip(request, connection):
    connection.drip(chat_server.completion('[[YES]]'), seconds=0.001)

  with chat_server.Server(drip) as server:
    assert asking.ask(server, asking.case('x'))[0] == [YES]


@pytest.mark.parametrize('code', [408, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(code):
  busy = chat_server.status(code)
  with chat_server.Server(chat_server.first(2, busy)) as server:
    assert asking.ask(server, asking.case('x'))[0] == [YES]
  with chat_server.Server(busy) as server:
    assert asking.ask(server, asking.case('x'))[0] == [FAILED]
    assert len(server.requests) == 3


@pytest.mark.parametrize('code', [301, 302, 400, 401, 403, 404, 413, 422])
def test_what_does_not_pass_is_not(code):
  with chat_server.Server(
      chat_server.status(code, Location='http://127.0.0.1:9/')) as server:
    verdicts, _ = asking.ask(server, asking.case('x'), asking.case('y'))
    assert verdicts == [FAILED] * 2
    assert len(server.requests) == 2


def test_pauses_grow():
  with chat_server.Server(chat_server.status(500)) as server:
    asking.ask(server, asking.case('x'), max_retries=3, backoff_seconds=0.08)
  begun = [r.seconds for r in server.requests]
  gaps = [b - a for a, b in itertools.pairwise(begun)]
  for gap, pause in zip(gaps, (0.08, 0.16, 0.32), strict=True):
    assert gap >= pause / 2


def test_retry_after_stops_all_requests_for_so_long():
  busy = chat_server.status(429, Retry_After='0.4')
  with chat_server.Server(chat_server.first(1, busy)) as server:
    verdicts, _ = asking.ask(
        server, *(asking.case(i) for i in range(5)), max_concurrent=1)
    assert verdicts == [YES] * 5
  begun = [r.seconds for r in server.requests]
  assert len(begun) == 6
  assert begun[1] - begun[0] >= 0.39


def test_a_server_that_asks_to_come_back_tomorrow_has_failed():
  busy = chat_server.status(429, Retry_After='86400')
  with chat_server.Server(busy) as server:
    verdicts, seconds = asking.ask(
        server, asking.case('x'), max_backoff_seconds=0.3)
    assert verdicts == [FAILED]
    assert len(server.requests) == 1
    assert seconds < 2.0


def test_retry_after_is_a_number_of_seconds_or_a_date():
  def read(text):
    return completions._seconds(text)

  assert (read('7'), read('0.5'), read('-3')) == (7.0, 0.5, 0.0)
  assert [read(t) for t in ('', 'soon', 'nan', 'inf', '12 monkeys')] == (
      [None] * 5)
  now = datetime.datetime.now(datetime.UTC)
  date = email.utils.format_datetime(
      now + datetime.timedelta(seconds=30), usegmt=True)
  assert 25.0 < read(date) < 31.0
  assert read('Wed, 21 Oct 2015 07:28:00 GMT') == 0.0
  assert read('Wed, 21 Oct 2015 07:28:00 -0000') == 0.0


GARBAGE = {
    'empty': b'', 'text': b'<html>busy</html>', 'null': b'null',
    'list': b'[]', 'object': b'{}', 'no choice': b'{"choices": []}',
    'no message': b'{"choices": [{"text": "[[YES]]"}]}',
    'number': chat_server.completion(1),
    'parts': chat_server.completion([{'text': '[[YES]]'}]),
    'no utf-8': b'\xff\xfe\x00',
    'torn': chat_server.completion('[[YES]]')[:-5],
    'deep': b'[' * 100_000,
    'endless': b' ' * (2 << 20),
}


@pytest.mark.parametrize('body', GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_no_verdict(body):
  def send(request, connection):
    connection.send(body)

  with chat_server.Server(chat_server.first(1, send)) as server:
    assert asking.ask(server, asking.case('x'))[0] == [YES]
  with chat_server.Server(send) as server:
    assert asking.ask(server, asking.case('x'))[0] == [FAILED]
    assert len(server.requests) == 3


def test_a_reply_cut_off_in_the_middle_is_no_verdict():
  body = chat_server.completion('[[YES]]')

  def send(request, connection):
    connection.send(body[:len(body) // 2], claimed=len(body))

  with chat_server.Server(chat_server.first(1, send)) as server:
    assert asking.ask(server, asking.case('x'))[0] == [YES]
  with chat_server.Server(send) as server:
    assert asking.ask(server, asking.case('x'))[0] == [FAILED]


def test_the_key_is_sent_and_nowhere_to_be_seen(monkeypatch, caplog):
  secret = 'sk-very-secret'
  monkeypatch.setenv('JUDGE_KEY', f' {secret}\n')

  def refuse(request, connection):
    header = request.headers['Authorization']
    connection.send(f'Bad key: {header}'.encode(), status=401)

  caplog.set_level(logging.DEBUG)
  with chat_server.Server(refuse) as server:
    made = asking.config(server, api_key_variable='JUDGE_KEY')
    verdicts, _ = asking.ask(
        server, asking.case('x'), api_key_variable='JUDGE_KEY')
    assert verdicts == [FAILED]
    assert server.requests[0].headers['Authorization'] == f'Bearer {secret}'
    with (contextlib.closing(endpoint.Endpoint(made)) as asked,
          pytest.raises(types.UserError, match='HTTP 401') as error):
      asked.check()
  assert 'HTTP 401' in caplog.text
  shown = [caplog.text, repr(made), str(config_lib.resolved(made)),
           str(error.value)]
  assert not any(secret in text for text in shown)


def test_without_a_key_no_header_is_sent():
  with chat_server.Server(chat_server.yes) as server:
    asking.ask(server, asking.case('x'))
    assert 'Authorization' not in server.requests[0].headers


@pytest.mark.parametrize('value', [None, '', ' ', 'two words', 'na\u00efve'])
def test_a_missing_key_is_named_before_anything_is_asked(monkeypatch, value):
  monkeypatch.delenv('JUDGE_KEY', raising=False)
  if value is not None:
    monkeypatch.setenv('JUDGE_KEY', value)
  with pytest.raises(types.UserError, match='JUDGE_KEY: this environment'):
    endpoint.Endpoint(
        asking.config('http://x/v1', api_key_variable='JUDGE_KEY'))


@pytest.mark.parametrize('overrides, message', [
    (dict(url='judge:8000'), "url='judge:8000' is no address"),
    (dict(url='ftp://judge/v1'), 'is no address'),
    (dict(url='http://'), 'is no address'),
    (dict(url='http://judge:port/v1'), 'is no address'),
    (dict(max_tokens=0), 'endpoint.max_tokens=0 must be >= 1'),
    (dict(max_concurrent=0), 'endpoint.max_concurrent=0 must be >= 1'),
    (dict(max_retries=-1), 'endpoint.max_retries=-1 must be >= 0'),
    (dict(requests_per_second=-1.0), 'requests_per_second=-1.0 must be >= 0'),
    (dict(requests_per_second=float('nan')), 'requests_per_second=nan'),
    (dict(backoff_seconds=-1.0), 'backoff_seconds=-1.0 must be >= 0'),
    (dict(timeout_seconds=0.0), 'timeout_seconds=0.0 must be > 0'),
    (dict(max_wait_seconds=float('nan')), 'max_wait_seconds=nan must be > 0'),
    (dict(max_wait_seconds=float('inf')), 'seconds=inf must be > 0 and finite'),
])
def test_a_mistake_is_one_line_naming_field_and_value(overrides, message):
  with pytest.raises(types.UserError, match='^[^\n]*$') as error:
    completions.EndpointConfig(**overrides)
  assert message in str(error.value)


@pytest.mark.parametrize('overrides', [
    dict(api_key_variable='sk-hush'), dict(url='http://me:sk-hush@judge/v1'),
    dict(url='http://judge/v1?key=sk-hush'), dict(url='http://sk-hush@'),
])
def test_a_key_in_the_wrong_field_is_not_repeated(overrides):
  with pytest.raises(types.UserError, match='api_key_variable') as error:
    completions.EndpointConfig(**overrides)
  assert 'sk-hush' not in str(error.value)


@pytest.mark.parametrize('name', ['url', 'model'])
def test_an_endpoint_needs_a_url_and_a_model(name):
  with pytest.raises(types.UserError, match=f"endpoint.{name}='' is empty"):
    endpoint.Endpoint(asking.config('http://x/v1', **{name: ''}))
