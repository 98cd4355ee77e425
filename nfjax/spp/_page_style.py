"""How a report looks: light and dark, on a wide screen, a phone and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1b1d21; --paper: #ffffff; --stripe: #f3f4f6; --rule: #d0d4da; --muted: #5b626c;
  --exploding: #b3201c; --vanishing: #6a3ab2; --preserved: #176f35; --non-finite: #b3201c;
  --curve0: #0072b2; --curve1: #c98500; --curve2: #00805d; --curve3: #d55e00; --curve4: #b65f91;
  --curve5: #3b9fd6; --curve6: #000000; --curve7: #7f7f1f;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --paper: #15171a; --stripe: #1e2125; --rule: #43484f; --muted: #a3aab4;
    --exploding: #ff8a80; --vanishing: #c3a3ff; --preserved: #6fd08c; --non-finite: #ff8a80;
    --curve0: #4aa8e0; --curve1: #e69f00; --curve2: #27c397; --curve3: #f07f2e; --curve4: #e09cc3;
    --curve5: #8fd0f5; --curve6: #ffffff; --curve7: #c6c65a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.1rem 0 .35rem; }
p { margin: .35rem 0; }
ol, ul { padding-left: 1.4rem; margin: .4rem 0; }
li { margin: .5rem 0; overflow-wrap: anywhere; }
code { font: .875em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; unicode-bidi: isolate; }
.kicker, .small, figcaption p { color: var(--muted); font-size: .875rem; }
.kicker { margin: 0; }
.headline { font-size: 1.2rem; font-weight: 600; margin: 0 0 1rem; }
.badge {
  display: inline-block; padding: .05rem .5rem; border: 1.5px solid currentColor; border-radius: 1rem;
  font-size: .85rem; font-weight: 600; white-space: nowrap;
}
.exploding { color: var(--exploding); } .vanishing { color: var(--vanishing); }
.preserved { color: var(--preserved); } .non-finite { color: var(--non-finite); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--rule); border-left: .35rem solid; border-radius: .4rem; padding: .7rem .9rem; }
.card > * { color: var(--ink); }
.card > h3 { margin-top: 0; display: flex; flex-wrap: wrap; gap: .3rem .6rem; align-items: center; }
.card .exploding, .card .vanishing, .card .preserved, .card .non-finite { font-weight: 600; }
.remedy { border-left: .2rem solid var(--preserved); padding-left: .6rem; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figcaption strong { display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: center; }
figcaption p { margin: .1rem 0 .3rem; }
.plot { display: block; width: 100%; height: auto; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
.legend li { margin: 0; }
.swatch { vertical-align: middle; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th:not(:first-child) { min-width: 4.6rem; }
thead th { border-bottom: 1.5px solid var(--rule); white-space: normal; vertical-align: bottom; line-height: 1.25; }
tbody th { font-weight: normal; }
.text { text-align: left; }
tbody { background: var(--paper); }
tbody:nth-of-type(even) { background: var(--stripe); }
tbody .name { position: sticky; left: 0; background: inherit; }
tbody .name { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
tbody tr { background: inherit; }
tr.turn > :first-child { box-shadow: inset .3rem 0 var(--exploding); font-weight: 700; }
tr.turn.vanishing > :first-child { box-shadow: inset .3rem 0 var(--vanishing); }
tr.turn > * { color: var(--ink); border: solid var(--exploding); border-width: 1.5px 0; }
tr.turn.vanishing > * { border-color: var(--vanishing); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media (max-width: 34rem) {
  body { padding: 1rem .75rem 3rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  th, td { padding: .25rem .35rem; } td.text { white-space: normal; }
  tbody .name { min-width: 6rem; max-width: 46vw; }
  tbody .badge { white-space: normal; overflow-wrap: normal; border-radius: .5rem; }
}
@media print {
  :root { color-scheme: light; }
  body { font-size: 10.5pt; padding: 0; } main { max-width: none; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .12rem .3rem; }
  thead { display: table-header-group; } tr, .card, li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .grid { grid-template-columns: 1fr 1fr; }
}
"""
