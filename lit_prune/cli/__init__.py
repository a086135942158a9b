"""The command line: its verbs call functions of the library and of the lab."""
