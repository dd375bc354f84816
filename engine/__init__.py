"""The engine: requests in, audio chunks out."""
