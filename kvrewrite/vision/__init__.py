"""Vision-language models: the unmodified model turns images and text into embeddings, the rewritten language model reads them."""
