"""The errors a user can cause: one message that says what, where, why and what to do next."""


class InputError(ValueError):
    """Wrong usage or unusable input. Commands print the message alone and exit with code 2."""
