"""The check of settings that name one of a few ways."""


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuses a misspelt setting where it is given: later, it would silently mean one of the others.

    Args:
        name: Of the setting.
        value: As given.
        allowed: What it may be.

    Raises:
        ValueError: Something else.
    """
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
