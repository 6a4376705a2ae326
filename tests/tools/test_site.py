"""The site is built strictly, every link in it leads somewhere, and every public name has its place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusednorm
from tests.helpers.built_site import Content, faults

if sys.version_info < (3, 11):
    pytest.skip("mkdocs-material needs Python 3.11", allow_module_level=True)

from tools.site import docstrings, hooks

ROOT = Path(fusednorm.__file__).parents[1]
API = sorted((ROOT / "docs" / "api").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stdout + run.stderr
    return folder


def test_links_of_the_site_lead_somewhere(site):
    assert faults(site) == []


def test_every_public_name_is_on_one_page(site):
    named = [name for page in API for name in re.findall(r"^::: fusednorm\.(\w+)$", page.read_text(), re.MULTILINE)]
    assert sorted(named) == fusednorm.__all__
    shown = {page.stem: Content((site / "docs/api" / page.stem / "index.html").read_text()).anchors for page in API}
    for name in named:
        assert sum(f"fusednorm.{name}" in anchors for anchors in shown.values()) == 1, name


def test_methods_and_formulas_are_shown(site):
    page = (site / "docs/api/generation/index.html").read_text()
    assert 'id="fusednorm.KVCache.crop"' in page and 'id="fusednorm.KVCache.reorder"' in page
    assert "<mfrac>" in (site / "docs/api/norms/index.html").read_text()


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="../missing/">x</a>', "../missing/ is not there"),
        ('<a href="#missing">x</a>', "#missing has no such anchor"),
        ('<a href="other/#missing">x</a>', "other/#missing has no such anchor"),
        ('<img src="https://example.org/x.png">', "loads https://example.org/x.png"),
        ("<p>text\n- no list</p>", "'- ' in"),
        ("<p>see :func:<code>x</code></p>", "':func:' in"),
    ],
)
def test_faults_of_a_site_are_found(tmp_path, html, fault):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text('<h2 id="there">x</h2><a href="../">back</a>')
    (tmp_path / "index.html").write_text('<p id="top"><a href="other/#there">x</a> <a href="#top">y</a></p>')
    assert faults(tmp_path) == []
    (tmp_path / "index.html").write_text(html)
    assert [found for found in faults(tmp_path) if fault in found]


def test_docstrings_become_markdown():
    text = """A sum, as :func:`add` and :class:`~torch.Tensor`.

.. math:: a + b
    + c

At :math:`b = 0` it is a.

Returns:
    (sum, difference): of
    two.

Example:
    >>> 1 + 1
    2
"""
    assert docstrings.markdown(text, frozenset({"add"})) == (
        "A sum, as [`add`][fusednorm.add] and `Tensor`.\n\n$$ a + b + c $$\n\nAt $b = 0$ it is a.\n\n"
        "**Returns:** (sum, difference): of two.\n\nExamples:\n    >>> 1 + 1\n    2\n"
    )


def test_what_pages_link_to_belongs_to_the_site(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "one.py").write_text('"""Says one."""\n')
    (tmp_path / "more.md").write_text("[back](start.md#here) [raw](raw.json) [gone](gone.md)")
    (tmp_path / "raw.json").write_text("{}")
    (tmp_path / "start.md").write_text("[more](more.md) [parts](parts) [other](https://example.org/x.md)")
    found = hooks.reached(tmp_path, ["start.md"])
    assert sorted(found) == ["more.md", "parts/README.md", "parts/one.py.md", "raw.json", "start.md"]
    assert "[`one.py`](one.py). Says one." in (found["parts/README.md"] or "")
    assert '"""Says one."""' in (found["parts/one.py.md"] or "")
