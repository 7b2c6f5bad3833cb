// fmkernels::build_info() -> str: how this library was built, as JSON, for `python -m fmkernels info`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "torch/namespace.h"

#ifndef FMK_BUILD_INFO  // setup.py defines it, for this file only
#define FMK_BUILD_INFO "{}"
#endif

namespace {

std::string build_info() { return FMK_BUILD_INFO; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fmkernels, library) { library.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&build_info));
}
