"""What one uses kvrewrite with: evaluation, benchmarks, training, reports. The compiler imports nothing from here."""
