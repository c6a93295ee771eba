"""What the database remembers: tables and state moves. All our SQL on them is here."""

from aftercommit.records.schema import SCHEMA_VERSION, create_tables, schema_problem
from aftercommit.records.tables import Base, PoolState, ProgressRecord, TaskRecord, WorkerRecord

__all__ = [
    "SCHEMA_VERSION",
    "Base",
    "PoolState",
    "ProgressRecord",
    "TaskRecord",
    "WorkerRecord",
    "create_tables",
    "schema_problem",
]
