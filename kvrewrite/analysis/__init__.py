"""Computes what a rewritten model costs: memory, operations, and its model card."""
