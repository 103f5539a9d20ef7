"""The commands: what a person types, and the place where a pool meets its two doors."""
