"""The score that orders hypotheses of different lengths."""


def length_penalty(length: int, strength: float) -> float:
    """Return what a log probability is divided by: ((5 + length) / 6) ** strength.

    Wu et al. 2016, equation 14. Length counts EOS where there is one. At strength 0 the score is
    the log probability; the larger the strength, the better long hypotheses fare.
    """
    return float(((5 + length) / 6) ** strength)
