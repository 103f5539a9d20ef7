"""Measurements of what the design promises; ``make bench`` runs them, tests never do."""
