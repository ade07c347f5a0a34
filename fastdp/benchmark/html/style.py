"""The style sheet of reports: light and dark by the reader's choice, one column on narrow screens, sober on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1a1f29; --soft: #566070; --line: #d9dee6; --grid: #e8ebf0;
  --good: #0b6e3a; --bad: #a4262c; --warn: #8a4b00; --good-back: #e7f5ec; --bad-back: #fdebec; --warn-back: #fff3df;
  --input: #c2457a; --scatter: #2f6fde; --compute: #2c8a4b; --merge: #0e8a9c; --wait: #8a94a3;
  --communication: #d1541f; --update: #8a4fc7; --other: #a58a3c;
  --s0: #2f6fde; --s1: #d1541f; --s2: #2c8a4b; --s3: #8a4fc7; --s4: #a77b00; --s5: #0e8a9c; --s6: #b8326f;
  --s7: #566070;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1b2029; --text: #e7eaf0; --soft: #a3adbc; --line: #343c4a; --grid: #2a313d;
    --good: #6fd398; --bad: #ff9a9e; --warn: #f2bd6b; --good-back: #16301f; --bad-back: #3a1c20;
  --warn-back: #36290f;
    --input: #ee7fb0; --scatter: #6a9bf5; --compute: #5cbb7c; --merge: #3fb9cb; --wait: #7d8796;
    --communication: #f08354; --update: #b389e8; --other: #8f7c45;
    --s0: #6a9bf5; --s1: #f08354; --s2: #5cbb7c; --s3: #b389e8; --s4: #d3a93a; --s5: #3fb9cb; --s6: #ee7fb0;
    --s7: #a3adbc;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 20px 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 85ch; overflow-wrap: anywhere; }
header p { max-width: none; }
.soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin: 20px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .875rem; display: block; overflow-wrap: anywhere; }
.note { border-radius: 8px; padding: 10px 14px; margin: 16px 0 0; max-width: none; }
.note.good { background: var(--good-back); color: var(--good); }
.note.bad { background: var(--bad-back); color: var(--bad); }
.note.warn { background: var(--warn-back); color: var(--warn); }
.scroll { overflow-x: auto; margin: 12px 0 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding: 0 0 4px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.word, td.word { text-align: left; font-weight: 500; overflow-wrap: anywhere; min-width: 7em; }
th.figure, td.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
details { margin: 12px 0 0; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
p code { white-space: nowrap; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  margin: 8px 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: minmax(7em, max-content) 1fr; gap: 4px 18px; margin: 12px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 8px 40px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 10px 0 0; list-style: none;
  font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.legend i { width: 14px; height: 12px; border-radius: 3px; flex: none; }
.legend i.dash { height: 0; border-radius: 0; border-top: 2px dashed var(--soft); width: 20px; }
.bars { display: grid; grid-template-columns: minmax(4em, max-content) 1fr minmax(4.5em, max-content);
  gap: 5px 12px;
  align-items: center; font-size: .875rem; margin: 6px 0 0; }
.bars .name { overflow-wrap: anywhere; max-width: 15em; } .bars .value { text-align: right;
  font-variant-numeric: tabular-nums; }
.bar { height: 18px; display: flex; background: var(--grid); border-radius: 4px; overflow: hidden; }
.bar i { display: block; height: 100%; min-width: 0; border-right: 1px solid var(--card); }
.bar i:last-child { border-right: 0; }
.lane { position: relative; height: 18px; background: var(--grid); border-radius: 4px; overflow: hidden; }
.lane i { position: absolute; top: 0; height: 100%; border-right: 1px solid var(--card); }
.axis { position: relative; height: 1.4em; color: var(--soft); font-size: .8rem;
  font-variant-numeric: tabular-nums; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span:first-child { transform: none; } .axis span:last-child { transform: translateX(-100%); }
figure { margin: 12px 0 0; }
.plot { padding: 30px 20px 44px 66px; }
.plot svg { display: block; width: 100%; height: 300px; overflow: visible; }
.plot text { fill: var(--soft); font-size: 13px; font-family: inherit; font-variant-numeric: tabular-nums; }
.plot .grid { stroke: var(--grid); } .plot .base { stroke: var(--line); }
.plot .ideal { stroke-dasharray: 6 5; stroke-width: 1.5; opacity: .75; }
.plot .link { stroke-width: 2; } .plot .reach { stroke-width: 2; opacity: .8; }
.forest { position: relative; height: 22px;
  background: linear-gradient(var(--line), var(--line)) 50% 0 / 1px 100% no-repeat; }
.forest i, .forest b { position: absolute; }
.forest i { top: 10px; height: 2px; background: var(--soft); }
.forest b { top: 6px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%; background: var(--soft); }
.forest.good i, .forest.good b { background: var(--good); } .forest.bad i, .forest.bad b { background: var(--bad); }
.alone { clip-path: inset(50%); position: absolute; width: 1px; height: 1px; overflow: hidden;
  white-space: nowrap; }
@media (max-width: 600px) {
  main { padding: 20px 12px 40px; }
  section { padding: 16px 14px; }
  h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: 10px 12px; } .tile b { font-size: 1.2rem; }
  .plot { padding: 28px 12px 40px 52px; } .plot svg { height: 240px; } .plot text { font-size: 12px; }
  .bars .name { max-width: 7.5em; } .bars { gap: 5px 8px; }
  dl { grid-template-columns: 7.5em 1fr; gap: 4px 10px; }
  table, tbody, caption { display: block; }
  thead { clip-path: inset(50%); position: absolute; width: 1px; height: 1px; overflow: hidden; }
  tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 20px; padding: 8px 0;
    border-bottom: 1px solid var(--line); }
  tr th.word { grid-column: 1 / -1; border: 0; padding: 0 0 2px; font-weight: 600; }
  tr td { display: flex; justify-content: space-between; gap: 8px; border: 0; padding: 1px 0; }
  tr td.wide, tr td.word { grid-column: 1 / -1; white-space: normal; }
  tr td.word { justify-content: flex-start; }
  td::before { content: attr(data-label); color: var(--soft); font-size: .85rem; flex: none; }
}
@media print {
  :root { --page: #fff; --card: #fff; --text: #000; --soft: #444; --line: #bbb; --grid: #e6e6e6; --good: #0b6e3a;
    --bad: #a4262c; --warn: #8a4b00; --good-back: #fff; --bad-back: #fff; --warn-back: #fff; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  section, .tile { border-radius: 0; } section, .note { break-inside: auto; }
  figure, tr, .tile, h2, h3, .bars { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; } th, td { padding: 4px 8px 4px 0; } thead th.figure { white-space: normal; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(100px, 1fr)); } .tile b { font-size: 13pt; }
  .tile span { font-size: 8pt; }
}
""".strip()
