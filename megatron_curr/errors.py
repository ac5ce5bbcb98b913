"""The errors a user can cause. Each says where, what was found, and what to do about it.

The command line turns every one of them into one message and exit code 2; anything else is a bug
of ours and keeps its traceback.
"""


class UserError(Exception):
    """Base of every error that a change to the input, and not to the code, can mend."""


class RecipeError(UserError):
    """The recipe asks for something that is unknown, contradictory or impossible."""


class DataError(UserError):
    """A shard, tokenizer or corpus file is missing, damaged or not what it claims to be."""


class CheckpointError(UserError):
    """A checkpoint or run folder is missing, damaged, in use, or belongs to another recipe."""


class ShimError(Exception):
    """A name inside megatron-core that we stand in for has moved: ours to mend, not the user's."""
