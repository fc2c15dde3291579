"""SIDE TOWER: a local endpoint that speaks AssemblyAI Streaming v3, so that everything runs without an account."""
