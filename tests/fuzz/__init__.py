"""Random programs, each held to an eager reference that is made of recorded rows: see ``check.py`` for the property.

``python -m tests.fuzz --seeds 0:1000`` runs them; a failure is printed with its seed and the smallest program that shows it.
"""
