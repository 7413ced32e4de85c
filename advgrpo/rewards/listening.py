"""The flags of every command that listens, and what it says about its address."""

from __future__ import annotations

import ipaddress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from advgrpo.config import Options
from advgrpo.rewards.scoring_request import Limits
from advgrpo.rewards.scoring_server import ScoringServer

_LIMITS = Limits()


class Listening(Options):
    """Where a server listens, to whom, and what a request may cost."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    token_file: Path | None = None
    """File with a secret that every request must show (rewards.remote.token_file); unset: that of environment variable
    ADVGRPO_REWARD_TOKEN, or none."""
    allow_hosts: tuple[str, ...] = ()
    """Names that requests may call this server by, beside --host, addresses, localhost and this machine's name."""
    max_bytes: Annotated[int, Field(ge=1, le=2**40)] = _LIMITS.max_bytes
    """Bytes of the longest request."""
    max_pixels: Annotated[int, Field(ge=1, le=2**40)] = _LIMITS.max_pixels
    """Pixels of all images of a request; scoring takes at least 15 bytes for each."""
    max_image_pixels: Annotated[int, Field(ge=1, le=2**26)] = _LIMITS.max_image_pixels
    """Pixels of one image."""
    request_seconds: Annotated[float, Field(ge=0.1, le=86400)] = _LIMITS.request_seconds
    """Seconds for a request to arrive."""
    score_seconds: Annotated[float, Field(ge=0.1, le=86400)] = _LIMITS.score_seconds
    """Seconds from there to its answer, other requests' before it included."""

    def limits(self) -> Limits:
        """What one request may cost."""
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})

    def address(self) -> dict[str, Any]:
        """Arguments of `make_server`."""
        return {"host": self.host, "port": self.port, "hosts": self.allow_hosts}


def tell_address(server: ScoringServer, what: str) -> None:
    """Print where the server listens, and a note where anybody may use it."""
    host, port = server.server_address[:2]
    print(f"serving {what} at http://{host}:{port}", flush=True)
    if not server.token and not ipaddress.ip_address(host).is_loopback:
        print("note: whoever reaches this port may use it; --token-file asks for a token", flush=True)
