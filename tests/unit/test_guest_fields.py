"""The fields that are falsified under a real guest are all that moves."""

import pytest
from guests.fields import ENGINE, FIELDS, IMAGE_BYTES, LAYOUT, PAGE_BYTES, QUEUE, unknown


def test_each_field_of_each_table_is_falsified_or_harmless():
    names = [field.name for field in FIELDS]
    assert len(set(names)) == len(names)
    of_tables = {f"{table.name}.{name}" for table in LAYOUT.tables() for name, _ in table.fields}
    assert of_tables <= set(names)


@pytest.mark.parametrize("offset", [0x20, 0x0FFF, LAYOUT.tables()[-1].end, ENGINE + 176, ENGINE + PAGE_BYTES - 1])
def test_what_is_in_no_field_is_found(offset: int):
    image = bytearray(IMAGE_BYTES)
    place, row = LAYOUT.submission.put(QUEUE, PAGE_BYTES, 16, QUEUE)
    image[place : place + len(row)] = row
    for field in FIELDS:
        field.falsify(memoryview(image))
    assert unknown(memoryview(image)) == []
    image[offset] = 1
    assert unknown(memoryview(image)) == [offset // PAGE_BYTES * PAGE_BYTES]
