"""From a CSV file to orders, line by line. Nothing here knows of the database."""

import csv
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Annotated, BinaryIO

from pydantic import BaseModel, Field, StringConstraints, ValidationError

Code = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]


class BadFile(Exception):
    """The file is of no use as a whole; the message is for the person who uploaded it."""


class OrderLine(BaseModel, extra="forbid"):
    """What a line holds, in this order."""

    order: Code
    ordered_on: date
    customer: Code
    product: Code
    quantity: int = Field(ge=1, le=100_000)
    unit_price: Decimal = Field(ge=0, le=1_000_000, decimal_places=2)


def read_lines(file: BinaryIO, number: int) -> Iterator[tuple[int, OrderLine | str]]:
    """Yield each line behind line *number*: its own number, and its order or what is wrong with it."""
    columns = list(OrderLine.model_fields)
    while raw := file.readline(10_000):  # whatever this file is, no more of it is in memory
        number, text = number + 1, raw.decode("utf-8-sig", errors="replace").rstrip()
        if len(raw) == 10_000 or "\0" in text or "\ufffd" in text:
            raise BadFile(f"Line {number} is not text in UTF-8. Spreadsheet programs can save a file as “CSV UTF-8”.")
        if number == 1:
            if text.replace('"', "") != ",".join(columns):
                raise BadFile(f"The first line must be “{','.join(columns)}”. It is “{text[:100]}”.")
            continue
        for row in csv.DictReader([text.replace("\r", " ")], columns, restkey="too many cells"):
            try:
                yield number, OrderLine.model_validate(row)
            except ValidationError as error:
                wrong = (f"{each['loc'][0]} “{str(each['input'])[:40]}”: {each['msg']}" for each in error.errors())
                yield number, "; ".join(wrong)
