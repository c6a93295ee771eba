"""From a CSV file to orders, line by line. Nothing here knows of the database."""

import csv
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any, BinaryIO

from pydantic import BaseModel, Field, ValidationError


class BadFile(Exception):
    """The file is of no use as a whole; the message is for the person who uploaded it."""


class OrderLine(BaseModel, str_strip_whitespace=True):
    """What a line holds, in this order."""

    order: str = Field(min_length=1, max_length=40)
    ordered_on: date
    customer: str = Field(min_length=1, max_length=40)
    product: str = Field(min_length=1, max_length=40)
    quantity: int = Field(ge=1, le=100_000)
    unit_price: Decimal = Field(ge=0, le=1_000_000, decimal_places=2)


COLUMNS = list(OrderLine.model_fields)


def read_lines(file: BinaryIO, number: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield each line behind line *number*: its own number, and its order, or what is wrong with it."""
    while raw := file.readline(10_000):  # whatever this file is, no more of it is in memory
        number, text = number + 1, raw.decode("utf-8-sig", errors="replace")
        if len(raw) == 10_000 or "\0" in text or "\ufffd" in text:
            raise BadFile(f"Line {number} is not text in UTF-8. Is this a CSV file? Spreadsheets can be saved as one.")
        cells = [cell.strip() for cell in next(csv.reader([text.replace("\r", " ")]), [])]
        if number == 1 and cells != COLUMNS:
            raise BadFile(f"The first line must name the columns {', '.join(COLUMNS)}. It reads: {text.strip()[:100]}")
        if number > 1 and any(cells):
            yield number, check(cells)


def check(cells: list[str]) -> dict[str, Any] | str:
    """Return the order that the cells of a line hold, or say what is wrong with them."""
    if len(cells) != len(COLUMNS):
        return f"{len(cells)} cells instead of {len(COLUMNS)}"
    try:
        order = OrderLine.model_validate(dict(zip(COLUMNS, cells, strict=True)))
    except ValidationError as error:
        return "; ".join(f"{each['loc'][0]} “{each['input'][:40]}”: {each['msg']}" for each in error.errors())
    return order.model_dump(exclude={"unit_price"}) | {"cents": int(order.quantity * order.unit_price * 100)}
