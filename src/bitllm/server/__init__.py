"""The HTTP server; its chat page lies in `chat_page/`."""
