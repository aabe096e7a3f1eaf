"""The one exception class of slimlstm."""


class SlimLSTMError(ValueError):
    """Something was asked for that cannot be done. The message says what was seen, why it is wrong, and the remedy."""
