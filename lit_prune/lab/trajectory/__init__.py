"""Which way the layers move while a network trains, against the gradients of both kinds of information."""
