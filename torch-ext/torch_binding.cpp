// The Python module of a build for the Hugging Face hub, by kernel-builder (build.toml). Importing it loads the
// library, whose files register their ops; the schemas are in fmkernels/ops.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
