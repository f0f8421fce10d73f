"""A rank's part of a quantised matrix."""

from __future__ import annotations

import torch

from ...kernels.quantized_weight import QuantizedWeight

ALL = slice(None)


def part_of(weight: QuantizedWeight, rows: slice = ALL, columns: slice = ALL) -> QuantizedWeight:
    """Some outputs and some inputs of a matrix, with the very codes and factors that it has there.

    Raises:
        ValueError: the inputs do not begin and end with groups, or are not in order.
    """
    if rows == ALL and columns == ALL:
        return weight
    weight = weight.with_plain_factors()
    num_columns = weight.in_features
    first, end, _ = columns.indices(num_columns)
    is_whole_rows = (first, end) == (0, num_columns)
    size = weight.group_size
    is_one_group = weight.scales.shape[1] == 1
    groups = slice(0, 1) if is_one_group else slice(first // size, -(-end // size))
    if not is_whole_rows:
        if weight.input_order is not None:
            raise ValueError(
                "its inputs are sorted by importance (desc_act), so no rank has whole groups: take a checkpoint "
                "without, or tensor_parallel_size 1"
            )
        if not is_one_group and (first % size or (end % size and end != num_columns)):
            raise ValueError(f"inputs {first} to {end} tear groups of {size} weights apart")

    def factors(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows, groups].clone()

    scales = factors(weight.scales)
    assert scales is not None
    return QuantizedWeight.from_codes(
        weight.unpacked(rows)[:, columns],
        scales,
        bits=weight.bits,
        group_size=-1 if is_one_group else size,
        zeros=factors(weight.zeros),
        offsets=factors(weight.offsets),
        input_order=weight.input_order if is_whole_rows else None,
    )
