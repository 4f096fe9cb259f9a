"""The few errors that a user can cause; the command line turns each into one line on stderr."""


class UserError(Exception):
    """Bad input: the message says what, the value met, what was expected, and what to do."""


class ConfigError(UserError):
    """conf.json or conf_prune.json is at fault."""


class FormatError(UserError):
    """A bundle, model or data file is not what it should be, or is damaged."""


class MismatchError(UserError):
    """Two inputs do not belong together: another model, another configuration."""


class ShapeError(UserError):
    """A tensor or module does not have the shape that an operation needs."""
