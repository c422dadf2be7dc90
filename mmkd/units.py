"""Numbers with units, for readers."""


def readable_size(count: float) -> str:
    """Bytes in the unit that suits them."""
    unit = next((i for i in range(4) if count < 1000 * 1024**i), 4)
    return f"{count / 1024**unit:.{0 if unit == 0 else 1}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
