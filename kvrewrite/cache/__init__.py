"""The memory of rewritten models: what a request holds, and the pages that it lies in."""
