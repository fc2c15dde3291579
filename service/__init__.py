"""Turnwire: upload a WAV, stream it to AssemblyAI at the pace it was recorded, follow its turns live, keep them."""
