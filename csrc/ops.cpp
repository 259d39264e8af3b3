// The ops' schemas, their last line of checks, and the allocation of results.
//
// What a user can get wrong is checked in gatedrnn/functional.py, with a sentence; the checks here
// keep a direct call of torch.ops.gatedrnn from reading memory that is not there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "scan.h"

#if GATEDRNN_WITH_CUDA && !defined(GATEDRNN_EMULATION)
#include "cuda/torch_device.h"
#endif

// The tests run the CUDA kernels on the CPU: as a library beside this one.
#ifdef GATEDRNN_EMULATION
#define GATEDRNN_LIBRARY gatedrnn_emulation
#else
#define GATEDRNN_LIBRARY gatedrnn
#endif
// Through a macro, since PyTorch 2.10 takes the name as it is written.
#define GATEDRNN_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)

namespace gatedrnn {

// The first exception of any thread reaches the caller as it is: PyTorch would turn it into text.
void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  std::atomic_flag failed;
  std::exception_ptr error;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The option of a code. Codes are integers, for PyTorch 2.13 never frees a `str` argument.
template <class Enum>
Enum option(const char* name, int64_t code, Enum last) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int>(last), name, " must be 0 to ",
                  static_cast<int>(last), ", got ", code);
  return static_cast<Enum>(code);
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "x must be float64, float32, bfloat16 or float16");
  }
}

// Dense in the order of `dims`, outermost first; sizes of one do not count.
bool is_dense(const Tensor& t, std::initializer_list<int> dims) {
  int64_t expected = 1;
  for (auto dim = dims.end(); dim-- != dims.begin();) {
    if (t.size(*dim) == 1) continue;
    if (t.stride(*dim) != expected) return false;
    expected *= t.size(*dim);
  }
  return true;
}

// Results follow their model: channels_last when it is so and is not also contiguous.
MemoryFormat format_like(const Tensor& model) {
  if (model.dim() != 4 || model.numel() == 0 || is_dense(model, {0, 1, 2, 3}))
    return MemoryFormat::Contiguous;
  return is_dense(model, {0, 2, 3, 1}) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 1;
  }
}

// PyTorch's own error does not pass through the stable ABI. gatedrnn/_ops.py knows this text.
Tensor empty(std::vector<int64_t> size, ScalarType dtype, const Tensor& like, MemoryFormat format) {
  try {
    return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
  } catch (const std::exception&) {
    int64_t bytes = bytes_of(dtype);
    for (const int64_t length : size) bytes *= length;
    throw std::runtime_error("gatedrnn: out of memory: cannot allocate " + std::to_string(bytes) +
                             " bytes on x's device");
  }
}

// (N, C, H, W), (N, D, C, H, W), or a map that one of these is broadcast from: a size of one in
// C or D gets stride 0.
Strides strides_of(const Tensor& t) {
  Strides s;
  const bool five = t.dim() == 5;
  s.n = t.stride(0);
  if (five && t.size(1) > 1) s.d = t.stride(1);
  const int c = five ? 2 : 1;
  if (t.size(c) > 1) s.c = t.stride(c);
  s.h = t.stride(c + 1);
  s.w = t.stride(c + 2);
  return s;
}

// A tensor's memory; a storage that was given back (as sharding does) has none.
const void* data_of(const char* name, const Tensor& t) {
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, name,
                  " has no memory: its storage was resized to 0");
  return data;
}

bool on_gpu([[maybe_unused]] const Tensor& x) {
#ifdef GATEDRNN_EMULATION
  return true;
#else
  return x.is_cuda();
#endif
}

#if GATEDRNN_WITH_CUDA
#ifdef GATEDRNN_EMULATION
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
using cuda::DeviceScope;
#endif

// Runs a pass on x's device and on the caller's current stream there, with the temporary memory
// that it asks for.
template <class Args>
void run_on_gpu(int64_t (*pass)(const Args&, void*, void*), const Args& a, const Tensor& x) {
  const DeviceScope scope(x);
  const int64_t bytes = pass(a, nullptr, scope.stream());
  Tensor workspace = empty({bytes}, ScalarType::Byte, x, MemoryFormat::Contiguous);
  pass(a, workspace.mutable_data_ptr(), scope.stream());
}
#endif

void forward(const ScanArgs& a, [[maybe_unused]] const Tensor& x) {
#if GATEDRNN_WITH_CUDA
  if (on_gpu(x)) return run_on_gpu(cuda::forward, a, x);
#endif
#ifndef GATEDRNN_EMULATION
  cpu_kernels().forward(a);
#endif
}

void backward(const BackwardArgs& a, [[maybe_unused]] const Tensor& x) {
#if GATEDRNN_WITH_CUDA
  if (on_gpu(x)) return run_on_gpu(cuda::backward, a, x);
#endif
#ifndef GATEDRNN_EMULATION
  cpu_kernels().backward(a);
#endif
}

void clamp(const ClampArgs& a, [[maybe_unused]] const Tensor& weight) {
#if GATEDRNN_WITH_CUDA
  if (on_gpu(weight)) return run_on_gpu(cuda::clamp_spectral, a, weight);
#endif
#ifndef GATEDRNN_EMULATION
  clamp_spectral(a);
#endif
}

void clamp_backward(const ClampBackwardArgs& a, [[maybe_unused]] const Tensor& weight) {
#if GATEDRNN_WITH_CUDA
  if (on_gpu(weight)) return run_on_gpu(cuda::clamp_spectral_backward, a, weight);
#endif
#ifndef GATEDRNN_EMULATION
  clamp_spectral_backward(a);
#endif
}

// One tensor alone decides which kernels run: none may lie elsewhere.
void check_device(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
}

struct Options {
  std::vector<int64_t> directions;
  int64_t merge, nonlinearity, gate_activation;
};

// Everything that forward and backward read, checked.
void fill_inputs(ScanArgs& a, const Tensor& x, const std::optional<Tensor>& g, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Options& options) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions, got ", x.dim());
  check_device("weight", weight, x);
  if (g) check_device("g", *g, x);
  if (bias) check_device("bias", *bias, x);
  a.dtype = dtype_of(x);
  const ScalarType state = a.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  a.n = x.size(0), a.c = x.size(1), a.h = x.size(2), a.w = x.size(3);
  STD_TORCH_CHECK(a.c >= 1, "x must have at least one channel");
  a.directions = static_cast<int64_t>(options.directions.size());
  STD_TORCH_CHECK(a.directions >= 1 && a.directions <= kDirections,
                  "there must be one to four directions, got ", a.directions);
  int seen = 0;
  for (int64_t i = 0; i < a.directions; ++i) {
    const int64_t code = options.directions[i];
    STD_TORCH_CHECK(code >= 0 && code < kDirections, "a direction must be 0 to 3, got ", code);
    STD_TORCH_CHECK(!(seen >> code & 1), "a direction is given twice: ", code);
    seen |= 1 << code;
    a.direction[i] = static_cast<int>(code);
  }
  a.merge = option("merge", options.merge, Merge::kSum);
  a.nonlinearity = option("nonlinearity", options.nonlinearity, Nonlinearity::kSigmoid);
  a.gate_activation = option("gate_activation", options.gate_activation, GateActivation::kSigmoid);

  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == a.directions && weight.size(1) == a.c &&
                      weight.size(2) >= 1 && a.c % weight.size(2) == 0,
                  "weight must be (D, C, C / groups)");
  STD_TORCH_CHECK(weight.scalar_type() == state && weight.is_contiguous(),
                  "weight must be contiguous and of the state's type");
  a.block = weight.size(2);
  a.weight = data_of("weight", weight);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == a.directions && bias->size(1) == a.c,
                    "bias must be (D, C)");
    STD_TORCH_CHECK(bias->scalar_type() == state && bias->is_contiguous(),
                    "bias must be contiguous and of the state's type");
    a.bias = data_of("bias", *bias);
  }
  a.x = data_of("x", x);
  a.x_strides = strides_of(x);
  if (g) {
    const bool five = g->dim() == 5;
    STD_TORCH_CHECK((five || g->dim() == 4) && g->scalar_type() == x.scalar_type(),
                    "g must have 4 or 5 dimensions and x's dtype");
    const int c = five ? 2 : 1;
    STD_TORCH_CHECK(g->size(0) == a.n && (!five || g->size(1) == a.directions) &&
                        (g->size(c) == 1 || g->size(c) == a.c) && g->size(c + 1) == a.h &&
                        g->size(c + 2) == a.w,
                    "g must be (N, 1|C, H, W) or (N, D, 1|C, H, W)");
    a.g = data_of("g", *g);
    a.g_strides = strides_of(*g);
    a.gate_directions = five && a.directions > 1;
    a.gate_channels = g->size(c) > 1;
  }
}

std::vector<int64_t> result_size(const ScanArgs& a, bool per_direction) {
  if (per_direction) return {a.n, a.directions, a.c, a.h, a.w};
  return {a.n, a.c, a.h, a.w};
}

// y and, for a max merge whose gradient will be asked for, the mask of the winning directions.
std::tuple<Tensor, Tensor> scan(Tensor x, std::optional<Tensor> g, Tensor weight,
                                std::optional<Tensor> bias, std::vector<int64_t> directions,
                                int64_t merge, int64_t nonlinearity, int64_t gate_activation,
                                bool keep_mask) {
  ScanArgs a;
  fill_inputs(a, x, g, weight, bias, {directions, merge, nonlinearity, gate_activation});
  const bool separate = a.merge == Merge::kNone;
  const MemoryFormat format = separate ? MemoryFormat::Contiguous : format_like(x);
  Tensor y = empty(result_size(a, separate), x.scalar_type(), x, format);
  const bool masked = keep_mask && a.merge == Merge::kMax;
  Tensor mask = masked ? empty(result_size(a, false), ScalarType::Byte, x, format)
                       : empty({0}, ScalarType::Byte, x, MemoryFormat::Contiguous);
  if (y.numel() == 0) return {y, mask};
  a.y = y.mutable_data_ptr();
  a.y_strides = strides_of(y);
  if (masked) a.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  forward(a, x);
  return {y, mask};
}

// dx, dg, dweight, dbias; those not asked for are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> scan_backward(
    Tensor grad, Tensor x, std::optional<Tensor> g, Tensor weight, std::optional<Tensor> bias,
    Tensor mask, std::vector<int64_t> directions, int64_t merge, int64_t nonlinearity,
    int64_t gate_activation, bool needs_g, bool needs_weight, bool needs_bias) {
  BackwardArgs a;
  fill_inputs(a, x, g, weight, bias, {directions, merge, nonlinearity, gate_activation});
  const bool separate = a.merge == Merge::kNone;
  const auto size = result_size(a, separate);
  STD_TORCH_CHECK(grad.dim() == static_cast<int64_t>(size.size()), "grad must have y's shape");
  for (size_t i = 0; i < size.size(); ++i)
    STD_TORCH_CHECK(grad.size(static_cast<int64_t>(i)) == size[i], "grad must have y's shape");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have x's dtype");
  check_device("grad", grad, x);
  check_device("mask", mask, x);

  const MemoryFormat format = format_like(x);
  const ScalarType state = weight.scalar_type();
  const auto nothing = [&] { return empty({0}, state, x, MemoryFormat::Contiguous); };
  Tensor dx = empty(result_size(a, false), x.scalar_type(), x, format);
  Tensor dg = nothing(), dweight = nothing(), dbias = nothing();
  // The CPU adds to what is there, a GPU writes every element.
  const bool is_added_to = !on_gpu(x) || x.numel() == 0;
  const auto of_weight = [&](std::vector<int64_t> size) {
    Tensor sums = empty(size, state, weight, MemoryFormat::Contiguous);
    return is_added_to ? torch::stable::zero_(sums) : sums;
  };
  if (needs_g) {
    STD_TORCH_CHECK(g.has_value(), "needs_g without g");
    const auto sizes = g->sizes();
    dg = empty({sizes.begin(), sizes.end()}, x.scalar_type(), x, format_like(*g));
    a.dg = dg.mutable_data_ptr();
    a.dg_strides = strides_of(dg);
  }
  if (needs_weight) {
    dweight = of_weight({a.directions, a.c, a.block});
    a.dweight = dweight.mutable_data_ptr();
  }
  if (needs_bias) {
    dbias = of_weight({a.directions, a.c});
    a.dbias = dbias.mutable_data_ptr();
  }
  if (x.numel() == 0) {
    if (needs_g) torch::stable::zero_(dg);
    return {dx, dg, dweight, dbias};
  }
  if (a.merge == Merge::kMax) {
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.dim() == 4,
                    "mask must be bytes");
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(mask.size(i) == x.size(i), "mask must have x's shape");
    a.mask = static_cast<uint8_t*>(const_cast<void*>(data_of("mask", mask)));
    a.y_strides = strides_of(mask);
  }
  a.grad = data_of("grad", grad);
  a.grad_strides = strides_of(grad);
  a.dx = dx.mutable_data_ptr();
  a.dx_strides = strides_of(dx);
  backward(a, x);
  return {dx, dg, dweight, dbias};
}

void check_clamped(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.is_contiguous() && weight.size(2) >= 1 &&
                      weight.size(1) % weight.size(2) == 0,
                  "weight must be contiguous, (D, C, C / groups)");
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float,
                  "weight must be float32 or float64");
}

// weight (D, C, K), each of its B = D C / K blocks divided by its spectral norm where that is above
// one; and what is kept of each for the backward pass, (B, 1 + 2 K), empty unless `keep`.
std::tuple<Tensor, Tensor> clamp_spectral_op(Tensor weight, bool keep) {
  check_clamped(weight);
  ClampArgs a{};
  a.k = weight.size(2);
  a.blocks = weight.numel() / (a.k * a.k);
  a.is_double = weight.scalar_type() == ScalarType::Double;
  Tensor clamped = empty({weight.size(0), weight.size(1), a.k}, weight.scalar_type(), weight,
                         MemoryFormat::Contiguous);
  Tensor kept = empty({keep ? a.blocks : 0, 1 + 2 * a.k}, ScalarType::Double, weight,
                      MemoryFormat::Contiguous);
  if (a.blocks == 0) return {clamped, kept};
  a.weight = data_of("weight", weight);
  a.clamped = clamped.mutable_data_ptr();
  if (keep) a.kept = static_cast<double*>(kept.mutable_data_ptr());
  clamp(a, weight);
  return {clamped, kept};
}

// dL/dweight from dL/d clamped.
Tensor clamp_spectral_backward_op(Tensor grad, Tensor weight, Tensor kept) {
  check_clamped(weight);
  bool fits = grad.dim() == 3 && grad.is_contiguous() && grad.scalar_type() == weight.scalar_type();
  for (int i = 0; fits && i < 3; ++i) fits = grad.size(i) == weight.size(i);
  STD_TORCH_CHECK(fits, "grad must be contiguous, of weight's shape and dtype");
  ClampBackwardArgs a{};
  a.k = weight.size(2);
  a.blocks = weight.numel() / (a.k * a.k);
  a.is_double = weight.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(kept.is_contiguous() && kept.numel() == a.blocks * (1 + 2 * a.k) &&
                      kept.scalar_type() == ScalarType::Double,
                  "kept must be what the clamp of weight keeps");
  check_device("grad", grad, weight);
  check_device("kept", kept, weight);
  Tensor dweight = empty({weight.size(0), weight.size(1), a.k}, weight.scalar_type(), weight,
                         MemoryFormat::Contiguous);
  if (a.blocks == 0) return dweight;
  a.grad = data_of("grad", grad);
  a.weight = data_of("weight", weight);
  a.kept = static_cast<const double*>(data_of("kept", kept));
  a.dweight = dweight.mutable_data_ptr();
  clamp_backward(a, weight);
  return dweight;
}

template <class Library>
void implement(Library& m) {
  m.impl("scan", TORCH_BOX(&scan));
  m.impl("scan_backward", TORCH_BOX(&scan_backward));
  m.impl("clamp_spectral", TORCH_BOX(&clamp_spectral_op));
  m.impl("clamp_spectral_backward", TORCH_BOX(&clamp_spectral_backward_op));
}

}  // namespace

GATEDRNN_DEFINE(GATEDRNN_LIBRARY, m) {
  m.def(
      "scan(Tensor x, Tensor? g, Tensor weight, Tensor? bias, int[] directions, int merge, "
      "int nonlinearity, int gate_activation, bool keep_mask) -> (Tensor, Tensor)");
  m.def(
      "scan_backward(Tensor grad, Tensor x, Tensor? g, Tensor weight, Tensor? bias, Tensor mask, "
      "int[] directions, int merge, int nonlinearity, int gate_activation, bool needs_g, "
      "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("clamp_spectral(Tensor weight, bool keep) -> (Tensor, Tensor)");
  m.def("clamp_spectral_backward(Tensor grad, Tensor weight, Tensor kept) -> Tensor");
}

#if !defined(GATEDRNN_EMULATION)
STABLE_TORCH_LIBRARY_IMPL(GATEDRNN_LIBRARY, CPU, m) { implement(m); }
#endif

#if GATEDRNN_WITH_CUDA
#ifdef GATEDRNN_EMULATION
STABLE_TORCH_LIBRARY_IMPL(GATEDRNN_LIBRARY, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(GATEDRNN_LIBRARY, CUDA, m) {
#endif
  implement(m);
}
#endif

}  // namespace gatedrnn
