"""From a CSV file to orders, line by line. Nothing here knows of the database."""

import csv
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import NamedTuple

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

    @property
    def cents(self) -> int:
        """What the order costs."""
        return int(self.quantity * self.unit_price * 100)


COLUMNS = list(OrderLine.model_fields)


class Line(NamedTuple):
    """A line as it stands in a file."""

    file_id: int
    number: int
    raw: bytes

    @property
    def text(self) -> str:
        """The line as text; what is none shows as a replacement character."""
        return self.raw.decode("utf-8-sig", errors="replace").replace("\0", "\ufffd").strip()

    def cells(self) -> list[str]:
        """Cut the line into its cells, or raise a `ValueError` that says why that cannot be."""
        if len(self.raw) == LONGEST and not self.raw.endswith(b"\n"):
            raise ValueError(f"longer than {LONGEST:,} bytes")
        if "\ufffd" in self.text:
            raise ValueError("not text in UTF-8")
        return [cell.strip() for cell in next(csv.reader([self.text.replace("\r", " ")]), [])]

    def order(self) -> OrderLine:
        """Return the order that the line holds, or raise a `ValueError` that says what is wrong with it."""
        cells = self.cells()
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
        try:
            return OrderLine.model_validate(dict(zip(COLUMNS, cells, strict=True)))
        except ValidationError as error:
            each = [f"{it['loc'][0]} “{it['input'][:40]}”: {it['msg']}" for it in error.errors()]
            raise ValueError("; ".join(each)) from None


class Lines:
    """The lines of a file, as a source for a batch: read from the disk each time, so that few are in memory."""

    def __init__(self, file_id: int, path: Path) -> None:
        self.file_id, self.path = file_id, path
        with path.open("rb") as file:
            header = Line(file_id, 1, file.readline(LONGEST))
        try:
            found = header.cells()
        except ValueError as error:
            raise BadFile(f"Line 1 is {error}. Is this a CSV file? Spreadsheets can be saved as one.") from None
        if not found:
            raise BadFile("There is no order in this file.")
        if found != COLUMNS:
            raise BadFile(f"The first line must name the columns {', '.join(COLUMNS)}. It reads: {header.text[:100]}")

    def __len__(self) -> int:
        """Count them, so that the batch knows how many are left."""
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Line]:
        """Give what stands behind the header, without empty lines; of one that is too long its beginning."""
        with self.path.open("rb") as file:
            for number in count(1):
                raw = rest = file.readline(LONGEST)
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(LONGEST)
                if number > 1 and raw.strip(b" ,;\t\r\n"):
                    yield Line(self.file_id, number, raw)
                if not raw:
                    return
