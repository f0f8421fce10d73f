"""Makes the process that imports it one of a system without pidfds."""

import os

vars(os).pop("pidfd_open", None)
