"""The report's style sheet: system fonts, colours for light and dark."""

STYLE = """
:root{color-scheme:light dark;--bg:#f7f8fa;--card:#fff;--ink:#171b22;--dim:#626c7a;--line:#e3e7ec;--accent:#0d7a6f;
--accent-soft:#dff3ef;--full:#a9b3c1;--most:#7cc4ba;--code:#fbfcfd;--kw:#8a3ea8;--fn:#1c5fb8;--str:#2f7d32;--num:#a8540a;--com:#7a8594}
@media (prefers-color-scheme:dark){:root{--bg:#0f1217;--card:#171b22;--ink:#e6e9ee;--dim:#98a2b0;--line:#2a313b;
--accent:#3fcab8;--accent-soft:#12352f;--full:#566170;--most:#2c7f74;--code:#12161c;--kw:#cf9be4;--fn:#82b4f5;--str:#93cf95;
--num:#e8ad74;--com:#7f8a99}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:36px 24px 60px}
h1{font-size:32px;line-height:1.2;margin:2px 0 6px;letter-spacing:-.02em}
h2{font-size:20px;margin:0 0 14px;letter-spacing:-.01em}
h4{margin:18px 0 8px;font-size:14px}
h4 .dim{font-weight:400;margin-left:6px}
p{margin:0 0 14px;max-width:88ch}
.brand{color:var(--accent);font-weight:600;font-size:13px;letter-spacing:.04em}
.lead{font-size:16px;color:var(--dim)}
.lead b{color:var(--ink)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:14px;margin:22px 0 18px}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:16px 18px}
.tile .value{font-size:28px;font-weight:650;letter-spacing:-.02em;line-height:1.3;font-variant-numeric:tabular-nums}
.tile .label,.tile .note{font-size:13px;color:var(--dim)}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;margin-bottom:20px}
nav a{color:var(--accent);text-decoration:none;font-weight:550}
nav a:hover{text-decoration:underline}
section{padding:24px 26px;margin:0 0 20px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{font-weight:550;color:var(--dim);text-align:left;white-space:nowrap}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font-size:.92em}
.dim{color:var(--dim)}
.small{font-size:12.5px;margin:8px 0 0}
.chip{display:inline-block;background:var(--accent-soft);color:var(--accent);border-radius:6px;padding:0 7px;margin:1px 5px 1px 0;
font-size:12px;white-space:nowrap}
.set{color:var(--accent)}
.badge{display:inline-block;border:1px solid var(--accent);color:var(--accent);border-radius:99px;padding:0 10px;font-size:12.5px;
font-weight:600;margin-right:6px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:22px 34px;align-items:start}
figure{margin:0;min-width:0}
figcaption{font-size:13.5px;font-weight:600;margin-bottom:8px;display:flex;flex-wrap:wrap;gap:2px 14px}
.key{font-weight:400;color:var(--dim)}
.key i{display:inline-block;width:10px;height:10px;border-radius:3px;margin:0 4px 0 8px}
.k-full{background:var(--full)}.k-most{background:var(--most)}.k-kept{background:var(--accent)}
.plot{width:100%;height:auto;display:block;font:11px system-ui,sans-serif}
.plot text{fill:var(--dim)}
.grid{stroke:var(--line)}
.curve{fill:none;stroke-width:2.2;stroke-linejoin:round}
.c-full{stroke:var(--full);stroke-width:4}.c-policy{stroke:var(--accent)}
.dot{stroke:var(--card);stroke-width:1}
.dot.c-full{fill:var(--full)}.dot.c-policy{fill:var(--accent)}
.hit{fill:transparent}
.bar-full{fill:var(--full);opacity:.45}.bar-most{fill:var(--most)}.bar-kept{fill:var(--accent)}
.cell{fill:var(--line)}.heat{fill:var(--accent)}
.plot .cell-text{fill:var(--ink)}.plot .cell-text.strong{fill:var(--card)}
.at{font-size:13px;color:var(--dim)}
.at b{color:var(--accent)}
details{margin:8px 0}
summary{cursor:pointer;padding:4px 0}
summary code{color:var(--dim);margin-left:8px}
.code{background:var(--code);border:1px solid var(--line);border-radius:8px;padding:12px 0;margin:0;overflow-x:auto;
font-size:12.5px;line-height:1.6}
.code>span{display:block;padding:0 16px 0 13px;border-left:3px solid transparent;white-space:pre;width:max-content;min-width:100%}
.code>.new{background:var(--accent-soft);border-left-color:var(--accent)}
.code .k,.code .kn,.code .ow{color:var(--kw)}.code .nf{color:var(--fn);font-weight:600}.code .s1,.code .s2{color:var(--str)}
.code .mi,.code .mf,.code .kc{color:var(--num)}.code .c1{color:var(--com);font-style:italic}
.meter{display:block;width:120px;height:8px;margin-top:7px;background:var(--line);border-radius:4px;overflow:hidden}
.meter i{display:block;height:100%;background:var(--accent)}
footer{color:var(--dim);font-size:12.5px;text-align:center;margin-top:26px}
@media print{body{background:#fff}section{break-inside:avoid-page;border:0}}
"""
