"""Models over HTTP: an OpenAI-compatible API, the endpoints of the 2023 server, a page."""
