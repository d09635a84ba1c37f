"""The HTTP server: OpenAI's endpoints over `AsyncLLM`, in starlette, uvicorn and msgspec."""

from bitllm.server.app import build_app
from bitllm.server.models import AdapterFiles, ServedModels
from bitllm.server.options import ServerOptions
from bitllm.server.run import serve

__all__ = ["AdapterFiles", "ServedModels", "ServerOptions", "build_app", "serve"]
