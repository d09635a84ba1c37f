"""The reference backend: the decoder in plain NumPy, written to be read and compared with."""

from bitllm.backends.reference.decoder import ReferenceBackend, ReferenceDecoder

__all__ = ["ReferenceBackend", "ReferenceDecoder"]
