"""A recording inside a JSON body: base64, alone or in a data: URL. Nothing is fetched, nothing touches a file."""

from __future__ import annotations

import base64
import binascii

from declaim.engine.errors import InvalidRequest

MAX_REFERENCE_BYTES = 10 << 20


def decode_reference(value: str, *, param: str) -> bytes:
    """The recording's bytes. param: the field it came in, named in errors. Raises: InvalidRequest."""
    text = value.strip()
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidRequest(f"{param} is a data: URL without ';base64,': send base64", param=param)
    elif "://" in text[:12]:
        raise InvalidRequest(
            f"{param} is a URL, and none is fetched: send the recording itself, in base64", param=param
        )
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{param} is not base64 ({error}): send the recording in base64", param=param) from None
    if len(data) > MAX_REFERENCE_BYTES:
        raise InvalidRequest(
            f"{param} has {len(data)} bytes, at most {MAX_REFERENCE_BYTES} are taken: send a shorter recording",
            param=param,
        )
    return data
