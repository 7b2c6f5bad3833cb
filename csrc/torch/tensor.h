// The thin bridge between torch's stable ABI and the kernels in csrc/cpu and csrc/cuda.
//
// Arguments are checked in Python, before an op is called; what is checked here guards memory, and its messages
// are for those who write kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "math/half.h"
#include "torch/namespace.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has only the one without the cause
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// FMK_CHECK(condition, message...) throws; the parts of the message are written one after the other.
#define FMK_CHECK(condition, ...)  \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ::fmk::fail(__VA_ARGS__);    \
  } while (false)

namespace fmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "fmkernels: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// ---- dtypes -------------------------------------------------------------------------------------------------

// Calls f with the C++ type of a floating dtype:  dispatch(x.scalar_type(), [&]<class T>() { ... });
template <class F>
decltype(auto) dispatch(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<bf16>();
    case ScalarType::Half:
      return f.template operator()<f16>();
    default:
      fail("expected float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(type));
  }
}

// The dtype of a C++ type:  empty_as(x, sizes, scalar_type_of<float>)
template <class T>
inline constexpr ScalarType scalar_type_of = ScalarType::Undefined;
template <> inline constexpr ScalarType scalar_type_of<float> = ScalarType::Float;
template <> inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;
template <> inline constexpr ScalarType scalar_type_of<bf16> = ScalarType::BFloat16;
template <> inline constexpr ScalarType scalar_type_of<f16> = ScalarType::Half;
template <> inline constexpr ScalarType scalar_type_of<int64_t> = ScalarType::Long;
template <> inline constexpr ScalarType scalar_type_of<int32_t> = ScalarType::Int;
template <> inline constexpr ScalarType scalar_type_of<int8_t> = ScalarType::Char;
template <> inline constexpr ScalarType scalar_type_of<uint8_t> = ScalarType::Byte;
template <> inline constexpr ScalarType scalar_type_of<bool> = ScalarType::Bool;

// ---- tensors ------------------------------------------------------------------------------------------------

// The elements of a contiguous tensor: data<const T>(input), data<T>(output).
template <class T>
T* data(const Tensor& tensor) {
  using Element = std::remove_const_t<T>;
  FMK_CHECK(tensor.scalar_type() == scalar_type_of<Element>, "expected a tensor of ",
            torch::headeronly::toString(scalar_type_of<Element>), ", got ",
            torch::headeronly::toString(tensor.scalar_type()));
  FMK_CHECK(tensor.is_contiguous(), "expected a contiguous tensor");
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

// The same for an optional tensor: null where there is none.
template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// (The names here differ from those in torch::stable, which argument-dependent lookup would find as well.)

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}

// A fresh contiguous tensor on the device of `like`, with its sizes and its dtype unless others are given. Straight
// from torch's allocator: 0.6 us, where torch::stable::new_empty takes 1.4 through the dispatcher. On the CPU that
// skips the NaN that torch.use_deterministic_algorithms fills in, so the environment variable FMK_POISON=1 (the tests
// set it) does.
inline Tensor empty_as(const Tensor& like, Sizes sizes, std::optional<ScalarType> type = std::nullopt) {
  namespace stable = torch::stable::detail;
  constexpr size_t max_dims = 64;  // as torch
  FMK_CHECK(sizes.size() <= max_dims, "too many dimensions: ", sizes.size());
  int64_t strides[max_dims], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  int32_t dtype, device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  if (type) dtype = stable::to<int32_t>(stable::from(*type));
  AtenTensorHandle handle;
  FMK_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, dtype, device_type, like.get_device_index(),
                                     &handle) == 0,
            "out of memory");
  Tensor result(handle);
  static const bool poison = std::getenv("FMK_POISON") != nullptr;
  if (poison && result.is_cpu() && result.numel() > 0) {
    std::memset(result.mutable_data_ptr(), 0xff, result.numel() * result.element_size());  // NaN, if floating
  }
  return result;
}

inline Tensor empty_as(const Tensor& like, std::optional<ScalarType> type = std::nullopt) {
  return empty_as(like, like.sizes(), type);
}

// ---- CPU threads --------------------------------------------------------------------------------------------

// Calls f(first, last) on parts of [begin, end), on torch's threads where there is more than `grain` to do. The first
// exception of a part is thrown again here, with its message: torch's own C interface would lose it.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain) return f(begin, end);
  std::exception_ptr error;
  std::once_flag once;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (...) {
      std::call_once(once, [&] { error = std::current_exception(); });
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace fmk

// ---- CUDA ---------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

// Weak, because only CUDA builds of torch have it, and the library loads beside a CPU build too. (USE_CUDA stays
// undefined, so that no other symbol of that kind is used by accident: STD_CUDA_CHECK would need one.)
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

#define FMK_CUDA_CHECK(call)                                                                     \
  do {                                                                                           \
    if (cudaError_t error_ = (call); error_ != cudaSuccess) [[unlikely]]                         \
      ::fmk::fail(#call, ": ", cudaGetErrorString(error_), " (", cudaGetErrorName(error_), ")"); \
  } while (false)

// After every launch.
#define FMK_LAUNCH_CHECK() FMK_CUDA_CHECK(cudaGetLastError())

namespace fmk {

inline cudaStream_t current_stream(int32_t device_index) {
  FMK_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  FMK_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0, "no current stream on device ",
            device_index);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fmk

#endif  // __CUDACC__
