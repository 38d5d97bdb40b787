"""The one exception that means "you gave us something wrong", as opposed to a bug of ours."""


class InputError(ValueError):
    """A mistake in what the user gave us: one clear line that names the place, the value, and what
    is right.
    """
