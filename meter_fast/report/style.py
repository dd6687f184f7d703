"""The style sheet of the report page: cards in one column, light or dark as the system is. Knows no content."""

CSS = """
:root {
  --page: #f6f7f9; --card: #ffffff; --text: #1b2330; --quiet: #647084; --line: #e3e7ee; --track: #edf0f5;
  --tone1: #2563c9; --tone2: #d9661f; --tone3: #1d9a6c; --tone4: #9a4bc4; --tone5: #8b95a5; --tone6: #c2334d;
  --good: #1d9a6c; --good-soft: #dff4ea; --bad: #c2334d; --mark: #fff1c2; --mark-text: #6b4e00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e28; --text: #e7ebf2; --quiet: #93a0b4; --line: #2a3341; --track: #252d3a;
    --tone1: #6ea3f7; --tone2: #f59a5c; --tone3: #4fcf9e; --tone4: #c68be8; --tone5: #7c8798; --tone6: #f0758b;
    --good: #4fcf9e; --good-soft: #17382d; --bad: #f0758b; --mark: #4a3c10; --mark-text: #ffe08a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 44px 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin: 0 0 8px; font-weight: 600; }
p { margin: 4px 0 14px; max-width: 78ch; }
.quiet { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0 0; }
.facts .card { flex: 1 1 150px; padding: 12px 16px; }
.facts b { display: block; font-size: 20px; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.facts span { color: var(--quiet); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 13px; font-weight: 500; color: var(--quiet); padding: 0 12px 8px 0;
  white-space: nowrap; }
td { padding: 9px 12px 9px 0; border-top: 1px solid var(--line); vertical-align: middle; white-space: nowrap; }
td.number, th.number { text-align: right; padding-right: 20px; }
td.name { font-weight: 600; padding-right: 24px; }
td.name small { display: block; font-weight: 400; color: var(--quiet); white-space: normal; min-width: 150px; }
td.wide { width: 46%; min-width: 220px; }
.bar { position: relative; height: 14px; border-radius: 7px; background: var(--track); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 7px; background: var(--tone1); min-width: 2px; }
.bar .chance { width: 2px; border-radius: 0; inset: -4px auto -4px auto; background: var(--text); opacity: .75;
  min-width: 0; }
.bar .shuffled { width: 12px; height: 12px; inset: 1px auto auto auto; margin-left: -6px; border-radius: 50%;
  background: var(--card); border: 3px solid var(--tone2); }
.key { display: flex; flex-wrap: wrap; gap: 20px; font-size: 13px; color: var(--quiet); margin: 12px 0 0;
  padding: 0; list-style: none; }
.key li { display: flex; align-items: center; gap: 7px; }
.key i { display: inline-block; }
.key .is-score { width: 22px; height: 10px; border-radius: 5px; background: var(--tone1); }
.key .is-chance { width: 2px; height: 16px; background: var(--text); opacity: .75; }
.key .is-shuffled { width: 12px; height: 12px; border-radius: 50%; border: 3px solid var(--tone2); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px;
  margin-top: 14px; }
.chart { width: 100%; height: auto; display: block; }
.chart .grid { stroke: var(--line); }
.chart .tick { fill: var(--quiet); font-size: 12px; }
.chart path { fill: none; }
.chart .raw { opacity: .28; stroke-width: 1; }
.chart .mean { stroke-width: 2.2; stroke-linejoin: round; }
.chart .joined { stroke-width: 1.2; stroke-dasharray: 3 4; }
.chart .dot { stroke: var(--card); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 6px 0 0; padding: 0; list-style: none;
  font-size: 13px; color: var(--quiet); }
.legend li { display: flex; align-items: center; gap: 7px; }
.spot { width: 9px; height: 9px; border-radius: 50%; }
.swatch { width: 14px; height: 4px; border-radius: 2px; }
path.tone1 { stroke: var(--tone1); } circle.tone1 { fill: var(--tone1); } i.tone1 { background: var(--tone1); }
path.tone2 { stroke: var(--tone2); } circle.tone2 { fill: var(--tone2); } i.tone2 { background: var(--tone2); }
path.tone3 { stroke: var(--tone3); } circle.tone3 { fill: var(--tone3); } i.tone3 { background: var(--tone3); }
path.tone4 { stroke: var(--tone4); } circle.tone4 { fill: var(--tone4); } i.tone4 { background: var(--tone4); }
path.tone5 { stroke: var(--tone5); } circle.tone5 { fill: var(--tone5); } i.tone5 { background: var(--tone5); }
path.tone6 { stroke: var(--tone6); } circle.tone6 { fill: var(--tone6); } i.tone6 { background: var(--tone6); }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 16px;
  margin-top: 14px; }
.example { display: flex; flex-direction: column; gap: 12px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.pair figure { margin: 0; }
.pair img { width: 100%; aspect-ratio: 1; display: block; border-radius: 8px; border: 1px solid var(--line); }
.pair figcaption { font-size: 12px; color: var(--quiet); margin-top: 4px; }
.caption { font-size: 16px; line-height: 1.45; }
.hidden { background: var(--mark); color: var(--mark-text); border-radius: 5px; padding: 1px 7px;
  font-weight: 600; }
.tag { float: right; font-size: 12px; color: var(--quiet); border: 1px solid var(--line); border-radius: 99px;
  padding: 1px 10px; margin-left: 8px; }
.fills { display: grid; grid-template-columns: minmax(70px, max-content) 1fr 48px; gap: 4px 10px;
  align-items: center; font-size: 14px; }
.fills .bar, .claims .bar { height: 10px; }
.fills .bar i { background: var(--tone5); }
.fills .right { color: var(--good); font-weight: 600; }
.fills .bar i.right { background: var(--good); }
.fills span:nth-child(3n), .claims .share { text-align: right; font-variant-numeric: tabular-nums;
  font-size: 13px; }
.claims { border-top: 1px solid var(--line); padding-top: 10px; font-size: 13px; display: grid; gap: 8px; }
.claims .said { display: grid; grid-template-columns: 1fr 48px; column-gap: 10px; align-items: center; }
.claims .said > div:first-child { grid-column: 1 / -1; }
.claims .bar i { background: var(--bad); }
.claims .true .bar i { background: var(--good); }
.plain td { padding: 6px 12px 6px 0; white-space: normal; }
.plain td:first-child { color: var(--quiet); width: 220px; }
details { margin-top: 16px; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  margin: 12px 0 0; }
@media (max-width: 700px) { td.wide { min-width: 110px; } main { padding: 24px 14px 48px; } }
footer { margin-top: 48px; font-size: 13px; color: var(--quiet); }
"""
