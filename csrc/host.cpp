// The module _host: csrc/math evaluated from Python, so that tests can tie the C++ formulas to the reference, to Triton
// and to differentiation in float64. The package works without it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "math/half.h"
#include "math/normal.h"
#include "math/objective.h"
#include "math/probe.h"
#include "math/rho.h"
#include "math/timestep.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// out[i, :] = f(i), `width` values each.
template <class T, class F>
py::array_t<T> rows(py::ssize_t count, py::ssize_t width, F&& f) {
  py::array_t<T> out({count, width});
  auto view = out.template mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < count; ++i) {
    const auto values = f(i);
    for (py::ssize_t j = 0; j < width; ++j) view(i, j) = values[j];
  }
  return out;
}

template <class T>
fmk::Coefficients<T> coefficients(const Array<T>& table, py::ssize_t i) {
  auto v = table.template unchecked<2>();
  return {v(i, 0), v(i, 1), v(i, 2), v(i, 3), v(i, 4), v(i, 5)};
}

// What exists once for float and once for double.
template <class T>
void define(py::module_& m, const std::string& bits) {
  m.def(("schedule" + bits).c_str(), [](int code, T s0, T s1, Array<T> t) {
    return rows<T>(t.size(), 6, [&](py::ssize_t i) {
      const auto v = fmk::schedule_coefficients(code, s0, s1, t.at(i));
      return std::array<T, 6>{v.alpha, v.sigma, v.gamma, v.d_alpha, v.d_sigma, v.d_gamma};
    });
  });
  m.def(("objective" + bits).c_str(),
        [](int prediction, int compare, T o0, int weight, T k, Array<T> t, Array<T> table) {
          return rows<T>(t.size(), 7, [&](py::ssize_t i) {
            const auto r = fmk::objective_row(prediction, compare, o0, weight, k, t.at(i), coefficients(table, i));
            return std::array<T, 7>{r.p, r.a, r.b, r.c, r.w, r.time, r.scale};
          });
        });
  m.def(("normal_pair" + bits).c_str(), [](Array<uint32_t> w0, Array<uint32_t> w1) {
    return rows<T>(w0.size(), 2, [&](py::ssize_t i) {
      std::array<T, 2> n;
      fmk::normal_pair(w0.at(i), w1.at(i), n[0], n[1]);
      return n;
    });
  });
  m.def(("log_uniform" + bits).c_str(), py::vectorize([](int32_t w) { return fmk::log_uniform(w, T(0)); }));
  m.def(("sin_pi" + bits).c_str(), py::vectorize([](T x) { return fmk::sin_pi(x); }));
  m.def(("cos_pi" + bits).c_str(), py::vectorize([](T x) { return fmk::cos_pi(x); }));
  m.def(("with_sign" + bits).c_str(),
        py::vectorize([](T x, uint32_t word, int lane) { return fmk::with_sign(x, word, lane); }));
  m.def(("rho" + bits).c_str(), py::vectorize([](int kind, T k, T r) { return fmk::rho(kind, k, r); }));
  m.def(("d_rho" + bits).c_str(), py::vectorize([](int kind, T k, T r) { return fmk::d_rho(kind, k, r); }));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "csrc/math evaluated on the host, for tests; the suffix is the number of bits of the arithmetic";
  define<float>(m, "32");
  define<double>(m, "64");
  m.def("philox", [](Array<uint32_t> counter, uint32_t k0, uint32_t k1) {
    auto c = counter.unchecked<2>();
    return rows<uint32_t>(counter.shape(0), 4, [&](py::ssize_t i) {
      const auto w = fmk::philox({c(i, 0), c(i, 1), c(i, 2), c(i, 3)}, k0, k1);
      return std::array<uint32_t, 4>{w.w0, w.w1, w.w2, w.w3};
    });
  });
  m.def("permute", py::vectorize([](uint64_t seed, uint32_t n, uint32_t x) { return fmk::permute(seed, n, x); }));
  m.def("parity", py::vectorize([](uint32_t x) { return fmk::parity(x); }));
  m.def("hadamard_word", py::vectorize([](uint32_t c, uint32_t word) { return fmk::hadamard_word(c, word); }));
  m.def("inverse_normal_cdf", py::vectorize([](double u) { return fmk::inverse_normal_cdf(u); }));
  m.def("timestep", py::vectorize([](int sampler, double q0, double q1, double shift, double u) {
          return fmk::timestep_inverse_cdf(sampler, q0, q1, shift, u);
        }));
  m.def("bf16_bits", py::vectorize([](float x) { return fmk::from_float<fmk::bf16>(x).bits; }));
  m.def("f16_bits", py::vectorize([](float x) { return fmk::from_float<fmk::f16>(x).bits; }));
  m.def("bf16_value", py::vectorize([](uint16_t bits) { return fmk::to_float(fmk::bf16{bits}); }));
  m.def("f16_value", py::vectorize([](uint16_t bits) { return fmk::to_float(fmk::f16{bits}); }));

  py::dict codes;
#define FMK_CODE(name) codes[#name] = int(fmk::name)
  FMK_CODE(STREAM_X0), FMK_CODE(STREAM_BRIDGE), FMK_CODE(STREAM_TIME), FMK_CODE(STREAM_PROBE);
  FMK_CODE(STREAM_DEQUANTISATION), FMK_CODE(STREAM_BASE), FMK_CODE(STREAM_PERMUTATION);
  FMK_CODE(SCHEDULE_COND_OT), FMK_CODE(SCHEDULE_VP), FMK_CODE(SCHEDULE_VE), FMK_CODE(SCHEDULE_COSINE);
  FMK_CODE(SCHEDULE_LINEAR_VP), FMK_CODE(SCHEDULE_SUB_VP), FMK_CODE(SCHEDULE_POLYNOMIAL);
  FMK_CODE(SCHEDULE_CONSTANT_NOISE), FMK_CODE(SCHEDULE_SCHRODINGER_BRIDGE), FMK_CODE(SCHEDULE_CUSTOM);
  FMK_CODE(PROBE_RADEMACHER), FMK_CODE(PROBE_NORMAL), FMK_CODE(PROBE_HADAMARD);
  FMK_CODE(TIMESTEP_UNIFORM), FMK_CODE(TIMESTEP_LOGIT_NORMAL), FMK_CODE(TIMESTEP_MODE), FMK_CODE(TIMESTEP_COS_MAP);
  FMK_CODE(TIMESTEP_BETA), FMK_CODE(PREDICT_VELOCITY), FMK_CODE(PREDICT_NOISE), FMK_CODE(PREDICT_DATA);
  FMK_CODE(PREDICT_SCORE), FMK_CODE(PREDICT_EDM), FMK_CODE(COMPARE_NATIVE), FMK_CODE(COMPARE_VELOCITY);
  FMK_CODE(WEIGHT_NONE), FMK_CODE(WEIGHT_MIN_SNR), FMK_CODE(WEIGHT_SIGMA_SQRT), FMK_CODE(WEIGHT_COS_MAP);
  FMK_CODE(WEIGHT_LIKELIHOOD), FMK_CODE(RHO_SQUARE), FMK_CODE(RHO_ABSOLUTE), FMK_CODE(RHO_PSEUDO_HUBER);
#undef FMK_CODE
  m.attr("codes") = codes;
}
