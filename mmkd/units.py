"""Numbers with units as text."""


def readable_size(count: float) -> str:
    """A number of bytes as text in a suitable unit, such as 1.5 GiB."""
    unit = next((i for i in range(4) if count < 1000 * 1024**i), 4)
    return f"{count / 1024**unit:.{0 if unit == 0 else 1}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def readable_count(count: float) -> str:
    """A number of parameters or tokens as text, such as 134.5 million."""
    if count < 1000:
        return f"{count:.0f}"
    unit = next((i for i in (1, 2, 3) if count < 999.95 * 1000**i), 3)
    return f"{count / 1000**unit:.1f} {('thousand', 'million', 'billion')[unit - 1]}"


def readable_time(seconds: float) -> str:
    """A duration as text in its two largest units, such as 4 min 10 s."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def with_noun(number: int, noun: str) -> str:
    """A number with its noun, such as 1 row or 2,000 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
