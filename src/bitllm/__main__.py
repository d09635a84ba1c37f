"""`python -m bitllm` is the `bitllm` command."""

from bitllm.cli import main

if __name__ == "__main__":
    main()
