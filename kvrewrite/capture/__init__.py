"""Front ends: an unmodified decoder in, a flat `torch.fx` graph out."""
