"""RULER."""

PREFIX = "ruler:"
TASKS: dict = {}
