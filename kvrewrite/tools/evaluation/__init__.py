"""Tasks that ask about a long context, and what measures policies on them."""
