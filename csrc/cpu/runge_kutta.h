// What the two Runge–Kutta ops share: weighted sums of the values of a vector field.
#pragma once

#include "stage.h"
#include "tile.h"

namespace fmk {

constexpr int64_t MAX_TERMS = 64;
// Rows below so many columns that have a step size each are worked on together: their sums are formed before they are
// multiplied by h. It does not matter how many rows there are: a row alone must equal the row in its batch.
constexpr int64_t NARROW = 32;

constexpr int64_t GROUP = 7;  // terms added at once: their pointers stay in registers

// A contiguous tensor's memory; where a copy is needed it lives as long as this object.
class Contiguous {
 public:
  const void* operator()(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    return copies_.emplace_back(torch::stable::contiguous(tensor)).const_data_ptr();
  }

 private:
  std::vector<Tensor> copies_;
};

// Tensors of one shape and one dtype, k_1 to k_count.
struct Terms {
  ScalarType type;
  int64_t elements, count = 0;
  const void* k[MAX_TERMS];

  void add(const Tensor& tensor, Contiguous& contiguous) {
    FMK_CHECK(count < MAX_TERMS, "at most ", MAX_TERMS, " values of the vector field");
    FMK_CHECK(tensor.scalar_type() == type && tensor.numel() == elements, "y and k differ in dtype or size");
    k[count++] = contiguous(tensor);
  }
  // Whether all terms are added in one loop that converts from half precision.
  bool in_half() const {
    return (type == ScalarType::BFloat16 || type == ScalarType::Half) && count > 0 && count <= GROUP;
  }
};

// Calls f(row, element) for each element of rows: unrolled and vectorised over rows where the number of columns is a
// constant, else over columns.
template <int COLUMNS, class F>
FMK_INLINE void for_elements(int64_t rows, int64_t columns, F&& f) {
  if constexpr (COLUMNS > 0) {
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      [&]<int... J>(std::integer_sequence<int, J...>)
          __attribute__((always_inline)) { (f(r, r * COLUMNS + J), ...); }(std::make_integer_sequence<int, COLUMNS>());
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) f(r, r * columns + j);
    }
  }
}

template <class C>
alignas(64) inline constexpr C ZEROS[TILE] = {};

// Calls f<terms>() with the number of terms, at most GROUP, as a constant.
template <class F>
FMK_INLINE void with_terms(int64_t terms, F&& f) {
  switch (terms) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    default:
      f.template operator()<GROUP>();
  }
}

// Calls f(k, first, terms) for groups of terms, k pointing to the elements from `offset` on as C.
template <class C, class F>
FMK_INLINE void for_groups(const Terms& terms, int64_t offset, int64_t count, F&& f) {
  alignas(64) C buffers[GROUP][TILE];
  for (int64_t first = 0; first < terms.count; first += GROUP) {
    const int64_t group = std::min(GROUP, terms.count - first);
    const C* k[GROUP];
    for (int64_t j = 0; j < group; ++j) k[j] = staged(terms.k[first + j], terms.type, offset, count, buffers[j]);
    f(k, first, group);
  }
}

// first = start + Σ a_j k_j over at most GROUP terms, and second = start2 + Σ b_j k_j where it is not null.
void add_terms(float* first, float* second, const float* start, const float* start2, const float* const* k,
               const float* a, const float* b, int64_t terms, int64_t count);
void add_terms(double* first, double* second, const double* start, const double* start2, const double* const* k,
               const double* a, const double* b, int64_t terms, int64_t count);

// The first in half precision.
void add_terms(bf16* out, const bf16* start, const bf16* const* k, const float* a, int64_t terms, int64_t count);
void add_terms(f16* out, const f16* start, const f16* const* k, const float* a, int64_t terms, int64_t count);

// Calls f(elements, k) with the elements of x and of the terms from `offset` on, in their type of half precision.
template <class F>
void with_half(const Terms& terms, const void* x, int64_t offset, F&& f) {
  const auto call = [&]<class T>(T) {
    const T* k[GROUP];
    for (int64_t j = 0; j < terms.count; ++j) k[j] = static_cast<const T*>(terms.k[j]) + offset;
    f(static_cast<const T*>(x) + offset, static_cast<const T* const*>(k));
  };
  terms.type == ScalarType::BFloat16 ? call(bf16{}) : call(f16{});
}

// out = start + Σ a_j k_j of `count` elements from `offset` on, all in half precision.
inline void add_in_half(void* out, const void* start, const float* a, const Terms& terms, int64_t offset,
                        int64_t count) {
  with_half(terms, start, offset, [&]<class T>(const T* from, const T* const* k) {
    add_terms(static_cast<T*>(out) + offset, from, k, a, terms.count, count);
  });
}

// Over `count` ≤ TILE elements from `offset` on: first = start + Σ a_j k_j, and second = Σ b_j k_j where it is not
// null, of any number of terms.
template <class C>
void weighted_sums(C* first, C* second, const C* start, const C* a, const C* b, const Terms& terms, int64_t offset,
                   int64_t count) {
  if (terms.count == 0) std::copy_n(start, count, first);
  const C *from = start, *from2 = ZEROS<C>;
  for_groups<C>(terms, offset, count, [&](const C* const* k, int64_t done, int64_t group) {
    add_terms(first, second, from, from2, k, a + done, second ? b + done : nullptr, group, count);
    from = first, from2 = second;
  });
}

}  // namespace fmk
