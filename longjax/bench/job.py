"""`job=bench`: measures the programs of training on random tokens.

  python -m longjax --config=configs/bench.py

For each case the variants are compiled and run once, then timed in turn:
shared, unshared, shared, .. Whatever else the machine does meanwhile meets
both alike.
"""

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence

import jax
from absl import logging

from longjax import config as config_lib
from longjax.bench import (
    kernels,
    measure,
    programs,
    rates,
    record,
    report,
    suite,
    workload,
)
from longjax.data import records as records_lib
from longjax.model import huggingface_config
from longjax.parallel import mesh as mesh_lib
from longjax.parallel import multihost
from longjax.parallel import rules as rules_lib
from longjax.planner import flops
from longjax.train import initial, mirror

RESULT_FILE = 'bench.json'


def run(
    config: suite.BenchConfig,
    workdir: str | os.PathLike[str],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> int:
  """Measures all cases and writes `bench.json` after each.

  Args:
    config: what is measured, and on which mesh.
    workdir: a directory, or one on an object store.
    devices: None means all.

  Returns:
    The exit code.

  Raises:
    UserError: a case does not go with the mesh.
  """
  if config.cpu_devices and devices is None:  # Before any use of a device.
    mesh_lib.split_cpu(config.cpu_devices)
  copy = mirror.Mirror(workdir)
  rules = rules_lib.Rules(mesh_lib.make(config.mesh, devices))
  model = config.model or huggingface_config.load(
      initial.find(config.init_from))
  setting = programs.Setting(
      model=model, rules=rules, compute=config.compute, seed=config.seed)
  for name, case in config.cases.items():
    if isinstance(case, suite.Case):
      programs.check(name, case, setting)
  found: list[record.Record] = []
  with config.compute.matmul_precision():
    made = report.Report(
        title=_title(config, setting), limits=rates.find(config, rules),
        records=found)
    for records in _cases(config, setting):
      found += records
      multihost.on_primary(lambda: records_lib.write_text(
          copy.local / RESULT_FILE, json.dumps(_content(config, made))))
      copy.publish()
  if multihost.is_primary():
    report.show(made, sys.stdout)
  logging.info('Benchmark: %s', copy.remote / RESULT_FILE)
  return 0


def _title(config: suite.BenchConfig, setting: programs.Setting) -> str:
  mesh = setting.rules.mesh
  sizes = ', '.join(
      f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1)
  return (
      f'{config.suite}: {flops.num_parameters(setting.model) / 1e6:,.0f} '
      f'million parameters, {config.compute.dtype}; {mesh.size} x '
      f'{mesh.devices.flat[0].device_kind}{f", {sizes}" if sizes else ""}; '
      f'jax {jax.__version__}')


def _content(
    config: suite.BenchConfig, made: report.Report
) -> dict[str, object]:
  return made.content() | {'config': config_lib.resolved(config)}


def _cases(
    config: suite.BenchConfig, setting: programs.Setting
) -> Iterator[list[record.Record]]:
  """Measures one case after the other."""
  policy, num_layers = None, 0
  for number, (name, case) in enumerate(config.cases.items(), start=1):
    logging.info('%d/%d: %s', number, len(config.cases), name)
    if isinstance(case, suite.KernelCase):
      yield list(_of_kernel(name, case, setting))
      continue
    of_case = programs.with_depth(setting, case)
    if policy is None or num_layers != of_case.model.num_layers:
      policy = None  # Before the next one takes its memory.
      policy = programs.Policy(of_case)
      num_layers = of_case.model.num_layers
    yield _of_program(name, case, of_case, policy)
    gc.collect()


@dataclasses.dataclass(kw_only=True)
class _Variant:
  """A variant being measured."""

  prepared: programs.Prepared
  compile_seconds: float
  readings: list[measure.Reading]


def _of_program(
    name: str, case: suite.Case, setting: programs.Setting,
    policy: programs.Policy,
) -> list[record.Record]:
  """All variants in turn; one after the other if memory has no room for it."""
  found = _in_turn(name, case, case.variants, setting, policy)
  if found is not None:
    return found
  if len(case.variants) > 1:
    logging.info('%s: not all variants fit into memory side by side.', name)
  return [
      one for variant in case.variants
      for one in (
          _in_turn(name, case, (variant,), setting, policy)
          or [record.Record(case=name, program=case.program, variant=variant)])]


def _in_turn(
    name: str, case: suite.Case, names: Sequence[suite.Variant],
    setting: programs.Setting, policy: programs.Policy,
) -> list[record.Record] | None:
  """Prepares variants, then runs them in turn; None if they do not fit."""
  variants: dict[suite.Variant, _Variant] = {}
  try:
    for variant in names:
      with measure.CompileClock() as clock:
        prepared = programs.prepare(case, variant, setting, policy)
        prepared.warm_up()
      variants[variant] = _Variant(
          prepared=prepared, compile_seconds=clock.seconds, readings=[])
    for _ in range(case.repeats):
      for made in variants.values():
        made.readings.append(made.prepared.run())
    return [
        _record(name, case, setting, variant, made)
        for variant, made in variants.items()]
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
  # Out here nothing holds on to what the error came from. The update that
  # failed had taken the policy.
  variants.clear()
  gc.collect()
  policy.renew()
  return None


def _record(
    name: str, case: suite.Case, setting: programs.Setting,
    variant: suite.Variant, made: _Variant,
) -> record.Record:
  shared = programs.shared_workload(case, setting)
  own = shared if variant == 'shared' else workload.unshared(shared)

  def needed(work):
    return workload.needed_flops(case.program, work, setting.model).total

  def num_bytes(work):
    if case.program != 'decode':
      return 0.0
    return workload.decode_bytes(
        work, setting.model, width=setting.compute.activation_dtype.itemsize)

  return record.Record(
      case=name, program=case.program, variant=variant,
      readings=made.readings, compile_seconds=made.compile_seconds,
      num_tokens=workload.num_tokens(case.program, shared),
      needed_flops=needed(shared), own_flops=needed(own),
      needed_bytes=num_bytes(shared), own_bytes=num_bytes(own),
      num_devices=setting.rules.mesh.size,
      peak_bytes=made.prepared.peak_bytes(), facts=made.prepared.facts)


def _of_kernel(
    name: str, case: suite.KernelCase, setting: programs.Setting
) -> Iterator[record.Record]:
  """Attention by backend, on one device."""
  dtype = setting.compute.dtype
  if case.program == 'parity':
    for backend in case.backends:
      for tested in ('float32', 'bfloat16'):
        yield record.Record(
            case=name, program=case.program, variant=f'{backend} {tested}',
            facts=kernels.attention_errors(case, backend, tested))
    yield record.Record(
        case=name, program=case.program, variant='network float32',
        facts=kernels.network_errors(case))
    return
  forward = kernels.num_flops(setting.model, case.length)
  for backend in case.backends:
    with measure.CompileClock() as clock:
      speed = kernels.speed(case, backend, setting.model, dtype)
    for what, times in (('forward', 1.0), ('both', 3.0)):
      yield record.Record(
          case=name, program=case.program, variant=f'{backend} {what}',
          readings=speed[what], compile_seconds=clock.seconds,
          num_tokens=case.length, needed_flops=times * forward,
          own_flops=times * forward)
