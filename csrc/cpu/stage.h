// Conversions between storage and arithmetic types, a tile at a time.
#pragma once

#include "torch/tensor.h"

namespace fmk {

// Read and write `count` elements at p[offset] as C (float or double).
template <class C>
void load(C* out, const void* p, ScalarType type, int64_t offset, int64_t count);
template <class C>
void store(void* p, ScalarType type, int64_t offset, const C* in, int64_t count);

// Round to a storage type and back, in place.
template <class C>
void round_through(ScalarType type, C* x, int64_t count);

// The elements as C: where the storage type is C itself the memory is used as it is, else `buffer`.
template <class C>
const C* staged(const void* p, ScalarType type, int64_t offset, int64_t count, C* buffer) {
  if (p == nullptr) return nullptr;
  if (type == scalar_type_of<C>) return static_cast<const C*>(p) + offset;
  load(buffer, p, type, offset, count);
  return buffer;
}

inline const void* pointer(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* pointer(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

}  // namespace fmk
