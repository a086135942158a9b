"""The verb `analyze`: channel and layer tables, structure, controls, comparisons of runs, and their figures."""
