"""The verb `sweep`: methods × sparsities × seeds under one protocol."""
