"""FLOOR 0: everything that can be decided without I/O. No clock, no socket, no log, no framework."""
