"""The one error of reading and writing weights of others."""


class WeightsError(ValueError):
    """A folder of weights cannot be read, written or represented; the message is one line."""
