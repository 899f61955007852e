"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A mistake in the input: one line that names the field or file and the mend.

    The command line prints it after ``moejax: error:`` and exits with 2, without a traceback.
    Anything else that is raised is a defect of moejax and keeps its traceback (exit 1).
    """


def did_you_mean(word: str, choices) -> str:
    """``"; did you mean 'x'?"`` when one of ``choices`` is close to ``word``, else their list."""
    import difflib

    choices = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from: {', '.join(choices)}" if choices else ""
