"""The verb `lesion`: single channels set to zero or replaced by their peers."""
