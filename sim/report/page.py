"""The page that reports are made of: one file, no script, nothing fetched, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

import msgspec

Tone = Literal["", "good", "bad", "warn"]

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#5d6675;--rule:#e1e5eb;--grid:#edf0f4;
--c0:#2563d9;--c1:#d9760a;--c2:#0f8f6b;--c3:#b5379b;--c4:#6d5bd0;--c5:#8a8f99;
--good:#0b7a52;--bad:#c22f2f;--warn:#a86300;--limit:#c22f2f;--goodbg:#e5f5ee;--badbg:#fbeaea;--warnbg:#fcf2df}
@media(prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1a1f28;--ink:#e7eaf0;--soft:#98a2b3;--rule:#2b323e;
--grid:#252b36;--c0:#6ea0ff;--c1:#f5a54a;--c2:#4fcf9f;--c3:#ea84d5;--c4:#a99bff;--c5:#7d8694;
--good:#57d6a0;--bad:#ff8a8a;--warn:#f1bd63;--limit:#ff8a8a;--goodbg:#153429;--badbg:#3b1f22;--warnbg:#382b14}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1220px;margin:0 auto;padding:28px 24px 48px}
header h1{font-size:25px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
header p{margin:0;color:var(--soft);overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 12px}
.note{margin:14px 0 0;padding:10px 14px;border-radius:8px;border:1px solid var(--rule);background:var(--card)}
.note.good{background:var(--goodbg);border-color:var(--good)}
.note.bad{background:var(--badbg);border-color:var(--bad)}
.note.warn{background:var(--warnbg);border-color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:18px}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:12px 16px}
.tile b{display:block;font-size:22px;line-height:1.3;font-weight:650;overflow-wrap:anywhere;
font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px;display:block}
.tile.good b{color:var(--good)}.tile.bad b{color:var(--bad)}.tile.warn b{color:var(--warn)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--least,360px)),1fr));gap:14px}
.card{padding:14px 16px 10px;min-width:0}
.card h3{margin:0 0 2px;font-size:15px}
.card>p{margin:0 0 6px;color:var(--soft);font-size:13px}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
svg .grid{stroke:var(--grid)}svg text{fill:var(--soft)}
svg .tick{font-size:11px;font-variant-numeric:tabular-nums}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke:var(--c)}svg .dashed{stroke-dasharray:5 4}
svg .area{fill:var(--c);opacity:.16}svg .points{fill:var(--c);stroke:var(--card);stroke-width:1.5}
svg .ring{fill:none;stroke:var(--ink);stroke-width:2.5}
svg .limit{stroke:var(--limit);stroke-dasharray:4 3;stroke-width:1.3}svg .limit-text{fill:var(--limit);font-size:11px}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:4px 0 4px;font-size:13px;color:var(--soft)}
.legend .key{display:inline-block;width:16px;height:0;border-top:3px solid var(--c);margin-right:6px;vertical-align:4px}
.legend .key.dashed{border-top-style:dashed}
.legend .key.points,.legend .key.ring{width:10px;height:10px;border:2.5px solid var(--c);border-radius:50%;
vertical-align:-1px}.legend .key.points{background:var(--c)}.legend .key.ring{border-color:var(--ink)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);text-align:right;padding:6px 10px;border-bottom:1px solid var(--rule);
white-space:nowrap;vertical-align:bottom}
td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
tr:last-child td{border-bottom:0}
th.text,td.text{text-align:left}td.long{white-space:normal;min-width:220px}
tr.chosen td{background:var(--goodbg);font-weight:600}tr.dim td{color:var(--soft)}
td .good{color:var(--good)}td .bad{color:var(--bad)}td .warn{color:var(--warn)}
.bar{display:inline-block;width:64px;height:8px;border-radius:4px;background:var(--grid);margin-left:8px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--c);border-radius:4px}
pre{margin:0;padding:12px 14px;background:var(--card);border:1px solid var(--rule);border-radius:8px;overflow-x:auto;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.empty{color:var(--soft);padding:30px 0;text-align:center}
footer{margin-top:34px;color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""


class Cell(msgspec.Struct, frozen=True):
    """One cell of a table.

    Attributes:
        share: draws a bar of this length, 0 to 1.
    """

    text: str
    tone: Tone = ""
    share: float | None = None


class Column(msgspec.Struct, frozen=True):
    """A heading, and whether what stands under it is text (left) or long text (left, wrapped)."""

    heading: str
    kind: str = "number"


def page(title: str, subtitle: str, body: Sequence[str], footer: str) -> str:
    """The whole file. `body` is markup; the other texts are escaped here."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        + "\n".join(body)
        + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what belongs under it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def note(text: str, tone: Tone = "") -> str:
    """A remark that must not be missed."""
    return f'<p class="note {tone}">{escape(text)}</p>'


def tiles(entries: Sequence[tuple[str, str, Tone]]) -> str:
    """Figures to be read first: `(figure, what it is, tone)`."""
    boxes = "".join(
        f'<div class="tile {tone}"><b>{escape(figure)}</b><span>{escape(name)}</span></div>'
        for figure, name, tone in entries
    )
    return f'<div class="tiles">{boxes}</div>'


def card(title: str, text: str, drawing: str) -> str:
    """A chart with its title; `drawing` is markup."""
    return f'<div class="card"><h3>{escape(title)}</h3><p>{escape(text)}</p>{drawing}</div>'


def cards(*boxes: str, least_width: int = 360) -> str:
    """Cards side by side, as many as fit."""
    return f'<div class="cards" style="--least:{least_width}px">{"".join(boxes)}</div>'


def code(text: str) -> str:
    """Something to be copied."""
    return f"<pre>{escape(text)}</pre>"


def table(columns: Sequence[Column], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Rows of `(class, cells)`; classes are `chosen`, `dim` or nothing."""
    head = "".join(f'<th class="{_side(column)}">{escape(column.heading)}</th>' for column in columns)
    body = "".join(
        f'<tr class="{name}">'
        + "".join(
            f'<td class="{_side(column)}">{_cell(cell)}</td>' for column, cell in zip(columns, cells, strict=True)
        )
        + "</tr>"
        for name, cells in rows
    )
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _side(column: Column) -> str:
    return {"number": "", "text": "text", "long": "text long"}[column.kind]


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.tone:
        text = f'<span class="{cell.tone}">{text}</span>'
    if cell.share is not None:
        width = 100 * min(1.0, max(0.0, cell.share))
        text += f'<span class="bar c0"><i style="width:{width:.0f}%"></i></span>'
    return text
