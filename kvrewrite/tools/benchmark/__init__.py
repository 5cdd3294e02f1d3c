"""`kvrewrite bench`: compares time and memory of policies with transformers' full cache, kvpress and the roofline."""
