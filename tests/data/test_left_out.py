import logging

import pytest

from mmkd.data.left_out import LeftOut


def test_reasons_are_counted_and_the_first_rows_named(caplog: pytest.LogCaptureFixture) -> None:
    left_out = LeftOut("train")
    for row in (1, 4, 5, 9):
        left_out.add(row, "without completion")
    left_out.add(7, "with an empty answer")
    with caplog.at_level(logging.WARNING):
        left_out.warn(of=12)
    assert [record.message for record in caplog.records] == [
        "5 of 12 train rows are left out: 4 without completion (rows 1, 4, 5 and 1 more); "
        "1 with an empty answer (row 7)."
    ]
    assert len(left_out) == 5


def test_nothing_is_said_where_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    LeftOut("eval").warn(of=3)
    assert not caplog.records
