"""The laboratory: what researchers ask of a network. It uses the library; nothing of the library imports it."""
