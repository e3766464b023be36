"""The pages in a real browser: Chromium without a window, as `make browser` installs it.

Without one these are skipped; with DIFFDISTILL_BROWSER=required, as in CI, they fail.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.boards import EFFICIENCY, HOSTILE, draw_grid, measured, reported, written
from support.browser import chromium, set_width
from support.report_run import CONFIG, line

from diffdistill.eval.board import further
from diffdistill.eval.board.files import write_leaderboard
from diffdistill.eval.board.report import write_report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with three measured models, one of them of three seeds, a hostile one, and two published set-ups."""
    folder = tmp_path_factory.mktemp("board")
    draw_grid(folder / "good.png", "teal")
    draw_grid(folder / "hostile.png", "maroon")
    file = written(
        folder,
        *(measured("good student", 0.2 + 0.01 * seed, seed=seed, grid="good.png") for seed in range(3)),
        measured("teacher", 0.1, steps=35, recall=0.9, method="pretrain", efficiency=EFFICIENCY),
        measured(HOSTILE, 1.0, recall=0.7, method=HOSTILE, notes=HOSTILE, grid="hostile.png"),
        reported("published low", 1.5),
        reported("published high", 2.5),
        reported(
            "elsewhere", 0.5, protocol={"name": "CIFAR-10: another", "task": "CIFAR-10", "evaluator": "another's"}
        ),
    )
    return write_leaderboard([file], folder / "out", title="Board", with_reported=False)[0].as_uri()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("report") / "run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    numbers = [{"generator/loss": 1 / step, "health/fake_lag": 1 + step / 500} for step in (50, 100, 150)]
    (run / "metrics.jsonl").write_text("".join(line(50 * n, 10 * n, **held) for n, held in enumerate(numbers, start=1)))
    for step in (50, 100, 150):
        draw_grid(run / "previews" / f"step-{step:08d}.png")
    return write_report(run).as_uri()


class Tab:
    """A page in the browser, with what a person would do to it."""

    def __init__(self, browser: Any, url: str, *, dark: bool = False, width: int = 1280) -> None:
        self.browser = browser
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        media = {"features": [{"name": name, "value": value} for name, value in wishes.items()]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        set_width(browser, width)
        browser.get("about:blank")
        browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "file://", "storageTypes": "local_storage"})
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # what earlier pages left
        browser.get(url)

    def js(self, script: str) -> Any:
        return self.browser.execute_script(f"return {script}")

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def press(self, *keys: str) -> None:
        """Keys, at whatever has the focus."""
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            self.browser.switch_to.active_element.send_keys(getattr(Keys, key, key))

    def choose(self, selector: str, value: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.all(selector)[0]).select_by_value(value)

    def names(self) -> list[str]:
        """The models whose rows are to be seen, in order."""
        return [link.text for link in self.all("tr.row td.name a") if link.is_displayed()]

    def record(self) -> str | None:
        """The name in the open record."""
        heads = [head.text for head in self.all("dialog[open] h2")]
        assert len(heads) <= 1
        return heads[0] if heads else None

    def focused(self) -> str:
        return self.js("document.activeElement.textContent.trim()")


@pytest.fixture
def page(browser: Any, board: str) -> Tab:
    return Tab(browser, board)


@pytest.mark.parametrize("which", ["board", "run_page"])
def test_a_page_asks_for_nothing_and_complains_of_nothing(
    which: str, browser: Any, request: pytest.FixtureRequest
) -> None:
    tab = Tab(browser, request.getfixturevalue(which))
    for theme in ("light", "dark"):
        tab.all("#theme")[0].click()
        assert tab.js("document.documentElement.dataset.theme") == theme
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert not [url for url in asked if not url.startswith(("file:///", "data:"))]
    assert len([url for url in asked if url.startswith("file:///")]) == 1


def test_rows_of_a_long_board_come_when_they_are_asked_for(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [measured(f"model {i}", 0.1 + 0.1 * i, recall=1 - 0.1 * i, notes=HOSTILE) for i in range(7)]
    file = written(tmp_path, *records)
    whole = Tab(browser, write_leaderboard([file], tmp_path / "whole", title="B", with_reported=False)[0].as_uri())
    bare = "[...document.querySelectorAll('tr.row')].map((row) => row.outerHTML.replace(/<svg.*?svg>|\\n/g, ''))"
    rows = whole.js(bare)
    for name, value in (("MANY", 6), ("AT_ONCE", 2), ("AT_LEAST", 1)):
        monkeypatch.setattr(further, name, value)
    url = write_leaderboard([file], tmp_path / "long", title="B", with_reported=False)[0].as_uri()
    page = Tab(browser, url)
    assert page.names() == ["model 0", "model 1"]
    button = page.all("button[data-further]")[0]
    assert button.text == "Show 5 more of 5"
    pasted = "(search.value = '{}', search.dispatchEvent(new Event('input')))"
    page.js(pasted.format("model 5"))
    assert page.names() == ["model 5"]
    page.all("tr.row:not([hidden]) td.name a")[0].click()
    assert page.record() == "model 5"
    assert HOSTILE in page.all("dialog[open]")[0].text
    page.press("ESCAPE")
    page.js(pasted.format(""))
    assert button.text == "Show 4 more of 4"
    button.click()
    assert page.names() == [f"model {i}" for i in range(7)]
    assert page.js(bare) == rows
    last = Tab(browser, f"{url}#record-7")
    assert last.record() == "model 6"
    last.press("ESCAPE")
    [recall] = [head for head in last.all("section.card th button") if head.text.startswith("recall")]
    recall.click()
    assert last.names() == [f"model {i}" for i in range(6, -1, -1)]
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_rows_stand_by_rank_and_are_sorted_by_a_click_either_way(page: Tab) -> None:
    hostile = page.names()[2]
    assert page.names()[:3] == ["teacher", "good student", hostile]
    [recall] = [button for button in page.all("section.card th button") if button.text.startswith("recall")]
    recall.click()
    assert page.names()[:3] == ["good student", hostile, "teacher"]
    recall.click()
    assert page.names()[:3] == ["teacher", hostile, "good student"]
    assert recall.find_element("xpath", "..").get_attribute("aria-sort") == "descending"


def test_sorting_never_crosses_a_published_set_up(page: Tab) -> None:
    published = page.all("section.card")[1]
    [fid] = [button for button in published.find_elements("css selector", "th button") if button.text.startswith("FID")]
    for order in (["published low", "published high"], ["published high", "published low"]):
        fid.click()
        assert page.names()[3:] == [*order, "elsewhere"]


def test_models_are_filtered_by_words_and_by_kind(page: Tab) -> None:
    page.all("#search")[0].send_keys("GOOD student")
    assert page.names() == ["good student"]
    assert page.all("#count")[0].text == "1 of 6"
    page.press("ESCAPE")
    assert len(page.names()) == 6
    page.choose("#kind", "reported")
    assert page.names() == ["published low", "published high", "elsewhere"]
    page.choose("#kind", "")
    page.choose("#evaluations", "5+")
    assert page.names() == ["teacher"]


def test_a_filter_that_nothing_matches_says_so_and_can_be_cleared(page: Tab) -> None:
    page.all("#search")[0].send_keys("no such model")
    assert page.names() == []
    page.all("#clear")[0].click()
    assert len(page.names()) == 6


def test_a_record_opens_on_a_click_and_holds_every_seed(page: Tab) -> None:
    page.all("td.name a")[1].click()
    assert page.record() == "good student"
    text = page.all("dialog[open]")[0].text
    assert "0.2, 0.21, 0.22" in text
    assert all(f"Seed {seed}" in text for seed in range(3))
    page.all("dialog[open] [data-close]")[0].click()
    assert page.record() is None


def test_a_record_opens_from_the_plot_and_by_its_address(page: Tab, browser: Any, board: str) -> None:
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", page.all("svg a")[0])
    assert page.record() == "teacher"
    assert Tab(browser, f"{board}#record-2").record() == "good student"


def test_everything_works_without_a_mouse(page: Tab) -> None:
    page.press("/")
    assert page.js("document.activeElement.id") == "search"
    page.press("ARROW_DOWN", "ARROW_DOWN")
    assert page.focused() == "good student"
    page.press("ENTER")
    assert page.record() == "good student"
    page.press("ARROW_LEFT")
    assert page.record() == "teacher"
    page.press("ARROW_RIGHT")
    assert page.record() == "good student"
    page.press("ESCAPE")
    assert page.record() is None
    assert page.focused() == "good student"


def test_tab_reaches_the_columns_and_space_sorts(page: Tab) -> None:
    page.all("section.card details summary")[0].send_keys("")
    for _ in range(40):
        page.press("TAB")
        if page.focused().startswith("recall"):
            break
    page.press("SPACE")
    assert page.names()[0] == "good student"


def test_the_plot_shows_another_cost_when_it_is_chosen(page: Tab) -> None:
    choices = page.all("figure.plot .choices label")
    assert [choice.text for choice in choices] == ["NFE", "training images"]
    assert [plot.is_displayed() for plot in page.all("figure.plot svg")] == [True, False]
    choices[1].click()
    assert [plot.is_displayed() for plot in page.all("figure.plot svg")] == [False, True]


def test_grids_are_pictures_and_stand_with_their_noise(page: Tab) -> None:
    assert page.all(".gallery h3")[0].text == "Samples from the same noise: seeds 0 to 1799"
    assert page.js("[...document.querySelectorAll('.grids img')].map(i => i.naturalWidth)") == [40, 40]


def test_hostile_names_are_shown_and_never_run(page: Tab) -> None:
    for link in page.all("td.name a"):
        link.click()
        page.press("ESCAPE")
    assert page.js("window.hacked") is None
    assert HOSTILE in page.names()


@pytest.mark.parametrize("which", ["board", "run_page"])
def test_dark_mode_follows_the_system_and_keeps_its_contrast(
    which: str, browser: Any, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(which)
    brightness = {}
    for dark in (False, True):
        tab = Tab(browser, url, dark=dark)
        for part in ("color", "backgroundColor"):
            colour = tab.js(f"getComputedStyle(document.body).{part}.match(/[\\d.]+/g).slice(0, 3).map(Number)")
            brightness[dark, part] = luminance(colour)
    assert brightness[False, "backgroundColor"] > 0.8
    assert brightness[True, "backgroundColor"] < 0.05
    for dark in (False, True):
        light, deep = sorted((brightness[dark, "color"], brightness[dark, "backgroundColor"]), reverse=True)
        assert (light + 0.05) / (deep + 0.05) > 7  # WCAG 2.2, AAA


def luminance(colour: list[float]) -> float:
    """Relative luminance of sRGB 0 .. 255, as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("which", ["board", "run_page"])
def test_a_narrow_screen_scrolls_tables_and_not_the_page(
    which: str, browser: Any, request: pytest.FixtureRequest
) -> None:
    tab = Tab(browser, request.getfixturevalue(which), width=360)
    assert tab.js("document.documentElement.scrollWidth") <= 360


def test_the_report_reads_all_panels_at_one_step(browser: Any, run_page: str) -> None:
    tab = Tab(browser, run_page)
    browser.execute_script("arguments[0].focus()", tab.all(".panels svg")[0])
    tab.press("ARROW_LEFT")
    assert [output.text for output in tab.all(".panels output")] == ["0.01 at 100", "1.2 at 100"]
    tab.press("TAB", "TAB", "TAB")
    assert [output.text for output in tab.all(".panels output")] == ["0.00667", "1.3"]


def test_the_report_counts_by_steps_images_or_time(browser: Any, run_page: str) -> None:
    tab = Tab(browser, run_page)
    for choice, texts in enumerate((["50", "100", "150"], ["3200", "6400", "9600"], ["10 s", "20 s", "30 s"])):
        tab.all(".choices label")[choice].click()
        groups = tab.all(".panel")[0].find_elements("css selector", ".x")
        [shown] = [group for group in groups if group.is_displayed()]
        assert {text.text for text in shown.find_elements("css selector", "text")} >= set(texts)


def test_the_reports_previews_are_turned_by_a_slider(browser: Any, run_page: str) -> None:
    tab = Tab(browser, run_page)
    shown = [figure.is_displayed() for figure in tab.all(".film figure")]
    assert shown == [False, False, True]
    tab.all(".film input[type=range]")[0].send_keys("")
    browser.execute_script("document.querySelector('.film input').focus()")
    tab.press("ARROW_LEFT")
    assert [figure.is_displayed() for figure in tab.all(".film figure")] == [False, True, False]
    assert tab.all(".film .scrub output")[0].text == "Step 100, 6400 images"
