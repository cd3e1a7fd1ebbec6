"""The errors a user can meet: what is wrong, a hint with the next step, and the exit code.

Exit codes are a contract with CI jobs: 1 a gate was missed, 2 usage, recipe or input is wrong,
3 the run itself failed. Only ``cli.app.main`` turns these into messages on stderr.
"""


class MetaAugError(Exception):
    """Base of every error metaaug raises on purpose.

    Args:
        message: What is wrong, with the value seen and where (flag, recipe key, file or layer).
        hint: What to do next, ideally a command or flag; shown on its own line.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class GateError(MetaAugError):
    """A check the user asked for (accuracy drop, agreement, parity) was not met."""

    exit_code = 1


class UsageError(MetaAugError):
    """Flags that do not go together, or a value outside its range."""

    exit_code = 2


class RecipeError(MetaAugError):
    """A recipe that does not validate, or a run directory whose recipe has changed."""

    exit_code = 2


class InputError(MetaAugError):
    """A model, weights file, image folder or artefact that cannot be used."""

    exit_code = 2


class GraphError(MetaAugError):
    """A network that cannot be captured, cut, quantized or exported."""

    exit_code = 3
