"""Every causal language model of transformers, tiny, through the compiler: `python -m tests.coverage`."""
