// Runs one scan and its adjoint on the CPU kernels, without PyTorch: reads the case from standard
// input, and writes y, dx, dg, dweight and dbias to standard output (see test_aarch64.py).
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "scan.h"

namespace gatedrnn {

// Two threads, so that the results of several threads are merged too.
int64_t thread_count() { return 2; }

void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t half = count / 2;
  std::thread other([&] {
    if (half > 0) body(0, half);
  });
  if (half < count) body(half, count);
  other.join();
}

namespace {

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) {
    std::fprintf(stderr, "scan_case: the case is too short\n");
    std::exit(2);
  }
}

int64_t number() {
  int64_t value;
  read(&value, sizeof value);
  return value;
}

template <class Enum>
Enum option() {
  return static_cast<Enum>(number());
}

Strides strides() {
  Strides s;
  s.n = number(), s.d = number(), s.c = number(), s.h = number(), s.w = number();
  return s;
}

using Bytes = std::vector<char>;

// A tensor that is given: its strides, its first byte, and all memory behind it. Null without any.
const char* given(Bytes& memory, Strides& s) {
  s = strides();
  const int64_t first = number();
  memory.resize(static_cast<size_t>(number()));
  read(memory.data(), memory.size());
  return memory.empty() ? nullptr : memory.data() + first;
}

void write(const Bytes& result) { std::fwrite(result.data(), 1, result.size(), stdout); }

void run_case() {
  BackwardArgs a;
  a.dtype = option<Dtype>();
  const int64_t maps = a.dtype == Dtype::kFloat64 ? 8 : a.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t state = a.dtype == Dtype::kFloat64 ? 8 : 4;  // bytes
  a.n = number(), a.c = number(), a.h = number(), a.w = number(), a.block = number();
  a.directions = number();
  for (int64_t d = 0; d < a.directions; ++d) a.direction[d] = static_cast<int>(number());
  a.merge = option<Merge>();
  a.nonlinearity = option<Nonlinearity>();
  a.gate_activation = option<GateActivation>();
  a.gate_directions = number() != 0;
  a.gate_channels = number() != 0;

  Bytes x, g, weight, bias, grad;
  Strides dense;
  a.x = given(x, a.x_strides);
  a.g = given(g, a.g_strides);
  a.weight = given(weight, dense);
  a.bias = given(bias, dense);
  a.grad = given(grad, a.grad_strides);
  a.y_strides = strides();
  a.dx_strides = strides();
  a.dg_strides = strides();

  // Results that the kernels forget to write stay NaN.
  const auto poisoned = [](int64_t bytes) { return Bytes(static_cast<size_t>(bytes), '\xff'); };
  const int64_t count = a.n * a.c * a.h * a.w;
  int64_t gates = a.g == nullptr ? 0 : a.n * a.h * a.w;
  if (a.gate_directions) gates *= a.directions;
  if (a.gate_channels) gates *= a.c;
  Bytes y = poisoned(maps * count * (a.merge == Merge::kNone ? a.directions : 1));
  Bytes mask = poisoned(count), dx = poisoned(maps * count), dg = poisoned(maps * gates);
  // The kernels add to these two.
  Bytes dweight(static_cast<size_t>(state * a.directions * a.c * a.block));
  Bytes dbias(a.bias == nullptr ? 0 : static_cast<size_t>(state * a.directions * a.c));

  a.y = y.data();
  a.mask = a.merge == Merge::kMax ? reinterpret_cast<uint8_t*>(mask.data()) : nullptr;
  cpu_kernels().forward(a);
  a.dx = dx.data();
  a.dg = a.g == nullptr ? nullptr : dg.data();
  a.dweight = dweight.data();
  a.dbias = a.bias == nullptr ? nullptr : dbias.data();
  cpu_kernels().backward(a);

  for (const Bytes* result : {&y, &dx, &dg, &dweight, &dbias}) write(*result);
}

}  // namespace
}  // namespace gatedrnn

int main(int count, char**) {
  if (count > 1)  // --capability
    std::puts(gatedrnn::cpu_capability());
  else
    gatedrnn::run_case();
}
