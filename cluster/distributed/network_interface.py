"""Which network interface the ranks of a gang talk over."""

import os

import psutil


def pin_interface(address: str) -> None:
    """Have gloo and NCCL use the interface that has `address`.

    Left alone, gloo asks for the address of the host's name, which is often loopback, and NCCL
    takes the first interface it likes, which may be a container's. What the environment names
    already, stands.

    Args:
        address: under which Ray knows this node.
    """
    if (name := interface_of(address)) is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # else NCCL takes it for a prefix


def interface_of(address: str) -> str | None:
    """Name of the interface that has a numeric address; None if no interface has."""
    for name, assigned in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in assigned):
            return name
    return None
