"""What the server tells of itself: health, models, version, figures."""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import Response

from bitllm import __version__
from bitllm.engine.llm import LLM
from bitllm.server.api_error import closed, loading
from bitllm.server.call import Call, json_response
from bitllm.server.metrics import CONTENT_TYPE
from bitllm.server.models import ListedModel, ServedModel, ServedModels
from bitllm.server.responses import (
    HealthResponse,
    LoadFigures,
    ModelCard,
    ModelList,
    ModelLoad,
    PoolFigures,
    StatsResponse,
    VersionResponse,
)

__all__ = ["health", "list_models", "metrics", "show_model", "stats", "version"]


async def health(call: Call, body: None) -> Response:
    """Return whether requests are taken."""
    if call.service.admission.draining:
        raise closed()
    if call.service.opened is None:
        raise loading()
    return json_response(HealthResponse("ok"))


async def version(call: Call, body: None) -> Response:
    """Return the version of bitllm."""
    return json_response(VersionResponse(__version__))


async def list_models(call: Call, body: None) -> Response:
    """Return the models that are served."""
    return json_response(ModelList(data=[_card(each) for each in call.service.models.listed()]))


async def show_model(call: Call, body: None) -> Response:
    """Return one model.

    Raises:
        ApiError: 404, it is not served.
    """
    return json_response(_card(call.service.models.get(call.request.path_params["model"])))


def _card(listed: ListedModel) -> ModelCard:
    return ModelCard(
        id=listed.name,
        created=listed.created,
        status=listed.state,
        parent=listed.parent,
        max_model_len=None if listed.llm is None else listed.llm.llm.context,
        meta={} if listed.llm is None else _meta(listed.llm.llm),
    )


def _meta(llm: LLM) -> dict[str, Any]:
    return {
        "name": llm.name,
        "n_ctx": llm.context,
        "n_vocab": llm.spec.vocab_size,
        "n_embd": llm.spec.hidden_size,
        "n_layer": len(llm.spec.layers),
        "backend": llm.info.backend,
        "chat": llm.tokenizer.has_chat_template,
    }


async def metrics(call: Call, body: None) -> Response:
    """Return figures for Prometheus."""
    service = call.service
    text = service.metrics.text(service.loaded(), service.admission)
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


async def stats(call: Call, body: None) -> Response:
    """Return figures for `bitllm ps`."""
    service = call.service
    return json_response(
        StatsResponse(
            version=__version__,
            uptime_seconds=time.monotonic() - service.metrics.started,
            draining=service.admission.draining,
            requests=service.admission.under_way,
            max_requests=service.admission.limit,
            resident_bytes=_resident_bytes(),
            models=[_load(each) for each in service.loaded()],
            loading=service.opened is None,
            pool=None if service.opened is None else _pool(service.opened),
        )
    )


def _pool(models: ServedModels) -> PoolFigures | None:
    pool = models.pool
    if pool is None:
        return None
    own = [each for each in models.listed() if each.parent is None]
    return PoolFigures(
        loading=[each.name for each in own if each.state == "loading"],
        unloaded=[each.name for each in own if each.state == "unloaded"],
        planned_bytes=pool.planned_bytes,
        memory_limit=pool.memory_limit,
        unload_seconds={
            name: each.unload_seconds
            for each in pool.loaded()
            for name in (each.name, *each.aliases)
            if each.unload_seconds is not None
        },
    )


def _load(served: ServedModel) -> ModelLoad:
    llm = served.llm.llm
    now = llm.stats()
    figures = LoadFigures(
        running=now.running,
        waiting=now.waiting,
        blocks=now.blocks,
        used_blocks=now.used_blocks,
        cached_blocks=now.cached_blocks,
        hit_rate=now.hit_rate,
        steps=now.steps,
        prefilled_tokens=now.prefilled_tokens,
        decoded_tokens=now.decoded_tokens,
        cached_tokens=now.cached_tokens,
        preemptions=now.preemptions,
    )
    info = llm.info
    return ModelLoad(served.name, info.backend, info.kernel, info.threads, llm.context, figures)


def _resident_bytes() -> int | None:
    try:
        from bitllm.backends.cpu import resident_bytes
    except ImportError:
        return None
    return resident_bytes() or None
