"""bitllm inside other people's programs; each module needs the library it is named after."""
