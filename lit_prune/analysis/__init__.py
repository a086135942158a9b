"""What `analyze` computes beside the channel table: structure of layers, controls, comparisons of runs."""
