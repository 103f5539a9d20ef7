"""Fakes, strategies and media for tests; nothing else imports from here."""
