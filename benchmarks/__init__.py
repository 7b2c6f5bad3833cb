"""What the kernels cost, measured against what people use today: `python -m fmkernels bench`."""
