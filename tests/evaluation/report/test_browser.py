"""The report as people see it: opened in headless Chromium, without a network."""

import shutil

import pytest

from dino.evaluation.report.report import image_paths, write_report

from ...coco_files import write_coco
from .detections import imperfect

webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
wait = pytest.importorskip("selenium.webdriver.support.wait")
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: apt-get install chromium chromium-driver (Debian)"
)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """-> analysis, address of the page."""
    folder = tmp_path_factory.mktemp("report mit ä")
    files = write_coco(folder / "data", counts=(6, 4, 0, 5, 3))
    data = files.read()
    rates = {"missed": 0.25, "misplaced": 0.15, "confused": 0.15, "duplicate": 0.1}
    results, _ = imperfect(data, seed=4, rates=rates)
    page = folder / "report.html"
    analysis = write_report(page, data=data, results=results, files=image_paths(data, files.images), details={})
    return analysis, page.as_uri()


@pytest.fixture
def page(browser, report):
    browser.get(report[1])
    return browser


def visible(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length"
    return browser.execute_script(script, selector)


def set_threshold(browser, value):
    script = (
        "const s = document.getElementById('threshold'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, value)


def text(browser, identifier):
    return browser.find_element("id", identifier).text


def test_it_opens_without_errors_and_without_a_network(page):
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert page.execute_script("return [...document.images].every(i => i.src.startsWith('data:'))")
    assert page.title.startswith("Evaluation: AP ")


def test_all_pictures_show(page):
    page.execute_script("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    ready = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
    wait.WebDriverWait(page, 10).until(lambda b: b.execute_script(ready))
    assert visible(page, ".gallery figure") > 0


@pytest.mark.parametrize("threshold", [0.01, 0.35, 0.6, 0.99])
def test_the_slider_moves_boxes_and_figures(page, report, threshold):
    analysis, _ = report
    set_threshold(page, threshold)
    assert text(page, "threshold-value") == f"{threshold:.2f}"
    found = {kind: sum(f.kind == kind and f.score >= threshold for f in analysis.found) for kind in analysis.tally}
    found["missed"] = sum(o.score < threshold for o in analysis.objects)
    for kind, number in found.items():
        assert text(page, f"tally-{kind}") == str(number), kind
    shown = page.execute_script("return [...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    drawn = {int(caption.split("_")[1].split(".")[0]) for caption in shown}
    for kind in ("found", "false", "misplaced"):
        expected = [f for f in analysis.found if f.kind == kind and f.score >= threshold and f.image in drawn]
        assert visible(page, f".mark.{kind}") == len(expected)
    missed = [o for o in analysis.objects if o.score < threshold and o.image in drawn]
    assert visible(page, ".mark.missed") == len(missed)
    detected = sum(found[kind] for kind in found if kind != "missed")
    assert text(page, "tally-precision") == f"{found['found'] / detected if detected else 1:.3f}"


def test_tabs_filter_the_pictures(page):
    everything = visible(page, ".gallery figure")
    for button in page.find_elements("css selector", ".tabs button")[::-1]:
        button.click()
        group = button.get_attribute("data-group")
        expected = everything if group == "all" else len(page.find_elements("css selector", f"[data-groups~={group}]"))
        assert visible(page, ".gallery figure") == expected


def test_the_table_sorts(page):
    def column(number):
        return [e.text for e in page.find_elements("css selector", f"#classes tbody td:nth-child({number})")]

    heads = page.find_elements("css selector", "#classes th")
    heads[1].click()
    assert column(2) == sorted(column(2), key=int, reverse=True)
    heads[1].click()
    assert column(2) == sorted(column(2), key=int)
    heads[0].click()
    assert column(1) == sorted(column(1), reverse=True)


def test_a_picture_grows_when_clicked(page):
    figure = page.find_element("css selector", ".gallery figure")
    before = figure.size["width"]
    page.execute_script("arguments[0].click()", figure)
    assert figure.size["width"] > 1.5 * before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(page, scheme):
    """A contrast of 4.5 or more (WCAG 2, level AA) between text and page."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colours = page.execute_script(
        "const all = s => getComputedStyle(document.querySelector(s));"
        "return [['.lead', 'body'], ['h1', 'body'], ['.card small', '.card'], ['thead th', '.scroll']]"
        ".map(([text, ground]) => [all(text).color, all(ground).backgroundColor])"
    )
    for text_colour, ground in colours:
        lighter, darker = sorted((luminance(text_colour), luminance(ground)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text_colour, ground)
    assert (luminance(colours[0][1]) < 0.1) == (scheme == "dark")


def luminance(colour):
    """Relative luminance of a CSS colour `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_predictions_without_truth(browser, tmp_path):
    files = write_coco(tmp_path / "data", counts=(4, 2))
    data = files.read()
    results, _ = imperfect(data, seed=1)
    files = image_paths(data, files.images)
    write_report(tmp_path / "p.html", data={**data, "annotations": []}, results=results, files=files, details={})
    browser.get((tmp_path / "p.html").as_uri())
    for threshold in (0.01, 0.5, 0.9):
        set_threshold(browser, threshold)
        assert visible(browser, ".mark") == sum(r["score"] >= threshold for r in results)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
