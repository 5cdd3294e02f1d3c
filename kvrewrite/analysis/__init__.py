"""What a rewritten model costs and what it is: memory, operations, the model card."""
