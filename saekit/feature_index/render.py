"""The one renderer: what the reader returns, as HTML or text. Data in, a string out; no file, no torch, no framework.

    fragment(header_html(f), numbers_html(f), histogram_html(f.histogram))    # style and root element around any panels
    feature_html(f, view="top", zoom="snippet", sign="both")                  # the whole feature
    feature_text(f, ansi=True)                                                # for the terminal
    page_html([idx.feature(12), idx.feature(99)], view="top")                  # one file that opens from disk

Every `*_html` but `feature_html` returns inner markup for `fragment`. Only firing tokens get an element with a title; text
on which the feature is silent stays text. All data pass through `escape`. No script, no link out, no inline SVG: a page
that allows `div span b i table details` and a `style` block shows all of it.
"""

import html
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

STEPS = 8
# of a code whose sign is not sure; in place, since few need it and every fragment carries the rules
HATCH = ' style="background-image:repeating-linear-gradient(135deg,#0000 0 3px,#8886 3px 5px)"'
ORANGE, BLUE = "#E66101", "#4393C3"

# Text keeps its colour and backgrounds stay translucent, so the same rules serve light and dark pages.
_RULES = """
--c:230 97 1;--g:color-mix(in srgb,currentColor 14%,#0000);
font-size:14px;line-height:1.5;font-variant-numeric:tabular-nums;
h2,h3{font-size:26px;line-height:1.3;margin:0;padding:0}
h3{font-size:15px;margin-bottom:6px}
p{margin:4px 0}
.q,th{opacity:.76;font-weight:400}
.q,.tag,table{font-size:13px}
.lead{font-size:17px}
.tag{border:1px solid var(--g);border-radius:9px;padding:0 8px;margin-right:6px}
.cols{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--w,300px)),1fr));gap:22px 36px;margin:16px 0}
.wide{--w:460px}
.stat{--w:98px;gap:12px 18px;padding:12px 0;border:solid var(--g);border-width:1px 0}
.stat *{display:block}
.stat b{font-size:19px}
.hist{display:flex;align-items:end;height:120px;gap:1px;border-bottom:1px solid}
.hist i{flex:1}
.hist i,.bar i{background:rgb(var(--c)/.8)}
.rule{position:relative;height:14px}
.rule i{position:absolute;top:4px;height:5px;background:var(--g)}
.rule .m{outline:1px solid}
.ends{display:flex;place-content:space-between}
table{border-collapse:collapse;width:100%;margin:0}
td,th{padding:1px 8px 1px 0;border:0;text-align:right}
td:first-child,th:first-child{text-align:left}
.bar{width:34%}
.bar i{display:block;height:8px;border-radius:2px}
.t,.x{font:13px/1.65 ui-monospace,Menlo,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.t *,.x *{unicode-bidi:isolate}
.x{display:grid;grid-template-columns:58px 1fr;gap:0 12px;padding:4px 0;border-bottom:1px solid var(--g)}
.k{grid-template-columns:58px 2fr 3fr;gap:0;white-space:pre;border:0;padding:0}
.k>*{overflow:hidden}
.k .l{display:flex;place-content:end;margin-left:12px}
i{font-style:normal}
.t i,.x i{opacity:.4}
.x>i,.x .s{opacity:.9}
.x>i{text-align:right;font-weight:600}
b[class]{background:rgb(var(--c)/var(--a));border-radius:3px;font-weight:400}
span [class]{border-radius:0}
b.m,span.m{font-weight:700;text-decoration:underline}
[class^=n]{--c:67 147 195}
"""
STYLE = (
    "<style>.saekit{"
    + _RULES.replace("\n", "")
    + "".join(f"[class*='{i}']{{--a:.{i}}}" for i in range(1, STEPS + 1))
    + "}</style>"
)


def escape(text: str) -> str:
    """The only way from data into markup."""
    return html.escape(text, quote=True)


def fragment(*parts: str) -> str:
    """Panels inside the root element, with the style they need."""
    return f'{STYLE}<div class="saekit">{"".join(parts)}</div>'


def page_html(features: Sequence, view: str = "top", zoom: str = "snippet", sign: str = "both") -> str:
    """One HTML file of features, provenance at the end: no script, nothing loaded, light or dark as the reader's system is."""
    numbers = ", ".join(f"{f.number:,}" for f in features)
    title = (
        f"feature{'s' if len(features) > 1 else ''} {numbers} of {features[0].index.name}"
        if features
        else "no features"
    )
    indexes = {f.index.fingerprint: f.index for f in features}
    ends = [
        f"{i.name} · {i.manifest['F']:,} features · {i.n_encoded:,} tokens · saekit {i.manifest['saekit_version']} · index {name}"
        for name, i in indexes.items()
    ]
    body = "<hr>".join(feature_html(f, view, zoom, sign) for f in features)
    end = "".join(f'<p class="q">{escape(line)}</p>' for line in ends)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark}'
        "body{margin:32px auto;padding:0 24px;max-width:1180px;font-family:system-ui,sans-serif;"
        "background:light-dark(#fff,#0e1117);color:light-dark(#31333f,#fafafa)}hr{border:0;margin:40px 0}</style>"
        f'</head><body>{body}<div class="saekit">{end}</div></body></html>\n'
    )


# numbers


def number(x: float, digits: int = 3) -> str:
    """Three significant digits with a true minus; a dash for what is not defined."""
    if x is None or math.isnan(x):
        return "–"
    if x == 0:
        return "0"
    size = math.floor(math.log10(abs(x)))
    if size < -4 or size > 6:
        return f"{x / 10.0**size:.{digits - 1}f}·10{_superscript(size)}".replace("-", "−")
    return f"{x:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def code(x: float, scale: float) -> str:
    """A code with as many decimals as give the largest magnitude `scale` three digits, so that a column of them is aligned."""
    if scale <= 0 or not 1e-3 < scale < 1e7:
        return number(x)
    return f"{x:,.{max(0, 2 - math.floor(math.log10(scale)))}f}".replace("-", "−")


def percent(share: float) -> str:
    """`12.3 %`; below a hundredth of a percent as a power of ten."""
    if share is None or math.isnan(share):
        return "–"
    return f"{number(100 * share)} %" if share == 0 or share >= 1e-4 else number(share, 2)


def _two(x: float) -> str:
    return f"{x:.2f}".replace("-", "−")


def _superscript(n: int) -> str:
    return str(n).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# tokens

MARKS = {" ": "␣", "\n": "↵", "\t": "⇥"}


def visible(piece: bytes) -> str:
    """A token as text: white space shown as ␣ ↵ ⇥ where alone or doubled, control characters as code points, stray bytes as \\xff."""
    return _shown(piece.decode("utf-8", errors="backslashreplace"))


def _shown(text: str) -> str:
    out = []
    for i, c in enumerate(text):
        if c in "\n\t":
            out.append(MARKS[c])
        elif c == " ":
            doubled = text[i - 1 : i] == " " or text[i + 1 : i + 2] == " " or not text.strip()
            out.append("␣" if doubled else " ")
        elif c == "\r":
            out.append("␍")
        elif (
            unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn")
            or c in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        ):
            out.append(f"\\u{ord(c):04x}")
        else:
            out.append(c)
    return "".join(out)


def units(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """Ranges [a, b) of tokens that are shown as one: neighbours that only together form a character."""
    out, begin, missing = [], 0, 0
    for i, piece in enumerate(pieces):
        if i > begin and not (missing and piece[:1] and 0x80 <= piece[0] < 0xC0):
            out.append((begin, i))
            begin, missing = i, 0
        for byte in piece:
            if 0x80 <= byte < 0xC0:
                missing = max(0, missing - 1)
            else:
                missing = 3 if byte >= 0xF0 else 2 if byte >= 0xE0 else 1 if byte >= 0xC0 else 0
    if begin < len(pieces):
        out.append((begin, len(pieces)))
    return out


def step(value: float, scale: float) -> str:
    """Class of a firing token: `p1` to `p8`, or `n1` to `n8` for a negative code."""
    size = min(STEPS, max(1, math.ceil(STEPS * abs(value) / scale))) if scale > 0 else STEPS
    return f"{'p' if value > 0 else 'n'}{size}"


def _plain(text: str, breaks: bool) -> str:
    """Silent text: white-space marks are set faint, and a run of right-to-left text is isolated."""
    out, faint = [], False
    shown = text if breaks else _shown(text)
    if breaks:
        # the whole-sequence view keeps line breaks and indentation as they are
        shown = "".join(c if c in "\n\t " else _shown(c) for c in text)
    for c in shown:
        mark = c in "␣↵⇥␍" or (breaks and c == "\n")
        if mark != faint:
            out.append("<i>" if mark else "</i>")
            faint = mark
        out.append("↵\n" if mark and c == "\n" else escape(c))
    if faint:
        out.append("</i>")
    joined = "".join(out)
    if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text):
        return f"<span>{joined}</span>"
    return joined


def tokens_html(
    pieces: Sequence[bytes],
    codes: Sequence[float],
    scale: float,
    *,
    positions: Sequence[int] | None = None,
    special: Sequence[bool] | None = None,
    encoded: Sequence[bool] | None = None,
    first: int = 0,
    last: int | None = None,
    strongest: int | None = None,
    rank: int | None = None,
    document: str = "",
    breaks: bool = False,
    std: Sequence[float] | None = None,
    titles: Sequence[str] | None = None,
) -> str:
    """Tokens `first` to `last` as inline markup, firing ones coloured by |code| / scale in eight steps.

    `strongest` (default: the largest magnitude of all) is bold and underlined; `rank` and `document` go into its title. `std`:
    of each code, in the title; a code below its own is hatched. `titles` stand in for those that tell the codes.
    """
    codes = [float(c) for c in codes]
    last = len(pieces) if last is None else last
    if strongest is None:
        strongest = max(range(len(codes)), key=lambda i: abs(codes[i]), default=-1)
    out, silent = [], []

    def said(i: int) -> str:
        if titles is not None:
            return titles[i]
        return _title(
            codes[i], scale, positions[i] if positions is not None else None, std[i] if std is not None else None
        )

    def flush():
        if silent:
            out.append(_plain(b"".join(silent).decode("utf-8", errors="backslashreplace"), breaks))
            silent.clear()

    for a, b in units(pieces[first:last]):
        a, b = a + first, b + first
        at = max(range(a, b), key=lambda i: abs(codes[i]))
        text = b"".join(pieces[a:b])
        if codes[at] != 0:
            flush()
            title = ", ".join(said(i) for i in range(a, b) if codes[i])
            if at == strongest:
                title += (f", rank {rank:,}" if rank else "") + (f", {document}" if document else "")
            mark = " m" if a <= strongest < b and codes[strongest] != 0 else ""
            shown = escape(visible(text))
            if breaks:
                shown = shown.replace("↵", "↵\n")
            hatched = HATCH if std is not None and abs(codes[at]) < std[at] else ""
            out.append(f'<b class="{step(codes[at], scale)}{mark}"{hatched} title="{escape(title)}">{shown}</b>')
        elif special is not None and special[a]:
            flush()
            out.append(f'<i class="s" title="special token, no code">{escape(visible(text))}</i>')
        elif encoded is not None and not encoded[a]:
            flush()
            out.append(f'<i class="s" title="no code was computed here">{escape(visible(text))}</i>')
        elif a <= strongest < b:
            # the centre of a near miss is silent and still has to be seen
            flush()
            out.append(f'<span class="m" title="silent here">{escape(visible(text))}</span>')
        else:
            silent.append(text)
    flush()
    return "".join(out)


def _title(value: float, scale: float, position: int | None, std: float | None = None) -> str:
    spread = ""
    if std is not None:
        spread = f" ± {code(std, scale)}" + (", its sign is not sure" if abs(value) < std else "")
    share = f", {100 * abs(value) / scale:.0f} % of max" if scale > 0 else ""
    return f"{code(value, scale)}{spread}{share}" + (f", token {int(position):,}" if position is not None else "")


def hover_text(before: bytes, token: bytes, after: bytes) -> str:
    """A token in its text for Plotly, which reads a few tags in hover text, and of named entities not `&quot;`."""
    parts = (visible(before[-60:]), visible(token[:40]), visible(after[:40]))
    a, b, c = (plot_text(part) for part in parts)
    return f"{a}<b>{b}</b>{c}"


def plot_text(text: str) -> str:
    """Data as text of a Plotly figure."""
    return escape(text).replace("&quot;", '"').replace("&#x27;", "'")


def example_html(example, scale: float, zoom: str = "snippet") -> str:
    """One example as one line (or, for `full`, one paragraph) that starts with its number."""
    value = f"<i>{code(example.value, scale) if example.value else '–'}</i>"
    common = {
        "positions": example.positions,
        "special": example.special,
        "encoded": example.encoded,
        "strongest": example.centre,
        "rank": example.rank,
        "document": example.document,
        "std": example.std,
    }
    begin = '<i title="the sequence begins here">▏</i>' if example.at_start else "<i>…</i>"
    end = '<i title="the sequence ends here">▕</i>' if example.at_end else "<i>…</i>"
    if zoom != "stacked":
        text = tokens_html(example.pieces, example.codes, scale, breaks=zoom == "full", **common)
        return f'<div class="x">{value}<div>{begin}{text}{end}</div></div>'
    # the unit that holds the trigger starts the right column
    split = next(a for a, b in units(example.pieces) if a <= example.centre < b)
    left = tokens_html(example.pieces, example.codes, scale, last=split, **common)
    right = tokens_html(example.pieces, example.codes, scale, first=split, **common)
    return f'<div class="x k">{value}<div class="l"><div>{begin}{left}</div></div><div>{right}{end}</div></div>'


def examples_html(examples: Sequence, scale: float, zoom: str = "snippet", *, title: str = "", note: str = "") -> str:
    """A list of examples under a heading; the note alone where there are none."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    why = f'<p class="q">{escape(note)}</p>' if note else ""
    return f"<div>{head}{why}{''.join(example_html(e, scale, zoom) for e in examples)}</div>"


def counts_html(
    pieces: Sequence[bytes],
    features: Sequence[int],
    most: int,
    *,
    first: int = 0,
    special: Sequence[bool] | None = None,
    encoded: Sequence[bool] | None = None,
    centre: int | None = None,
    breaks: bool = False,
) -> str:
    """A text coloured by how many features fire on each token, full colour at `most`; `first` is the number of its first token.

    Where none fires the text stays plain. `centre` (default: the token with most) is bold and underlined.
    """
    counts = [int(n) for n in features]
    titles = [f"{n:,} feature{'' if n == 1 else 's'}, token {first + i:,}" for i, n in enumerate(counts)]
    return tokens_html(
        pieces, counts, most, titles=titles, special=special, encoded=encoded, strongest=centre, breaks=breaks
    )


def counted_html(tokens: Sequence, most: int, *, title: str) -> str:
    """Tokens in their text, one to a line that starts with the number of features on the token."""
    lines = []
    for t in tokens:
        e = t.example
        text = counts_html(
            e.pieces, t.features, most, first=int(e.positions[0]), special=e.special, encoded=e.encoded, centre=e.centre
        )
        begin, end = "▏" if e.at_start else "…", "▕" if e.at_end else "…"
        lines.append(
            f'<div class="x"><i>{int(t.features[e.centre]):,}</i><div><i>{begin}</i>{text}<i>{end}</i></div></div>'
        )
    return f"<div><h3>{escape(title)}</h3>{''.join(lines)}</div>"


def legend_html(scale: float, signed: bool, name: str = "own maximum") -> str:
    """The eight steps with what they stand for; a whole number stays one."""
    plus = "".join(f'<b class="p{i}"> &nbsp; </b>' for i in range(1, STEPS + 1))
    minus = "".join(f'<b class="n{i}"> &nbsp; </b>' for i in range(STEPS, 0, -1)) if signed else ""
    top = f"{scale:,}" if isinstance(scale, int) else number(scale)
    low, high = (f"−{top}", f"+{top}") if signed else ("0", top)
    return (
        f'<p><span class="q">{low} </span><span aria-hidden="true">{minus}{plus}</span>'
        f'<span class="q"> {high} = {escape(name)}</span></p>'
    )


def legend_name(scale: str | float) -> str:
    return {"own": "largest magnitude of this feature", "p99": "its 99th percentile"}.get(str(scale), "shared maximum")


# panels


def header_html(feature, *, title: bool = True) -> str:
    """Number, label, tags, flags, and where the feature comes from."""
    index = feature.index
    entry = feature.entry
    parts = []
    if title:
        parts.append(f"<h2>Feature {feature.number:,}</h2>")
    if entry.label:
        parts.append(f'<p class="lead">{escape(entry.label)}</p>')
    model = (index.manifest.get("model") or {}).get("id") or ""
    where = " · ".join(p for p in (index.name, index.manifest["variant"], model, index.site) if p)
    parts.append(f'<p class="q">{escape(where)}</p>')
    tags = [*(("★ bookmarked",) if entry.bookmarked else ()), *entry.tags, *feature.flags]
    if tags:
        parts.append("<p>" + "".join(f'<span class="tag">{escape(t)}</span>' for t in tags) + "</p>")
    return "".join(parts)


def state_line(feature) -> str:
    """What a reader must know before the numbers: dead, rare, dense, capped, one side empty. Empty if nothing."""
    n, E = feature.n, feature.index.n_encoded
    if n == 0:
        return f"did not fire on {E:,} tokens; density below {number(feature.density_interval[1], 1)} (95 %)"
    lines = []
    if n < 10:
        lines.append(f"fires {n} time{'s' if n > 1 else ''} only: every example is shown, rates are uncertain")
    if "dense" in feature.flags:
        lines.append(f"dense: fires on {percent(feature.density)} of tokens")
    if feature.capped:
        lines.append(f"capped: shown from {len(feature.positions):,} of {n:,} firings")
    if "start-of-sequence" in feature.flags:
        lines.append(f"{percent(feature.column('start_share'))} of firings lie in the first two tokens of a sequence")
    return "; ".join(lines)


def numbers_html(feature) -> str:
    """Density with its interval, and the numbers beside it."""
    c, index = feature.column, feature.index
    low, high = feature.density_interval
    E = index.n_encoded
    tiles = [("density", percent(feature.density) if feature.n else f"< {number(high, 1)}", f"{percent(low)} to {percent(high)}" if feature.n else "95 % bound")]  # fmt: skip
    tiles.append(("fires on", f"{feature.n:,}", f"of {E:,} tokens"))
    if feature.n:
        tiles.append(("in", f"{c('n_seq'):,}", f"of {index.n_sequences:,} sequences"))
        if feature.signed:
            tiles.append(("positive on", percent(c("density_pos")), f"largest {number(c('max_pos'))}"))
            tiles.append(("negative on", percent(c("density_neg")), f"largest {number(c('max_neg'))}"))
        else:
            tiles.append(("largest", number(feature.max), f"median {number(c('q50'))}"))
        tiles.append(("energy", percent(c("energy")), "of Σ a²‖d‖²"))
        tiles.append(("token entropy", number(c("token_entropy")), "bits"))
        tiles.append(("fires among", number(c("crowd")), "features per token"))
    nearest = c("max_dec_cos")
    if not math.isnan(nearest):
        tiles.append(("nearest decoder", number(nearest), f"feature {c('max_dec_feature'):,}"))
    if index.has_budgets:
        tiles.append(("budget", percent(c("budget")), f"{percent(c('budget_share'))} of it used"))
    if index.has_std:
        tiles.append(("std", number(feature.std), f"of a code; sign unsure on {percent(feature.uncertain)}"))
        tiles.append(("KL", number(c("kl_mean")), "nats per firing"))
    body = "".join(
        f'<div><span class="q">{escape(a)}</span><b>{escape(b)}</b><span class="q">{escape(d)}</span></div>'
        for a, b, d in tiles
    )
    return f'<div class="cols stat">{body}</div>'


def histogram_html(histogram, quantiles: Sequence[float] | None = None, *, title: str = "Codes where it fires") -> str:
    """64 bars with heights by the square root of the count, so that the rare strong codes stay visible.

    `quantiles`: q05 q25 q50 q75 q95 of the magnitude, drawn as a ruler below, on both sides for signed codes.
    """
    counts, edges = np.asarray(histogram.counts), np.asarray(histogram.edges)
    top = int(counts.max(initial=0))
    if top == 0:
        return f'<div><h3>{escape(title)}</h3><p class="q">no firings</p></div>'
    low, high = float(edges[0]), float(edges[-1])
    middle = len(counts) // 2 if low < 0 else 0
    bars = []
    for i, count in enumerate(counts.tolist()):
        height = f"{max(2.0, 100 * math.sqrt(count / top)):.0f}%" if count else "0"
        side = ' class="n"' if i < middle else ""
        bars.append(
            f'<i{side} style="height:{height}" title="{number(edges[i])} to {number(edges[i + 1])}: {count:,}"></i>'
        )
    ruler = ""
    if quantiles is not None and high > 0 and not any(math.isnan(q) for q in quantiles):
        marks = []
        for sign in (1, -1) if low < 0 and counts[:middle].any() else (1,):
            if low < 0 and sign == 1 and not counts[middle:].any():
                continue
            at = [100 * (sign * q - low) / (high - low) for q in quantiles]
            for a, b in ((at[0], at[4]), (at[1], at[3])):
                marks.append(f'<i style="left:{min(a, b):.1f}%;width:{abs(b - a):.1f}%"></i>')
            marks.append(f'<i class="m" style="left:{at[2]:.1f}%" title="median {number(quantiles[2])}"></i>')
        names = zip(("5 %", "25 %", "median", "75 %", "95 %"), quantiles, strict=True)
        words = escape("magnitude quantiles: " + ", ".join(f"{k} {number(q)}" for k, q in names))
        ruler = f'<div class="rule" role="img" aria-label="{words}" title="{words}">{"".join(marks)}</div>'
    label = f"histogram from {number(low)} to {number(high)}, tallest bar {top:,} firings"
    zero = "<span>0</span>" if low < 0 else ""
    return (
        f'<div><h3>{escape(title)}</h3><div class="hist" role="img" aria-label="{escape(label)}">{"".join(bars)}</div>{ruler}'
        f'<div class="ends q"><span>{number(low)}</span>{zero}<span>{number(high)}</span></div></div>'
    )


def _bar(size: float, top: float, negative: bool = False) -> str:
    width = 100 * min(1.0, abs(size) / top) if top else 0
    return f'<td class="{"n " if negative else ""}bar"><i style="width:{width:.0f}%"></i></td>'


def _chip(token: str, most: int = 20) -> str:
    """A token in a table; a long one is cut, and whole in its title."""
    if len(token) <= most:
        return f'<span class="t">{escape(token)}</span>'
    return f'<span class="t" title="{escape(token)}">{escape(token[:most])}…</span>'


def _bar_rows(rows: Sequence[tuple[str, float, list[str]]], top: float, negative: bool = False) -> str:
    return "".join(
        f"<tr><td>{_chip(name)}</td>{_bar(size, top, negative)}"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, size, cells in rows
    )


def logits_html(logits, k: int = 10, signed: bool = False) -> str:
    """Strongest up and down tokens of the decoder row through the unembedding: two panels. A negative code swaps their parts."""
    if logits is None:
        return '<div><h3>Logit weights</h3><p class="q">none in this index: the unembedding was not at hand</p></div>'
    top = max((abs(t.weight) for t in [*logits.up, *logits.down]), default=0.0)
    note = f'<p class="q">{escape(logits.note)}</p>' if logits.note else ""
    panels = []
    titles = ("Positive codes raise, negative lower", "Negative codes raise, positive lower")
    raises, lowers = titles if signed else ("Raises these logits", "Lowers these logits")
    for title, tokens, negative in ((raises, logits.up[:k], False), (lowers, logits.down[:k], True)):
        rows = _bar_rows([(t.text, t.weight, [_two(t.weight)]) for t in tokens], top, negative)
        panels.append(
            f"<div><h3>{title}</h3><table><tr><th>token</th><th></th><th>weight</th></tr>{rows}</table>{note}</div>"
        )
    return "".join(panels)


def token_table_html(tokens: Sequence, k: int = 10, *, title: str = "Tokens it fires on") -> str:
    """Commonest tokens with the share of firings, and how often the token makes it fire."""
    if not tokens:
        return f'<div><h3>{escape(title)}</h3><p class="q">no firings</p></div>'
    rows = _bar_rows(
        [(t.text, t.share, [f"{100 * t.share:.1f} %", f"{100 * t.precision:.1f} %"]) for t in tokens[:k]],
        tokens[0].share,
    )
    head = '<tr><th>token</th><th></th><th title="share of the firings that are on this token">of firings</th><th title="share of this token\'s occurrences on which it fires">of token</th></tr>'  # fmt: skip
    return f"<div><h3>{escape(title)}</h3><table>{head}{rows}</table></div>"


def rows_html(names: Sequence[str], columns: Sequence[Sequence], n: int, most: int = 50) -> str:
    """A plain table of `n` rows, of which the first `most` are shown; columns of more than one dimension are left out."""
    shown = [(name, column) for name, column in zip(names, columns, strict=True) if getattr(column, "ndim", 1) == 1]
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in shown)
    body = "".join("<tr>" + "".join(f"<td>{_cell(c[i])}</td>" for _, c in shown) + "</tr>" for i in range(min(n, most)))
    more = f'<p class="q">{n:,} rows, {most} are shown</p>' if n > most else ""
    return fragment(f"<table><tr>{head}</tr>{body}</table>{more}")


def _cell(value) -> str:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else ""
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    return "" if math.isnan(value) else number(float(value))


def neighbours_html(neighbours: Sequence, kind: str = "decoder", k: int = 10) -> str:
    """Nearest features with cosine (or NPMI) and label."""
    title, value = {
        "decoder": ("Nearest decoder rows", "cosine"),
        "encoder": ("Nearest encoder rows", "cosine"),
        "together": ("Fires together with", "NPMI"),
    }[kind]
    if not neighbours:
        return f'<div><h3>{title}</h3><p class="q">none</p></div>'
    signs = any(n.agree is not None for n in neighbours[:k])
    agree = [f"<td>{'–' if n.agree is None else percent(n.agree)}</td>" if signs else "" for n in neighbours[:k]]
    rows = "".join(
        f'<tr><td>{n.feature:,} <span class="q">{escape(n.label)}</span></td>{_bar(n.value, 1.0, n.value < 0)}'
        f"<td>{_two(n.value)}</td>{share}</tr>"
        for n, share in zip(neighbours[:k], agree, strict=True)
    )
    head = f"<th>feature</th><th></th><th>{value}</th>"
    if signs:
        head += '<th title="of the tokens on which both fire, those that give them codes of one sign">same sign</th>'
    return f"<div><h3>{title}</h3><table><tr>{head}</tr>{rows}</table></div>"


VIEW_NAMES = {
    "top": "Strongest",
    "quantiles": "From strong to weak",
    "random": "Drawn at random",
    "near": "Near misses",
}


def view_html(feature, view: str = "top", zoom: str = "snippet", sign: str = "both", scale: str | float = "own") -> str:
    """The example panel of one feature: legend, then one column (or one per sign) of examples.

    `view`: top, quantiles, random, near. `zoom`: stacked, snippet, full. `sign`: both, pos, neg. `scale`: own, p99, or a
    shared maximum.
    """
    if feature.n == 0:
        return ""
    size = {"own": feature.max, "p99": feature.column("q99")}[scale] if isinstance(scale, str) else float(scale)
    signs = [s for s in "+-" if (s == "+" or feature.signed) and sign in ("both", "pos" if s == "+" else "neg", s)]
    legend = legend_html(size, feature.signed, legend_name(scale))
    columns = []
    if view == "near":
        note = (
            "it is dense: its silence says little" if "dense" in feature.flags
            else "it is capped: where it is silent is not known" if feature.capped
            else "its commonest tokens where it is silent, sequences in which it fires elsewhere first"
        )  # fmt: skip
        columns.append(examples_html(feature.near_misses(16, zoom=zoom), size, zoom, title=VIEW_NAMES[view], note=note))
    elif view == "random":
        chosen = "both" if len(signs) != 1 or not feature.signed else signs[0]
        columns.append(examples_html(feature.random(20, sign=chosen, zoom=zoom), size, zoom, title=VIEW_NAMES[view]))
    else:
        view = "top" if feature.n < 10 else view
        for s in signs:
            name = VIEW_NAMES[view] + ("" if not feature.signed else ", positive" if s == "+" else ", negative")
            if feature.column("n_pos" if s == "+" else "n_neg") == 0:
                note = "never positive" if s == "+" else "never negative"
                columns.append(examples_html([], size, zoom, title=name, note=note))
            elif view == "top":
                columns.append(examples_html(feature.top(20, s, zoom=zoom), size, zoom, title=name))
            else:
                slices = feature.quantiles(10, 4, s, zoom=zoom)
                parts = [
                    examples_html(
                        x.examples,
                        size,
                        zoom,
                        note=f"{i} of {len(slices)} · {code(x.low, size)} to {code(x.high, size)} · {x.count:,} firings",
                    )
                    for i, x in enumerate(slices, 1)
                ]
                columns.append(f"<div><h3>{name}</h3>{''.join(parts)}</div>")
    return f'{legend}<div class="cols wide">{"".join(columns)}</div>'


def feature_html(
    feature, view: str = "top", zoom: str = "snippet", sign: str = "both", scale: str | float = "own"
) -> str:
    """Everything about one feature: header, numbers, histogram, logit weights, tokens, neighbours, examples."""
    state = state_line(feature)
    quantiles = None if feature.n < 10 else [feature.column(q) for q in ("q05", "q25", "q50", "q75", "q95")]
    panels = []
    if feature.n:
        panels.append(histogram_html(feature.histogram, quantiles))
        panels.append(token_table_html(feature.tokens(8), 8))
    panels.append(neighbours_html(feature.neighbours("decoder", 8), "decoder", 8))
    panels.append(logits_html(feature.logits(8), 8, feature.signed))
    if feature.n:
        panels.append(neighbours_html(feature.neighbours("together", 8), "together", 8))
    return fragment(
        header_html(feature),
        f"<p>{escape(state)}</p>" if state else "",
        numbers_html(feature),
        f'<div class="cols">{"".join(panels)}</div>',
        view_html(feature, view, zoom, sign, scale),
        f'<p class="q">{escape(entry_notes)}</p>' if (entry_notes := feature.notes) else "",
    )


# the terminal

ANSI = {
    "p": (230, 229, 223, 222, 221, 215, 214, 208),
    "n": (195, 159, 153, 117, 111, 75, 74, 68),
}
BLOCKS = " ▁▂▃▄▅▆▇█"


def example_text(example, scale: float, ansi: bool = False) -> str:
    """One example on one line: number, then text with the firing tokens coloured, or the trigger in «» without ANSI.

    Indentation on which the feature is silent is shortened to one space.
    """
    out, silent = [], []

    def flush():
        out.append(_shown(re.sub(" {2,}", " ", b"".join(silent).decode("utf-8", errors="backslashreplace"))))
        silent.clear()

    for a, b in units(example.pieces):
        at = max(range(a, b), key=lambda i: abs(float(example.codes[i])))
        value, centre = float(example.codes[at]), a <= example.centre < b
        text = b"".join(example.pieces[a:b])
        if ansi and value:
            flush()
            kind = step(value, scale)
            out.append(f"\x1b[{'1;' if centre else ''}30;48;5;{ANSI[kind[0]][int(kind[1]) - 1]}m{visible(text)}\x1b[0m")
        elif not ansi and centre:
            flush()
            out.append(f"«{visible(text)}»")
        else:
            silent.append(text)
    flush()
    start, end = ("" if example.at_start else "…"), ("" if example.at_end else "…")
    return f"{code(example.value, scale):>8}  {start}{''.join(out)}{end}"


def feature_text(feature, ansi: bool = False, view: str = "top", k: int = 10) -> str:
    """The feature for a terminal; plain, or with ANSI colours. `view`: top, quantiles, random, near."""
    index, c = feature.index, feature.column
    bold = (lambda s: f"\x1b[1m{s}\x1b[0m") if ansi else (lambda s: s)
    lines = [bold(f"Feature {feature.number:,}") + f" · {index.name} · {index.manifest['variant']} · {index.site}"]
    entry = feature.entry
    if entry.label:
        lines.append(_shown(entry.label))
    tags = [*entry.tags, *feature.flags]
    if tags:
        lines.append(_shown("  ".join(f"[{t}]" for t in tags)))
    if state := state_line(feature):
        lines.append(state)
    lines.append("")
    if feature.n:
        low, high = feature.density_interval
        lines.append(
            f"density {percent(feature.density)} ({percent(low)} to {percent(high)}) · {feature.n:,} of {index.n_encoded:,} "
            f"tokens · {c('n_seq'):,} sequences"
        )
        sides = f"largest {number(feature.max)}"
        if feature.signed:
            sides = f"{number(c('max_neg'))} to {number(c('max_pos'))}"
            lines.append(f"positive on {percent(c('density_pos'))} of tokens, negative on {percent(c('density_neg'))}")
        lines.append(
            f"{sides} · median {number(c('q50'))} · energy {percent(c('energy'))} · token entropy {number(c('token_entropy'))} bits"
        )
        counts, edges = feature.histogram.counts, feature.histogram.edges
        top = counts.max()
        bars = "".join(BLOCKS[math.ceil(8 * math.sqrt(x / top))] for x in counts.tolist())
        lines += [f"{number(edges[0])} {bars} {number(edges[-1])}", ""]
        tokens = "  ".join(f"{_quoted(t.text)} {100 * t.share:.1f} %" for t in feature.tokens(6))
        lines.append(f"fires on   {tokens}")
    if logits := feature.logits(8):
        for name, side in zip(
            ("+ raises", "− raises") if feature.signed else ("raises", "lowers"), (logits.up, logits.down)
        ):
            lines.append(f"{name:<11}" + "  ".join(f"{_quoted(t.text)} {number(t.weight, 2)}" for t in side))
        if logits.note:
            lines.append(f"           {logits.note}")
    if near := feature.neighbours("decoder", 6):
        lines.append("near       " + "  ".join(f"{n.feature:,} ({number(n.value, 2)})" for n in near))
    if feature.n and view in ("random", "near"):
        examples = feature.random(k) if view == "random" else feature.near_misses(k)
        lines += ["", bold(VIEW_NAMES[view].lower()), *(example_text(e, feature.max, ansi) for e in examples)]
    view = "top" if view == "quantiles" and feature.n < 10 else view
    for s in ("+-" if feature.signed else "+") if feature.n and view in ("top", "quantiles") else ():
        side = "" if not feature.signed else " positive" if s == "+" else " negative"
        if feature.column("n_pos" if s == "+" else "n_neg") == 0:
            lines += ["", f"never{side}"]
            continue
        lines += ["", bold(VIEW_NAMES[view].lower() + side)]
        slices = [feature.top(k, s)] if view == "top" else [x.examples for x in feature.quantiles(10, 2, s)]
        lines += [example_text(e, feature.max, ansi) for examples in slices for e in examples]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"'{text}'"
