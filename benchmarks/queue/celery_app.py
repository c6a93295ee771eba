"""Celery's application: ``celery --app benchmarks.queue.celery_app worker``."""

import os

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from benchmarks.queue.work import change, url

app = Celery("benchmark", broker=os.environ.get("BENCHMARK_REDIS"))
app.conf.update(task_ignore_result=True, worker_send_task_events=False)
# Nothing connects before the worker has forked.
engine = create_engine(url("psycopg"), pool_size=1, max_overflow=0)


@app.task(name="change")
def task(key: int) -> None:
    """Do the work in a session of its own."""
    with Session(engine) as session, session.begin():
        change(session, key)
