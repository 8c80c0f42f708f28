"""What is answered to a request that is not answered: OpenAI's form of an error."""

import json
from typing import Any

# An answer quotes no more than this of what a client sent.
QUOTED = 80


class Problem(Exception):
    """A request that is refused.

    Args:
      status: of HTTP.
      message: what is wrong, and what to send instead.
      field: of the body that is wrong.
      code: for programs.
      retry_after: seconds after which the same may be sent again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": dict(message=self.message, type=kind, param=self.field, code=self.code)}

    def headers(self) -> dict[str, str]:
        """What goes with it."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def quoted(value: Any) -> str:
    """What a client sent, cut to what a message can hold."""
    shown = repr(value[:QUOTED] if isinstance(value, str) else value)
    return shown if len(shown) <= QUOTED + 2 else f"{shown[:QUOTED]}..."


def to_json(value: Any) -> bytes:
    """ASCII, so that no text that a client sent can be one that has no UTF-8."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")
