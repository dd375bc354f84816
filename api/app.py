"""The ASGI application: routes, lifespan, and the layers around them.

Owns what is neither speech nor an error: models, health, readiness, metrics.
One application serves one Serving.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from declaim.api.access import AccessLayer
from declaim.api.errors import install_error_handlers
from declaim.api.metrics import ServerMetrics
from declaim.api.schemas import ModelCard, ModelList, Readiness
from declaim.api.serving import Serving
from declaim.api.speech import MODEL_ALIASES, build_speech_router, check_model


def create_app(serving: Serving) -> ASGIApp:
    """Build the application; its lifespan starts `serving` and closes it."""
    metrics = ServerMetrics(serving)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.start()
        try:
            yield
        finally:
            await asyncio.to_thread(serving.close)

    # Redirecting a POST for its trailing slash loses the body with many clients.
    app = FastAPI(title="declaim", lifespan=lifespan, redirect_slashes=False)
    install_error_handlers(app)
    app.include_router(build_speech_router(serving, metrics))
    app.include_router(_build_models_router(serving))
    app.include_router(_build_health_router(serving, metrics))
    return AccessLayer(app, metrics)


def _build_models_router(serving: Serving) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    def card(model_id: str) -> ModelCard:
        return ModelCard(id=model_id, created=created, owned_by="declaim", root=serving.engine().model_name)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The served model and its aliases."""
        return ModelList(data=[card(name) for name in (serving.engine().model_name, *MODEL_ALIASES)])

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> ModelCard:
        """One of them."""
        check_model(model_id, model_name=serving.engine().model_name)
        return card(model_id)

    return router


def _build_health_router(serving: Serving, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process answers; says nothing of the model."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """200 once a real request has gone through the engine and the vocoder, 503 with what is being done before."""
        status = serving.stage
        stage, percent = serving.progress()
        body = Readiness(status=status, stage=stage, percent=percent, error=serving.failure)
        return JSONResponse(body.model_dump(exclude_none=True), 200 if status == "ready" else 503)

    @router.get("/metrics")
    def scrape() -> Response:
        """Prometheus text; in a worker thread, since it asks the engine."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
