"""The one exception for everything that a user can get wrong about data."""


class DataError(ValueError):
    """A dataset, a data file or a `data.*` key that cannot be used.

    The message is one sentence: it names the key or the file, says what is wrong and what would
    be right. It is meant to be shown as it is, without a traceback.
    """
