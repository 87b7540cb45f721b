"""The errors and warnings users meet. Each message names the culprit and says what to do about it."""


class GyroquantError(Exception):
    """Base of every error that the user can mend. The command line shows it without a traceback."""


class UnsupportedModelError(GyroquantError):
    """A model, a site of it or a fold into it that cannot be done exactly; the model is left untouched."""


class ProofError(UnsupportedModelError):
    """The transformed model is not the same function as the original, beyond the threshold."""


class RecipeError(GyroquantError, ValueError):
    """A recipe that says something impossible, unknown or contradictory."""


class InputError(GyroquantError, ValueError):
    """A file, text or argument that cannot be used as it is."""


class MapError(GyroquantError, ValueError):
    """A map that does not exist or does not fit what it is applied to."""


class RenamedWarning(FutureWarning):
    """An old name of a key, keyword or option, which the next release refuses. The message says the new one."""
