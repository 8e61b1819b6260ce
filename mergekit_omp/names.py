"""The names of the merge methods; needs nothing, so that telling ours from others never fails."""

TRANSPLANT = "omp"
PREFIX = "omp_"


def is_ours(method_name: object) -> bool:
    """Whether a recipe's ``merge_method`` belongs to this package."""
    return isinstance(method_name, str) and (method_name == TRANSPLANT or method_name.startswith(PREFIX))
