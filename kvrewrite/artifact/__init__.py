"""Model directories: what `convert` writes and `load` reads."""
