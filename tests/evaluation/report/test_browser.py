"""The report and the check sheet as people see them: opened in headless Chromium, without a network."""

import json
import shutil
from pathlib import Path

import pytest

from dino.data.check.check_dataset import Resize, check_all
from dino.evaluation.report.preview import write_preview
from dino.evaluation.report.report import image_paths, write_report
from dino.training.curves import run_curves

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
    paths = image_paths(data, files.images)
    analysis = write_report(page, data=data, results=results, files=paths, details={}, run=curves_of(folder))
    return analysis, page.as_uri()


def curves_of(folder):
    """Curves of a run of three classes and two evaluations."""
    entries = [{"iteration": n, "total_loss": 9.0 / n, "lr": 1e-4} for n in range(1, 40)]
    entries += [{"iteration": n, "bbox/AP": n, "bbox/AP50": 2 * n, "bbox/AP-red": n} for n in (20, 40)]
    (folder / "metrics.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "model_best.pth").touch()
    return run_curves(folder / "model_best.pth")


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
    everything = visible(page, ".tabs + .gallery figure")
    for button in page.find_elements("css selector", ".tabs button")[::-1]:
        button.click()
        group = button.get_attribute("data-group")
        expected = everything if group == "all" else len(page.find_elements("css selector", f"[data-groups~={group}]"))
        assert visible(page, ".tabs + .gallery figure") == expected


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
    set_scheme(page, scheme)
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


def set_scheme(browser, scheme):
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)


def set_width(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Address of a report, its images and a check sheet, of 2 and of 60 classes with names of any kind."""
    found = {}
    for classes in (2, 60):
        folder = tmp_path_factory.mktemp(f"classes {classes}")
        files = write_coco(folder / "data", counts=(9, 30, 5, 0), category_ids=(1, 2), width=200, height=120)
        data = files.read()
        names = ["猫 and more", "a name without end " * 9, "<b>bold</b>", "no_space_in_this_name_" * 6]
        names = ["red", "green"] if classes == 2 else names + [f"class {k}" for k in range(4, 60)]
        data["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
        for number, a in enumerate(data["annotations"]):
            a["category_id"] = number % classes + 1
        results, _ = imperfect(data, seed=2, rates={"missed": 0.2, "misplaced": 0.1, "confused": 0.2, "duplicate": 0.1})
        results = [r for r in results if r["image_id"] != 4]  # an image without objects and without errors
        paths = image_paths(data, files.images)
        write_report(folder / "report.html", data=data, results=results, files=paths, details={"Data": "x" * 300})
        data["annotations"][9]["bbox"] = [150, 90, 100, 20]  # in the second image, beyond its border
        data["annotations"][40]["bbox"] = [10, 10, 0, 20]  # in the third one
        data["images"].append({"id": 9, "file_name": "absent.png", "width": 30, "height": 30})
        files.write(data)
        [checked] = check_all([(Path(files.annotations), Path(files.images))], Resize(800, 1333))
        write_preview(folder / "check.html", "data", checked.split, checked.issues)
        found |= {(classes, name): (folder / f"{name}.html").as_uri() for name in ("report", "images", "check")}
    return found


OVERFLOW = """
const wide = document.documentElement.clientWidth;
const scrolls = e => e.closest('.scroll, .chart, .mark');
return [...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && !scrolls(e.parentElement)
  && e.getBoundingClientRect().right > wide + 1).map(e => e.outerHTML.slice(0, 100))
  .concat(document.documentElement.scrollWidth > wide ? ['page'] : []);
"""
COVERED = """
return [...document.querySelectorAll('.picture')].flatMap(picture => {
  const frame = picture.getBoundingClientRect();
  const shown = [...picture.querySelectorAll('.mark:not([hidden]) span:not(.crowded)')]
    .filter(e => getComputedStyle(e).opacity > 0).map(e => e.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const outside = e => e.left < frame.left - 1 || e.top < frame.top - 1
    || e.right > frame.right + 1 || e.bottom > frame.bottom + 1;
  return [...shown.filter((e, i) => shown.slice(i + 1).some(other => meet(e, other))), ...shown.filter(outside)];
}).length;
"""
LABELS = """
return [...document.querySelectorAll('.mark span, .more, .chip')].map(e => getComputedStyle(e))
  .map(style => [style.color, style.backgroundColor]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("classes", [2, 60])
@pytest.mark.parametrize("name", ["report", "images", "check"])
def test_every_page_fits_and_its_labels_are_readable(browser, pages, name, classes, scheme):
    set_scheme(browser, scheme)
    browser.get(pages[classes, name])
    for width in (1200, 400):
        set_width(browser, width)
        assert browser.execute_script(OVERFLOW) == [], width
    set_width(browser, 1200)
    wait.WebDriverWait(browser, 5).until(lambda b: b.execute_script(COVERED) == 0)  # the page hears of its new width
    browser.execute_script("document.querySelectorAll('.gallery figure').forEach(e => e.click())")
    assert browser.execute_script(COVERED) == 0
    for text_colour, ground in {tuple(pair) for pair in browser.execute_script(LABELS)}:
        lighter, darker = sorted((luminance(text_colour), luminance(ground)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text_colour, ground)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_links_lead_to_the_drawn_set_and_back(browser, pages):
    browser.get(pages[2, "report"])
    browser.find_element("css selector", "a[href='images.html']").click()
    assert browser.current_url == pages[2, "images"]
    assert "4 of 4 images" in browser.find_element("css selector", "h1").text
    assert visible(browser, ".gallery figure") == 4
    assert "no errors" in browser.find_element("css selector", ".gallery").text
    browser.find_element("css selector", "a[href='report.html']").click()
    assert browser.current_url == pages[2, "report"]


def test_the_report_has_the_curves_of_the_run(page, browser, pages):
    assert visible(page, "#run svg") == 1
    assert "best: AP 40.0, iteration 41" in text(page, "run")
    browser.get(pages[2, "report"])
    assert visible(browser, "#run") == 0


@pytest.mark.parametrize("classes", [2, 60])
def test_the_check_sheet_begins_with_what_is_wrong(browser, pages, classes):
    browser.get(pages[classes, "check"])
    figures = browser.find_elements("css selector", ".gallery figure")
    captions = [figure.find_element("css selector", "figcaption").text for figure in figures]
    kinds = [figure.get_attribute("class").split() for figure in figures]
    assert sorted(kinds[:2]) == [["flagged", "error"]] * 2
    wrong = "\n".join(captions[:2])
    assert "absent.png" in wrong
    assert "missing files" in wrong
    assert "boxes without area" in wrong
    assert kinds[2] == ["flagged", "warning"]
    assert "boxes that cross the border of their image" in captions[2]
    assert kinds[3:] == [[]] * (len(figures) - 3)
    assert browser.find_elements("css selector", ".legend .key")[1].text.startswith(
        "green" if classes == 2 else "a name"
    )
    assert len(browser.find_elements("css selector", ".legend .key")) == classes + 1
    assert visible(browser, ".mark.named span:not(.crowded)") > 10


def test_a_label_without_room_is_counted_and_shown_when_pointed_at(browser, pages):
    set_width(browser, 1200)
    browser.get(pages[60, "check"])
    script = """return [...document.querySelectorAll('.picture')].map(picture =>
      [picture.querySelectorAll('.crowded').length, picture.querySelector('.more').textContent])"""
    counted = browser.execute_script(script)
    assert max(number for number, _ in counted) > 0
    assert all(text == (f"{number} more without label" if number else "") for number, text in counted)


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
