"""The page on the augmenter: every finished block, the gap, the warnings, and nothing from elsewhere."""

import re
from dataclasses import replace

import pytest

from metaaug_cli.augmentation.meta import MetaRecord
from metaaug_cli.runs.augmentation_page import BlockView, Taught, augmentation_page

RECORDS = [MetaRecord(step, 0.4, 0.3, 1e-5, 0.2, (1e-2, 1.0, 3.0)) for step in (0, 5, 10)]
TAUGHT = Taught(RECORDS, distance=0.25, similarity=0.9, epsilon=0.3, variance=0.5, sheet=b"picture")
LOSSES = {"trained": 2.0, "originals": 1.0, "held_back": 1.5}
BLOCKS = [BlockView("stem", LOSSES, None), BlockView("layer<1>", LOSSES, TAUGHT)]


def rows(page):
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_the_gap_is_a_table_of_all_blocks():
    heads, stem, layer = rows(augmentation_page(BLOCKS, 5))
    assert len(heads) == 7
    assert stem == ["stem", "–", "–", "2", "1", "1.5", "1.50"]
    assert layer == ["layer&lt;1&gt;", "0.25", "0.9", "2", "1", "1.5", "1.50"]
    assert "2 of 5 blocks" in augmentation_page(BLOCKS, 5)


def test_without_held_back_images_the_page_says_how_to_hold_some_back():
    few = [replace(block, losses={"trained": 2.0, "originals": 1.0}) for block in BLOCKS]
    page = augmentation_page(few, 2)
    assert [len(row) for row in rows(page)] == [5, 5, 5]
    assert "--holdout" in page
    assert "--holdout" not in augmentation_page(BLOCKS, 2)


def test_each_block_that_taught_has_its_sheet_and_four_charts():
    page = augmentation_page(BLOCKS, 2)
    assert page.count("<svg ") == 4
    assert page.count("data:image/png;base64,") == 1
    assert re.findall(r"<h2>(layer.*?)</h2>", page) == ["layer&lt;1&gt;"]


def test_the_distance_is_a_share_of_the_variance_as_epsilon_is():
    (chart,) = [svg for svg in re.findall(r"<svg.*?</svg>", augmentation_page(BLOCKS, 2)) if "epsilon" in svg]
    row = float(re.search(r'class="limit"[^>]*M\d+,([\d.]+)H', chart).group(1))
    values = re.search(r'class="line line0"[^>]*d="M([^"]*L[^"]*)"', chart).group(1)
    bottom = 220 - 34
    shares = [(bottom - float(p.split(",")[1])) / (bottom - row) for p in values.split("L")]
    assert shares == pytest.approx([0.2 / 0.5 / 0.3] * 3, rel=0.01)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"distance": 1e-4}, "collapsed to the identity"), ({"similarity": 0.2}, "hardly recognises")],
)
def test_trouble_is_said_where_it_is_seen(changed, said):
    assert 'class="note"' not in augmentation_page(BLOCKS, 2)
    page = augmentation_page([replace(BLOCKS[1], taught=replace(TAUGHT, **changed))], 1)
    assert said in re.search(r'<p class="note">(.*?)</p>', page).group(1)


def test_the_page_needs_nothing_but_itself():
    page = augmentation_page(BLOCKS, 2)
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
