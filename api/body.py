"""Reading a JSON body by hand: its size before its content, and a 413 that the client gets to see."""

from __future__ import annotations

from fastapi import Request
from starlette.requests import ClientDisconnect

from declaim.api.errors import BodyTooLarge, ClientGone, UnsupportedMediaType

# Room for a recording of 10 MiB in base64, and the longest text beside it.
MAX_BODY_BYTES = 16 << 20
# What is read and dropped of a body that is too large: closing on unread bytes would reset the connection and
# the client would never see the answer.
_MAX_DRAIN_BYTES = 64 << 20


async def read_json_body(request: Request) -> bytes:
    """Read a JSON body of at most MAX_BODY_BYTES, sent with a length or chunked.

    Raises: UnsupportedMediaType, BodyTooLarge, ClientGone.
    """
    body = await _read(request, keep=True)
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"The content type '{media_type}' is not taken: send application/json")
    return body


async def drop_body(request: Request) -> None:
    """Read a body that nobody wants, so that its sender sees the answer. Raises: BodyTooLarge, ClientGone."""
    await _read(request, keep=False)


async def _read(request: Request, *, keep: bool) -> bytes:
    body = bytearray()
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > _MAX_DRAIN_BYTES:
                break
            if keep and num_bytes <= MAX_BODY_BYTES:
                body += part
    except ClientDisconnect:
        raise ClientGone("the client hung up while it sent its request") from None
    if num_bytes > MAX_BODY_BYTES:
        raise BodyTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes: send less at once")
    return bytes(body)
