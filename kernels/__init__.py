"""One file per operation: its meaning in torch, its kernels, its launcher."""
