// Kernels whose launches run other code: what was made of the PTX that nvcc has made of them.
#pragma once

#include <cstddef>
#include <vector>

namespace gatedrnn::emulation {

// Takes the addresses of the kernel's parameters.
using TranslatedKernel = void (*)(char* const* parameters);

struct Translation {
  Translation(void (*kernel)(), TranslatedKernel translated, std::vector<size_t> parameter_bytes);
};

// Null in a library that has no translations; throws if it has some, and none of this kernel with
// parameters of such sizes.
TranslatedKernel translated(const void* kernel, const std::vector<size_t>& parameter_bytes);

}  // namespace gatedrnn::emulation
