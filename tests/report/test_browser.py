"""The page in a real browser, headless: every chart is drawn, nothing is logged, nothing is loaded."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bdtool.report.data import ReportData
from bdtool.report.page import write_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses its sandbox to root, as in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = (1200, 900), (360, 740)
DRAWN = """
return [...document.querySelectorAll("[data-chart]")].map((chart) => {
  const svg = chart.querySelector(".main-svg"), box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
  const marks = chart.querySelectorAll(".scatterlayer .js-line, .scatterlayer .point, .barlayer .point, .hm image");
  const right = chart.getBoundingClientRect().right;
  return {name: chart.dataset.chart, width: box.width, height: box.height, marks: marks.length, right: right,
          n_traces: chart.data.length, text: getComputedStyle(chart.querySelector(".xtick text")).fill};
});
"""


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Chrome"]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed; on Debian: apt install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'bdtool[dev]'")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def files(by_name: Callable[[str], ReportData], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("reports")
    paths = {name: directory / f"{name}.html" for name in ("varied", "fixed", "unlabelled")}
    for name, path in paths.items():
        write_report(path, by_name(name))
    return paths


def look(driver: "Chrome", path: Path, *, size: tuple[int, int], scheme: str) -> None:
    """Open the page and wait until its script says that the charts are drawn."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    prefer(driver, scheme)
    driver.get(path.as_uri())
    wait_for(driver, scheme)


def prefer(driver: "Chrome", scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_for(driver: "Chrome", scheme: str) -> None:
    stop = time.monotonic() + 30
    while drawn_for(driver) != scheme:
        assert time.monotonic() < stop, f"not drawn after 30 s; console: {driver.get_log('browser')}"
        time.sleep(0.05)


def drawn_for(driver: "Chrome") -> Any:
    return driver.execute_script("return document.documentElement.dataset.drawn")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["varied", "fixed", "unlabelled"])
def test_every_chart_is_drawn_and_nothing_is_logged(
    chromium: "Chrome", files: dict[str, Path], name: str, scheme: str, size: tuple[int, int]
) -> None:
    look(chromium, files[name], size=size, scheme=scheme)
    charts = chromium.execute_script(DRAWN)
    assert len(charts) == {"varied": 6, "fixed": 3, "unlabelled": 4}[name]
    for chart in charts:
        assert chart["width"] > 250, chart
        assert chart["height"] > 250, chart
        assert chart["marks"] >= chart["n_traces"], chart
        assert chart["right"] <= size[0], chart
    assert chromium.get_log("browser") == []


@pytest.mark.parametrize("name", ["varied", "fixed", "unlabelled"])
def test_a_phone_never_scrolls_sideways(chromium: "Chrome", files: dict[str, Path], name: str) -> None:
    look(chromium, files[name], size=PHONE, scheme="light")
    wide, window = chromium.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
    assert wide <= window == PHONE[0]


def test_charts_follow_the_colour_scheme_while_the_page_is_open(chromium: "Chrome", files: dict[str, Path]) -> None:
    look(chromium, files["varied"], size=DESKTOP, scheme="light")
    light = {chart["text"] for chart in chromium.execute_script(DRAWN)}
    prefer(chromium, "dark")
    wait_for(chromium, "dark")
    dark = {chart["text"] for chart in chromium.execute_script(DRAWN)}
    page = chromium.execute_script("return getComputedStyle(document.body).color")
    assert light == {"rgb(27, 31, 36)"}
    assert dark == {page} == {"rgb(230, 233, 238)"}


def test_pictures_are_shown_and_nothing_is_loaded(chromium: "Chrome", files: dict[str, Path]) -> None:
    look(chromium, files["varied"], size=DESKTOP, scheme="light")
    widths = chromium.execute_script("return [...document.images].map((image) => image.naturalWidth)")
    assert widths == [32] * 18
    loaded = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
