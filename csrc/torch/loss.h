// Codes of the loss op's schema.
#pragma once

#include <cstdint>

namespace fmk {

enum Reduction { REDUCE_NONE = 0, REDUCE_SUM = 1, REDUCE_MEAN = 2 };
constexpr int64_t TERM_X1 = 1, TERM_X0 = 2, TERM_Z = 4;  // bits of `terms`: which tensors the residual reads

}  // namespace fmk
