"""Hardware for the cost model: a literal table of data-sheet figures, and what software gets out of them."""

from dataclasses import dataclass

from distmoe.contracts import UserError
from distmoe.training.cost_model import Link, Machine

# Shares of the data sheet that large products, copies and exchanges reach in practice.
_FLOPS_SHARE = 0.4
_MEMORY_SHARE = 0.8
_LINK_SHARE = 0.7
# Of one message between processes, from call to arrival.
_LATENCY_INSIDE_S = 3e-6
_LATENCY_BETWEEN_S = 6e-6
_LAUNCH_S = 6e-6  # of an operation that torch runs eagerly: what bounds small models


@dataclass(frozen=True)
class DataSheet:
    """Peak figures of one device, one direction of each link.

    Attributes:
        name: As sold.
        flops: By precision, without sparsity.
        memory_bandwidth: Bytes/s.
        memory_bytes: Of the device.
        inside: Bytes/s to devices of the same host.
        between: Bytes/s to other hosts, of the device's own network adapter.
    """

    name: str
    flops: dict[str, float]
    memory_bandwidth: float
    memory_bytes: float
    inside: float
    between: float


DATA_SHEETS = {
    # NVIDIA H100 Tensor Core GPU data sheet (SXM5, 80 GB; fp32 outside the tensor cores, as torch has it by default;
    # NVLink 900 GB/s both ways); NVIDIA DGX H100: one ConnectX-7 of 400 Gbit/s a GPU.
    "h100": DataSheet(
        "H100 SXM 80 GB", {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12}, 3.35e12, 80e9, inside=450e9, between=50e9
    ),
    # NVIDIA A100 80GB data sheet (SXM; NVLink 600 GB/s both ways); NVIDIA DGX A100: one ConnectX-6 of 200 Gbit/s a GPU.
    "a100": DataSheet(
        "A100 SXM 80 GB", {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12}, 2.039e12, 80e9, inside=300e9, between=25e9
    ),
}


def machine_of(device: str, precision: str) -> Machine:
    """A device of the table, as far as software gets out of it.

    Raises:
        UserError: It is not in the table.
    """
    sheet = DATA_SHEETS.get(device)
    if sheet is None:
        raise UserError(
            f"device {device}: must be {' or '.join(DATA_SHEETS)}, or leave it out and measure this machine (--measure)"
        )
    return Machine(
        f"{sheet.name}, {precision}",
        flops=_FLOPS_SHARE * sheet.flops[precision],
        memory_bandwidth=_MEMORY_SHARE * sheet.memory_bandwidth,
        memory_bytes=sheet.memory_bytes,
        inside=Link(_LINK_SHARE * sheet.inside, _LATENCY_INSIDE_S),
        between=Link(_LINK_SHARE * sheet.between, _LATENCY_BETWEEN_S),
        launch_s=_LAUNCH_S,
    )
