"""The executor on a GPU: a batch that stays on the device, steps launched ahead of their results, CUDA graphs.

`runner` is what the executor's loop drives. Everything here also runs on a CPU, where nothing is asynchronous and a
graph is a plain call, so that its tokens can be proved without a GPU.
"""
