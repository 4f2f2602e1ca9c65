"""The page of a report in a real browser: widths, colour schemes, the x-axis, hostile names."""

import json
import shutil

import pytest
from written_runs import write_run

from hvd_lbt.cli import main

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="apt-get install chromium")

HOSTILE = "</script><script>document.title='ran'</script><b>x</b> &amp; <!--"
LOCAL = ("file:", "data:", "blob:")
# Rectangles of the elements that a selector finds; those without an area are left out.
RECTANGLES = """selector => [...document.querySelectorAll(selector)].map(e => {
  const r = e.getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom];
}).filter(r => r[2] > r[0] && r[3] > r[1])"""
WIDER_THAN_THE_PAGE = """() => [...document.querySelectorAll('body *')].filter(e =>
  !e.closest('.wide, .plot') && e.getBoundingClientRect().right > innerWidth + 1
).map(e => e.outerHTML.slice(0, 80))"""


def rename(run, name):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"name": name})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, and of three that differ in length, one unfinished, one evil."""
    folder = tmp_path_factory.mktemp("browser")
    one = write_run(folder / "grow")
    evil = rename(write_run(folder / "evil", policy="digits_decay_lr"), HOSTILE)
    short = write_run(folder / ("unfinished" * 12), policy="cifar10_cosine_grow_batch", updates=60)
    for name, runs in {"one": [one], "three": [one, evil, short]}.items():
        assert main(["report", *map(str, runs), "--out", str(folder / f"report_{name}")]) == 0
    return {name: folder / f"report_{name}" / "report.html" for name in ("one", "three")}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options += ["--disable-component-update", "--disable-sync"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page; at the end no console message, no dialog and no request may have come."""
    heard, opened = [], []

    def opener(file, width=800):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.on(
            "request",
            lambda request: request.url.startswith(LOCAL) or heard.append(request.url),
        )
        page.set_default_timeout(120_000)  # milliseconds, on a busy machine
        page.goto(file.as_uri())
        opened.append(page)
        return page

    yield opener
    for page in opened:
        page.close()
    assert not heard


def overlapping(rectangles):
    """The pairs that share more than a pixel."""
    return [
        (one, other)
        for place, one in enumerate(rectangles)
        for other in rectangles[place + 1 :]
        if min(one[2], other[2]) - max(one[0], other[0]) > 1
        and min(one[3], other[3]) - max(one[1], other[1]) > 1
    ]


@pytest.mark.parametrize("width", [400, 800, 1600])
@pytest.mark.parametrize("name", ["one", "three"])
def test_nothing_runs_out_of_the_page_or_over_something_else(pages, visit, name, width):
    page = visit(pages[name], width)
    for scheme, light in (("light", True), ("dark", False)):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(WIDER_THAN_THE_PAGE) == []
        figures = page.evaluate(RECTANGLES, "figure")
        assert len(figures) == 9
        parts = page.evaluate(RECTANGLES, "body > *:not(#figures):not(script), figure")
        assert overlapping(parts) == []
        plots = page.evaluate(RECTANGLES, ".plot .nsewdrag")
        assert len(plots) == 9
        assert all(right - left > 250 and low - top > 150 for left, top, right, low in plots)
        for place in range(9):
            labels = f"figure:nth-child({place + 1}) :is(.xtick, .ytick) text"
            assert overlapping(page.evaluate(RECTANGLES, labels)) == []
        text, ground = (
            page.evaluate(f"getComputedStyle(document.body).{key}.match(/\\d+/g).map(Number)")
            for key in ("color", "backgroundColor")
        )
        assert (sum(text) < sum(ground)) == light
        axis = page.evaluate("getComputedStyle(document.querySelector('.xtitle')).fill")
        assert axis == f"rgb({', '.join(map(str, text))})"


def test_the_switch_changes_the_axis_of_every_curve(pages, visit):
    page = visit(pages["three"])
    ends = "id => document.getElementById(id).data.filter(t => t.name).map(t => t.x.at(-1))"
    title = "document.querySelector('#figure-loss .xtitle').textContent"
    assert page.evaluate(title) == "epochs"
    assert page.evaluate(ends, "figure-loss")[:2] == [20, 20]
    assert page.evaluate(ends, "figure-lr")[:2] == pytest.approx([19.7, 20], abs=0.1)
    page.check("input[value=updates]")
    assert page.evaluate(title) == "updates"
    assert page.evaluate(ends, "figure-loss")[:2] == [426, 899]
    page.check("input[value=samples]")
    assert page.evaluate(ends, "figure-accuracy")[:2] == [28740, 28740]
    page.check("input[value=hours]")
    seconds = [3600 * end for end in page.evaluate(ends, "figure-speed")[:2]]
    assert seconds == pytest.approx([28740 / 500] * 2)
    page.check("input[name=log]")
    assert page.evaluate("document.getElementById('figure-loss').layout.xaxis.type") == "log"
    assert overlapping(page.evaluate(RECTANGLES, "#figure-loss .xtick text")) == []


def test_a_group_can_be_hidden_and_a_curve_zoomed(pages, visit):
    page = visit(pages["three"])
    lines = "document.querySelectorAll('#figure-loss .scatterlayer .trace').length"
    assert page.evaluate(lines) == 3
    page.uncheck("#switch-groups input[value='1']")
    assert page.evaluate(lines) == 2
    axis = "document.getElementById('figure-loss').layout.xaxis.range"
    before = page.evaluate(axis)
    page.locator("#figure-loss").scroll_into_view_if_needed()
    (left, top, right, low) = page.evaluate(RECTANGLES, "#figure-loss .nsewdrag")[0]
    page.mouse.move(left + 100, top + 50)
    page.mouse.down()
    page.mouse.move((left + right) / 2, low - 50, steps=3)
    page.mouse.up()
    after = page.evaluate(axis)
    assert before[0] < after[0] < after[1] < before[1]


def test_a_name_that_is_markup_is_shown_as_text(pages, visit):
    page = visit(pages["three"])
    assert page.title() != "ran"
    for place in ("h1", "#summary", "#switch-groups", "#groups", "#runs"):
        assert HOSTILE in page.text_content(place)
    assert page.evaluate("document.querySelectorAll('b').length") == 0
    page.evaluate("Plotly.Fx.hover('figure-accuracy', [{curveNumber: 1, pointNumber: 0}])")
    assert page.text_content("#figure-accuracy .hoverlayer").count("</script><script>") == 1


def test_print_is_light_and_fits_a_sheet(pages, visit):
    page = visit(pages["three"], 1600)
    page.emulate_media(color_scheme="dark", media="print")
    page.set_viewport_size({"width": 700, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    plots = page.evaluate(RECTANGLES, ".plot .main-svg")
    assert plots
    assert max(right for _, _, right, _ in plots) <= 700
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    assert page.evaluate("getComputedStyle(document.querySelector('.xtitle')).fill") == (
        "rgb(31, 35, 40)"
    )
