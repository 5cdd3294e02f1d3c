"""Tools that use kvrewrite: evaluation, benchmarks, training, reports. The compiler imports nothing from here."""
