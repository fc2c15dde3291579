"""FLOOR 3: one third-party library per file behind the ports. Importable by `runtime` only; none knows another."""
