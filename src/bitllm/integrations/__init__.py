"""bitllm and other programs; each module needs the library it is named after, once it is called."""
