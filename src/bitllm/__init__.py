"""bitllm: run, serve, train and convert BitNet b1.58 language models."""
