"""The verb `suite`: many runs of one experiment on the devices at hand."""
