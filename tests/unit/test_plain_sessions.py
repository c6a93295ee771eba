"""What is not ours is left alone: importing aftercommit puts nothing on SQLAlchemy's classes."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

kinds = (Session, AsyncSession, Connection, Engine)


def heard():
    return {
        f"{kind.__name__}.{name}": len(getattr(kind.dispatch, name)._clslevel.get(kind, ()))
        for kind in (Session, Connection, Engine)
        for name in kind.dispatch._event_names
    }


before = [dict(vars(kind)) for kind in kinds], heard()
import aftercommit, aftercommit.fastapi, aftercommit.testing, aftercommit.events, aftercommit.batches
from aftercommit import Database, TaskRecord

db = Database("sqlite:///" + sys.argv[1])
with db.session() as session:
    session.execute(text("SELECT 1"))

assert ([dict(vars(kind)) for kind in kinds], heard()) == before
assert "Session.after_begin" in heard()

engine = create_engine("sqlite://")
with Session(engine) as session:
    connection = session.connection()
    session.execute(text("SELECT 1"))
    session.commit()
    ours = {name for name in {*vars(session), *vars(connection), *session.info} if "aftercommit" in str(name)}
    assert not ours, ours
"""


def test_importing_and_using_the_library_puts_nothing_on_sqlalchemy_s_classes(tmp_path: Path):
    """No listener on ``Session``, no method replaced, and nothing on a session that hands nothing over."""
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "test.db")], check=True)
