"""The one error of reading and writing weights of others."""

_LONGEST = 1000  # characters of a message, which may quote a file


class WeightsError(ValueError):
    """A folder of weights cannot be read, written or represented; the message is one line."""

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}...")
