"""The errors a user meets: one message that says what, where, why and what to do next."""


class InputError(ValueError):
    """Wrong usage or unusable input. Commands print the message alone and exit with code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (no room for checkpoints, diverged). Commands exit with code 1."""
