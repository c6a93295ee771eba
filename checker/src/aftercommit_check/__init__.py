"""Find misuse of SQLAlchemy sessions around background work, without running the code.

The rooms, in the order in which they import each other: ``sources`` (files, configuration, pinned versions),
``index`` (modules, scopes, bindings), ``facts`` (what an expression is, what a function does to a session),
``rules`` (what is wrong), ``output`` (how it is told). ``runner`` and ``cli`` tie them together.
"""

__version__ = "0.1.0"
