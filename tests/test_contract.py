"""The page of the contract tells what the tests show, and each row is shown."""

from __future__ import annotations

import contract
import pytest


def test_the_page_is_what_the_tests_say():
    remedy = "run: python tests/contract.py > docs/contract.md"
    assert contract.PAGE.read_text() == contract.page(), remedy


@pytest.mark.parametrize("row", contract.rows(), ids=lambda row: row.key)
def test_each_row_has_a_test(row):
    shown = {key for key, _ in contract.marks()}
    assert row.key in shown


def test_each_mark_names_a_row():
    known = {row.key for row in contract.rows()}
    assert [mark for mark in contract.marks() if mark[0] not in known] == []


def test_rows_are_unique():
    keys = [row.key for row in contract.rows()]
    assert len(set(keys)) == len(keys)
