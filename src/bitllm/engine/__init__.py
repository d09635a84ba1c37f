"""From steps to text: block tables, scheduling, stopping, and the `LLM` that people use."""
