"""Measurements. Each is a package with a `__main__`; figures are ratios of one run on one machine."""
