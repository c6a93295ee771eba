"""Many records in short transactions, where one bad record costs nothing to the others."""

from aftercommit.batches.report import BatchFailure, BatchReport

__all__ = ["BatchFailure", "BatchReport"]
