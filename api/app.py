"""The ASGI application: routes, lifespan, and the layers around them.

Owns what is neither speech nor an error: models, greetings, health, readiness, metrics. One application serves one
Serving.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from declaim.api.access import AccessLayer
from declaim.api.cache import ResultCache
from declaim.api.errors import install_error_handlers
from declaim.api.gate import Gate, OpenGate, credential_of
from declaim.api.metrics import ServerMetrics
from declaim.api.page import page_file, wants_page
from declaim.api.rendering import Renders
from declaim.api.schemas import AudioModelList, Greeting, ModelCard, ModelList, ModelVoice, Readiness, controls_of
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.speech import MODEL_ALIASES, Lexicons, Voices, build_speech_router, check_model
from declaim.api.uploads import read_recording
from declaim.api.voices import check_reference, own_voice
from declaim.engine.errors import VoiceNotFound
from declaim.engine.request import EncodedVoice, Voice

# Beyond those that a page may always read.
_EXPOSED_HEADERS = (
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-finish-reason",
    "x-service-tier",
    *(
        f"x-ratelimit-{value}-{unit}"
        for value in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens", "characters")
    ),
    "x-ratelimit-limit-concurrent-streams",
    "x-ratelimit-remaining-concurrent-streams",
)


class OwnVoices:
    """The voices of the model alone: for a server that keeps none of its callers'."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def resolve(self, tenant: str, name: str | None) -> EncodedVoice | str | None:
        """One of the model's own. Raises: VoiceNotFound."""
        engine = self._serving.engine()
        try:
            return own_voice(name, model_name=engine.model_name, spec=engine.spec)
        except VoiceNotFound as error:
            known = ", ".join(("default", *engine.spec.voices, "alloy"))
            raise VoiceNotFound(f"{error}: use one of {known}", param="voice") from None

    async def encode_reference(self, data: bytes, *, transcript: str, param: str) -> EncodedVoice:
        """A recording that came with a request. Raises: InvalidRequest, MissingParameter."""
        engine = self._serving.engine()
        check_reference(engine, transcript, param="ref_text", recording=param)

        def encode() -> EncodedVoice:
            recording = read_recording(data, param=param)
            return engine.encode_voice(Voice(transcript, recording.audio, recording.sample_rate_hz))

        return await asyncio.to_thread(encode)


class NoLexicons:
    """For a server that keeps no pronunciations of its callers'."""

    async def entries(self, tenant: str) -> Mapping[str, str]:
        return {}


def create_app(
    serving: Serving,
    *,
    gate: Gate | None = None,
    voices: Voices | None = None,
    lexicons: Lexicons | None = None,
    settings: ApiSettings | None = None,
    workers: Executor | None = None,
    routers: Iterable[APIRouter] = (),
) -> AccessLayer:
    """Build the application; its lifespan starts `serving` and closes it.

    gate: None lets everybody in. voices: None knows the model's own. lexicons: None has no entries. workers: threads
    that encode, shut down with it; None makes as many as there are cores. routers: what else is served.

    Raises: OSError where the settings' cache folder cannot be used.
    """
    gate = gate or OpenGate()
    settings = settings or ApiSettings()
    metrics = ServerMetrics(serving)
    workers = workers or ThreadPoolExecutor(os.cpu_count() or 1, "declaim-encode")
    cache = None
    if settings.cache_folder is not None:
        cache = ResultCache(settings.cache_folder, max_bytes=settings.cache_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.start()
        try:
            yield
        finally:
            await asyncio.to_thread(serving.close)
            workers.shutdown(wait=False)

    # Redirecting a POST for its trailing slash loses the body with many clients.
    app = FastAPI(title="declaim", lifespan=lifespan, redirect_slashes=False)
    install_error_handlers(app)
    app.include_router(
        build_speech_router(
            serving,
            metrics,
            gate=gate,
            voices=voices or OwnVoices(serving),
            lexicons=lexicons or NoLexicons(),
            renders=Renders(cache),
            workers=workers,
            settings=settings,
        )
    )
    app.include_router(_build_models_router(serving, gate, is_public=settings.public_listings))
    app.include_router(_build_health_router(serving, metrics, cache, metrics_token=settings.metrics_token))
    for router in routers:
        app.include_router(router)
    return AccessLayer(_for_browsers(app, settings), metrics)


def _for_browsers(app: ASGIApp, settings: ApiSettings) -> ASGIApp:
    if not settings.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"),
        allow_headers=("*",),
        expose_headers=_EXPOSED_HEADERS,
        max_age=3600,
    )


def _build_models_router(serving: Serving, gate: Gate, *, is_public: bool) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    def card(model_id: str) -> ModelCard:
        engine = serving.engine()
        spec = engine.spec
        return ModelCard(
            id=model_id,
            created=created,
            owned_by="declaim",
            root=engine.model_name,
            sample_rate=spec.codec.sample_rate_hz,
            voices=[ModelVoice(name=name, language="en") for name in spec.voices or ("default",)],
            controls=controls_of(spec),
            instructions=list(spec.instructions),
            languages=list(spec.languages),
        )

    def cards() -> list[ModelCard]:
        return [card(name) for name in (serving.engine().model_name, *MODEL_ALIASES)]

    async def check(request: Request) -> None:
        if not is_public:
            await gate.authenticate(credential_of(request.headers, request.query_params))

    @router.get("/v1/models")
    async def list_models(request: Request) -> ModelList:
        """The served model and its aliases."""
        await check(request)
        return ModelList(data=cards())

    @router.get("/v1/audio/models")
    async def list_audio_models(request: Request) -> AudioModelList:
        """The same, as Open WebUI and others ask for it."""
        await check(request)
        return AudioModelList(models=cards())

    @router.get("/v1/models/{model_id:path}")
    async def get_model(request: Request, model_id: str) -> ModelCard:
        """One of them."""
        await check(request)
        check_model(model_id, model_name=serving.engine().model_name)
        return card(model_id)

    return router


def _build_health_router(
    serving: Serving, metrics: ServerMetrics, cache: ResultCache | None, *, metrics_token: str | None
) -> APIRouter:
    router = APIRouter()

    @router.head("/", include_in_schema=False)
    @router.get("/", response_model=Greeting)
    @router.head("/v1", include_in_schema=False)
    @router.get("/v1", response_model=Greeting)
    async def greet(request: Request) -> Response:
        """There is a server: clients ask early, to have a connection open. A browser gets the playground."""
        if request.url.path == "/" and wants_page(request):
            return page_file("index.html")
        return JSONResponse(Greeting(status=serving.stage).model_dump())

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process answers; says nothing of the model."""
        return {"status": "ok"}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> JSONResponse:
        """200 once a real request has gone through the engine and the vocoder, 503 with what is being done before, and
        where nothing can be decoded any more."""
        status, failure = serving.stage, serving.failure
        stage, percent = serving.progress()
        engine = serving.warm_engine
        lost = None if engine is None else (await asyncio.to_thread(engine.stats)).vocoder_failure
        if lost is not None:
            status = stage = "failed"
            failure = lost
        body = Readiness(status=status, stage=stage, percent=percent, error=failure)
        return JSONResponse(body.model_dump(exclude_none=True), 200 if status == "ready" else 503)

    @router.get("/metrics")
    def scrape(request: Request) -> Response:
        """Prometheus text; in a worker thread, since it asks the engine. Tenants are named to who brings the token."""
        if cache is not None:
            metrics.cache_bytes.set(cache.num_bytes)
        token = credential_of(request.headers, request.query_params) or ""
        names_tenants = metrics_token is not None and hmac.compare_digest(token.encode(), metrics_token.encode())
        return Response(metrics.text(names_tenants=names_tenants), media_type=CONTENT_TYPE_LATEST)

    return router
