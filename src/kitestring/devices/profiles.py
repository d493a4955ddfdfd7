"""What a device is: how fast it computes and talks, how much it holds, what that costs in energy.

Energy is modelled, as a range: arithmetic at 2.3 pJ per operation (half a 32-bit float multiply
and add: 3.7 + 0.9 pJ, 45 nm) up to a whole instruction of 70 pJ for each; M. Horowitz,
"Computing's energy problem", ISSCC 2014. Radio power per throughput: Huang et al., "A close
examination of performance and power characteristics of 4G LTE networks", MobiSys 2012, table 4
(LTE and WiFi, milliwatts per Mbit/s, which is nanojoules per bit); the radio's idle and tail
power is left out. The radio figures and the 70 pJ are quoted from memory: check them before you
rely on the joules. Speeds and links are assumptions of a size class, not measurements: replace
them with your own.
"""

from __future__ import annotations

from dataclasses import dataclass

from kitestring.errors import SettingError, unknown

ARITHMETIC_JOULES = (2.3e-12, 70e-12)
"""Joules per floating-point operation, (low, high)."""


@dataclass(frozen=True)
class Profile:
    """One class of device and its link to the cloud. All speeds are assumed, see the module."""

    name: str
    flops: float  # floating-point operations a second that small models reach
    memory: int  # bytes that a model and its training may take
    up: float  # bytes a second
    down: float  # bytes a second
    round_trip: float  # seconds
    joules_up: float  # per byte
    joules_down: float  # per byte
    cloud_flops: float = 1e12  # operations a second that the cloud gives to one request

    def __post_init__(self) -> None:
        for what in ("flops", "memory", "up", "down", "cloud_flops"):
            if getattr(self, what) <= 0:
                raise SettingError(f"{what} is {getattr(self, what)}", f"profile {self.name}")


_LTE = {"joules_up": 438.39e-9 * 8, "joules_down": 51.97e-9 * 8}
_WIFI = {"joules_up": 283.17e-9 * 8, "joules_down": 137.01e-9 * 8}
PROFILES = {
    p.name: p
    for p in (
        Profile("phone", 5e9, 256 * 2**20, 1.25e6, 5e6, 0.05, **_LTE),
        Profile("pc", 20e9, 2 * 2**30, 5e6, 12.5e6, 0.03, **_WIFI),
        Profile("gateway", 1e9, 64 * 2**20, 1.25e6, 2.5e6, 0.04, **_WIFI),
        Profile("microcontroller", 50e6, 512 * 2**10, 0.125e6, 0.125e6, 0.1, **_WIFI),
    )
}


def profile(name: str) -> Profile:
    if name not in PROFILES:
        raise unknown("device profile", name, PROFILES)
    return PROFILES[name]


def joules(p: Profile, flops: float, bytes_up: float, bytes_down: float) -> tuple[float, float]:
    """Modelled energy (low, high) of computing and sending."""
    radio = bytes_up * p.joules_up + bytes_down * p.joules_down
    low, high = (flops * per + radio for per in ARITHMETIC_JOULES)
    return low, high
