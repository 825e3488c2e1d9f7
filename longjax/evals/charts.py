"""Line charts as inline SVG, drawn for reading rather than for exploring.

A chart is a `<figure>`: title and unit, a legend with each line's last value,
the drawing, and a line that shows the values under the pointer (`page.SCRIPT`
fills it in; without scripts the drawing is complete).
"""

import dataclasses
import json
import math
from collections.abc import Sequence

from longjax.evals import axes, page

_WIDTH, _HEIGHT = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
# More points than pixels add bytes, not information.
_MAX_POINTS = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One curve.

  Attributes:
    name: in the legend.
    x: places, growing.
    y: values; NaN leaves a gap.
    color: 0..6, or None for the colour of text, which leads the eye.
    window: centred moving average over so many points; 1 draws the values.
    low: lower ends of error bars, NaN for none; empty: no error bars.
    high: upper ends.
    shift: moves the drawing to the right, so that error bars stand apart.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  color: int | None = None
  window: int = 1
  low: Sequence[float] = ()
  high: Sequence[float] = ()
  shift: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
  """Lines over one pair of axes.

  Attributes:
    title: what is shown.
    unit: of the vertical axis, and anything a reader must know.
    lines: the curves; a chart without a finite value is not drawn.
    x_label: of the horizontal axis.
    x_ticks: places of the ticks; empty: chosen.
    is_x_log: logarithmic horizontal axis.
    is_y_log: logarithmic vertical axis; values <= 0 are left out.
    y_min: the vertical axis starts here or lower; None: at the lowest value.
    y_max: the vertical axis ends here or higher.
    band: a line's low and high edge over x, filled between.
    band_name: its name in the legend.
    shades: ranges of x with a tinted background.
    shade_name: their name in the legend.
    stages: (x, name) of vertical lines where a stage begins.
  """

  title: str
  unit: str
  lines: Sequence[Line]
  x_label: str = 'step'
  x_ticks: Sequence[float] = ()
  is_x_log: bool = False
  is_y_log: bool = False
  y_min: float | None = None
  y_max: float | None = None
  band: Line | None = None
  band_name: str = ''
  shades: Sequence[tuple[float, float]] = ()
  shade_name: str = ''
  stages: Sequence[tuple[float, str]] = ()


def figure(chart: Chart) -> str:
  """The chart as an HTML figure; '' if it has nothing to show."""
  fit = map(_positive, chart.lines) if chart.is_y_log else chart.lines
  lines = [line for line in map(_thin, fit) if any(map(math.isfinite, line.y))]
  if not lines:
    return ''
  x_axis, x_ticks = _x_axis(chart, lines)
  y_axis, y_ticks = _y_axis(chart, lines)
  parts = [
      *_shades(chart, x_axis),
      *_grid(chart, x_axis, x_ticks, y_axis, y_ticks),
      *_band(chart, x_axis, y_axis),
  ]
  # The line in the colour of text goes last, on top of the others.
  for line in sorted(lines, key=lambda line: line.color is None):
    parts += _curve(line, x_axis, y_axis)
  ends = f'y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
  parts.append(f'<line class="cursor" {ends} hidden></line>')
  points = json.dumps({
      'label': chart.x_label,
      'left': _LEFT, 'right': _WIDTH - _RIGHT, 'width': _WIDTH,
      'low': x_axis.low, 'high': x_axis.high, 'log': x_axis.is_log,
      'lines': [
          {'name': line.name, 'x': list(line.x),
           'y': [axes.number(y) if math.isfinite(y) else '' for y in line.y]}
          for line in lines],
  })
  return (
      '<figure class="chart"><figcaption><b>' + page.text(chart.title)
      + '</b> <span class="muted">' + page.text(chart.unit)
      + '</span></figcaption>' + _legend(chart, lines)
      + f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="'
      + page.text(chart.title) + '" data-points="' + page.text(points) + '">'
      + ''.join(parts) + '</svg><div class="readout muted"></div></figure>')


def moving_average(values: Sequence[float], window: int) -> list[float]:
  """Centred average over the finite values of a window, cut at the ends."""
  if window <= 1:
    return list(values)
  averaged = []
  for i in range(len(values)):
    near = values[max(0, i - window // 2):i + window // 2 + 1]
    finite = [v for v in near if math.isfinite(v)]
    averaged.append(sum(finite) / len(finite) if finite else math.nan)
  return averaged


def _positive(line: Line) -> Line:
  return dataclasses.replace(
      line, y=[y if y > 0 else math.nan for y in line.y])


def _thin(line: Line) -> Line:
  """Averages neighbours until the points are few enough."""
  size = math.ceil(len(line.x) / _MAX_POINTS)
  if size <= 1 or line.low:
    return line

  def mean(values):
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan

  starts = range(0, len(line.x), size)
  return dataclasses.replace(
      line, window=math.ceil(line.window / size),
      x=[line.x[s] for s in starts],
      y=[mean(line.y[s:s + size]) for s in starts])


def _x_axis(
    chart: Chart, lines: Sequence[Line]
) -> tuple[axes.Axis, list[float]]:
  low = min(line.x[0] for line in lines)
  high = max(line.x[-1] for line in lines)
  if high == low:
    low, high = (low / 2, high * 2) if chart.is_x_log else (low - 1, high + 1)
  elif chart.is_x_log:
    low, high = low / 1.15, high * 1.15
  axis = axes.Axis(low, high, _LEFT, _WIDTH - _RIGHT, chart.is_x_log)
  places = list(chart.x_ticks) or [
      t for t in axes.ticks(low, high, 6) if low <= t <= high]
  return axis, places


def _y_axis(
    chart: Chart, lines: Sequence[Line]
) -> tuple[axes.Axis, list[float]]:
  values = [y for a in lines for y in (*a.y, *a.low, *a.high)]
  if chart.band is not None:
    values += [*chart.band.low, *chart.band.high]
  values = [v for v in values if math.isfinite(v)]
  if chart.is_y_log:
    first = math.floor(math.log10(min(values)))
    last = max(first + 1, math.ceil(math.log10(max(values))))
    every = math.ceil((last - first) / 6)
    places = [10.0 ** e for e in range(first, last + 1, every)]
    low, high = 10.0 ** first, max(10.0 ** last, places[-1])
  else:
    low, high = min(values), max(values)
    low = low if chart.y_min is None else min(chart.y_min, low)
    high = high if chart.y_max is None else max(chart.y_max, high)
    places = axes.ticks(low, high, 5)
    low, high = places[0], places[-1]
  return axes.Axis(low, high, _HEIGHT - _BOTTOM, _TOP, chart.is_y_log), places


def _grid(chart, x_axis, x_ticks, y_axis, y_ticks) -> list[str]:
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
  label = '{:.0e}'.format if chart.is_y_log else axes.number
  parts = []
  for tick in y_ticks:
    y = y_axis(tick)
    parts.append(
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" '
        f'y2="{y:.1f}"></line><text x="{_LEFT - 6}" y="{y + 4:.1f}" '
        f'text-anchor="end">{label(tick)}</text>')
  for tick in x_ticks:
    x = x_axis(tick)
    parts.append(
        f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" '
        f'y2="{bottom + 4}"></line><text x="{x:.1f}" y="{bottom + 16}" '
        f'text-anchor="middle">{axes.number(tick)}</text>')
  parts.append(
      f'<text class="label" x="{right}" y="{_HEIGHT - 4}" text-anchor="end">'
      f'{page.text(chart.x_label)}</text>')
  for place, name in chart.stages:
    x = x_axis(place)
    parts.append(
        f'<line class="stage" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" '
        f'y2="{bottom}"></line><text class="label" x="{x + 4:.1f}" '
        f'y="{_TOP + 10}">{page.text(name)}</text>')
  return parts


def _shades(chart: Chart, x_axis: axes.Axis) -> list[str]:
  parts = []
  for start, end in chart.shades:
    left, right = x_axis(start), x_axis(end)
    parts.append(
        f'<rect class="shade" x="{left:.1f}" y="{_TOP}" '
        f'width="{max(right - left, 1.5):.1f}" '
        f'height="{_HEIGHT - _BOTTOM - _TOP}"></rect>')
  return parts


def _band(chart: Chart, x_axis: axes.Axis, y_axis: axes.Axis) -> list[str]:
  if chart.band is None:
    return []
  edges = [
      (x_axis(x), y_axis(low), y_axis(high))
      for x, low, high in zip(chart.band.x, chart.band.low, chart.band.high)
      if math.isfinite(low) and math.isfinite(high)]
  if not edges:
    return []
  lower = [f'{x:.1f},{low:.1f}' for x, low, _ in edges]
  upper = [f'{x:.1f},{high:.1f}' for x, _, high in edges]
  return [
      f'<polygon class="band" points="{" ".join(lower + upper[::-1])}">'
      '</polygon>',
      f'<polyline class="edge" points="{" ".join(lower)}"></polyline>',
      f'<polyline class="edge" points="{" ".join(upper)}"></polyline>']


def _curve(line: Line, x_axis: axes.Axis, y_axis: axes.Axis) -> list[str]:
  color = 'ink' if line.color is None else f'c{line.color % 7}'
  places = [x_axis(x) + line.shift for x in line.x]
  parts = []
  if line.window > 1 and line.color is None:
    raw = _path(places, line.y, y_axis)
    parts.append(f'<path class="raw {color}" d="{raw}"></path>')
  smooth = moving_average(line.y, line.window)
  parts.append(
      f'<path class="curve {color}" d="{_path(places, smooth, y_axis)}">'
      '</path>')
  for x, low, high in zip(places, line.low, line.high):
    if math.isfinite(low) and math.isfinite(high):
      parts.append(
          f'<path class="bar {color}" d="M{x:.1f} {y_axis(low):.1f}'
          f'V{y_axis(high):.1f}"></path>')
  finite = [(x, y) for x, y in zip(places, smooth) if math.isfinite(y)]
  if line.low or len(finite) == 1:
    parts += [
        f'<circle class="dot {color}" cx="{x:.1f}" cy="{y_axis(y):.1f}" '
        'r="3.2"></circle>' for x, y in finite]
  return parts


def _path(
    places: Sequence[float], values: Sequence[float], y_axis: axes.Axis
) -> str:
  parts, pen = [], 'M'
  for x, value in zip(places, values):
    if math.isfinite(value):
      parts.append(f'{pen}{x:.1f} {y_axis(value):.1f}')
    pen = 'L' if math.isfinite(value) else 'M'
  return ''.join(parts)


def _legend(chart: Chart, lines: Sequence[Line]) -> str:
  keys = []
  for line in lines:
    color = 'ink' if line.color is None else f'c{line.color % 7}'
    value = ''
    if not line.low:
      smooth = moving_average(line.y, line.window)
      last = next(y for y in reversed(smooth) if math.isfinite(y))
      value = f' <b>{axes.number(last)}</b>'
    keys.append(
        f'<span class="key"><i class="{color}"></i>{page.text(line.name)}'
        f'{value}</span>')
  boxes = (('band', chart.band_name if chart.band is not None else ''),
           ('shade', chart.shade_name if chart.shades else ''))
  keys += [
      f'<span class="key"><i class="box {kind}"></i>{page.text(name)}</span>'
      for kind, name in boxes if name]
  return f'<div class="legend">{"".join(keys)}</div>'
