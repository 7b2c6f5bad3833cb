// The namespace that ops are registered in: fmkernels, or what a build for the Hugging Face hub names its own.
#pragma once

#ifdef TORCH_EXTENSION_NAME
#define fmkernels TORCH_EXTENSION_NAME
#endif
