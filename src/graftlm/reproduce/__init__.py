"""Reproductions of the paper's experiments; each module is one experiment and imports lazily."""
