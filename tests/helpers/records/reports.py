"""Rows of reports, made by hand."""

import dataclasses
import math
from typing import Any

from condft.report import Role, SpectralRow


def make_row(name: str, kappa: float = 5.0, *, module_type: str = "layers.*.q", **changes: Any) -> SpectralRow:
    row = SpectralRow(
        name=name,
        shape=(4, 2),
        matrix_shape=(4, 2),
        dtype="float32",
        num_parameters=8,
        module_type=module_type,
        role=Role.LAYER,
        digest=f"{hash(name) & 0xFFFF:016x}",
        sigma_max=kappa,
        sigma_min=1.0,
        condition_number=kappa,
        frobenius_norm=kappa,
        stable_rank=1.5,
        log_volume=-math.inf if math.isinf(kappa) else math.log(kappa),
        entropy_deficit=kappa,
        relative_error=1e-4,
        noise_floor=1e-6,
        resolved=True,
        method="svd",
        fisher_information=kappa,
    )
    return dataclasses.replace(row, **changes)
