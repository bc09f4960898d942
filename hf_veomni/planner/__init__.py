"""Memory and speed of every layout of a world, by formulas."""

from hf_veomni.planner.devices import Device, find_device, identify_device, known_devices
from hf_veomni.planner.search import GIB, Entry, Plans, plan_layouts

__all__ = ["GIB", "Device", "Entry", "Plans", "find_device", "identify_device", "known_devices", "plan_layouts"]
