"""The page in a browser: it draws, sorts, switches and fits. Skipped where there is no Chromium to drive."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comparison_example import example, hostile

from gyroquant.benchmark.page import write_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)
PLOTS = ("pareto", "layers-a", "layers-b", "outliers-plot", "mass-plot", "seeds-plot")
ERRORS = "window.problems = []; addEventListener('securitypolicyviolation', (e) => problems.push(e.blockedURI));"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("browser")
    write_page(example(), made / "page.html")
    write_page(hostile(), made / "hostile.html")
    return made


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for one in [*ARGUMENTS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(DRIVER))
    made.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": ERRORS})
    yield made
    made.quit()


@pytest.fixture
def page(driver: Any, folder: Path) -> Any:
    """The example at 1280 pixels on a light system, drawn."""
    screen(driver, 1280)
    return opened(driver, folder / "page.html")


def screen(driver: Any, width: int, dark: bool = False) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def opened(driver: Any, path: Path) -> Any:
    driver.get(path.as_uri())
    return drawn(driver)


def drawn(driver: Any, theme: str = "") -> Any:
    def done(_: Any) -> bool:
        found = driver.execute_script("return document.documentElement.dataset.drawn")
        return found is not None and (not theme or found == theme)

    WebDriverWait(driver, 10, poll_frequency=0.05).until(done)
    return driver


def wait(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.03)


def marks(driver: Any, plot: str, kind: str = "") -> list[str]:
    """How each mark of a plot is drawn: its path, place and colour."""
    script = """return [...document.querySelectorAll(`#${arguments[0]} svg ${arguments[1]} path`)]
        .map((one) => [one.getAttribute('d'), one.getAttribute('transform'), one.getAttribute('fill')].join(' '))"""
    found: list[str] = driver.execute_script(script, plot, kind)
    return found


def column(driver: Any, number: int) -> list[str]:
    script = """return [...document.querySelectorAll('.scroll:not([hidden]) > .results tbody tr:not([hidden])')]
        .map((row) => row.cells[arguments[0]].dataset.value)"""
    found: list[str] = driver.execute_script(script, number)
    return found


def heading(driver: Any, text: str) -> Any:
    buttons = driver.find_elements(By.CSS_SELECTOR, ".scroll:not([hidden]) > .results thead button")
    return next(one for one in buttons if one.text.split()[0] == text)


def sorted_up(values: list[str]) -> bool:
    """Whether numbers ascend and what is missing is last."""
    numbers = [float(one) for one in values if one]
    return numbers == sorted(numbers) and values[len(numbers) :] == [""] * (len(values) - len(numbers))


def test_everything_is_drawn_without_a_complaint(driver: Any, folder: Path) -> None:
    screen(driver, 1280)
    driver.get_log("browser")
    for name in ("page.html", "hostile.html"):
        opened(driver, folder / name)
        assert driver.get_log("browser") == []
        assert driver.execute_script("return problems") == []
        assert driver.find_elements(By.CSS_SELECTOR, "iframe, img") == []
        for plot in PLOTS:
            assert len(marks(driver, plot)) > 8, plot
        resources = driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert [one for one in resources if not one.startswith("data:")] == []


@pytest.mark.parametrize("press", ["click", "enter", "space"])
def test_the_table_sorts(page: Any, press: str) -> None:
    def use(button: Any) -> None:
        if press == "click":
            page.execute_script(
                "arguments[0].scrollIntoView({behavior: 'instant', block: 'center', inline: 'center'})", button
            )
            button.click()
        else:
            page.execute_script("arguments[0].focus()", button)
            button.send_keys(Keys.ENTER if press == "enter" else Keys.SPACE)

    for name, number in (("KL", 7), ("Perplexity", 5)):
        button = heading(page, name)
        use(button)
        up = column(page, number)
        assert "" in up
        assert sorted_up(up)
        cell = button.find_element(By.XPATH, "..")
        assert cell.get_attribute("aria-sort") == "ascending"
        use(button)
        assert cell.get_attribute("aria-sort") == "descending"
        down = [one for one in column(page, number) if one]
        assert sorted_up(down[::-1])
        assert column(page, number)[len(down) :] == [""] * (len(up) - len(down))
    assert len(page.find_elements(By.CSS_SELECTOR, ".scroll:not([hidden]) [aria-sort$=scending]")) == 1


def test_the_table_is_filtered_by_bits(page: Any) -> None:
    Select(page.find_element(By.ID, "table-bits")).select_by_value("3")
    assert set(column(page, 1)) == {"3.0"}
    assert page.find_element(By.ID, "count").text == f"{len(column(page, 1))} of {len(example()['cells'])} rows"


def test_the_theme_is_the_systems_until_it_is_chosen_and_then_remembered(page: Any, folder: Path) -> None:
    def paper() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light, colours = paper(), marks(page, "pareto", ".role-legend")
    button = page.find_element(By.ID, "theme")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    drawn(page, "dark")
    assert button.get_attribute("aria-pressed") == "true"
    dark = paper()
    assert dark != light
    assert marks(page, "pareto", ".role-legend") != colours
    page.get((folder / "page.html").as_uri())
    assert paper() == dark
    page.execute_script("localStorage.clear()")
    screen(page, 1280, dark=True)
    opened(page, folder / "page.html")
    assert paper() == dark
    page.find_element(By.ID, "theme").click()
    drawn(page, "light")
    assert paper() == light
    page.execute_script("localStorage.clear()")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(driver: Any, folder: Path, width: int) -> None:
    screen(driver, width)
    opened(driver, folder / "page.html")
    driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    outside = """return [...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll')
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    assert driver.execute_script(outside) == []
    # Every mark and legend lies in its picture.
    cut = """return [...document.querySelectorAll('.plot')].filter((plot) => {
        const frame = plot.querySelector('svg').getBoundingClientRect();
        const boxes = [...plot.querySelectorAll('svg .role-legend-entry, svg .role-axis')]
            .map((one) => one.getBoundingClientRect());
        return boxes.some((box) => box.bottom > frame.bottom + 1 || box.right > frame.right + 2);
    }).map((one) => one.id)"""
    assert driver.execute_script(cut) == []


def test_another_size_of_the_window_draws_anew(page: Any) -> None:
    screen(page, 700)
    wait(lambda: page.execute_script("return document.querySelector('#pareto svg').clientWidth") <= 700)


def test_selectors_change_their_plot(page: Any) -> None:
    for selector, value, plot in (
        ("pareto-bits", "2", "pareto"),
        ("pareto-test", "c4", "pareto"),
        ("layers-measure", "decibels", "layers-b"),
        ("layers-left", "rtn W2 g64", "layers-a"),
        ("outliers-site", "R4", "outliers-plot"),
        ("outliers-measure", "kurtosis", "outliers-plot"),
        ("outliers-bits", "3", "outliers-plot"),
        ("mass-recipe", "quarot W2 g64", "mass-plot"),
        ("seeds-bits", "4", "seeds-plot"),
    ):
        before = marks(page, plot)
        Select(page.find_element(By.ID, selector)).select_by_value(value)
        wait(lambda plot=plot, before=before: marks(page, plot) != before)
        assert len(marks(page, plot)) > 8, selector


def test_the_size_is_in_bytes_or_in_bits_and_the_other_selectors_stay(page: Any) -> None:
    def axis() -> str:
        return str(page.execute_script("return document.querySelector('#pareto .role-axis-title').textContent"))

    def captions() -> list[str]:
        parts = page.find_elements(By.CSS_SELECTOR, "#tradeoff figcaption span")
        return [part.text for part in parts if part.is_displayed()]

    assert "MB" in captions()[0]
    Select(page.find_element(By.ID, "pareto-bits")).select_by_value("2")
    before = marks(page, "pareto")
    for view, unit in (("pareto_bits", "bits"), ("pareto", "MB")):
        Select(page.find_element(By.ID, "pareto-view")).select_by_value(view)
        wait(lambda unit=unit: unit in axis())
        assert len(captions()) == 1
        assert f" {unit}," in captions()[0]
    wait(lambda: marks(page, "pareto") == before)
    Select(page.find_element(By.ID, "pareto-bits")).select_by_value("3")
    wait(lambda: marks(page, "pareto") != before)


def test_panels_share_a_scale_of_colours(page: Any) -> None:
    before = marks(page, "layers-b", ".role-mark")
    Select(page.find_element(By.ID, "layers-left")).select_by_value("gsr W2 g64")
    wait(lambda: marks(page, "layers-b", ".role-mark") != before)


def test_one_text_is_shown_everywhere(page: Any) -> None:
    Select(page.find_element(By.ID, "table-test")).select_by_value("c4")
    for place in ("pareto-test", "seeds-plot-test"):
        assert page.find_element(By.ID, place).get_attribute("value") == "c4"
    captions = page.find_elements(By.CSS_SELECTOR, ".results caption")
    assert [one.text.split(";")[0] for one in captions if one.is_displayed()] == ["Measured on c4"]


def test_a_pointer_on_a_mark_shows_what_it_is(page: Any) -> None:
    point = page.find_element(By.CSS_SELECTOR, "#pareto .mark-symbol.role-mark path")
    page.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", point)
    webdriver.ActionChains(page).move_to_element(point).perform()
    wait(lambda: page.find_elements(By.CSS_SELECTOR, "#vg-tooltip-element.visible"))
    shown = page.find_element(By.ID, "vg-tooltip-element")
    keys = {one.text for one in shown.find_elements(By.CSS_SELECTOR, "td.key")}
    assert {"Method", "Family", "Size", "Bits, layers", "Perplexity", "Gap", "KL"} <= keys
    assert "undefined" not in shown.text
    assert 0 <= shown.rect["x"] <= 1280 - shown.rect["width"]
    assert shown.rect["height"] < 400


def test_commands_are_copied(page: Any) -> None:
    button = page.find_element(By.CSS_SELECTOR, "#verdict .copy")
    page.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", button)
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    button.click()
    wait(lambda: button.text == "Copied")


def test_the_keyboard_reaches_what_can_be_used_and_shows_where_it_is(page: Any) -> None:
    seen = set()
    for _ in range(14):
        webdriver.ActionChains(page).send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        assert focused.value_of_css_property("outline-style") == "solid"
        seen.add(focused.get_attribute("id") or focused.get_attribute("class") or focused.tag_name)
    assert {"theme", "copy", "pareto-test", "pareto-bits"} <= seen
