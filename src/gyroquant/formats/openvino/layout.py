"""The name of the OpenVINO IR file, and how it holds codes. Does not need the openvino package."""

from __future__ import annotations

MODEL = "openvino_model.xml"
# The CPU plugin of OpenVINO 2026.4.1 applies one group's scale to the weights of other groups if groups do not fit the
# blocks in which it processes a row. In calls of one to four rows, a group that is larger than a block must be a
# multiple of it: of 32 weights at 4 bits (64 if products run in bfloat16), 64 (128) at 2 bits, 4 (8) at 8 bits. In
# addition, longer rows are cut into larger blocks, in calls of any length: in rows of 3,072, groups of 24, 48 and 192
# are wrong at every width in bfloat16. Powers of two fit all of these blocks, and a single group a row always fits.
# Rows of codes that do not fill whole bytes are wrong too; at 8 bits, rows of odd length. Measured on single products
# of 1 to 64 rows, compared with exact ones.
_LARGEST_GROUP = 256


def held_group(group: int, columns: int) -> int:
    """The group size in the file for a group size of `group` in the model, in rows of `columns` weights: the largest
    power of two up to 256 that divides the group, or the whole row. The plugin computes other sizes wrongly.
    """
    return group if group == columns else min(group & -group, _LARGEST_GROUP)


def stored_bits(bits: int) -> int:
    """The number of bits in which a code or zero point of `bits` bits is stored."""
    return next(width for width in (2, 4, 8) if bits <= width)
