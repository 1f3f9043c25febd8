"""The renderer: exact markup for small inputs, hostile tokens, allowed elements, contrast."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from saekit.feature_index import render
from saekit.feature_index.feature import Histogram

ELEMENTS = {
    "style",
    "div",
    "p",
    "span",
    "b",
    "i",
    "table",
    "tr",
    "td",
    "th",
    "details",
    "summary",
    "meter",
    "h2",
    "h3",
    "h4",
    "img",
}
ATTRIBUTES = {"class", "id", "style", "title", "role", "tabindex"}
HOSTILE = [
    b"<script>", b"alert(1)", b"</script>", b"&lt;", b"&amp", b"\"'><img src=x onerror=alert(1)>", b"\x00", b"\x1b[31m", b"\xff\xfe",
    "👩".encode(), "\u200d".encode(), "🔬".encode(), "שלום".encode(), "\u202eabc".encode(), b"\n", b"\t ", b"a" * 500, b"", b"`$x$`",
]  # fmt: skip


class Reader(HTMLParser):
    """Collects elements, attributes and text, and checks that elements close in order."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.text, self.open, self.titles = set(), set(), [], [], []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.open.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "title":
                self.titles.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def hostile_index(make_index):
    """Every hostile piece as a token; feature 0 fires on all, 1 and 2 on every other one, signed; one special token."""
    pieces = [b"<s>", *HOSTILE]
    token_N = np.arange(len(pieces))
    dense_NF = np.zeros((len(pieces), 3), np.float32)
    dense_NF[:, 0] = np.linspace(1, 5, len(pieces))
    dense_NF[::2, 1] = -2
    dense_NF[1::3, 2] = 0.5
    made = make_index(dense_NF, token_N=token_N, pieces=pieces, unencoded=[0, 5])
    made.index.feature(1).label = "<b onclick=x>&"
    made.index.feature(1).tags = ["</div><script>"]
    made.index.feature(1).notes = "<img src=http://x>"
    return made.index


def test_only_allowed_markup_whatever_the_tokens(make_index):
    idx = hostile_index(make_index)
    for j in range(3):
        for view in ("top", "quantiles", "random", "near"):
            for zoom in ("stacked", "snippet", "full"):
                markup = idx.feature(j).html(view, zoom)
                read = Reader(markup)
                assert read.elements <= ELEMENTS
                assert all(a in ATTRIBUTES or a.startswith(("aria-", "data-")) for a in read.attributes)
                assert "http" not in re.sub(r"&lt;img src=http://x&gt;", "", markup) and "\x00" not in markup
    assert "</div><script>" in "".join(Reader(idx.feature(1).html()).text)


def test_text_is_whole_after_stripping_tags(make_index):
    idx = hostile_index(make_index)
    for j in range(3):
        example = idx.window(8, None, feature=j)
        markup = render.tokens_html(
            example.pieces, example.codes, 5.0, special=example.special, encoded=example.encoded
        )
        alone = "".join(render.visible(b"".join(example.pieces[a:b])) for a, b in render.units(example.pieces))
        # white space that stands alone in a token may lie inside a longer silent run: compare without its marks
        strip = lambda s: re.sub(r"[␣↵⇥ ]", "", s)  # noqa: E731
        assert strip("".join(Reader(markup).text)) == strip(alone)


def test_silent_text_has_no_elements():
    pieces = [b"def", b" add", b"(", b"a", b")", b":"]
    got = render.tokens_html(pieces, [0, 0, 1.5, 0, -3.0, 0], 3.0, positions=range(100, 106), rank=4, document="x.py")
    # 1.5 of 3 is step 4 of 8; the strongest is marked
    assert got == (
        'def add<b class="p4" title="1.50, 50 % of max, token 102">(</b>a'
        '<b class="n8 m" title="−3.00, 100 % of max, token 104, rank 4, x.py">)</b>:'
    )


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1e-9, "p1"), (0.125, "p1"), (0.126, "p2"), (0.5, "p4"), (0.99, "p8"), (1, "p8"), (7, "p8"), (-0.3, "n3")],
)
def test_steps(share, expected):
    assert render.step(share, 1.0) == expected
    assert render.step(share, 0.0)[1] == "8"


def test_characters_over_several_tokens_are_one_unit():
    euro = [b"a", b"\xe2", b"\x82", b"\xac", b"b"]
    assert render.units(euro) == [(0, 1), (1, 4), (4, 5)]
    got = render.tokens_html(euro, [0, 1, -2, 0, 0], 2.0, positions=range(5))
    # the strongest code colours the unit, all codes are in the title
    assert got == 'a<b class="n8 m" title="1.00, 50 % of max, token 1, −2.00, 100 % of max, token 2">€</b>b'
    # a broken character is not waited for, a stray byte stands alone
    assert render.units([b"\xe2", b"x", b"\x82", b"y"]) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert render.units([b"\xf0\x9f", b"\x99\x82!", b"\x82"]) == [(0, 2), (2, 3)]
    assert render.units([]) == []


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (b" word", " word"), (b" ", "␣"), (b"  x", "␣␣x"), (b"\n", "↵"), (b"\n    ", "↵␣␣␣␣"), (b"\t", "⇥"), (b"a b", "a b"),
        (b"\x00", "\\u0000"), (b"\x1b", "\\u001b"), (b"\xff", "\\xff"), ("\u202e".encode(), "\\u202e"), (b"\r\n", "␍↵"), ("é".encode(), "é"),
    ],
)  # fmt: skip
def test_what_tokens_look_like(piece, shown):
    assert render.visible(piece) == shown


def test_right_to_left_runs_are_isolated():
    got = render.tokens_html([b"x ", "שלום".encode(), b" y"], [0, 0, 1], 1.0)
    assert got.startswith("<span>x שלום</span><b")
    assert "unicode-bidi:isolate" in render.STYLE


def test_full_view_keeps_lines():
    got = render.tokens_html([b"if x:\n", b"    y", b"\n"], [0, 0, 2], 2.0, breaks=True)
    assert got == 'if x:<i>↵\n</i>    y<b class="p8 m" title="2.00, 100 % of max">↵\n</b>'


def test_special_and_masked_tokens_are_marked(make_index):
    idx = hostile_index(make_index)
    markup = render.example_html(idx.feature(0).top(1)[0], 5.0)
    assert "the sequence begins here" in render.example_html(idx.window(1, 24, 2, feature=0), 5.0)
    assert "the sequence ends here" in markup
    example = idx.window(3, None, feature=0)
    markup = render.example_html(example, 5.0, "full")
    assert '<i class="s" title="special token, no code">&lt;s&gt;</i>' in markup
    assert '<i class="s" title="no code was computed here">&amp;amp</i>' in markup


def test_stacked_splits_at_the_trigger(make_index):
    idx = make_index(np.eye(12, dtype=np.float32) * 3).index
    example = idx.feature(6).top(1, zoom="stacked")[0]
    left, right = re.search(
        r'<div class="l"><div>(.*)</div></div><div>(.*)</div></div>', render.example_html(example, 3.0, "stacked")
    ).groups()
    assert right.startswith('<b class="p8 m"') and "<b" not in left
    assert len(example.tokens) == 11 and left.count("w") == 5


def test_codes_with_a_standard_deviation():
    got = render.tokens_html([b"def", b" add", b"("], [0, 1.5, -3.0], 3.0, positions=range(3), std=[0, 2.0, 2.0])
    # 1.5 lies below its standard deviation, 3 above
    assert got == (
        f'def<b class="p4"{render.HATCH} title="1.50 ± 2.00, its sign is not sure, 50 % of max, token 1"> add</b>'
        '<b class="n8 m" title="−3.00 ± 2.00, 100 % of max, token 2">(</b>'
    )
    # of several tokens that are one character the strongest code decides
    assert render.HATCH not in render.tokens_html([b"\xe2", b"\x82\xac"], [1, -3.0], 3.0, std=[2, 2])


def test_counts_of_features():
    got = render.counts_html(
        [b"a", b" b", b"\n", b"c", b"<"], [0, 1, 8, 0, 3], 8, first=100, encoded=[True] * 3 + [False, True]
    )
    # 1 of 8 is the first step, 3 of 8 the third; the token with most is marked
    assert got == (
        'a<b class="p1" title="1 feature, token 101"> b</b><b class="p8 m" title="8 features, token 102">↵</b>'
        '<i class="s" title="no code was computed here">c</i><b class="p3" title="3 features, token 104">&lt;</b>'
    )
    assert render.counts_html([b"a", b"b\n  "], [2, 2], 2, breaks=True).endswith(">b↵\n␣␣</b>")
    assert render.counts_html([], [], 0) == ""


def test_counted_tokens_start_with_their_number(make_index):
    idx = hostile_index(make_index)
    found = idx.crowd(3)
    markup = render.counted_html(found.most, 3, title="<Most>")
    read = Reader(markup)
    assert read.elements <= ELEMENTS and "<Most>" in read.text
    # one sequence, so one line; its centre has the most features
    assert markup.startswith('<div><h3>&lt;Most&gt;</h3><div class="x"><i>3</i><div><i>▏</i>')
    assert markup.count(' m"') == 1 and any(t.startswith("3 features, token ") for t in read.titles)


def test_text_of_plots():
    assert render.plot_text("<a href='x'>\"&") == "&lt;a href='x'>\"&".replace(">", "&gt;").replace('"&', '"&amp;')
    assert render.hover_text(b"x\n", b"<b>", b"\xff" * 50) == "x↵<b>&lt;b&gt;</b>" + "\\xff" * 40


def test_a_whole_number_of_the_legend_stays_one():
    assert "1,234 = most" in render.legend_html(1234, False, "most") and "51.0 = x" in render.legend_html(
        51.0, False, "x"
    )


def test_numbers_of_some_variants(make_index, tmp_path):
    import torch

    from saekit.variants import Variational

    dense_NF = np.zeros((40, 2), np.float32)
    dense_NF[:10, 0] = [1, -1, 1, -1, 3, -3, 3, -3, 3, 3]
    noisy = make_index(dense_NF, signed=True, buffers={"b_var": torch.zeros(2)}, sae_variant=Variational(k=1, prior_std=2.0)).index  # fmt: skip
    # four of ten codes are below σ = 2·e⁰
    shown = render.numbers_html(noisy.feature(0))
    assert "sign unsure on 40.0 %" in shown and "nats per firing" in shown and shown.count("<b>2.00</b>") == 1
    assert render.HATCH in noisy.feature(0).html("random") and "±" not in render.numbers_html(noisy.feature(0))
    dead = render.numbers_html(noisy.feature(1))
    assert "sign unsure on –" in dead and "<b>–</b>" in dead
    budgets = {"budget": torch.tensor([0.5, 0.01]), "threshold": torch.tensor([0.1, 0.2])}
    given = make_index(np.abs(dense_NF), buffers=budgets, folder=tmp_path / "budgets").index
    # fires on 10 of 40 tokens
    assert "<b>50.0 %</b>" in render.numbers_html(given.feature(0)) and "50.0 % of it used" in render.numbers_html(given.feature(0))  # fmt: skip
    assert "nats" not in render.numbers_html(given.feature(0))


# numbers


@pytest.mark.parametrize(
    ("x", "shown"),
    [(0, "0"), (3.14159, "3.14"), (-0.05, "−0.0500"), (1234.5, "1,234"), (1.2e6, "1,200,000"), (12e6, "1.20·10⁷"), (3e-6, "3.00·10⁻⁶"), (-2.5e9, "−2.50·10⁹"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers(x, shown):
    assert render.number(x) == shown


def test_codes_share_their_decimals():
    assert [render.code(x, 12.34) for x in (12.34, 3.0, 0.04, -9.96)] == ["12.3", "3.0", "0.0", "−10.0"]
    assert [render.code(x, 0.5) for x in (0.5, 0.0123)] == ["0.500", "0.012"]
    assert render.percent(0.0423) == "4.23 %" and render.percent(3e-6) == "3.0·10⁻⁶" and render.percent(0) == "0 %"


# states


def test_dead_feature_has_no_empty_plots(make_index):
    dense_NF = np.zeros((300, 2), np.float32)
    dense_NF[0, 1] = 1
    f = make_index(dense_NF).index.feature(0)
    assert "did not fire on 300 tokens; density below 0.01 (95 %)" in f.html() and "did not fire on 300 tokens" in str(
        f
    )
    assert 'class="hist"' not in f.html() and "Strongest" not in f.html()
    one = make_index(dense_NF).index.feature(1)
    assert "fires 1 time only" in one.html() and one.quantiles()[0].count == 1


def test_few_firings_show_all_and_no_quantiles(make_index):
    # nine firings in one sequence, all after the same tokens
    dense_NF = np.zeros((60, 1), np.float32)
    dense_NF[10:28:2, 0] = np.arange(9, 0, -1)
    f = make_index(dense_NF, token_N=[1] * 60).index.feature(0)
    assert [e.value for e in f.top()] == list(range(9, 0, -1))
    assert f.html("quantiles").count('<div class="x">') == 9 and "1 of 10" not in f.html("quantiles")


def test_empty_side_says_so(make_index):
    f = make_index(np.ones((5, 1), np.float32), signed=True).index.feature(0)
    assert "never negative" in f.html() and "never negative" in str(f) and "one-sided" in f.flags
    assert "never negative" not in f.html(sign="pos")


def test_dense_feature_has_no_near_misses(make_index):
    f = make_index(np.ones((50, 1), np.float32)).index.feature(0)
    assert "it is dense: its silence says little" in f.html("near")


def test_histogram_bars():
    counts = np.zeros(64, np.int64)
    counts[[0, 10, 63]] = [1, 100, 25]
    got = render.histogram_html(Histogram(np.linspace(-2, 2, 65), counts), [0.1, 0.2, 0.5, 1, 2])
    heights = re.findall(r'<i( class="n")? style="height:([\d.]+)(%?)"', got)
    assert len(heights) == 64 and [h[0] != "" for h in heights] == [True] * 32 + [False] * 32
    # heights go with the square root of the count
    assert [float(heights[i][1]) for i in (0, 1, 10, 63)] == [10, 0, 100, 50]
    assert 'role="img" aria-label="histogram from −2.00 to 2.00, tallest bar 100 firings"' in got
    # the ruler stands on both sides; 0.5 lies at 62.5 % and 37.5 % of the width
    assert "left:62.5%" in got and "left:37.5%" in got and "median 0.500" in got


# promises


def luminance(rgb) -> float:
    return sum(
        w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True)
    )


def mix(front: str, back: str, alpha: float) -> list[float]:
    channels = lambda h: [int(h[i : i + 2], 16) / 255 for i in (1, 3, 5)]  # noqa: E731
    return [alpha * a + (1 - alpha) * b for a, b in zip(channels(front), channels(back), strict=True)]


@pytest.mark.parametrize(("text", "page"), [("#31333f", "#ffffff"), ("#fafafa", "#0e1117")])
def test_contrast_on_light_and_dark(text, page):
    def contrast(front, back):
        a, b = sorted((luminance(front), luminance(back)), reverse=True)
        return (a + 0.05) / (b + 0.05)

    for colour in (render.ORANGE, render.BLUE):
        assert "{} {} {}".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5))) in render.STYLE
        for step in range(1, 9):
            assert contrast(mix(text, text, 1), mix(colour, page, step / 10)) >= 4.5
    # secondary words are set at 76 %
    assert "opacity:.76" in render.STYLE and contrast(mix(text, page, 0.76), mix(page, page, 1)) >= 4.5


def test_style_is_small_and_scoped():
    assert len(render.STYLE.encode()) < 2048
    assert render.STYLE.startswith("<style>.saekit{") and render.STYLE.endswith("}</style>")
    inner = render.STYLE.removeprefix("<style>.saekit{").removesuffix("}</style>")
    depth = 0
    for c in inner:
        depth += (c == "{") - (c == "}")
        assert depth >= 0, "the scope would end here"
    assert depth == 0 and "url(" not in inner and "@import" not in inner


def test_same_bytes_everywhere(random_index):
    idx = random_index.index
    f = idx.feature(2)
    assert f.html() == f.html() == f._repr_html_() == render.feature_html(idx.feature(2))
    page = render.page_html([f, idx.feature(3)])
    assert f.html() in page and idx.feature(3).html() in page and "<script" not in page and "http" not in page
    assert str(f) == f.text() and "\x1b[" not in str(f) and "\x1b[" in f.text(color=True)


def test_panel_stays_small(make_index):
    # dense text with a firing on every third token, 48 tokens a window
    dense_NF = np.zeros((6000, 1), np.float32)
    dense_NF[::3, 0] = np.random.default_rng(0).random(2000) + 0.1
    f = make_index(dense_NF, lengths=[60] * 100).index.feature(0)
    assert len(f.html("quantiles").encode()) < 60_000


def golden_feature(make_index):
    """A signed feature by hand: fires on " b" of " a b c" with rising codes, once negative."""
    pieces = [b"<s>", b" a", b" b", b" c\n"]
    token_N = [0, 1, 2, 3] * 6
    dense_NF = np.zeros((24, 3), np.float32)
    dense_NF[2::4, 0] = [1, 2, 3, 4, 8, -2]
    dense_NF[1::4, 1] = 0.5
    import torch

    W = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]])
    W_U = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1]])
    made = make_index(
        dense_NF, lengths=[8, 8, 8], token_N=token_N, pieces=pieces, unencoded=range(0, 24, 4), D=2, W_dec_FD=W, W_enc_FD=W,
        variant="abs_topk", unembedding=(W_U, "before the soft cap of 30 on the logits"),
    )  # fmt: skip
    made.index.feature(0).label = "second letter"
    return made.index.feature(0)


@pytest.mark.parametrize("name", ["feature.txt", "feature.html"])
def test_golden(make_index, name):
    f = golden_feature(make_index)
    got = str(f) if name.endswith("txt") else f.html()
    path = Path(__file__).with_name("golden") / name
    # after a wanted change: write `got` to the file, and look at it
    assert got == path.read_text(encoding="utf-8")


def test_renderer_reads_no_file_and_knows_no_framework():
    source = Path(render.__file__).read_text(encoding="utf-8")
    imports = set(re.findall(r"^(?:import|from) (\w+)", source, re.M))
    assert imports == {"html", "math", "re", "unicodedata", "collections", "numpy"}
    assert "open(" not in source
