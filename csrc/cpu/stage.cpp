#include "stage.h"

#include "tile.h"

namespace fmk {
namespace {

// target_clones does not reach through templates, hence one plain function a pair of types.
#define FMK_CONVERT(Storage, Compute)                                                                \
  FMK_CLONES void load_loop(Compute* __restrict out, const Storage* __restrict in, int64_t count) {  \
    for (int64_t i = 0; i < count; ++i) out[i] = Compute(to_float(in[i]));                           \
  }                                                                                                  \
  FMK_CLONES void store_loop(Storage* __restrict out, const Compute* __restrict in, int64_t count) { \
    for (int64_t i = 0; i < count; ++i) out[i] = from_float<Storage>(in[i]);                         \
  }                                                                                                  \
  FMK_CLONES void round_loop(Storage, Compute* x, int64_t count) {                                   \
    for (int64_t i = 0; i < count; ++i) x[i] = Compute(to_float(from_float<Storage>(x[i])));         \
  }
FMK_CONVERT(float, float)
FMK_CONVERT(double, float)
FMK_CONVERT(bf16, float)
FMK_CONVERT(f16, float)
FMK_CONVERT(float, double)
FMK_CONVERT(double, double)
FMK_CONVERT(bf16, double)
FMK_CONVERT(f16, double)
#undef FMK_CONVERT

}  // namespace

template <class C>
void load(C* out, const void* p, ScalarType type, int64_t offset, int64_t count) {
  dispatch(type, [&]<class T>() { load_loop(out, static_cast<const T*>(p) + offset, count); });
}

template <class C>
void store(void* p, ScalarType type, int64_t offset, const C* in, int64_t count) {
  dispatch(type, [&]<class T>() { store_loop(static_cast<T*>(p) + offset, in, count); });
}

template <class C>
void round_through(ScalarType type, C* x, int64_t count) {
  if (type == scalar_type_of<C> || type == ScalarType::Double) return;
  dispatch(type, [&]<class T>() { round_loop(T{}, x, count); });
}

template void load(float*, const void*, ScalarType, int64_t, int64_t);
template void load(double*, const void*, ScalarType, int64_t, int64_t);
template void store(void*, ScalarType, int64_t, const float*, int64_t);
template void store(void*, ScalarType, int64_t, const double*, int64_t);
template void round_through(ScalarType, float*, int64_t);
template void round_through(ScalarType, double*, int64_t);

}  // namespace fmk
