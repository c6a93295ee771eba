"""From a CSV file to orders, line by line. Nothing here knows of the database."""

import csv
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pydantic import BaseModel, Field, ValidationError

LONGEST = 10_000  # bytes of a line: whatever a file is, no more of it is in memory


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


class Line(NamedTuple):
    """A line behind the header: a record of the batch."""

    file_id: int
    number: int
    raw: bytes

    @property
    def text(self) -> str:
        """The line as text; what is none stands as a question mark in a box."""
        return self.raw.decode("utf-8-sig", errors="replace").replace("\0", "\ufffd").strip()

    def order(self) -> dict[str, Any]:
        """Return the order that the line holds, or raise a `ValueError` that says what is wrong with it."""
        cells = self.cells()
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
        try:
            found = OrderLine.model_validate(dict(zip(COLUMNS, cells, strict=True)))
        except ValidationError as error:
            each = [f"{it['loc'][0]} “{it['input'][:40]}”: {it['msg']}" for it in error.errors()]
            raise ValueError("; ".join(each)) from None
        cents = int(found.quantity * found.unit_price * 100)
        return found.model_dump(exclude={"order", "unit_price"}) | {"number": found.order, "cents": cents}

    def cells(self) -> list[str]:
        """Cut the line into its cells."""
        if len(self.raw) == LONGEST and not self.raw.endswith(b"\n"):
            raise ValueError(f"longer than {LONGEST:,} bytes")
        if "\ufffd" in self.text:
            raise ValueError("not text in UTF-8")
        return [cell.strip() for cell in next(csv.reader([self.text.replace("\r", " ")]), [])]


class Lines:
    """The lines of a file, a source for a batch: read from the disk each time, so that memory does not grow with it."""

    def __init__(self, file_id: int, path: Path) -> None:
        self.file_id = file_id
        self.path = path
        with path.open("rb") as file:
            header = Line(file_id, 1, file.readline(LONGEST))
        if not header.text:
            raise BadFile("There is no order in this file.")
        try:
            found = header.cells()
        except ValueError as error:
            raise BadFile(f"Line 1 is {error}. Is this a CSV file? Spreadsheets can be saved as one.") from None
        if found != COLUMNS:
            raise BadFile(f"The first line must name the columns {', '.join(COLUMNS)}. It reads: {header.text[:100]}")

    def __iter__(self) -> Iterator[Line]:
        """Give what stands behind the header, without empty lines."""
        with self.path.open("rb") as file:
            for number, raw in enumerate(cut(file), start=1):
                if number > 1 and raw.strip(b" ,;\t\r\n"):
                    yield Line(self.file_id, number, raw)

    def __len__(self) -> int:
        """Count them, for a progress in percent."""
        return sum(1 for _ in self)


def cut(file: BinaryIO) -> Iterator[bytes]:
    """Give each line, and of one that is too long its beginning."""
    while raw := file.readline(LONGEST):
        rest = raw
        while not rest.endswith(b"\n") and (rest := file.readline(LONGEST)):
            pass
        yield raw
