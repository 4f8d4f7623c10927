"""The kernels: functions that Triton compiles, and what they share on the device."""
