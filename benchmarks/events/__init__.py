"""Events handled per second, on rows of their own and on one that all of them want.

Every side handles the same events, which wait in the database (but for one side, which has them in memory): each adds
one to a row. All are async, with the same number of handlers at once, in a process of their own. In the end the rows
must say exactly how many events there were. ``by hand, outbox`` is the measure: a table of events, claimed with
``FOR UPDATE SKIP LOCKED`` and deleted in the transaction of the effect, so that it takes effect exactly once, too.
"""
