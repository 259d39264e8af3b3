// Picks the kernels for this processor, once, when they are first asked for.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "scan.h"

namespace gatedrnn {

namespace portable {
extern const CpuKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}
#endif

namespace {

const CpuKernels& pick() {
  // GATEDRNN_CPU_CAPABILITY=portable|avx2 lowers the choice: for tests and for bug reports.
  const char* asked = std::getenv("GATEDRNN_CPU_CAPABILITY");
  if (asked != nullptr && std::strcmp(asked, "avx512") != 0 && std::strcmp(asked, "avx2") != 0 &&
      std::strcmp(asked, "portable") != 0) {
    std::fprintf(stderr,
                 "gatedrnn: GATEDRNN_CPU_CAPABILITY must be avx512, avx2 or portable, got '%s': "
                 "it is not heeded\n",
                 asked);
    asked = nullptr;
  }
  const auto allowed = [asked](const CpuKernels& kernels) {
    return asked == nullptr || std::strcmp(asked, kernels.name) == 0;
  };
#if defined(__x86_64__)
  if (allowed(avx512::kKernels) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::kKernels;
  if ((allowed(avx2::kKernels) || allowed(avx512::kKernels)) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return avx2::kKernels;
#else
  (void)allowed;
#endif
  return portable::kKernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = pick();
  return kernels;
}

const char* cpu_capability() { return cpu_kernels().name; }

}  // namespace gatedrnn
