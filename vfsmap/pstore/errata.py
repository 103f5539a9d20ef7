"""Find the wrong bytes of a Reed-Solomon codeword: Berlekamp-Massey, Chien, Forney.

Decoding is the kernel's to the last case (lib/reed_solomon/decode_rs.c), also where others give
up: with an odd number of parity bytes it may mend half a byte more than is certain.
"""

from typing import Final

_POLYNOMIAL: Final = 0x11D
_ORDER: Final = 255

EXP: Final = [1] * (2 * _ORDER)
LOG: Final = [0] * 256
for _power in range(1, 2 * _ORDER):
    _value = EXP[_power - 1] << 1
    EXP[_power] = _value ^ _POLYNOMIAL if _value > 0xFF else _value
for _power in range(_ORDER):
    LOG[EXP[_power]] = _power


def multiply(a: int, b: int) -> int:
    """Return a product in the field."""
    return EXP[LOG[a] + LOG[b]] if a and b else 0


def find_errors(remainder: bytes, length: int) -> dict[int, int] | None:
    """Return what to XOR to which bytes of a codeword; None: too many are wrong.

    ``remainder`` is the parity that was found XOR the one that its data should have, not all
    zeros.  Bytes are counted from the end of the codeword, which has ``length`` of them.
    """
    count = len(remainder)
    syndromes = [_evaluate(remainder[::-1], root) for root in range(count)]
    locator = _find_locator(syndromes)
    places = [place for place in range(_ORDER) if not _evaluate(locator, -place)]
    if len(places) != len(locator) - 1 or any(place >= length for place in places):
        return None
    evaluator = _multiply_polynomials(syndromes, locator)[: len(locator) - 1]
    slope = [c if power % 2 else 0 for power, c in enumerate(locator)][1:]
    errors = {}
    for place in places:
        above, below = _evaluate(evaluator, -place), _evaluate(slope, -place)
        if above:
            errors[place] = EXP[(LOG[above] - LOG[below] + place) % _ORDER]
    told = [0] * count
    for place, error in errors.items():
        for root in range(count):
            told[root] ^= EXP[(LOG[error] + place * root) % _ORDER]
    return errors if told == syndromes else None


def _evaluate(polynomial: bytes | list[int], power: int) -> int:
    """Return the value of a polynomial, lowest power first, at alpha to ``power``."""
    value = 0
    for at, factor in enumerate(polynomial):
        if factor:
            value ^= EXP[(LOG[factor] + at * power) % _ORDER]
    return value


def _multiply_polynomials(a: list[int], b: list[int]) -> list[int]:
    product = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] ^= multiply(x, y)
    return product


def _find_locator(syndromes: list[int]) -> list[int]:
    """Return the shortest recurrence that makes the syndromes; its roots tell the places."""
    locator, previous, degree = [1], [0, 1], 0
    for at in range(len(syndromes)):
        gap = 0
        for back, factor in enumerate(locator[: at + 1]):
            gap ^= multiply(factor, syndromes[at - back])
        if gap:
            longer = max(len(locator), len(previous))
            padded = locator + [0] * (longer - len(locator))
            changed = [
                old ^ multiply(gap, new)
                for old, new in zip(padded, previous + [0] * (longer - len(previous)), strict=True)
            ]
            if 2 * degree <= at:
                degree = at + 1 - degree
                previous = [EXP[(LOG[c] - LOG[gap]) % _ORDER] if c else 0 for c in locator]
            locator = changed
        previous = [0, *previous]
    while locator[-1] == 0:
        locator.pop()
    return locator
