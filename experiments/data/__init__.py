"""Text to token sequences: the packaged multi-domain corpus, a user's own files, synthetic data, one input pipeline.

packages (pins) -> download -> extract -> fetch -+
                                  build (user) --+-> shards on disk -> corpus -> pipeline
                                     synthetic --------- in memory ----^
"""


class DataError(ValueError):
    """Data that is missing, damaged or not what was pinned; the message says where and what was expected."""
