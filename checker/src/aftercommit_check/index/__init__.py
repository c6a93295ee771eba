"""Which names exist where: modules, scopes and what binds a name."""
