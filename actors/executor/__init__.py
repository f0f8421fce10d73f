"""The executor: runs steps on a device."""
