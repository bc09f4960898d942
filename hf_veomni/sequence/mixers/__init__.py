"""Linear attention, state spaces and short convolutions on cut and packed sequences, exact.

Nothing is imported here: `families.lightning` needs `exchange` and `functions`, and `table` needs `lightning`.
"""
