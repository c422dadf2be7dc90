"""Numbers with units as text."""


def readable_size(count: float) -> str:
    """A number of bytes as text in a suitable unit, such as 1.5 GiB."""
    unit = next((i for i in range(4) if count < 1000 * 1024**i), 4)
    return f"{count / 1024**unit:.{0 if unit == 0 else 1}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
