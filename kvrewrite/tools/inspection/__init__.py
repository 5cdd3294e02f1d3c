"""Shows what the compiler did: the graph around each attention site as readable Python, and a report in HTML."""
