"""The documented limits are those of the code."""

from support.limit_table import documented, text


def test_the_documented_limits_are_those_of_the_code() -> None:
    assert documented() == text(), "write them anew: PYTHONPATH=.:tests python -m support.limit_table"
