"""The playground: one page, its style and its script, and what they must know of the server.

Owns which files are sent. The page talks to the same endpoints as every other client.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request, Response

from declaim.api.schemas import controls_of
from declaim.api.serving import Serving

_TYPES = {"index.html": "text/html", "style.css": "text/css", "app.js": "text/javascript"}
# Nothing is loaded from elsewhere and nothing inline runs; what was streamed is played and kept from a blob.
_POLICY = "default-src 'self'; media-src 'self' blob: mediastream:; img-src 'self' data:; frame-ancestors 'none'"


def wants_page(request: Request) -> bool:
    """Whether a person's browser asks, and not a program."""
    return "text/html" in request.headers.get("accept", "")


def page_file(name: str) -> Response:
    """One of the playground's files, with what keeps it from loading anything else."""
    data = files("declaim.api").joinpath("playground", name).read_bytes()
    headers = {"content-security-policy": _POLICY, "cache-control": "no-cache", "x-content-type-options": "nosniff"}
    return Response(data, media_type=_TYPES[name], headers=headers)


def build_page_router(serving: Serving, *, max_input_chars: int) -> APIRouter:
    """The playground's own routes; the page itself is also what `/` gives a browser."""
    router = APIRouter(include_in_schema=False)

    @router.get("/playground")
    async def page() -> Response:
        return page_file("index.html")

    @router.get("/playground/style.css")
    async def style() -> Response:
        return page_file("style.css")

    @router.get("/playground/app.js")
    async def script() -> Response:
        return page_file("app.js")

    @router.get("/playground/settings.json")
    async def settings() -> dict[str, object]:
        """What the model can do."""
        engine = serving.engine()
        spec = engine.spec
        return {
            "model": engine.model_name,
            "imitates": spec.supports_voice_prompt,
            "needs_transcript": not spec.embeds_voices,
            "dialogue": spec.supports_dialogue,
            "controls": {name: control.model_dump() for name, control in controls_of(spec).items()},
            "instructions": list(spec.instructions),
            "languages": list(spec.languages),
            "max_input_chars": max_input_chars,
        }

    return router
