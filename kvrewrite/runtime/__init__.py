"""Runs a rewritten program: the model that users hold, its compiled parts and its CUDA graphs."""
