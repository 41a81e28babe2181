"""The one exception a user may cause. The command line prints it and exits with code 2."""


class InputError(ValueError):
    """What was given cannot be used: a file, a folder, a config or an argument.

    Every problem is one sentence that says what is wrong, where, what was found, what was expected and
    what to do. Checks that look at many things collect all problems before they raise.

    >>> str(InputError("a.nii.gz: empty file", "b.nii.gz: truncated"))
    'a.nii.gz: empty file\\nb.nii.gz: truncated'
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
