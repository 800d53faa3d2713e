"""What users see instead of a traceback."""


class UserError(Exception):
    """A fault the user can mend: what is wrong, the evidence, and the way out.

    Anything else that escapes is our bug and keeps its traceback.
    """

    def __init__(self, problem: str, *, evidence: str = "", fix: str = "", exit_code: int = 2) -> None:
        self.problem, self.evidence, self.fix, self.exit_code = problem, evidence, fix, exit_code
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"error: {self.problem}"]
        if self.evidence:
            lines.append(f"  seen: {self.evidence}")
        if self.fix:
            lines.append(f"  fix:  {self.fix}")
        return "\n".join(lines)


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """The nearest known word as a question, or the whole list when nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
