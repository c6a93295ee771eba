"""Ways of completing a run, or of not reconciling: the library's, and some that are almost right."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from aftercommit.records import moves
from aftercommit.records.moves import Claim

Stage = Callable[[Connection], bool]


class Variant:
    """How a run completes: stages, each a transaction of its own, between which a process may die.

    A task has two steps: one is committed with a checkpoint, the other with the end. A stage returns whether it may
    commit. This one is the library's way.
    """

    reconciles = True
    writes_with_the_asker = True

    def first(self, claim: Claim) -> list[Stage]:
        """One transaction: the effect, and the fenced checkpoint."""
        return [lambda connection: _effect(connection, claim.id, 1) and self.save(connection, claim)]

    def save(self, connection: Connection, claim: Claim) -> bool:
        """Note that the first step is done."""
        return moves.save_checkpoint(connection, claim, "1")

    def stages(self, claim: Claim) -> list[Stage]:
        """One transaction: the effect, and the fenced note that it is done."""
        return [lambda connection: _effect(connection, claim.id) and moves.finish(connection, claim, None)]


class NoFence(Variant):
    """Whoever is ready, is ready."""

    def save(self, connection: Connection, claim: Claim) -> bool:
        """The note asks for nothing."""
        return _note(connection, claim.id, "checkpoint = '1'", "id = :id")

    def stages(self, claim: Claim) -> list[Stage]:
        """The note asks for nothing."""
        return [lambda connection: _effect(connection, claim.id) and _note_done(connection, claim.id, "id = :id")]


class FenceWithoutClaim(Variant):
    """The record says that it runs; by whom is not asked."""

    def save(self, connection: Connection, claim: Claim) -> bool:
        """The note asks for the state alone."""
        return _note(connection, claim.id, "checkpoint = '1'", "id = :id AND state = 'running'")

    def stages(self, claim: Claim) -> list[Stage]:
        """The note asks for the state alone."""
        return [
            lambda connection: (
                _effect(connection, claim.id) and _note_done(connection, claim.id, "id = :id AND state = 'running'")
            )
        ]


class FenceByAttempt(Variant):
    """Attempts are counted anew when somebody retries a task, so that a number names two claims."""

    def save(self, connection: Connection, claim: Claim) -> bool:
        """The note asks for the attempt, not for the number of claims."""
        mine = f"id = :id AND state = 'running' AND attempt = {claim.attempt}"
        return _note(connection, claim.id, "checkpoint = '1'", mine)

    def stages(self, claim: Claim) -> list[Stage]:
        """The note asks for the attempt, not for the number of claims."""
        mine = f"id = :id AND state = 'running' AND attempt = {claim.attempt}"
        return [lambda connection: _effect(connection, claim.id) and _note_done(connection, claim.id, mine)]


class FenceByPlainRead(Variant):
    """Looked at, not locked: a snapshot goes on showing what is no longer true."""

    def stages(self, claim: Claim) -> list[Stage]:
        """The effect commits under a look; the note follows."""

        def look(connection: Connection) -> bool:
            found = connection.execute(
                sa.text(
                    "SELECT 1 FROM aftercommit_task WHERE id = :id AND state = 'running' AND attempt = :attempt "
                    "AND claims = :claims"
                ),
                {"id": id_of(connection, claim.id), "attempt": claim.attempt, "claims": claim.claims},
            ).first()
            return _effect(connection, claim.id) and found is not None

        return [look, lambda connection: moves.finish(connection, claim, None)]


class CompletionOutside(Variant):
    """The effect commits, fenced; that it is done is noted afterwards."""

    def stages(self, claim: Claim) -> list[Stage]:
        """Two transactions, and a gap between them."""
        return [
            lambda connection: _effect(connection, claim.id) and moves.lock(connection, claim),
            lambda connection: moves.finish(connection, claim, None),
        ]


class NoReconciliation(Variant):
    """A worker believes that what it holds is all that it is said to hold."""

    reconciles = False


class WrittenApart(Variant):
    """The task is written in a transaction of its own, as into a broker: the asker's may still be rolled back."""

    writes_with_the_asker = False


def id_of(connection: Connection, id: UUID) -> Any:
    """As the database compares it with a record's id, in SQL of our own."""
    return id.hex if connection.dialect.name == "sqlite" else id


def _effect(connection: Connection, id: UUID, step: int = 2) -> bool:
    parameters = {"task": str(id), "step": step}
    connection.execute(sa.text("INSERT INTO model_effect (task, step) VALUES (:task, :step)"), parameters)
    return True


def _note_done(connection: Connection, id: UUID, where: str) -> bool:
    return _note(connection, id, "state = 'succeeded', queued_key = NULL", where)


def _note(connection: Connection, id: UUID, what: str, where: str) -> bool:
    statement = sa.text(f"UPDATE aftercommit_task SET {what} WHERE {where}")
    return connection.execute(statement, {"id": id_of(connection, id)}).rowcount == 1
