"""FLOOR 5: the HTTP edge. A handler parses, calls one use case, renders."""
