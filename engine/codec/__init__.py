"""Codecs: codes to samples and back. One file a codec; `base` has what the rest of the engine sees."""
