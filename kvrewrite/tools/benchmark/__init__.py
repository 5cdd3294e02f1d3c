"""`kvrewrite bench`: time and memory of policies beside transformers' full cache, kvpress and the roofline."""
