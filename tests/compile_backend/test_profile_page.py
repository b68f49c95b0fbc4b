"""The page that `to_html` writes: well-formed, without network, and its table sorts and filters in a real browser."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from fpsim.casts import parse_cast
from fpsim.compile_backend import Gap, ProductStatistics, Profile, SiteStatistics, Statistics
from fpsim.policy.policy import KINDS

#: A name that would be markup, a script or a placeholder if it were not escaped.
WEIRD = "a.</script><b onclick='x'>$title"


def site(path: str, kind: str, role: str, product: int | None, **numbers: object) -> SiteStatistics:
    statistics = Statistics(elements=100, signal=10.0, **numbers)  # type: ignore[arg-type]
    is_product = kind in KINDS
    return SiteStatistics(
        path=path,
        operator="aten.mm",
        kind=kind if is_product else None,
        direction="forward" if kind in ("fprop", "forward") else "backward",
        role=role,
        shape=(10, 10),
        dtype="float32",
        cast=parse_cast("e4m3fn"),
        contracted=(1,) if is_product else (),
        product=product,
        statistics=statistics,
    )


PROFILE = Profile(
    (
        site("layers.10", "fprop", "activation", 0, noise=0.1, amax=2.0, exponents=((-3, 60), (1, 40))),
        site("layers.9", "fprop", "weight", 0, noise=0.0, amax=9.0, exponents=((0, 100),)),
        site(WEIRD, "dgrad", "gradient", 1, noise=5.0, amax=0.5, underflows=40, zeros=3, exponents=((-30, 97),)),
        site("", "forward", "result", None, noise=float("inf"), overflows=1, nans=2, exponents=((9, 98),)),
    ),
    (
        ProductStatistics("layers.10", "aten.mm", "fprop", ((10, 10), (10, 10)), 1, 0.02, 1.0),
        ProductStatistics(WEIRD, "aten.mm", "dgrad", ((10, 10), (10, 10)), 1, float("nan"), 1.0),
    ),
    (Gap("z", "aten._cdist_forward", "<allowed>"),),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "page.html"
    assert PROFILE.to_html(path, title="A & B") == path
    return path


class Balance(HTMLParser):
    """Checks that every element that needs an end has one, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_escapes_names(page: Path) -> None:
    reader = Balance()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open == []
    assert WEIRD in reader.text and "A & B" in reader.text and "<allowed>" in reader.text
    assert "<b onclick" not in page.read_text(encoding="utf-8")


def test_the_page_needs_no_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//\w|src=|@import|url\(", text)


def test_the_files_of_the_page_are_installed_with_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    installed = project["tool"]["setuptools"]["package-data"]["fpsim.compile_backend.report"]
    folder = resources.files("fpsim.compile_backend.report")
    for name in ("page.html.jinja", "page.css", "page.js"):
        assert folder.joinpath(name).is_file()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in installed), name


# -- in a browser ------------------------------------------------------------------------------------------------------

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
]  # fmt: skip

#: Clicks and types as a reader does, and writes the order of the rows into the page.
SCRIPT = """{
const seen = {}, table = document.getElementById('sites');
const order = () => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.id);
const head = key => table.querySelector('th[data-key="' + key + '"]');
const click = key => { head(key).querySelector('button').click(); return [order(), head(key).ariaSort]; };
seen.start = order();
for (const key of ['sqnr', 'amax', 'path', 'underflows', 'relative_error']) seen[key] = [click(key), click(key)];
seen.sorted = [...table.querySelectorAll('th')].filter(cell => cell.ariaSort !== 'none').length;
click('number');
const type = (id, property, value) => {
  const control = document.getElementById(id);
  control[property] = value;
  control.dispatchEvent(new Event('input'));
  return [order(), document.getElementById('shown').textContent];
};
seen.words = type('words', 'value', 'LAYERS mm');
type('words', 'value', '');
seen.role = type('role', 'value', 'gradient');
type('role', 'value', '');
seen.kind = type('kind', 'value', 'fprop');
type('kind', 'value', '');
seen.marked = type('marked', 'checked', true);
type('marked', 'checked', false);
document.getElementById('site-2').click();
const detail = table.querySelector('tr.detail');
seen.detail = [detail.previousElementSibling.id, detail.textContent, detail.querySelectorAll('svg rect title').length];
document.getElementById('site-2').click();
seen.closed = table.querySelectorAll('tr.detail').length;
seen.sparks = table.querySelectorAll('svg.spark').length;
seen.dots = document.querySelectorAll('.overview circle').length;
const result = document.createElement('pre');
result.id = 'seen';
result.textContent = JSON.stringify(seen);
document.body.append(result);
}"""


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("browser")
    driven = folder / "driven.html"
    driven.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{SCRIPT}</script></body>"), "utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "HOME": str(folder)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr  # nothing is refused, and no script fails
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def ids(*numbers: int) -> list[str]:
    return [f"site-{number}" for number in numbers]


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("sqnr", (ids(3, 2, 0, 1), "ascending"), (ids(1, 0, 2, 3), "descending")),
        ("amax", (ids(1, 0, 2, 3), "descending"), (ids(3, 2, 0, 1), "ascending")),
        ("path", (ids(3, 2, 1, 0), "ascending"), (ids(0, 1, 2, 3), "descending")),  # layers.9 before layers.10
        ("underflows", (ids(2, 0, 1, 3), "descending"), (ids(0, 1, 3, 2), "ascending")),
    ],
)
def test_a_click_on_a_heading_sorts(seen: dict, key: str, first: tuple, second: tuple) -> None:
    """Rows that are equal stay as they were."""
    assert [tuple(state) for state in seen[key]] == [first, second]


def test_a_number_that_is_none_comes_first_among_errors(seen: dict) -> None:
    assert seen["relative_error"][0][0][0] == "site-2"
    assert seen["relative_error"][1][0][-1] == "site-2"
    assert seen["sorted"] == 1


def test_rows_are_filtered(seen: dict) -> None:
    assert seen["start"] == ids(0, 1, 2, 3)
    assert seen["words"] == [ids(0, 1), "2 of 4 sites"]
    assert seen["role"] == [ids(2), "1 of 4 sites"]
    assert seen["kind"] == [ids(0, 1), "2 of 4 sites"]
    assert seen["marked"] == [ids(2, 3), "2 of 4 sites"]


def test_a_click_on_a_row_opens_its_histogram(seen: dict) -> None:
    above, text, bars = seen["detail"]
    assert above == "site-2" and bars == 1 and seen["closed"] == 0
    assert f"{WEIRD}: gradient of dgrad aten.mm" in text and "underflows: 40" in text and "2^-30: 97 inputs" in text
    assert (seen["sparks"], seen["dots"]) == (4, 4)
