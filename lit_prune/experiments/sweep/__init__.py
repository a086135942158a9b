"""The verb `sweep`: scores × sparsities × seeds under one protocol, a file a cell."""
