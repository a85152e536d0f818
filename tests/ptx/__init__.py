"""Runs PTX for sm_80 and sm_90 on the CPU, instruction by instruction: what the GPU's compiler made of the kernels, with no GPU.

parse.py         the text: registers, labels, instructions
memory.py        global and shared memory: bounds, alignment, what was never written, races of threads between two barriers
races.py         races of programs in global memory, by what happens before what
arithmetic.py    what an instruction computes in each lane
exchange.py      what it moves between registers, memory and the lanes of a warp
products.py      Hopper's asynchronous products, and the layouts of their matrices in shared memory
transfers.py     Hopper's copies by tensor map, and mbarriers
machine.py       registers, masks, control flow, barriers; in which order programs run
launches.py      Triton kernels, compiled and launched by the package itself
nvcc.py          the grid kernels of CUDA C++, compiled by nvcc
"""
