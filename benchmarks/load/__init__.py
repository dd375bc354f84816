"""A load tester for OpenAI-compatible speech servers, ours and others': `declaim bench serve`.

`workload` says what is asked and when, `client` asks and notes when each piece of audio came, `playback` plays it to an
imagined listener, `summary` adds up, `report` draws, `session` runs it all. Nothing here knows declaim's server.
"""
