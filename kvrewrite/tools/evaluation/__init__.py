"""Tasks with questions about a long context, and the measurement of policies on them."""
