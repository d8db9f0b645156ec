"""The built site: no broken link, image or anchor, no formula left as source, nothing from the network."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
HOME = "https://site/"
LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
UNRENDERED = re.compile(r"\$\$|\\[\[\](){}]|\\[a-z]{2,}|:(?:class|func|meth|mod|attr):|::\s*$|^&$")
"""Formulas, their columns, and reStructuredText, which these docstrings are not written in."""


class Page(HTMLParser):
    """What a page refers to, what can be referred to in it, and its text outside of code."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.texts = set(), [], [], []
        self.formulas = 0
        self._in_code = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        self.formulas += tag == "math"
        self._in_code += tag in ("code", "pre", "script", "style")
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif LOADED.get(tag) in values:
            self.loaded.append(values[LOADED[tag]])

    def handle_endtag(self, tag):
        self._in_code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self._in_code:
            self.texts.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        urljoin(HOME, str(path.relative_to(folder))): path for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def pages(site):
    return {
        url.removesuffix("index.html"): Page(path) for url, path in site.items() if path.suffix == ".html"
    }


def within(pages, kind):
    """Each reference within the site: its page, the address it leads to, and the anchor there."""
    for url, page in pages.items():
        for reference in getattr(page, kind):
            address = urlsplit(urljoin(url, reference))
            if address.netloc == "site":
                yield url, address._replace(fragment="").geturl(), unquote(address.fragment)


pytestmark = pytest.mark.slow


def test_every_page_of_the_navigation_is_there(pages):
    assert len(pages) > 15
    assert {HOME + "tutorials/spikingjelly/", HOME + "design/", HOME + "changelog/"} <= set(pages)


def test_links_and_images_lead_to_files(site, pages):
    files = set(site) | set(pages)
    found = [*within(pages, "links"), *within(pages, "loaded")]
    assert [(page, address) for page, address, _ in found if address not in files] == []


def test_anchors_lead_to_places(pages):
    found = [place for place in within(pages, "links") if place[1] in pages and place[2]]
    assert [place for place in found if place[2] not in pages[place[1]].ids] == []


def test_nothing_is_loaded_from_the_network(pages):
    loaded = [(url, address) for url, page in pages.items() for address in page.loaded]
    parts = [(url, address, urlsplit(urljoin(url, address))) for url, address in loaded]
    assert [place for *place, part in parts if part.scheme != "data" and part.netloc != "site"] == []


def test_formulas_are_there(pages):
    assert pages[HOME + "method/"].formulas > 10


def test_nothing_is_left_as_source(pages):
    left = [(url, text) for url, page in pages.items() for text in page.texts if UNRENDERED.search(text)]
    assert left == []


@pytest.mark.parametrize("room", ["sltt_ext", "sltt_ext.analysis", "sltt_ext.data", "sltt_ext.models"])
def test_every_public_name_is_in_the_reference(pages, room):
    documented = {place.rpartition(".")[2] for place in pages[HOME + "api/"].ids}
    assert set(importlib.import_module(room).__all__) - documented == set()
