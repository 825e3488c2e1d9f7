"""The page of a report: its skeleton, its style and its little script.

Everything is inline and the page's own policy forbids fetching anything and
running any script but ours, so what a model wrote can only ever be read.
"""

import base64
import hashlib
import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark;
  --bg: #f6f6f4; --panel: #fff; --ink: #1d1f23; --muted: #636873;
  --rule: #e2e3e7; --accent: #2458c5; --mark: #ffe58a; --shade: #f3d9cf;
  --band: #dbe9dd; --edge: #7fae88; --pill: 84%;
  --good: #0b7a55; --bad: #b3401c;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0569b; --c4: #a67c00;
  --c5: #3a9bd9; --c6: #7a5cc4; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14161a; --panel: #1c1f25; --ink: #e6e7ea; --muted: #9ba1ad;
  --rule: #31353e; --accent: #86aaff; --mark: #6a5600; --shade: #4a2f26;
  --band: #22382a; --edge: #4f7a5a; --pill: 24%;
  --good: #41c99a; --bad: #ff9270;
  --c0: #4aa8e0; --c1: #ff8a4c; --c2: #2fc99a; --c3: #e08fcb; --c4: #d9ac2e;
  --c5: #8fd0fa; --c6: #ac95f0; } }
* { box-sizing: border-box; }
[hidden] { display: none; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 1160px; margin: 0 auto; padding: 0 20px 60px; }
h1 { font-size: 24px; margin: 28px 0 2px; }
h2 { font-size: 19px; margin: 40px 0 10px; }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 6px 0; }
a { color: var(--accent); text-decoration: none; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 10px; }
.muted { color: var(--muted); }
.small { font-size: 13px; }
.panel, .chart, .group { background: var(--panel); border-radius: 8px;
  border: 1px solid var(--rule); }
.panel { padding: 14px 18px; overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 22px; }
.facts b { font-weight: 600; }
.scores { display: flex; flex-wrap: wrap; gap: 10px 40px; margin: 4px 0 14px; }
.scores div { line-height: 1.25; }
.scores .value { font-size: 32px; font-weight: 650; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.panel > table { width: 100%; }
th { font-weight: 600; text-align: left; font-size: 13px;
  color: var(--muted); }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
tbody th { color: var(--ink); font-size: 14px; white-space: nowrap; }
tr.total th, tr.total td { border-top: 2px solid var(--rule); }
td .ci { color: var(--muted); font-size: 12px; white-space: nowrap; }
td.up .delta { color: var(--good); } td.down .delta { color: var(--bad); }
.track { display: block; position: relative; height: 5px; width: 110px;
  max-width: 100%; background: var(--rule); border-radius: 3px;
  margin-top: 3px; }
.track i { position: absolute; left: 0; top: 0; bottom: 0; border-radius: 3px;
  background: var(--accent); }
.grid2 .ci { display: block; }
.grid2 .track { width: 76px; }
.grid2 { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.chart { margin: 0; padding: 12px 14px 6px; min-width: 0; display: flex;
  flex-direction: column; }
.chart svg { display: block; width: 100%; height: auto; margin-top: auto;
  padding-top: 4px; overflow: visible; }
.chart text { font-size: 11.5px; fill: var(--muted); }
.chart .label { font-size: 11px; }
figcaption .muted { font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; }
.key { white-space: nowrap; color: var(--muted); }
.key b { color: var(--ink); font-weight: 600; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  vertical-align: middle; margin-right: 5px; }
.key i.box { height: 11px; }
i.ink { background: var(--ink); }
i.c0 { background: var(--c0); } i.c1 { background: var(--c1); }
i.c2 { background: var(--c2); } i.c3 { background: var(--c3); }
i.c4 { background: var(--c4); } i.c5 { background: var(--c5); }
i.c6 { background: var(--c6); }
i.band { background: var(--band); outline: 1px dashed var(--edge); }
i.shade { background: var(--shade); }
svg .ink { stroke: var(--ink); } svg .c0 { stroke: var(--c0); }
svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); }
svg .c3 { stroke: var(--c3); } svg .c4 { stroke: var(--c4); }
svg .c5 { stroke: var(--c5); } svg .c6 { stroke: var(--c6); }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.curve.ink { stroke-width: 2.2; }
.raw { fill: none; stroke-width: 1; opacity: .28; }
.bar { fill: none; stroke-width: 1.4; opacity: .75; }
.dot { stroke-width: 2; fill: var(--panel); }
.grid { stroke: var(--rule); } .tick, .cursor { stroke: var(--muted); }
.stage { stroke: var(--muted); stroke-dasharray: 2 3; }
.shade { fill: var(--shade); } polygon.band { fill: var(--band); }
.edge { fill: none; stroke: var(--edge); stroke-dasharray: 4 3; }
.readout { font-size: 12px; min-height: 18px; }
.filters { display: flex; flex-wrap: wrap; gap: 8px 16px; margin: 0 0 14px;
  align-items: center; }
select, input { font: inherit; font-size: 14px; padding: 3px 6px;
  color: var(--ink); background: var(--panel); max-width: 100%;
  border: 1px solid var(--rule); border-radius: 6px; }
.group { padding: 12px 18px 14px; margin-bottom: 14px; }
.group > header { display: flex; flex-wrap: wrap; gap: 2px 14px;
  align-items: center; font-size: 13px; color: var(--muted); }
.tag { background: var(--accent); color: var(--panel); border-radius: 5px;
  padding: 0 8px; font-weight: 600; }
.question { font-size: 16px; margin: 8px 0 2px; white-space: pre-wrap; }
.row { display: grid; grid-template-columns: 74px 1fr; gap: 0 10px;
  font-size: 14px; margin: 3px 0; }
.row > :first-child { color: var(--muted); font-size: 13px; }
.row > * { min-width: 0; }
summary { cursor: pointer; color: var(--accent); font-size: 13px; }
details { margin: 4px 0; }
.docs { max-height: 520px; overflow: auto; border: 1px solid var(--rule);
  border-radius: 6px; padding: 4px 14px; margin: 6px 0; font-size: 13.5px; }
.docs section { border-left: 3px solid transparent; padding-left: 10px;
  margin-left: -13px; }
.docs section.source { border-color: var(--c4); }
.docs h4 { margin: 10px 0 0; font-size: 13px; }
pre, .docs p, .written { white-space: pre-wrap; margin: 2px 0 8px; }
pre { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; }
mark { background: var(--mark); color: inherit; border-radius: 3px;
  padding: 1px 0; }
.sample { border-top: 1px solid var(--rule); padding: 8px 0 4px; display: grid;
  grid-template-columns: 118px 1fr; gap: 2px 14px; }
.sample > * { min-width: 0; }
.sample:first-of-type { margin-top: 10px; }
.numbers > span { display: block; width: fit-content; }
.numbers { font-size: 12.5px; color: var(--muted); line-height: 1.4;
  font-variant-numeric: tabular-nums; }
.pill { display: inline-block; min-width: 44px; text-align: center;
  border-radius: 5px; padding: 0 7px; font-weight: 650; color: var(--ink);
  font-size: 13.5px; border: 1px solid transparent;
  background: hsl(calc(12 + var(--r) * 138) 62% var(--pill)); }
.written { font-size: 14px; margin: 0 0 4px; }
.thinking { color: var(--muted); font-style: italic; }
.flag { color: var(--bad); font-weight: 600; }
.note { color: var(--c4); font-weight: 600; }
.matrix td, .health td { white-space: nowrap; }
.matrix > summary { margin: 10px 0 6px; }
@media (max-width: 760px) {
  td .ci { display: block; font-size: 11px; }
  .track, .grid2 .track { width: 56px; }
  th, td { padding-right: 10px; }
  tbody th { white-space: normal; }
}
@media (max-width: 560px) {
  main { padding: 0 10px 40px; }
  .panel, .group { padding: 10px 12px; }
  .chart { padding: 10px 8px 4px; }
  .chart text { font-size: 13px; } .chart .label { font-size: 12px; }
  .sample, .row { grid-template-columns: 1fr; }
  .numbers { display: flex; flex-wrap: wrap; gap: 0 12px; }
  th, td { padding-right: 6px; }
}
"""

SCRIPT = """
'use strict';
for (const svg of document.querySelectorAll('svg[data-points]')) {
  const data = JSON.parse(svg.dataset.points);
  const cursor = svg.querySelector('.cursor');
  const readout = svg.nextElementSibling;
  const to = data.log ? Math.log : Number, from = data.log ? Math.exp : Number;
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) * data.width / box.width;
    const share = (place - data.left) / (data.right - data.left);
    const low = to(data.low), high = to(data.high);
    const wanted = from(low + Math.min(1, Math.max(0, share)) * (high - low));
    let best = null;
    for (const line of data.lines) for (const x of line.x)
      if (best === null || Math.abs(x - wanted) < Math.abs(best - wanted))
        best = x;
    const parts = data.lines.map(line => {
      const i = line.x.indexOf(best);
      return i < 0 || line.y[i] === '' ? null : line.name + ' ' + line.y[i];
    }).filter(part => part !== null);
    readout.textContent = data.label + ' ' + best + ': ' + parts.join(', ');
    const x = data.left + (to(best) - low) / (high - low)
        * (data.right - data.left);
    cursor.setAttribute('x1', x);
    cursor.setAttribute('x2', x);
    cursor.removeAttribute('hidden');
  });
  svg.addEventListener('pointerleave', () => {
    cursor.setAttribute('hidden', '');
    readout.textContent = '';
  });
}
const filters = document.querySelector('.filters');
if (filters) {
  const groups = [...document.querySelectorAll('.group[data-task]')];
  const update = () => {
    const get = name => filters.querySelector('[name=' + name + ']').value;
    const words = get('words').toLowerCase();
    let shown = 0;
    for (const group of groups) {
      const fits = ['task', 'step', 'outcome'].every(
          name => !get(name) || group.dataset[name] === get(name));
      group.hidden = !(fits &&
          (!words || group.textContent.toLowerCase().includes(words)));
      shown += !group.hidden;
    }
    document.querySelector('.shown').textContent =
        shown + ' of ' + groups.length + ' prompts shown';
  };
  filters.addEventListener('input', update);
  update();
}
"""


def text(value: object) -> str:
  """Text that is shown as it is, in elements and in quoted attributes."""
  return html.escape(str(value), quote=True)


def render(title: str, sections: Sequence[str]) -> str:
  """A whole page of sections, which are HTML already."""
  digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  policy = (
      "default-src 'none'; style-src 'unsafe-inline'; "
      f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
  body = '\n'.join(section for section in sections if section)
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
      f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n'
      f'<body><main>\n{body}\n</main>\n'
      f'<script>{SCRIPT}</script></body></html>\n'
  )
