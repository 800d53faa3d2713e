"""Every bound of the server on a number, a length or a time: the guard, the schema and the desk read them here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    # The request as bytes.
    body_bytes: int = 2 * 1024**2
    bodies_bytes: int = 64 * 1024**2
    """Bodies that are being read or kept, together."""
    head_bytes: int = 32 * 1024
    """Request line and headers."""
    num_headers: int = 100
    path_bytes: int = 1024
    query_bytes: int = 1024
    num_values: int = 30_000
    """Commas, brackets and braces of a JSON body outside its texts: its parser holds up everybody while it runs."""

    # What it asks.
    num_messages: int = 512
    content_chars: int = 200_000
    """One message, one prompt."""
    total_chars: int = 800_000
    """All messages together."""
    model_chars: int = 200
    n: int = 16
    max_tokens: int = 1024
    num_stops: int = 4
    stop_chars: int = 200
    logprobs: int = 20
    temperature: float = 2.0
    top_k: int = 1_000_000
    repetition_penalty: float = 2.0
    seed: int = 10**18
    """Least: -seed. Bounds in the schema are floats, and this one is exact."""
    num_prompts: int = 8
    """Texts that one call of /v1/completions may have continued."""
    num_chats: int = 256
    """Chats that one call of /v1/rewards may score."""
    user_chars: int = 256

    # Connections and times.
    connections: int = 512
    open_share: float = 0.75
    """Share of slots and queue that one client from elsewhere may hold."""
    deadline_s: float = 120.0
    head_s: float = 10.0
    """Until a request's head is there, from the connection or its first byte."""
    body_s: float = 10.0
    idle_s: float = 75.0
    """Between two requests of a connection."""
    send_s: float = 20.0
    """Without one byte taken by a client whose answer waits to be sent."""
    send_buffer_bytes: int = 128 * 1024
    """Of the kernel, for each connection: what a client that reads nothing can make us keep."""
