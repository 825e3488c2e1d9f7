import io
import json

import pytest

from longjax.bench import measure, rates, record, report

LIMITS = rates.Rates(
    flops=100.0, memory_bandwidth=50.0, is_measured=False, source='a guess')


def made(variant, *, seconds, own, case='c', program='update', **facts):
  return record.Record(
      case=case, program=program, variant=variant, num_tokens=30,
      needed_flops=60.0, own_flops=own, peak_bytes=1000, readings=[
          measure.Reading(seconds=s, cpu_seconds=2 * s) for s in seconds],
      **facts)


def test_shares_are_of_all_devices_and_of_the_median_run():
  figures = made(
      'shared', seconds=[2.0, 1.0, 9.0], own=60.0, num_devices=2,
      needed_bytes=40.0).figures(LIMITS)
  assert figures['tokens_per_second'] == pytest.approx(30 / 2)
  assert figures['share_of_peak'] == pytest.approx(60 / 2 / (2 * 100))
  assert figures['share_of_bandwidth'] == pytest.approx(40 / 2 / (2 * 50))
  assert figures['runs'] == [[2.0, 4.0], [1.0, 2.0], [9.0, 18.0]]


def test_what_is_not_bound_by_memory_has_no_share_of_it():
  figures = made('shared', seconds=[1.0], own=60.0).figures(LIMITS)
  assert figures['share_of_bandwidth'] is None


def test_the_ratio_is_unshared_over_shared_and_its_ideal_of_operations():
  [found] = record.ratios([
      made('shared', seconds=[1.0], own=60.0),
      made('unshared', seconds=[3.0], own=240.0)])
  assert (found.ideal, found.seconds, found.cpu_seconds) == (4.0, 3.0, 3.0)
  assert found.figures()['share_of_ideal'] == pytest.approx(0.75)


def test_the_ideal_of_decoding_is_of_bytes():
  [found] = record.ratios([
      made('shared', seconds=[1.0], own=60.0, own_bytes=10.0),
      made('unshared', seconds=[3.0], own=60.0, own_bytes=50.0)])
  assert found.ideal == 5.0


def test_a_variant_without_its_pair_or_its_time_gives_no_ratio():
  assert record.ratios([
      made('shared', seconds=[1.0], own=60.0),
      made('unshared', seconds=[], own=60.0),
      made('shared', seconds=[1.0], own=60.0, case='alone')]) == []


def text(*records):
  stream = io.StringIO()
  made_report = report.Report(
      title='A title', limits=LIMITS, records=records)
  report.show(made_report, stream)
  json.dumps(made_report.content(), allow_nan=False)
  return stream.getvalue()


def test_the_page_says_what_it_assumes_and_what_sharing_gains():
  page = text(
      made('shared', seconds=[1.0], own=60.0, facts={'padding': 0.25}),
      made('unshared', seconds=[3.0], own=240.0))
  assert 'Assumed: a guess.' in page
  assert '% MFU' in page
  assert '25.0' in page
  assert '75%' in page


def test_the_page_says_what_did_not_fit():
  page = text(made('unshared', seconds=[], own=60.0, case='too_long'))
  assert 'too_long, unshared: does not fit into memory' in page


def test_losses_and_gaps_are_printed_beside_the_tables():
  page = text(record.Record(
      case='g', program='gap', variant='shared', readings=[measure.Reading(
          seconds=1.0, cpu_seconds=1.0, values={'mean_gap': 1.25e-7})]))
  assert 'g, shared: mean_gap 1.25e-07' in page
